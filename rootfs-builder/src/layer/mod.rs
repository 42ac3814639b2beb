//! One layer: a compressed archive in, an EROFS image out, in one pass.
//!
//! ```text
//! blob ─► decode (own thread: digest, size, decompress) ─► tar ─► apply ─► erofs (data at once, inodes at the end)
//! ```
//!
//! Owner: the thread that imports an image. Nothing a layer says is trusted: paths stay below the root, sizes and counts are
//! bounded, and the image only counts once the digests were found right, which is known when the last byte was read.
//!
//! Invariant: the result depends on the archive alone, unless [`Conversion::depends_on_lower`] says that the layers below had
//! to be asked.

mod apply;
mod copy;
pub(crate) mod decode;
mod lower;
mod merge;
mod path;

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

use apply::Applier;
use decode::Decoder;
pub use decode::Expected;
pub use lower::Lower;
pub use merge::merge;

use crate::digest::Digest;
use crate::erofs::{DataWriter, ErofsError, Timestamp};
use crate::limits::Limits;
use crate::tar::{TarError, TarReader};

/// Why a layer is refused. The message doesn't name the layer: whoever passes the error on does.
#[derive(Debug, thiserror::Error)]
pub enum LayerError {
    #[error("cannot read the blob")]
    Read { source: io::Error },
    #[error("cannot decompress the blob")]
    Decompress { source: io::Error },
    #[error("the blob ends too early")]
    Truncated,
    #[error("compressed with {name}; gzip and zstd are supported")]
    UnknownCompression { name: &'static str },
    #[error("the blob's digest is {actual}")]
    WrongDigest { actual: Digest },
    #[error("the blob has {actual} bytes or more where the manifest says {expected}")]
    WrongSize { expected: u64, actual: u64 },
    #[error("the archive's digest is {actual} where the image's configuration says {expected}")]
    WrongDiffId { expected: Digest, actual: Digest },
    #[error("decompresses to more than the limit of {limit} bytes")]
    TooLarge { limit: u64 },
    #[error(
        "a decompression bomb: {compressed} bytes became {decompressed}, more than {limit} times as much"
    )]
    Bomb {
        compressed: u64,
        decompressed: u64,
        limit: u64,
    },
    #[error("has more than {limit} entries")]
    TooManyEntries { limit: u64 },
    #[error("has more than {limit} bytes of names and attributes")]
    TooMuchMetadata { limit: u64 },
    #[error("{path:?} has {bytes} bytes, more than the limit of {limit}")]
    FileTooLarge { path: String, bytes: u64, limit: u64 },
    #[error("the path {path:?} {problem}")]
    Path { path: String, problem: &'static str },
    #[error("the path {path:?} goes through something that is not a directory")]
    NotADirectory { path: String },
    #[error("{path:?}: {problem}")]
    Entry { path: String, problem: &'static str },
    #[error("{path:?} is a hard link to {target:?}, which is not there")]
    LinkTarget { path: String, target: String },
    #[error("not enough space in the image store: {available} bytes left")]
    NoSpace { available: u64 },
    #[error("the image store is full")]
    StoreFull { source: ErofsError },
    #[error("the archive is damaged")]
    Tar {
        #[from]
        source: TarError,
    },
    #[error("cannot build the file system image")]
    Erofs { source: ErofsError },
    #[error("cannot start a thread")]
    Thread { source: io::Error },
    #[error("conversion was stopped")]
    Stopped,
}

impl From<ErofsError> for LayerError {
    fn from(source: ErofsError) -> Self {
        if source.is_storage_full() {
            Self::StoreFull { source }
        } else {
            Self::Erofs { source }
        }
    }
}

/// The root directory's metadata, as far as a container's root needs it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct RootMetadata {
    pub mode: u16,
    pub uid: u32,
    pub gid: u32,
    pub mtime: Timestamp,
}

impl Default for RootMetadata {
    fn default() -> Self {
        Self {
            mode: 0o755,
            uid: 0,
            gid: 0,
            mtime: Timestamp::default(),
        }
    }
}

/// A layer that was converted; the image is complete but perhaps not yet on the disk.
#[derive(Debug)]
pub struct Conversion {
    pub file: File,
    pub size_bytes: u64,
    /// Bytes of the decompressed archive.
    pub archive_bytes: u64,
    pub entries: u64,
    pub inodes: u64,
    /// The root's metadata, if the layer has an entry for it.
    pub root: Option<RootMetadata>,
    /// Nothing of the layers below is visible.
    pub hides_lower: bool,
    /// On other lower layers the result might differ.
    pub depends_on_lower: bool,
}

/// Convert one layer into the empty file `output`; unnamed spill files go to `temporary`. `progress` gets the compressed bytes read
/// so far, and says whether to go on.
///
/// # Errors
/// The layer is refused or the image can't be written; `output` is then of no use.
pub fn convert(
    blob: Box<dyn Read + Send>,
    expected: &Expected,
    lower: &Lower<'_>,
    limits: Limits,
    (output, temporary): (File, &Path),
    progress: &dyn Fn(u64) -> bool,
) -> Result<Conversion, LayerError> {
    let data = DataWriter::new(output, temporary.to_path_buf())?;
    let mut applier = Applier::new(data, lower, limits, temporary);
    let mut tar = TarReader::new(Decoder::start(blob, expected, limits, progress)?);
    let applied = apply_all(&mut tar, &mut applier);
    // A damaged blob shows as nonsense in the archive: its own error comes first.
    if let Err(error) = applied {
        return Err(tar.source_mut().failure().unwrap_or(error));
    }
    let archive_bytes = tar.into_source().finish()?;
    applier.finish(uuid_of(&expected.diff_id), archive_bytes)
}

fn apply_all(tar: &mut TarReader<Decoder<'_>>, applier: &mut Applier<'_>) -> Result<(), LayerError> {
    while let Some(entry) = tar.next_entry()? {
        applier.apply(&entry, tar)?;
    }
    Ok(())
}

/// The image's unique id follows from its content.
fn uuid_of(diff_id: &Digest) -> [u8; 16] {
    let mut uuid = [0; 16];
    for (byte, digits) in uuid.iter_mut().zip(diff_id.hex().as_bytes().chunks(2)) {
        let digits = std::str::from_utf8(digits).unwrap_or("0");
        *byte = u8::from_str_radix(digits, 16).unwrap_or(0);
    }
    uuid
}
