//! The packet header of virtio-vsock (virtio 1.2, §5.10.6).

use crate::devices::virtio::GuestRam;
use crate::devices::virtio::queue::{Segment, read_segments, write_segments};

/// Length of a header, in bytes.
pub const HEADER_LEN: u32 = 44;
/// The host's address.
pub const HOST_CID: u64 = 2;
/// The only socket type offered.
pub const TYPE_STREAM: u16 = 1;

/// Flag of a shutdown: the sender will not receive any more.
pub const SHUTDOWN_RECEIVE: u32 = 1;
/// Flag of a shutdown: the sender will not send any more.
pub const SHUTDOWN_SEND: u32 = 2;
/// Both.
pub const SHUTDOWN_BOTH: u32 = SHUTDOWN_RECEIVE | SHUTDOWN_SEND;

/// What a packet is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub enum Op {
    /// Open a connection.
    Request = 1,
    /// It is open.
    Response = 2,
    /// It is gone.
    Reset = 3,
    /// One or both directions end.
    Shutdown = 4,
    /// Data.
    ReadWrite = 5,
    /// News about the sender's buffer.
    CreditUpdate = 6,
    /// Asks for such news.
    CreditRequest = 7,
}

impl Op {
    /// The operation of this number, if there is one.
    pub fn new(value: u16) -> Option<Self> {
        Some(match value {
            1 => Self::Request,
            2 => Self::Response,
            3 => Self::Reset,
            4 => Self::Shutdown,
            5 => Self::ReadWrite,
            6 => Self::CreditUpdate,
            7 => Self::CreditRequest,
            _ => return None,
        })
    }
}

/// A packet header in host byte order.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Header {
    pub src_cid: u64,
    pub dst_cid: u64,
    pub src_port: u32,
    pub dst_port: u32,
    pub len: u32,
    pub kind: u16,
    pub op: u16,
    pub flags: u32,
    pub buf_alloc: u32,
    pub fwd_cnt: u32,
}

impl Header {
    /// Reads the header at the start of a guest's packet.
    pub fn read(mem: &GuestRam, segments: &[Segment]) -> Option<Self> {
        let mut bytes = [0; HEADER_LEN as usize];
        if !read_segments(mem, segments, &mut bytes) {
            return None;
        }
        let mut rest = bytes.as_slice();
        let header = Self {
            src_cid: u64::from_le_bytes(take(&mut rest)),
            dst_cid: u64::from_le_bytes(take(&mut rest)),
            src_port: u32::from_le_bytes(take(&mut rest)),
            dst_port: u32::from_le_bytes(take(&mut rest)),
            len: u32::from_le_bytes(take(&mut rest)),
            kind: u16::from_le_bytes(take(&mut rest)),
            op: u16::from_le_bytes(take(&mut rest)),
            flags: u32::from_le_bytes(take(&mut rest)),
            buf_alloc: u32::from_le_bytes(take(&mut rest)),
            fwd_cnt: u32::from_le_bytes(take(&mut rest)),
        };
        Some(header)
    }

    /// Writes the header to the start of a guest's buffer.
    pub fn write(&self, mem: &GuestRam, segments: &[Segment]) -> bool {
        write_segments(mem, segments, &self.to_bytes())
    }

    /// The header as it is in memory.
    pub fn to_bytes(self) -> [u8; HEADER_LEN as usize] {
        let mut bytes = [0; HEADER_LEN as usize];
        let mut at = 0;
        let mut put = |part: &[u8]| {
            bytes[at..at + part.len()].copy_from_slice(part);
            at += part.len();
        };
        put(&self.src_cid.to_le_bytes());
        put(&self.dst_cid.to_le_bytes());
        put(&self.src_port.to_le_bytes());
        put(&self.dst_port.to_le_bytes());
        put(&self.len.to_le_bytes());
        put(&self.kind.to_le_bytes());
        put(&self.op.to_le_bytes());
        put(&self.flags.to_le_bytes());
        put(&self.buf_alloc.to_le_bytes());
        put(&self.fwd_cnt.to_le_bytes());
        bytes
    }
}

/// The next `N` bytes of a header; zeroes after its end, which the fixed lengths above never reach.
fn take<const N: usize>(rest: &mut &[u8]) -> [u8; N] {
    match rest.split_first_chunk::<N>() {
        Some((chunk, tail)) => {
            *rest = tail;
            *chunk
        }
        None => [0; N],
    }
}
