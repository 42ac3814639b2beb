//! Reading the images this crate writes, without mounting them.
//!
//! Used to look into the layers below the one being converted, and by tests. The files are this machine's own, yet every
//! address read from one is checked: a damaged image is an error, never a panic.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt;

use super::ErofsError;
use super::format::{
    BLOCK, BLOCK_BYTES, DIRENT_BYTES, INODE_BYTES, Layout, NULL_BLOCK, RawInode, SLOT_BYTES, SuperBlock,
    XATTR_ENTRY_BYTES, XATTR_HEADER_BYTES, XATTR_PREFIXES, decode_device, u16_at, u32_at, u64_at,
};
use super::tree::{Metadata, Timestamp, Xattrs};

/// An open image.
#[derive(Debug)]
pub struct Reader {
    file: File,
    superblock: SuperBlock,
}

/// What kind of file an inode is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FileKind {
    Directory,
    Regular,
    Symlink,
    CharDevice { major: u32, minor: u32 },
    BlockDevice { major: u32, minor: u32 },
    Fifo,
    Socket,
}

/// An inode, decoded.
#[derive(Debug, Clone)]
pub struct Stat {
    pub nid: u64,
    pub kind: FileKind,
    pub metadata: Metadata,
    pub size: u64,
    pub nlink: u32,
    raw: RawInode,
}

/// A directory's entry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DirEntry {
    pub name: Vec<u8>,
    pub nid: u64,
}

impl Reader {
    /// Check the superblock and the file's length.
    ///
    /// # Errors
    /// The file can't be read or is no complete image of ours.
    pub fn open(file: File) -> Result<Self, ErofsError> {
        let mut block = [0; BLOCK];
        file.read_exact_at(&mut block, 0)
            .map_err(|source| ErofsError::Read { source })?;
        let superblock = SuperBlock::decode(&block).map_err(|problem| ErofsError::Corrupt { problem })?;
        let len = file
            .metadata()
            .map_err(|source| ErofsError::Read { source })?
            .len();
        if len < u64::from(superblock.blocks) * BLOCK_BYTES {
            return Err(ErofsError::Corrupt {
                problem: "file is shorter than its superblock says",
            });
        }
        Ok(Self { file, superblock })
    }

    /// The image's unique id.
    pub const fn uuid(&self) -> [u8; 16] {
        self.superblock.uuid
    }

    /// Inodes in the image.
    pub const fn inodes(&self) -> u64 {
        self.superblock.inodes
    }

    /// The root directory.
    ///
    /// # Errors
    /// As [`Reader::stat`].
    pub fn root(&self) -> Result<Stat, ErofsError> {
        self.stat(u64::from(self.superblock.root_nid))
    }

    /// The inode of a number.
    ///
    /// # Errors
    /// The image is damaged or can't be read.
    pub fn stat(&self, nid: u64) -> Result<Stat, ErofsError> {
        let offset = self.inode_offset(nid)?;
        let mut bytes = [0; INODE_BYTES];
        self.read_at(offset, &mut bytes)?;
        let raw = RawInode::decode(&bytes).ok_or(ErofsError::Corrupt {
            problem: "an inode has an unknown format",
        })?;
        let (major, minor) = decode_device(raw.value);
        let kind = match raw.mode & 0o170_000 {
            0o040_000 => FileKind::Directory,
            0o100_000 => FileKind::Regular,
            0o120_000 => FileKind::Symlink,
            0o020_000 => FileKind::CharDevice { major, minor },
            0o060_000 => FileKind::BlockDevice { major, minor },
            0o010_000 => FileKind::Fifo,
            0o140_000 => FileKind::Socket,
            _ => {
                return Err(ErofsError::Corrupt {
                    problem: "an inode has an unknown type",
                });
            }
        };
        let metadata = Metadata {
            mode: raw.mode & 0o7777,
            uid: raw.uid,
            gid: raw.gid,
            mtime: Timestamp {
                secs: raw.mtime_secs,
                nanos: raw.mtime_nanos,
            },
            xattrs: self.xattrs(offset, &raw)?,
        };
        Ok(Stat {
            nid,
            kind,
            metadata,
            size: raw.size,
            nlink: raw.nlink,
            raw,
        })
    }

    /// The entry `name` of a directory.
    ///
    /// # Errors
    /// The image is damaged or can't be read.
    pub fn lookup(&self, directory: &Stat, name: &[u8]) -> Result<Option<Stat>, ErofsError> {
        if directory.kind != FileKind::Directory {
            return Ok(None);
        }
        // Blocks are sorted: the entry can only be in the last one that begins with no larger name.
        let (mut low, mut high) = (0, directory.size.div_ceil(BLOCK_BYTES));
        let mut candidate = None;
        while low < high {
            let middle = low.midpoint(high);
            let entries = self.directory_block(directory, middle)?;
            match entries.first() {
                Some(first) if first.name.as_slice() <= name => {
                    candidate = Some(entries);
                    low = middle + 1;
                }
                _ => high = middle,
            }
        }
        match candidate.into_iter().flatten().find(|entry| entry.name == name) {
            Some(entry) => self.stat(entry.nid).map(Some),
            None => Ok(None),
        }
    }

    /// A directory's entries without `.` and `..`, in byte order.
    ///
    /// # Errors
    /// The image is damaged or can't be read.
    pub fn entries(&self, directory: &Stat) -> Result<Vec<DirEntry>, ErofsError> {
        let mut all = Vec::new();
        for block in 0..directory.size.div_ceil(BLOCK_BYTES) {
            all.extend(self.directory_block(directory, block)?);
        }
        all.retain(|entry| entry.name != b"." && entry.name != b"..");
        Ok(all)
    }

    /// A symbolic link's target.
    ///
    /// # Errors
    /// The image is damaged or can't be read.
    pub fn link_target(&self, link: &Stat) -> Result<Vec<u8>, ErofsError> {
        if link.kind != FileKind::Symlink || link.size > BLOCK_BYTES {
            return Err(ErofsError::Corrupt {
                problem: "not a symbolic link",
            });
        }
        let mut target = Vec::new();
        self.data(link)
            .read_to_end(&mut target)
            .map_err(|source| ErofsError::Read { source })?;
        Ok(target)
    }

    /// The bytes of a regular file.
    pub const fn data<'a>(&'a self, file: &'a Stat) -> FileReader<'a> {
        FileReader {
            reader: self,
            stat: file,
            position: 0,
        }
    }

    /// Length of the run at `position` that is a hole (`true`) or stored data (`false`).
    ///
    /// # Errors
    /// The image is damaged or can't be read.
    pub fn run_at(&self, file: &Stat, position: u64) -> Result<(bool, u64), ErofsError> {
        let extent = self.extent(file, position)?;
        Ok((extent.offset.is_none(), extent.len))
    }

    fn inode_offset(&self, nid: u64) -> Result<u64, ErofsError> {
        nid.checked_mul(SLOT_BYTES)
            .and_then(|offset| offset.checked_add(u64::from(self.superblock.meta_block) * BLOCK_BYTES))
            .ok_or(ErofsError::Corrupt {
                problem: "an inode number is out of range",
            })
    }

    fn read_at(&self, offset: u64, bytes: &mut [u8]) -> Result<(), ErofsError> {
        let end = offset.checked_add(bytes.len() as u64);
        if end.is_none_or(|end| end > u64::from(self.superblock.blocks) * BLOCK_BYTES) {
            return Err(ErofsError::Corrupt {
                problem: "an address is outside of the image",
            });
        }
        self.file
            .read_exact_at(bytes, offset)
            .map_err(|source| ErofsError::Read { source })
    }

    fn xattrs(&self, inode: u64, raw: &RawInode) -> Result<Xattrs, ErofsError> {
        let mut xattrs = Xattrs::new();
        if raw.xattr_bytes == 0 {
            return Ok(xattrs);
        }
        let mut bytes = vec![0; raw.xattr_bytes];
        self.read_at(inode + INODE_BYTES as u64, &mut bytes)?;
        let corrupt = ErofsError::Corrupt {
            problem: "extended attributes are damaged",
        };
        let mut at = XATTR_HEADER_BYTES;
        while at + XATTR_ENTRY_BYTES <= bytes.len() {
            let (name_len, index) = (usize::from(bytes[at]), bytes[at + 1]);
            let value_len = usize::from(u16_at(&bytes, at + 2));
            let name_at = at + XATTR_ENTRY_BYTES;
            let Some(name) = bytes.get(name_at..name_at + name_len) else {
                return Err(corrupt);
            };
            let value_at = name_at + name_len;
            let Some(value) = bytes.get(value_at..value_at + value_len) else {
                return Err(corrupt);
            };
            let Some((prefix, _)) = XATTR_PREFIXES.iter().find(|(_, number)| *number == index) else {
                return Err(corrupt);
            };
            xattrs.insert([prefix, name].concat().into(), value.into());
            at = (value_at + value_len).next_multiple_of(4);
        }
        Ok(xattrs)
    }

    fn directory_block(&self, directory: &Stat, block: u64) -> Result<Vec<DirEntry>, ErofsError> {
        let corrupt = || ErofsError::Corrupt {
            problem: "a directory is damaged",
        };
        let start = block * BLOCK_BYTES;
        let len = directory.size.saturating_sub(start).min(BLOCK_BYTES);
        let mut bytes = vec![0; usize::try_from(len).unwrap_or(BLOCK)];
        let mut data = FileReader {
            reader: self,
            stat: directory,
            position: start,
        };
        data.read_exact(&mut bytes)
            .map_err(|source| ErofsError::Read { source })?;
        if bytes.len() < DIRENT_BYTES {
            return Err(corrupt());
        }
        let count = usize::from(u16_at(&bytes, 8)) / DIRENT_BYTES;
        if count * DIRENT_BYTES > bytes.len() {
            return Err(corrupt());
        }
        let mut entries = Vec::with_capacity(count);
        for index in 0..count {
            let at = index * DIRENT_BYTES;
            let name_at = usize::from(u16_at(&bytes, at + 8));
            let name_end = if index + 1 < count {
                usize::from(u16_at(&bytes, at + DIRENT_BYTES + 8))
            } else {
                bytes.len()
            };
            let name = bytes.get(name_at..name_end).ok_or_else(corrupt)?;
            let name = name.split(|byte| *byte == 0).next().unwrap_or(name).to_vec();
            entries.push(DirEntry {
                name,
                nid: u64_at(&bytes, at),
            });
        }
        Ok(entries)
    }

    /// Where the data at `position` is and how far it goes on like that.
    fn extent(&self, file: &Stat, position: u64) -> Result<Extent, ErofsError> {
        let raw = &file.raw;
        let left = file.size.saturating_sub(position);
        let in_blocks = |offset: u64, len: u64| Extent {
            offset: Some(u64::from(raw.value) * BLOCK_BYTES + offset),
            len,
        };
        match raw.layout {
            Layout::Plain => Ok(in_blocks(position, left)),
            Layout::Inline => {
                let inline_from = file.size / BLOCK_BYTES * BLOCK_BYTES;
                if position < inline_from {
                    return Ok(in_blocks(position, inline_from - position));
                }
                let behind = self.inode_offset(file.nid)? + (INODE_BYTES + raw.xattr_bytes) as u64;
                Ok(Extent {
                    offset: Some(behind + (position - inline_from)),
                    len: left,
                })
            }
            Layout::Chunked => {
                let chunk_bits = 12 + (raw.value & 0x1f);
                let (chunk, inside) = (position >> chunk_bits, position & ((1 << chunk_bits) - 1));
                let table = self.inode_offset(file.nid)? + (INODE_BYTES + raw.xattr_bytes) as u64;
                let mut entry = [0; 4];
                self.read_at(table + chunk * 4, &mut entry)?;
                let len = ((1 << chunk_bits) - inside).min(left);
                let block = u32_at(&entry, 0);
                Ok(Extent {
                    offset: (block != NULL_BLOCK).then(|| u64::from(block) * BLOCK_BYTES + inside),
                    len,
                })
            }
        }
    }
}

/// A run of a file's bytes that lie together, or are a hole.
struct Extent {
    offset: Option<u64>,
    len: u64,
}

/// Sequential reading of one file.
#[derive(Debug)]
pub struct FileReader<'a> {
    reader: &'a Reader,
    stat: &'a Stat,
    position: u64,
}

impl FileReader<'_> {
    /// Go to a position before the file's end.
    pub const fn seek_to(&mut self, position: u64) {
        self.position = position;
    }
}

impl Read for FileReader<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.position >= self.stat.size || buffer.is_empty() {
            return Ok(0);
        }
        let extent = self
            .reader
            .extent(self.stat, self.position)
            .map_err(io::Error::other)?;
        let len = usize::try_from(extent.len)
            .unwrap_or(usize::MAX)
            .min(buffer.len());
        let buffer = &mut buffer[..len];
        match extent.offset {
            Some(offset) => self.reader.read_at(offset, buffer).map_err(io::Error::other)?,
            None => buffer.fill(0),
        }
        self.position += len as u64;
        Ok(len)
    }
}
