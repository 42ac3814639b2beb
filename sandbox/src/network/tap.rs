#![expect(unsafe_code, reason = "the tap driver's requests")]
//! Opens taps for the VMM: frames with a virtio header, no protocol information, gone with the last descriptor.

use std::{
    fs::File,
    io,
    os::fd::{AsRawFd as _, OwnedFd},
};

/// `struct virtio_net_hdr_v1`.
const HEADER_BYTES: libc::c_int = 12;

/// Opens a new tap with this name in the calling thread's network namespace.
pub(crate) fn open(name: &str) -> io::Result<OwnedFd> {
    let file = File::options().read(true).write(true).open("/dev/net/tun")?;
    // SAFETY: an ifreq is plain data; all zeroes are a value of it.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    // The last byte stays zero.
    let room = request.ifr_name.len() - 1;
    if name.is_empty() || name.len() > room {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from.cast_signed();
    }
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR | libc::IFF_TUN_EXCL;
    // All are bits of a short, the highest included.
    request.ifr_ifru.ifru_flags = u16::try_from(flags).unwrap_or(0).cast_signed();
    // SAFETY: the request reads and writes an ifreq, which outlives the call.
    check(unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw mut request) })?;
    let header_bytes = HEADER_BYTES;
    // SAFETY: the request reads an int, which outlives the call.
    check(unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETVNETHDRSZ, &raw const header_bytes) })?;
    Ok(file.into())
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}
