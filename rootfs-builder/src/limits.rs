//! How much an image may ask of this machine.

/// Bounds on what an image's author controls. The defaults are far above any honest image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Index, manifest and configuration, each.
    pub document_bytes: u64,
    /// Layers of one image.
    pub layers: usize,
    /// One layer once decompressed.
    pub layer_bytes: u64,
    /// Decompressed bytes for each compressed one: deflate can't exceed 1032, so only bombs do.
    pub compression_ratio: u64,
    /// Up to so many decompressed bytes, any ratio is fine.
    pub ratio_free_bytes: u64,
    /// Entries of one layer's archive.
    pub layer_entries: u64,
    /// Names, link targets and extended attributes of one layer, which are kept in memory until it is written.
    pub layer_metadata_bytes: u64,
    /// One file, holes included.
    pub file_bytes: u64,
    /// Space that stays free where the store is.
    pub reserve_bytes: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            document_bytes: 8 << 20,
            layers: 512,
            layer_bytes: 256 << 30,
            compression_ratio: 1100,
            ratio_free_bytes: 1 << 30,
            layer_entries: 4_000_000,
            layer_metadata_bytes: 1 << 30,
            file_bytes: 1 << 44,
            reserve_bytes: 64 << 20,
        }
    }
}
