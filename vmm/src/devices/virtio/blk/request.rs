//! Parsing of virtio-blk requests (virtio 1.2, §5.2.6). Makes no assumption about how the driver frames a request.
//!
//! Invariant: a [`Request`] lies within the disk, carries whole sectors and a status byte, and respects the limits the
//! device advertises. Whether its buffers are guest memory is found out when they are used.

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID,
    VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};
use vm_memory::{Address, GuestAddress};

use crate::devices::virtio::GuestRam;
use crate::devices::virtio::queue::{Chain, Segment, read_segments, slice_segments};

/// Unit of the driver's addresses.
pub const SECTOR_BYTES: u64 = 512;
/// Longest buffer the device asks the driver for.
pub const SIZE_MAX_BYTES: u32 = 64 * 1024;
/// Most data buffers in a request: what a ring of 256 leaves beside header and status.
pub const SEG_MAX: u32 = 254;
/// Most data in one request.
pub const MAX_DATA_BYTES: u32 = SIZE_MAX_BYTES * SEG_MAX;
/// Most sectors one discard covers: 1 GiB.
pub const MAX_DISCARD_SECTORS: u32 = 1 << 21;
/// Most sectors one write-zeroes covers: 16 MiB, as it may come down to writing them.
pub const MAX_WRITE_ZEROES_SECTORS: u32 = 1 << 15;

const HEADER_LEN: u32 = 16;
const RANGE_LEN: u32 = 16;

/// What the driver wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// Read `len_bytes` at `offset_bytes`.
    Read { offset_bytes: u64, len_bytes: u32 },
    /// Write `len_bytes` at `offset_bytes`.
    Write { offset_bytes: u64, len_bytes: u32 },
    /// Make what has been written durable.
    Flush,
    /// Return the serial.
    GetId,
    /// Give the space back; the content becomes indeterminate.
    Discard { offset_bytes: u64, len_bytes: u64 },
    /// Make it read as zeroes, giving the space back only if allowed to.
    WriteZeroes {
        offset_bytes: u64,
        len_bytes: u64,
        unmap: bool,
    },
}

/// A well-formed request.
#[derive(Debug)]
pub struct Request {
    /// What to do.
    pub operation: Operation,
    /// Where the status byte goes.
    pub status: GuestAddress,
}

/// Why a request isn't carried out.
#[derive(Debug, PartialEq, Eq)]
pub enum Refusal {
    /// There is no place for a status.
    NoStatus,
    /// The driver is told with a status byte.
    Status {
        /// Where it goes.
        status: GuestAddress,
        /// Its value.
        code: u8,
    },
}

/// What the device has and offers, as far as requests are concerned.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Size of the disk in sectors.
    pub capacity_sectors: u64,
    /// Writes of any kind are refused.
    pub read_only: bool,
}

impl Request {
    /// Makes sense of `chain`.
    pub fn parse(mem: &GuestRam, chain: &Chain, limits: Limits) -> Result<Self, Refusal> {
        let last = chain.writable().last().ok_or(Refusal::NoStatus)?;
        let status = last
            .addr
            .checked_add(u64::from(last.len - 1))
            .ok_or(Refusal::NoStatus)?;
        let refuse = |code: u32| Refusal::Status {
            status,
            // The status codes are single bytes by definition.
            code: code.to_le_bytes()[0],
        };
        let mut header = [0; HEADER_LEN as usize];
        if !read_segments(mem, chain.readable(), &mut header) {
            return Err(refuse(VIRTIO_BLK_S_IOERR));
        }
        let kind = u32::from_le_bytes([header[0], header[1], header[2], header[3]]);
        let [.., s0, s1, s2, s3, s4, s5, s6, s7] = header;
        let sector = u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]);
        let data_out = chain.readable_len() - HEADER_LEN;
        let data_in = chain.writable_len() - 1;
        let operation = match kind {
            VIRTIO_BLK_T_IN => {
                transfer(sector, data_in, limits).map(|(offset_bytes, len_bytes)| Operation::Read {
                    offset_bytes,
                    len_bytes,
                })
            }
            VIRTIO_BLK_T_OUT if !limits.read_only => {
                transfer(sector, data_out, limits).map(|(offset_bytes, len_bytes)| Operation::Write {
                    offset_bytes,
                    len_bytes,
                })
            }
            VIRTIO_BLK_T_OUT => Err(VIRTIO_BLK_S_IOERR),
            VIRTIO_BLK_T_FLUSH => Ok(Operation::Flush),
            VIRTIO_BLK_T_GET_ID => Ok(Operation::GetId),
            VIRTIO_BLK_T_DISCARD | VIRTIO_BLK_T_WRITE_ZEROES if !limits.read_only => {
                parse_range(mem, chain, data_out, kind, limits)
            }
            _ => Err(VIRTIO_BLK_S_UNSUPP),
        };
        match operation {
            Ok(operation) => Ok(Self { operation, status }),
            Err(code) => Err(refuse(code)),
        }
    }
}

/// The data buffers of a read.
pub fn data_in(chain: &Chain) -> impl Iterator<Item = Segment> {
    slice_segments(chain.writable(), 0..chain.writable_len().saturating_sub(1))
}

/// The data buffers of a write.
pub fn data_out(chain: &Chain) -> impl Iterator<Item = Segment> {
    slice_segments(chain.readable(), HEADER_LEN..chain.readable_len())
}

fn transfer(sector: u64, len: u32, limits: Limits) -> Result<(u64, u32), u32> {
    let whole_sectors = len > 0 && u64::from(len) % SECTOR_BYTES == 0;
    if !whole_sectors || len > MAX_DATA_BYTES {
        return Err(VIRTIO_BLK_S_IOERR);
    }
    let offset = offset_within(sector, u64::from(len) / SECTOR_BYTES, limits)?;
    Ok((offset, len))
}

fn offset_within(sector: u64, sectors: u64, limits: Limits) -> Result<u64, u32> {
    match sector.checked_add(sectors) {
        // No overflow: the capacity is that of a file, whose length in bytes fits.
        Some(end) if end <= limits.capacity_sectors => Ok(sector * SECTOR_BYTES),
        _ => Err(VIRTIO_BLK_S_IOERR),
    }
}

/// A discard or write-zeroes of exactly one range, all the device offers.
fn parse_range(mem: &GuestRam, chain: &Chain, len: u32, kind: u32, limits: Limits) -> Result<Operation, u32> {
    let mut range = [0; RANGE_LEN as usize];
    let mut bytes = range.as_mut_slice();
    if len != RANGE_LEN {
        return Err(VIRTIO_BLK_S_IOERR);
    }
    for segment in data_out(chain) {
        let (part, rest) = bytes.split_at_mut((segment.len as usize).min(bytes.len()));
        if !read_segments(mem, &[segment], part) {
            return Err(VIRTIO_BLK_S_IOERR);
        }
        bytes = rest;
    }
    let [s0, s1, s2, s3, s4, s5, s6, s7, n0, n1, n2, n3, f0, f1, f2, f3] = range;
    let sector = u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]);
    let sectors = u32::from_le_bytes([n0, n1, n2, n3]);
    let flags = u32::from_le_bytes([f0, f1, f2, f3]);
    let discard = kind == VIRTIO_BLK_T_DISCARD;
    let allowed_flags = if discard {
        0
    } else {
        VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP
    };
    if flags & !allowed_flags != 0 {
        return Err(VIRTIO_BLK_S_UNSUPP);
    }
    let max = if discard {
        MAX_DISCARD_SECTORS
    } else {
        MAX_WRITE_ZEROES_SECTORS
    };
    if sectors == 0 || sectors > max {
        return Err(VIRTIO_BLK_S_IOERR);
    }
    let offset_bytes = offset_within(sector, sectors.into(), limits)?;
    let len_bytes = u64::from(sectors) * SECTOR_BYTES;
    Ok(if discard {
        Operation::Discard {
            offset_bytes,
            len_bytes,
        }
    } else {
        Operation::WriteZeroes {
            offset_bytes,
            len_bytes,
            unmap: flags & VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0,
        }
    })
}
