//! The last step of an image: inodes, directories and the superblock, once all file contents are in.
//!
//! Inodes come breadth first, so that a directory's children lie together. Behind an inode are its extended attributes and
//! then, if it fits without crossing a block, what is left of its data.
//!
//! Invariants: inode numbers start above 0 (a directory entry with number 0 counts as deleted) and the root's fits in 16 bits
//! because it comes first; the superblock is written after everything else.

use std::fs::File;

use super::ErofsError;
use super::data::{DataWriter, INLINE_MAX, Output, Spool};
use super::format::{
    BLOCK, BLOCK_BYTES, DIRENT_BYTES, INCOMPAT_CHUNKED_FILE, INODE_BYTES, Layout, RawInode, SLOT_BYTES,
    SuperBlock, XATTR_ENTRY_BYTES, XATTR_HEADER_BYTES, split_xattr_name,
};
use super::tree::{Directory, InodeId, Metadata, Node, Place, Tree, Xattrs};

/// Where the first inode, the root, lies behind the start of the inode area.
const ROOT_OFFSET: u64 = 64;

/// An image that is complete but perhaps not yet on the disk.
#[derive(Debug)]
pub struct Written {
    /// The file it was written to.
    pub file: File,
    pub size_bytes: u64,
    pub inodes: u64,
}

/// Write `tree` behind the data it refers to.
///
/// # Errors
/// The image can't be written or would exceed the format's limits.
pub fn finish(tree: &Tree, data: DataWriter, uuid: [u8; 16]) -> Result<Written, ErofsError> {
    let chunked = data.chunked;
    let (mut output, meta_block, spool) = data.into_parts();
    let plan = Plan::new(tree, meta_block)?;
    let emitter = Emitter {
        tree,
        plan: &plan,
        spool: &spool,
    };
    emitter.inodes(&mut output)?;
    emitter.directory_blocks(&mut output)?;
    // The last directory block may be followed by nothing: the file gets its full length in any case.
    let superblock = SuperBlock {
        root_nid: u16::try_from(plan.nid(Tree::ROOT)).map_err(|_| ErofsError::TooLarge)?,
        inodes: plan.order.len() as u64,
        blocks: plan.end_block,
        meta_block,
        uuid,
        incompatible: if chunked { INCOMPAT_CHUNKED_FILE } else { 0 },
    };
    output.flush()?;
    output.write_at(0, &superblock.encode()[..])?;
    let size_bytes = u64::from(plan.end_block) * BLOCK_BYTES;
    Ok(Written {
        file: output.finish(size_bytes)?,
        size_bytes,
        inodes: plan.order.len() as u64,
    })
}

/// What lies where.
struct Plan {
    /// Inodes that are reachable, in the order they are written.
    order: Vec<InodeId>,
    /// By inode: its place behind the start of the inode area, 0 if it is unreachable.
    offsets: Vec<u64>,
    /// By inode: directory entries that refer to it (subdirectories' `..` among them).
    links: Vec<u32>,
    /// By inode, directories only: the directory it is in.
    parents: Vec<InodeId>,
    /// By inode, directories only: the first of its blocks.
    directory_blocks: Vec<u32>,
    meta_block: u32,
    end_block: u32,
}

impl Plan {
    fn new(tree: &Tree, meta_block: u32) -> Result<Self, ErofsError> {
        let count = tree.inodes_made();
        let mut plan = Self {
            order: Vec::with_capacity(count),
            offsets: vec![0; count],
            links: vec![0; count],
            parents: vec![Tree::ROOT; count],
            directory_blocks: vec![0; count],
            meta_block,
            end_block: 0,
        };
        plan.walk(tree);
        let inode_area = plan.place(tree);
        let mut next = u64::from(meta_block) + inode_area.div_ceil(BLOCK_BYTES);
        for id in &plan.order {
            if let Node::Directory(directory) = &tree.inode(*id).node {
                plan.directory_blocks[id.0 as usize] =
                    u32::try_from(next).map_err(|_| ErofsError::TooLarge)?;
                next += DirectorySize::of(directory).blocks_outside();
            }
        }
        plan.end_block = u32::try_from(next).map_err(|_| ErofsError::TooLarge)?;
        Ok(plan)
    }

    /// Breadth first from the root, counting links.
    fn walk(&mut self, tree: &Tree) {
        self.order.push(Tree::ROOT);
        self.links[0] = 2;
        let mut next = 0;
        while let Some(id) = self.order.get(next).copied() {
            next += 1;
            let Some(directory) = tree.directory(id) else {
                continue;
            };
            for child in directory.entries.values() {
                let index = child.0 as usize;
                if tree.directory(*child).is_some() {
                    self.links[index] = 2;
                    self.links[id.0 as usize] += 1;
                    self.parents[index] = id;
                    self.order.push(*child);
                } else {
                    self.links[index] += 1;
                    if self.links[index] == 1 {
                        self.order.push(*child);
                    }
                }
            }
        }
    }

    /// Give every inode its offset; returns where the inode area ends.
    fn place(&mut self, tree: &Tree) -> u64 {
        let mut end = ROOT_OFFSET;
        for id in &self.order {
            let inode = tree.inode(*id);
            let head = (INODE_BYTES + xattr_bytes(&inode.metadata.xattrs)) as u64;
            let mut offset = end.next_multiple_of(SLOT_BYTES);
            let body = match Behind::of(&inode.node) {
                Behind::Nothing => 0,
                Behind::Whole(len) => {
                    // The kernel wants inline data within one block.
                    while (offset + head) % BLOCK_BYTES + len > BLOCK_BYTES {
                        offset += SLOT_BYTES;
                    }
                    len
                }
                Behind::Table(len) => len,
            };
            // Not required, but it spares the kernel a copy.
            if offset % BLOCK_BYTES + INODE_BYTES as u64 > BLOCK_BYTES {
                offset = offset.next_multiple_of(BLOCK_BYTES);
            }
            self.offsets[id.0 as usize] = offset;
            end = offset + head + body;
        }
        end
    }

    fn nid(&self, id: InodeId) -> u64 {
        self.offsets[id.0 as usize] / SLOT_BYTES
    }
}

/// What follows an inode's extended attributes.
enum Behind {
    Nothing,
    /// Bytes that must not cross a block.
    Whole(u64),
    /// Bytes that may.
    Table(u64),
}

impl Behind {
    fn of(node: &Node) -> Self {
        match node {
            Node::Directory(directory) => match DirectorySize::of(directory).inline_bytes() {
                0 => Self::Nothing,
                len => Self::Whole(len),
            },
            Node::Regular(data) => match &data.place {
                Place::Empty | Place::Blocks { .. } => Self::Nothing,
                Place::BlocksAndTail { .. } => Self::Whole(data.size % BLOCK_BYTES),
                Place::Chunks { table, .. } => Self::Table(table.len() as u64 * 4),
            },
            Node::Symlink { target, block: None } => Self::Whole(target.len() as u64),
            _ => Self::Nothing,
        }
    }
}

/// How a directory's entries fill blocks: each block holds whole entries, in order.
struct DirectorySize {
    full_blocks: u64,
    /// Bytes used in the last block.
    last: usize,
}

impl DirectorySize {
    fn of(directory: &Directory) -> Self {
        // The two dot entries sort among the others, so a split may depend on where they fall.
        let mut size = Self {
            full_blocks: 0,
            last: 0,
        };
        for name in sorted_names(directory) {
            let len = DIRENT_BYTES + name.len();
            if size.last + len > BLOCK {
                size.full_blocks += 1;
                size.last = 0;
            }
            size.last += len;
        }
        size
    }

    const fn bytes(&self) -> u64 {
        self.full_blocks * BLOCK_BYTES + self.last as u64
    }

    const fn inline_bytes(&self) -> u64 {
        if self.last <= INLINE_MAX {
            self.last as u64
        } else {
            0
        }
    }

    const fn blocks_outside(&self) -> u64 {
        self.full_blocks + if self.last <= INLINE_MAX { 0 } else { 1 }
    }
}

/// The entries' names with `.` and `..` where byte order puts them.
fn sorted_names(directory: &Directory) -> impl Iterator<Item = &[u8]> {
    let before = directory
        .entries
        .keys()
        .map(AsRef::as_ref)
        .take_while(|name: &&[u8]| *name < &b"."[..]);
    // No entry lies between the two: names are never empty and never "." or "..".
    let after = directory
        .entries
        .keys()
        .map(AsRef::as_ref)
        .skip_while(|name: &&[u8]| *name < &b"."[..]);
    let (below_dotdot, above) = (after.clone(), after);
    before
        .chain(std::iter::once(&b"."[..]))
        .chain(below_dotdot.take_while(|name| *name < &b".."[..]))
        .chain(std::iter::once(&b".."[..]))
        .chain(above.skip_while(|name| *name < &b".."[..]))
}

/// Bytes of an inode's extended attributes, header included.
fn xattr_bytes(xattrs: &Xattrs) -> usize {
    if xattrs.is_empty() {
        return 0;
    }
    let entries: usize = xattrs
        .iter()
        .map(|(name, value)| xattr_entry_bytes(name, value))
        .sum();
    XATTR_HEADER_BYTES + entries
}

fn xattr_entry_bytes(name: &[u8], value: &[u8]) -> usize {
    let suffix = split_xattr_name(name).map_or(0, |(_, suffix)| suffix.len());
    (XATTR_ENTRY_BYTES + suffix + value.len()).next_multiple_of(4)
}

/// Writes what the plan says.
struct Emitter<'a> {
    tree: &'a Tree,
    plan: &'a Plan,
    spool: &'a Spool,
}

impl Emitter<'_> {
    fn inodes(&self, output: &mut Output) -> Result<(), ErofsError> {
        let base = u64::from(self.plan.meta_block) * BLOCK_BYTES;
        let mut bytes = Vec::new();
        for (number, id) in self.plan.order.iter().enumerate() {
            bytes.clear();
            let inode = self.tree.inode(*id);
            let raw = self.raw_inode(*id, number);
            bytes.extend_from_slice(&raw.encode());
            push_xattrs(&inode.metadata, &mut bytes);
            self.push_behind(*id, &mut bytes)?;
            output.write_at(base + self.plan.offsets[id.0 as usize], &bytes)?;
        }
        Ok(())
    }

    fn raw_inode(&self, id: InodeId, number: usize) -> RawInode {
        let inode = self.tree.inode(id);
        let (layout, size, value) = match &inode.node {
            Node::Directory(directory) => {
                let size = DirectorySize::of(directory);
                let layout = if size.inline_bytes() > 0 {
                    Layout::Inline
                } else {
                    Layout::Plain
                };
                (layout, size.bytes(), self.plan.directory_blocks[id.0 as usize])
            }
            Node::Regular(data) => match &data.place {
                Place::Empty => (Layout::Plain, 0, 0),
                Place::Blocks { first } => (Layout::Plain, data.size, *first),
                Place::BlocksAndTail { first, .. } => (Layout::Inline, data.size, *first),
                Place::Chunks { chunk_bits, .. } => (Layout::Chunked, data.size, u32::from(chunk_bits - 12)),
            },
            Node::Symlink { target, block: None } => (Layout::Inline, target.len() as u64, 0),
            Node::Symlink {
                target,
                block: Some(block),
            } => (Layout::Plain, target.len() as u64, *block),
            Node::CharDevice(device) | Node::BlockDevice(device) => (Layout::Plain, 0, *device),
            Node::Fifo | Node::Socket | Node::Whiteout => (Layout::Plain, 0, 0),
        };
        let metadata = &inode.metadata;
        RawInode {
            layout,
            xattr_bytes: xattr_bytes(&metadata.xattrs),
            mode: metadata.mode | inode.node.type_bits(),
            size,
            value,
            ino: u32::try_from(number + 1).unwrap_or(u32::MAX),
            uid: metadata.uid,
            gid: metadata.gid,
            mtime_secs: metadata.mtime.secs,
            mtime_nanos: metadata.mtime.nanos,
            nlink: self.plan.links[id.0 as usize],
        }
    }

    fn push_behind(&self, id: InodeId, bytes: &mut Vec<u8>) -> Result<(), ErofsError> {
        match &self.tree.inode(id).node {
            Node::Directory(directory) => {
                if DirectorySize::of(directory).inline_bytes() > 0
                    && let Some(last) = self.directory_content(id, directory).pop()
                {
                    bytes.extend_from_slice(&last);
                }
            }
            Node::Regular(data) => match &data.place {
                Place::BlocksAndTail { spooled_at, .. } => {
                    let len = usize::try_from(data.size % BLOCK_BYTES).unwrap_or(BLOCK);
                    self.spool.read(*spooled_at, len, bytes)?;
                }
                Place::Chunks { table, .. } => table
                    .iter()
                    .for_each(|block| bytes.extend_from_slice(&block.to_le_bytes())),
                Place::Empty | Place::Blocks { .. } => {}
            },
            Node::Symlink { target, block: None } => bytes.extend_from_slice(target),
            _ => {}
        }
        Ok(())
    }

    /// The blocks of directories, except last ones that went behind their inodes.
    fn directory_blocks(&self, output: &mut Output) -> Result<(), ErofsError> {
        for id in &self.plan.order {
            let Some(directory) = self.tree.directory(*id) else {
                continue;
            };
            let outside = DirectorySize::of(directory).blocks_outside();
            if outside == 0 {
                continue;
            }
            let first = u64::from(self.plan.directory_blocks[id.0 as usize]);
            let blocks = self.directory_content(*id, directory);
            for (index, block) in (0..outside).zip(&blocks) {
                output.write_at((first + index) * BLOCK_BYTES, block)?;
            }
        }
        Ok(())
    }

    /// A directory's blocks, the last one only as long as it is used.
    fn directory_content(&self, id: InodeId, directory: &Directory) -> Vec<Vec<u8>> {
        let mut blocks = Vec::new();
        let mut pending: Vec<(&[u8], u64, u8)> = Vec::new();
        let mut used = 0;
        for name in sorted_names(directory) {
            let (target, kind) = match name {
                b"." => (id, 2),
                b".." => (self.plan.parents[id.0 as usize], 2),
                _ => match directory.entries.get(name) {
                    Some(child) => (*child, self.tree.inode(*child).node.dirent_type()),
                    None => continue,
                },
            };
            let len = DIRENT_BYTES + name.len();
            if used + len > BLOCK {
                blocks.push(directory_block(&pending, true));
                pending.clear();
                used = 0;
            }
            used += len;
            pending.push((name, self.plan.nid(target), kind));
        }
        blocks.push(directory_block(&pending, false));
        blocks
    }
}

/// All entries' fixed parts, then all names; a name ends where the next begins.
fn directory_block(entries: &[(&[u8], u64, u8)], padded: bool) -> Vec<u8> {
    let mut block = Vec::with_capacity(BLOCK);
    let mut name_at = entries.len() * DIRENT_BYTES;
    for (name, nid, kind) in entries {
        block.extend_from_slice(&nid.to_le_bytes());
        // Offsets within a block fit in 16 bits.
        block.extend_from_slice(&u16::try_from(name_at).unwrap_or(u16::MAX).to_le_bytes());
        block.extend_from_slice(&[*kind, 0]);
        name_at += name.len();
    }
    for (name, ..) in entries {
        block.extend_from_slice(name);
    }
    if padded {
        block.resize(BLOCK, 0);
    }
    block
}

fn push_xattrs(metadata: &Metadata, bytes: &mut Vec<u8>) {
    if metadata.xattrs.is_empty() {
        return;
    }
    bytes.extend_from_slice(&[0; XATTR_HEADER_BYTES]);
    for (name, value) in &metadata.xattrs {
        // Names and sizes were checked when the inode was made.
        let Some((index, suffix)) = split_xattr_name(name) else {
            continue;
        };
        let start = bytes.len();
        bytes.push(u8::try_from(suffix.len()).unwrap_or(u8::MAX));
        bytes.push(index);
        bytes.extend_from_slice(&u16::try_from(value.len()).unwrap_or(u16::MAX).to_le_bytes());
        bytes.extend_from_slice(suffix);
        bytes.extend_from_slice(value);
        bytes.resize(start + (bytes.len() - start).next_multiple_of(4), 0);
    }
}
