//! EROFS images: written in one pass over their contents, read back without mounting them.
//!
//! An image is laid out so that it can be written while its files still arrive: the superblock's block, then file data in
//! order of arrival, then inodes (with small rests of files and directories behind them), then directory blocks. The
//! superblock is written last; until then the file is no EROFS image.
//!
//! Data is uncompressed and every block is 4096-aligned in the blob, so a guest's reads hit the host's page cache as they
//! are, shared by all microVMs. The same input gives the same bytes.
//!
//! Written for Linux 6.12's `fs/erofs`; what is used of the format is in [`format`].

mod builder;
mod data;
pub mod format;
mod reader;
mod tree;
mod writer;

use std::io;
use std::path::PathBuf;

pub(crate) use builder::symlink_node;
pub use builder::{Attributes, ImageBuilder, image_from_directory};
pub use data::{DataWriter, FileWriter};
pub use reader::{DirEntry, FileKind, Reader, Stat};
pub use tree::{
    Directory, FileData, Inode, InodeId, Metadata, Node, Place, Timestamp, Tree, Xattrs, check_name,
};
pub use writer::{Written, finish};

/// Why an image can't be written or read.
#[derive(Debug, thiserror::Error)]
pub enum ErofsError {
    #[error("cannot write the image")]
    Write { source: io::Error },
    #[error("cannot read the image")]
    Read { source: io::Error },
    #[error("cannot read {path}")]
    Input { path: PathBuf, source: io::Error },
    #[error("cannot create {path}")]
    Create { path: PathBuf, source: io::Error },
    #[error("not a usable EROFS image: {problem}")]
    Corrupt { problem: &'static str },
    #[error("a file of {declared} bytes ended after {read}")]
    ShortFile { declared: u64, read: u64 },
    #[error("file name {name:?} cannot be stored (empty, too long, or with a forbidden byte)")]
    Name { name: String },
    #[error("extended attribute {name:?} cannot be stored (unknown namespace or too large)")]
    Xattr { name: String },
    #[error("{bytes} bytes of extended attributes on one file are too many")]
    XattrsTooLarge { bytes: usize },
    #[error("symbolic link target of {bytes} bytes is longer than Linux allows (4095)")]
    SymlinkTarget { bytes: usize },
    #[error("device number {major}:{minor} does not exist on Linux")]
    Device { major: u32, minor: u32 },
    #[error("more than 4294967295 inodes")]
    TooManyInodes,
    #[error("the image would be larger than 16 TiB")]
    TooLarge,
    #[error("a parent of the entry is not a directory")]
    NotADirectory,
    #[error("{path:?} does not exist in the image")]
    NotFound { path: String },
    #[error("{path:?} exists already")]
    Exists { path: String },
}

impl ErofsError {
    /// Whether the file system that takes the image ran out of space.
    pub fn is_storage_full(&self) -> bool {
        match self {
            Self::Write { source } | Self::Create { source, .. } => {
                matches!(
                    source.kind(),
                    io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded
                )
            }
            _ => false,
        }
    }
}
