//! Giving guest memory back to the host.

#![expect(unsafe_code, reason = "madvise on guest memory")]

use std::io;

use vm_memory::{GuestAddress, GuestMemory};

use crate::devices::virtio::GuestRam;

/// The host's page.
pub const PAGE_BYTES: u64 = 4096;

/// Takes the whole pages within a guest-physical range back from the guest, which will find zeroes (or, behind a private
/// mapping of a file, the file's content) there. How many bytes that was.
pub fn discard(mem: &GuestRam, start: GuestAddress, len_bytes: u64) -> io::Result<u64> {
    let first = start
        .0
        .checked_next_multiple_of(PAGE_BYTES)
        .ok_or(io::ErrorKind::InvalidInput)?;
    let end = start
        .0
        .checked_add(len_bytes)
        .ok_or(io::ErrorKind::InvalidInput)?
        & !(PAGE_BYTES - 1);
    let len = usize::try_from(end.saturating_sub(first)).map_err(|_| io::ErrorKind::InvalidInput)?;
    let mut done = 0;
    for slice in GuestMemory::get_slices(mem, GuestAddress(first), len) {
        let slice = slice.map_err(|_| io::ErrorKind::InvalidInput)?;
        let region = mem
            .find_region(GuestAddress(first + done))
            .ok_or(io::ErrorKind::InvalidInput)?;
        // A private mapping forgets its pages; a shared one has to free those of the file behind it.
        let shared = region.flags() & libc::MAP_SHARED != 0;
        let advice = if shared {
            libc::MADV_REMOVE
        } else {
            libc::MADV_DONTNEED
        };
        let target = slice.ptr_guard_mut();
        // SAFETY: the range is a part of a mapping that `mem` keeps alive and that nobody but the guest has references
        // into: losing its content harms the guest only, which asked for it.
        let result = unsafe { libc::madvise(target.as_ptr().cast(), target.len(), advice) };
        if result != 0 {
            return Err(io::Error::last_os_error());
        }
        done += slice.len() as u64;
    }
    Ok(done)
}
