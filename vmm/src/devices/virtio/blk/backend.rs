//! The disk image on the host: what may be opened, and synchronous access to it.
//!
//! Owner: the device; the io_uring engine uses the same file by its registered index.
//! Invariants:
//! - A read-only disk is backed by a descriptor that can't write, so that no bug in this process can change an image
//!   that other microVMs share.
//! - The capacity is fixed when the disk is opened. If the file shrinks later, requests beyond its end fail; nothing is
//!   ever mapped, so there is no fault to take.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;

use rustix::fs::{FallocateFlags, OFlags, fallocate, fcntl_getfl};
use thiserror::Error;

use super::request::SECTOR_BYTES;
use crate::devices::virtio::iovec::GuestIovecs;

static ZEROES: [u8; 64 * 1024] = [0; 64 * 1024];

/// Why a file can't be a disk.
#[derive(Debug, Error)]
pub enum ImageError {
    /// The host refused.
    #[error("disk image `{id}` can't be examined")]
    Io {
        /// Name of the drive.
        id: String,
        /// What the host said.
        #[source]
        source: io::Error,
    },
    /// The descriptor can write though the drive is read-only.
    #[error("disk image `{id}` is for a read-only drive but is open for writing: open it with O_RDONLY")]
    Writable {
        /// Name of the drive.
        id: String,
    },
    /// The descriptor can't both read and write though the drive can.
    #[error(
        "disk image `{id}` is for a writable drive but isn't open for reading and writing: check its permissions"
    )]
    NotWritable {
        /// Name of the drive.
        id: String,
    },
    /// Nothing in it.
    #[error("disk image `{id}` is empty")]
    Empty {
        /// Name of the drive.
        id: String,
    },
    /// A part of a sector at the end.
    #[error(
        "disk image `{id}` is {len_bytes} bytes long, not a multiple of 512: it is truncated or needs padding"
    )]
    PartialSector {
        /// Name of the drive.
        id: String,
        /// Length of the file.
        len_bytes: u64,
    },
    /// The file system in it goes on after its end.
    #[error(
        "disk image `{id}` is truncated: its {filesystem} header says {header_bytes} bytes, the file has {len_bytes}"
    )]
    Truncated {
        /// Name of the drive.
        id: String,
        /// What the header was recognised as.
        filesystem: &'static str,
        /// Length the header asks for.
        header_bytes: u64,
        /// Length of the file.
        len_bytes: u64,
    },
}

/// An open disk image.
#[derive(Debug)]
pub struct Disk {
    file: File,
    capacity_sectors: u64,
    read_only: bool,
}

impl Disk {
    /// Checks that `file` is what the drive `id` needs.
    pub fn new(id: &str, mut file: File, read_only: bool) -> Result<Self, ImageError> {
        let io_error = |source: io::Error| ImageError::Io {
            id: id.to_owned(),
            source,
        };
        let mode = fcntl_getfl(&file).map_err(|errno| io_error(errno.into()))? & OFlags::ACCMODE;
        match (read_only, mode) {
            (true, OFlags::RDONLY) | (false, OFlags::RDWR) => {}
            (true, _) => return Err(ImageError::Writable { id: id.to_owned() }),
            (false, _) => return Err(ImageError::NotWritable { id: id.to_owned() }),
        }
        // Unlike the metadata, this also knows the size of a block device.
        let len_bytes = file.seek(SeekFrom::End(0)).map_err(io_error)?;
        if len_bytes == 0 {
            return Err(ImageError::Empty { id: id.to_owned() });
        }
        check_header(id, &file, len_bytes)?;
        if len_bytes % SECTOR_BYTES != 0 {
            return Err(ImageError::PartialSector {
                id: id.to_owned(),
                len_bytes,
            });
        }
        Ok(Self {
            file,
            capacity_sectors: len_bytes / SECTOR_BYTES,
            read_only,
        })
    }

    /// The file itself.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Size in sectors.
    pub fn capacity_sectors(&self) -> u64 {
        self.capacity_sectors
    }

    /// Whether writing is refused.
    pub fn read_only(&self) -> bool {
        self.read_only
    }

    /// Fills `iovecs` from `offset_bytes`, in as many calls as it takes.
    pub fn read_all(&self, iovecs: &mut GuestIovecs, offset_bytes: u64) -> io::Result<()> {
        transfer_all(
            iovecs,
            offset_bytes,
            io::ErrorKind::UnexpectedEof,
            |iovecs, offset| iovecs.preadv(self.file.as_fd(), offset),
        )
    }

    /// Writes `iovecs` at `offset_bytes`, in as many calls as it takes.
    pub fn write_all(&self, iovecs: &mut GuestIovecs, offset_bytes: u64) -> io::Result<()> {
        transfer_all(
            iovecs,
            offset_bytes,
            io::ErrorKind::WriteZero,
            |iovecs, offset| iovecs.pwritev(self.file.as_fd(), offset),
        )
    }

    /// Makes completed writes durable.
    pub fn flush(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    /// Gives the space of a range back to the host. Only advice: success if the file system can't.
    pub fn discard(&self, offset_bytes: u64, len_bytes: u64) -> io::Result<()> {
        match self.allocate(punch_hole(), offset_bytes, len_bytes) {
            Err(error) if is_unsupported(&error) => Ok(()),
            result => result,
        }
    }

    /// Makes a range read as zeroes, by the cheapest means the file system has.
    pub fn write_zeroes(&self, offset_bytes: u64, len_bytes: u64, unmap: bool) -> io::Result<()> {
        match self.allocate(zero_mode(unmap), offset_bytes, len_bytes) {
            Err(error) if is_unsupported(&error) => self.store_zeroes(offset_bytes, len_bytes),
            result => result,
        }
    }

    /// Makes a range read as zeroes by writing them.
    pub fn store_zeroes(&self, offset_bytes: u64, len_bytes: u64) -> io::Result<()> {
        let end = offset_bytes.saturating_add(len_bytes);
        let mut offset = offset_bytes;
        while offset < end {
            let len = usize::try_from(end - offset)
                .unwrap_or(usize::MAX)
                .min(ZEROES.len());
            self.file.write_all_at(&ZEROES[..len], offset)?;
            offset += len as u64;
        }
        Ok(())
    }

    fn allocate(&self, mode: FallocateFlags, offset_bytes: u64, len_bytes: u64) -> io::Result<()> {
        Ok(fallocate(&self.file, mode, offset_bytes, len_bytes)?)
    }
}

/// Mode of `fallocate` for a discard.
pub fn punch_hole() -> FallocateFlags {
    FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE
}

/// Mode of `fallocate` for a write-zeroes.
pub fn zero_mode(unmap: bool) -> FallocateFlags {
    if unmap {
        punch_hole()
    } else {
        FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE
    }
}

/// Whether an error means that the file system lacks the operation.
pub fn is_unsupported(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EOPNOTSUPP | libc::ENOSYS))
}

fn transfer_all(
    iovecs: &mut GuestIovecs,
    mut offset_bytes: u64,
    at_end: io::ErrorKind,
    mut call: impl FnMut(&GuestIovecs, i64) -> io::Result<usize>,
) -> io::Result<()> {
    while !iovecs.is_empty() {
        let offset = i64::try_from(offset_bytes).map_err(|_| io::ErrorKind::InvalidInput)?;
        match call(iovecs, offset) {
            Ok(0) => return Err(at_end.into()),
            Ok(count) => {
                iovecs.advance(count);
                offset_bytes += count as u64;
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Refuses an image whose file system header says that it is longer than its file: half a download, a full disk. Images
/// without a header that is known pass.
fn check_header(id: &str, file: &File, len_bytes: u64) -> Result<(), ImageError> {
    // Superblocks of EROFS and ext4 begin 1 KiB into the image.
    let mut header = [0; 2048];
    let header_len = read_start(file, &mut header).map_err(|source| ImageError::Io {
        id: id.to_owned(),
        source,
    })?;
    let Some(superblock) = header[..header_len].get(1024..1024 + 0x154) else {
        return Ok(());
    };
    let le16 = |at: usize| u16::from_le_bytes([superblock[at], superblock[at + 1]]);
    let le32 = |at: usize| u64::from(le16(at)) | u64::from(le16(at + 2)) << 16;
    let (filesystem, blocks, block_bits) = if le32(0) == 0xe0f5_e1e2 {
        ("EROFS", le32(36), u32::from(superblock[12]))
    } else if le16(0x38) == 0xef53 {
        let wide = le32(0x60) & 0x80 != 0;
        let high = if wide { le32(0x150) } else { 0 };
        (
            "ext4",
            le32(4) | high << 32,
            u32::from(superblock[24]).saturating_add(10),
        )
    } else {
        return Ok(());
    };
    let header_bytes = 1u64
        .checked_shl(block_bits)
        .and_then(|block_bytes| blocks.checked_mul(block_bytes))
        .unwrap_or(u64::MAX);
    if header_bytes > len_bytes {
        return Err(ImageError::Truncated {
            id: id.to_owned(),
            filesystem,
            header_bytes,
            len_bytes,
        });
    }
    Ok(())
}

fn read_start(mut file: &File, buf: &mut [u8]) -> io::Result<usize> {
    file.seek(SeekFrom::Start(0))?;
    let mut len = 0;
    while len < buf.len() {
        match file.read(&mut buf[len..]) {
            Ok(0) => break,
            Ok(count) => len += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(len)
}
