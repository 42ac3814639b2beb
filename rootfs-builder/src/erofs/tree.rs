//! The file tree of an image while it is being put together.
//!
//! Owner: whoever builds one image, on one thread. File contents are not in here: they are already in the output
//! ([`FileData`] says where). Inodes live in an arena and directories refer to them by index, so a hard link is a second
//! reference, and what gets replaced simply loses its last one.
//!
//! Invariants: index 0 is the root and a directory; link counts are not kept but counted when the image is written.

use std::collections::BTreeMap;

use super::ErofsError;
use super::format::{NAME_MAX, encode_device, split_xattr_name};

/// A point in time, with the nanoseconds always counting forward.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default, serde::Serialize, serde::Deserialize,
)]
pub struct Timestamp {
    pub secs: i64,
    pub nanos: u32,
}

/// Extended attributes by their full names.
pub type Xattrs = BTreeMap<Box<[u8]>, Box<[u8]>>;

/// What every kind of file has.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Metadata {
    /// Permission bits with set-user-id, set-group-id and sticky (`0o7777`).
    pub mode: u16,
    pub uid: u32,
    pub gid: u32,
    pub mtime: Timestamp,
    pub xattrs: Xattrs,
}

impl Metadata {
    /// Owned by root, from the epoch, without extended attributes.
    pub fn new(mode: u16) -> Self {
        Self {
            mode: mode & 0o7777,
            ..Self::default()
        }
    }

    /// The same with an owner.
    #[must_use]
    pub fn owned_by(mut self, uid: u32, gid: u32) -> Self {
        (self.uid, self.gid) = (uid, gid);
        self
    }

    /// Whether an inode can carry these attributes.
    pub(crate) fn check(&self) -> Result<(), ErofsError> {
        let mut total = 0;
        for (name, value) in &self.xattrs {
            if split_xattr_name(name).is_none() || value.len() > usize::from(u16::MAX) {
                return Err(ErofsError::Xattr {
                    name: String::from_utf8_lossy(name).into_owned(),
                });
            }
            total += name.len() + value.len() + 8;
        }
        // 65535 units of four bytes, the header among them.
        if total > 0x3_ff00 {
            return Err(ErofsError::XattrsTooLarge { bytes: total });
        }
        Ok(())
    }
}

/// Where a regular file's bytes are.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct FileData {
    pub size: u64,
    pub place: Place,
}

/// The ways file data lies in an image.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Place {
    /// No bytes at all.
    #[default]
    Empty,
    /// Consecutive blocks from this one, the last padded with zeroes.
    Blocks { first: u32 },
    /// Whole blocks from `first`, then a rest that waits in the spool to be put behind the inode.
    BlocksAndTail { first: u32, spooled_at: u64 },
    /// A table of chunks of `1 << chunk_bits` bytes; holes have no block.
    Chunks { chunk_bits: u8, table: Box<[u32]> },
}

/// The kinds of files.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Node {
    Directory(Directory),
    Regular(FileData),
    /// A target that goes behind the inode, or has its own block if it is long.
    Symlink {
        target: Box<[u8]>,
        block: Option<u32>,
    },
    CharDevice(u32),
    BlockDevice(u32),
    Fifo,
    Socket,
    /// Hides a name of the layers below: overlayfs wants a character device 0:0.
    Whiteout,
}

/// A directory's entries.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Directory {
    pub entries: BTreeMap<Box<[u8]>, InodeId>,
    /// Hides the directory of the same name in the layers below.
    pub opaque: bool,
}

/// An index into the tree's arena.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct InodeId(pub(crate) u32);

/// A file without its name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Inode {
    pub metadata: Metadata,
    pub node: Node,
}

/// The arena and its root.
#[derive(Debug)]
pub struct Tree {
    inodes: Vec<Inode>,
}

impl Tree {
    /// The root directory, always there.
    pub const ROOT: InodeId = InodeId(0);

    /// An empty root directory.
    pub fn new(root: Metadata) -> Self {
        Self {
            inodes: vec![Inode {
                metadata: root,
                node: Node::Directory(Directory::default()),
            }],
        }
    }

    /// All inodes ever made, whether or not a directory still refers to them.
    pub fn inodes_made(&self) -> usize {
        self.inodes.len()
    }

    pub fn inode(&self, id: InodeId) -> &Inode {
        &self.inodes[id.0 as usize]
    }

    pub fn inode_mut(&mut self, id: InodeId) -> &mut Inode {
        &mut self.inodes[id.0 as usize]
    }

    /// The directory's entries, if it is one.
    pub fn directory(&self, id: InodeId) -> Option<&Directory> {
        match &self.inode(id).node {
            Node::Directory(directory) => Some(directory),
            _ => None,
        }
    }

    /// As [`Self::directory`], to change.
    pub fn directory_mut(&mut self, id: InodeId) -> Option<&mut Directory> {
        match &mut self.inode_mut(id).node {
            Node::Directory(directory) => Some(directory),
            _ => None,
        }
    }

    /// What `name` in directory `parent` refers to.
    pub fn child(&self, parent: InodeId, name: &[u8]) -> Option<InodeId> {
        self.directory(parent)?.entries.get(name).copied()
    }

    /// Make an inode that no directory refers to yet.
    pub fn add(&mut self, metadata: Metadata, node: Node) -> Result<InodeId, ErofsError> {
        metadata.check()?;
        let id = u32::try_from(self.inodes.len()).map_err(|_| ErofsError::TooManyInodes)?;
        self.inodes.push(Inode { metadata, node });
        Ok(InodeId(id))
    }

    /// Let `name` in directory `parent` refer to `child`, whatever it referred to before.
    pub fn link(&mut self, parent: InodeId, name: &[u8], child: InodeId) -> Result<(), ErofsError> {
        check_name(name)?;
        let directory = self.directory_mut(parent).ok_or(ErofsError::NotADirectory)?;
        directory.entries.insert(name.into(), child);
        Ok(())
    }
}

impl Node {
    /// A character or block device, or nothing if Linux has no such number.
    pub fn device(is_char: bool, major: u32, minor: u32) -> Option<Self> {
        let number = encode_device(major, minor)?;
        Some(if is_char {
            Self::CharDevice(number)
        } else {
            Self::BlockDevice(number)
        })
    }

    /// The file type bits of `st_mode`.
    pub const fn type_bits(&self) -> u16 {
        match self {
            Self::Directory(_) => 0o040_000,
            Self::Regular(_) => 0o100_000,
            Self::Symlink { .. } => 0o120_000,
            Self::CharDevice(_) | Self::Whiteout => 0o020_000,
            Self::BlockDevice(_) => 0o060_000,
            Self::Fifo => 0o010_000,
            Self::Socket => 0o140_000,
        }
    }

    /// The type as directory entries store it.
    pub const fn dirent_type(&self) -> u8 {
        match self {
            Self::Regular(_) => 1,
            Self::Directory(_) => 2,
            Self::CharDevice(_) | Self::Whiteout => 3,
            Self::BlockDevice(_) => 4,
            Self::Fifo => 5,
            Self::Socket => 6,
            Self::Symlink { .. } => 7,
        }
    }
}

/// Whether a directory can hold an entry of this name.
pub fn check_name(name: &[u8]) -> Result<(), ErofsError> {
    let wrong =
        name.is_empty() || name == b"." || name == b".." || name.iter().any(|byte| matches!(byte, 0 | b'/'));
    if wrong || name.len() > NAME_MAX {
        return Err(ErofsError::Name {
            name: String::from_utf8_lossy(name).into_owned(),
        });
    }
    Ok(())
}
