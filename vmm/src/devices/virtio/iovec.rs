//! Guest buffers as scatter-gather lists for vectored system calls: the zero-copy path of blk and vsock.
//!
//! Invariant: every entry points into a mapping that the list's own [`GuestRam`] reference keeps alive, so a list can't
//! outlive the memory it names. The guest may write to that memory at any time; only the kernel accesses it through
//! these pointers, never Rust code.

#![expect(unsafe_code, reason = "system calls that take pointers into guest memory")]

use std::fmt;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;

use thiserror::Error;
use vm_memory::{GuestMemory, VolatileSlice};

use super::GuestRam;
use super::queue::{MAX_CHAIN_LEN, Segment};

/// The most entries a list takes, the kernel's UIO_MAXIOV.
pub const MAX_IOVECS: usize = MAX_CHAIN_LEN;

/// Why a guest buffer can't be added.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum IovecError {
    /// Not all of the buffer is guest memory.
    #[error("guest buffer of {len} bytes at {addr:#x} is not in guest memory")]
    OutOfMemory {
        /// Guest-physical address.
        addr: u64,
        /// Length in bytes.
        len: u32,
    },
    /// The list has [`MAX_IOVECS`] entries.
    #[error("more than {MAX_IOVECS} guest buffers")]
    TooMany,
}

/// A list of guest buffers.
pub struct GuestIovecs {
    mem: Arc<GuestRam>,
    iovecs: Vec<libc::iovec>,
    len_bytes: usize,
}

// SAFETY: the pointers refer to the shared mapping that `mem` keeps alive, valid from every thread; they are only handed
// to the kernel, which copes with concurrent access.
unsafe impl Send for GuestIovecs {}

impl GuestIovecs {
    /// An empty list over `mem`.
    pub fn new(mem: Arc<GuestRam>) -> Self {
        Self {
            mem,
            iovecs: Vec::new(),
            len_bytes: 0,
        }
    }

    /// The same, with room for all it may ever take: adding to it allocates nothing.
    pub fn with_capacity(mem: Arc<GuestRam>) -> Self {
        Self {
            iovecs: Vec::with_capacity(MAX_IOVECS + 1),
            ..Self::new(mem)
        }
    }

    /// Empties the list, keeping its allocation.
    pub fn clear(&mut self) {
        self.iovecs.clear();
        self.len_bytes = 0;
    }

    /// Total length, in bytes.
    pub fn len_bytes(&self) -> usize {
        self.len_bytes
    }

    /// Whether the list names no byte.
    pub fn is_empty(&self) -> bool {
        self.len_bytes == 0
    }

    /// Number of entries.
    pub fn count(&self) -> usize {
        self.iovecs.len()
    }

    /// Appends a guest buffer.
    pub fn push(&mut self, segment: Segment) -> Result<(), IovecError> {
        let out_of_memory = || IovecError::OutOfMemory {
            addr: segment.addr.0,
            len: segment.len,
        };
        let before = (self.iovecs.len(), self.len_bytes);
        let Self {
            mem,
            iovecs,
            len_bytes,
        } = self;
        for slice in GuestMemory::get_slices(&**mem, segment.addr, segment.len as usize) {
            let result = match slice {
                Ok(_) if iovecs.len() == MAX_IOVECS => Err(IovecError::TooMany),
                Ok(slice) => {
                    iovecs.push(to_iovec(&slice));
                    *len_bytes += slice.len();
                    Ok(())
                }
                Err(_) => Err(out_of_memory()),
            };
            if result.is_err() {
                iovecs.truncate(before.0);
                *len_bytes = before.1;
                return result;
            }
        }
        if self.len_bytes - before.1 != segment.len as usize {
            self.iovecs.truncate(before.0);
            self.len_bytes = before.1;
            return Err(out_of_memory());
        }
        Ok(())
    }

    /// Drops all but the first `count` entries.
    pub fn truncate(&mut self, count: usize) {
        let dropped = self.iovecs.drain(count.min(self.iovecs.len())..);
        self.len_bytes -= dropped.map(|iovec| iovec.iov_len).sum::<usize>();
    }

    /// Drops the first `count` bytes, which a system call has dealt with.
    pub fn advance(&mut self, count: usize) {
        let mut left = count.min(self.len_bytes);
        self.len_bytes -= left;
        let mut whole = 0;
        for iovec in &mut self.iovecs {
            if left < iovec.iov_len {
                iovec.iov_base = iovec.iov_base.cast::<u8>().wrapping_add(left).cast();
                iovec.iov_len -= left;
                break;
            }
            left -= iovec.iov_len;
            whole += 1;
        }
        self.iovecs.drain(..whole);
    }

    /// Drops the first `count` entries.
    pub fn drop_first(&mut self, count: usize) {
        let dropped = self.iovecs.drain(..count.min(self.iovecs.len()));
        self.len_bytes -= dropped.map(|iovec| iovec.iov_len).sum::<usize>();
    }

    /// The entries, for a request that the kernel reads them from.
    pub fn as_ptr(&self) -> *const libc::iovec {
        self.iovecs.as_ptr()
    }

    /// Reads from `file` at `offset` into the buffers. May be short.
    pub fn preadv(&self, file: BorrowedFd<'_>, offset: i64) -> io::Result<usize> {
        // SAFETY: the entries describe memory that `self.mem` keeps mapped, see the module's invariant.
        check(unsafe { libc::preadv(file.as_raw_fd(), self.as_ptr(), self.c_count(), offset) })
    }

    /// Writes the buffers to `file` at `offset`. May be short.
    pub fn pwritev(&self, file: BorrowedFd<'_>, offset: i64) -> io::Result<usize> {
        // SAFETY: as for `preadv`; the kernel only reads the memory.
        check(unsafe { libc::pwritev(file.as_raw_fd(), self.as_ptr(), self.c_count(), offset) })
    }

    /// Reads one message, such as a frame of a tap, into the buffers. More than [`GuestIovecs::len_bytes`] if it didn't fit.
    /// There must be less than [`MAX_IOVECS`] entries.
    pub fn readv(&mut self, file: BorrowedFd<'_>) -> io::Result<usize> {
        let mut overflow = 0u8;
        self.iovecs.push(libc::iovec {
            iov_base: (&raw mut overflow).cast(),
            iov_len: 1,
        });
        // SAFETY: as for `preadv`; the last entry is a byte that outlives the call.
        let read = check(unsafe { libc::readv(file.as_raw_fd(), self.as_ptr(), self.c_count()) });
        self.iovecs.pop();
        read
    }

    /// Writes `head` and then the buffers as one message. There must be less than [`MAX_IOVECS`] entries, or it fails.
    pub fn writev_behind(&mut self, head: &[u8], file: BorrowedFd<'_>) -> io::Result<usize> {
        let entry = libc::iovec {
            iov_base: head.as_ptr().cast_mut().cast(),
            iov_len: head.len(),
        };
        self.iovecs.insert(0, entry);
        // SAFETY: as for `preadv`; the kernel only reads the memory, and `head` outlives the call.
        let written = check(unsafe { libc::writev(file.as_raw_fd(), self.as_ptr(), self.c_count()) });
        self.iovecs.remove(0);
        written
    }

    /// Receives from a socket into the buffers, without waiting. Zero is the end of the stream.
    pub fn receive(&self, socket: BorrowedFd<'_>) -> io::Result<usize> {
        let mut header = self.message_header();
        // SAFETY: `header` is valid for the call and names memory that `self.mem` keeps mapped.
        check(unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut header, libc::MSG_DONTWAIT) })
    }

    /// Sends the buffers to a socket, without waiting and without a signal when nobody reads. May be short.
    pub fn send(&self, socket: BorrowedFd<'_>) -> io::Result<usize> {
        let header = self.message_header();
        let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
        // SAFETY: as for `receive`; the kernel only reads the memory.
        check(unsafe { libc::sendmsg(socket.as_raw_fd(), &raw const header, flags) })
    }

    fn message_header(&self) -> libc::msghdr {
        libc::msghdr {
            msg_name: std::ptr::null_mut(),
            msg_namelen: 0,
            msg_iov: self.as_ptr().cast_mut(),
            msg_iovlen: self.iovecs.len(),
            msg_control: std::ptr::null_mut(),
            msg_controllen: 0,
            msg_flags: 0,
        }
    }

    fn c_count(&self) -> libc::c_int {
        // At most MAX_IOVECS.
        libc::c_int::try_from(self.iovecs.len()).unwrap_or(libc::c_int::MAX)
    }
}

impl fmt::Debug for GuestIovecs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GuestIovecs")
            .field("count", &self.iovecs.len())
            .field("len_bytes", &self.len_bytes)
            .finish_non_exhaustive()
    }
}

fn to_iovec(slice: &VolatileSlice<'_>) -> libc::iovec {
    libc::iovec {
        iov_base: slice.ptr_guard_mut().as_ptr().cast(),
        iov_len: slice.len(),
    }
}

fn check(result: isize) -> io::Result<usize> {
    usize::try_from(result).map_err(|_| io::Error::last_os_error())
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;

    use vm_memory::{Bytes, GuestAddress};

    use super::*;

    /// Two regions that touch, and a third beyond a hole.
    fn memory() -> Arc<GuestRam> {
        let ranges = [
            (GuestAddress(0), 0x1000),
            (GuestAddress(0x1000), 0x1000),
            (GuestAddress(0x4000), 0x1000),
        ];
        Arc::new(GuestRam::from_ranges(&ranges).unwrap())
    }

    fn segment(addr: u64, len: u32) -> Segment {
        Segment {
            addr: GuestAddress(addr),
            len,
        }
    }

    #[test]
    fn buffers_across_regions_become_several_entries() {
        let mem = memory();
        let mut list = GuestIovecs::new(Arc::clone(&mem));
        list.push(segment(0xff0, 0x20)).unwrap();
        list.push(segment(0x4000, 0x10)).unwrap();
        assert_eq!((list.count(), list.len_bytes()), (3, 0x30));
        let (mut near, far) = UnixStream::pair().unwrap();
        near.write_all(&[7; 0x30]).unwrap();
        assert_eq!(list.receive(far.as_fd()).unwrap(), 0x30);
        for at in [0xff0, 0x1000, 0x4000] {
            assert_eq!(mem.read_obj::<[u8; 16]>(GuestAddress(at)).unwrap(), [7; 16]);
        }
        assert_eq!(mem.read_obj::<[u8; 16]>(GuestAddress(0x1010)).unwrap(), [0; 16]);
        assert_eq!(list.send(far.as_fd()).unwrap(), 0x30);
        near.read_exact(&mut [0; 0x30]).unwrap();
    }

    #[test]
    fn buffers_not_wholly_in_memory_leave_the_list_as_it_was() {
        let mut list = GuestIovecs::new(memory());
        list.push(segment(0x10, 0x10)).unwrap();
        for (addr, len) in [
            (0x2000, 1),
            (0x1ff0, 0x11),
            (0x3fff, 2),
            (0x4fff, 2),
            (u64::MAX, 1),
            (u64::MAX, 0x10),
            (0, u32::MAX),
        ] {
            assert_eq!(
                list.push(segment(addr, len)),
                Err(IovecError::OutOfMemory { addr, len })
            );
            assert_eq!((list.count(), list.len_bytes()), (1, 0x10));
        }
    }

    #[test]
    fn the_list_is_bounded() {
        let mut list = GuestIovecs::new(memory());
        for _ in 0..MAX_IOVECS {
            list.push(segment(0, 1)).unwrap();
        }
        assert_eq!(list.push(segment(0, 1)), Err(IovecError::TooMany));
        assert_eq!((list.count(), list.len_bytes()), (MAX_IOVECS, MAX_IOVECS));
    }

    #[test]
    fn advancing_and_truncating_keep_the_rest() {
        let mem = memory();
        mem.write_slice(b"0123456789", GuestAddress(0)).unwrap();
        let mut list = GuestIovecs::new(mem);
        for at in [0, 4, 8] {
            list.push(segment(at, if at == 8 { 2 } else { 4 })).unwrap();
        }
        list.advance(0);
        list.advance(5);
        assert_eq!((list.count(), list.len_bytes()), (2, 5));
        let (mut near, far) = UnixStream::pair().unwrap();
        assert_eq!(list.send(far.as_fd()).unwrap(), 5);
        let mut sent = [0; 5];
        near.read_exact(&mut sent).unwrap();
        assert_eq!(&sent, b"56789");
        list.truncate(1);
        assert_eq!((list.count(), list.len_bytes()), (1, 3));
        list.advance(100);
        assert!(list.is_empty() && list.count() == 0);
        list.clear();
        assert_eq!(
            list.receive(far.as_fd()).unwrap_err().kind(),
            io::ErrorKind::WouldBlock
        );
    }
}
