//! What an import tells whoever watches it.

/// Watches an import. Called on the importing thread, some thousand times for each gigabyte.
///
/// Nobody has to be told of a process that is to end: an import or a pull may be killed at any moment, and the next one goes on.
pub trait Progress {
    fn event(&self, event: ProgressEvent<'_>);

    /// Asked some ten times a second: whether to give up. What was fetched stays for the next pull.
    fn cancelled(&self) -> bool {
        false
    }

    /// So much of the layer `index` came from the registry; told some ten times a second while a pull waits.
    fn fetched(&self, index: usize, bytes_done: u64, bytes: u64) {
        let _ = (index, bytes_done, bytes);
    }
}

/// What happens during an import, in this order for each layer; several layers are under way at a time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ProgressEvent<'a> {
    /// The image was found and its description is right. `bytes`: of all layers as stored.
    ImageStarted { layers: usize, bytes: u64 },
    /// The layer `index`, counted from the bottom, is being converted.
    LayerStarted {
        index: usize,
        digest: &'a str,
        bytes: u64,
    },
    /// So much of it was read.
    LayerAdvanced { index: usize, bytes_done: u64 },
    /// The layer is in the store.
    LayerFinished {
        index: usize,
        digest: &'a str,
        outcome: LayerOutcome,
    },
    /// The image is in the store.
    ImageFinished,
}

/// How a layer came to be in the store.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LayerOutcome {
    Converted { size_bytes: u64 },
    AlreadyPresent { size_bytes: u64 },
}

/// Nobody watches.
#[derive(Debug, Clone, Copy)]
pub struct NoProgress;

impl Progress for NoProgress {
    fn event(&self, _event: ProgressEvent<'_>) {}
}
