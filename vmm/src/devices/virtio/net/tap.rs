//! The tap, by its open descriptor. Whoever opened it has chosen its name and put it into its network namespace.

#![expect(unsafe_code, reason = "requests of the tap driver")]

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use thiserror::Error;
use vmm_sys_util::ioctl::{ioctl_with_mut_ref, ioctl_with_ref, ioctl_with_val};

use super::Backend;
use super::frame::HEADER_LEN;

const IFREQ_NAME_LEN: usize = libc::IFNAMSIZ;

/// `struct ifreq`, of which the tap driver uses the flags.
#[repr(C)]
#[derive(Debug, Default)]
struct TapRequest {
    name: [u8; IFREQ_NAME_LEN],
    flags: u16,
    _rest: [u16; 11],
}

/// Why a descriptor can't be a device's tap.
#[derive(Debug, Error)]
pub enum TapError {
    /// Something else.
    #[error("the descriptor is not a tap that is attached to its interface")]
    NotTap(#[source] io::Error),
    /// Other frames than a device's.
    #[error("the tap must be made with IFF_TAP, IFF_NO_PI and IFF_VNET_HDR; its flags are {flags:#x}")]
    Flags {
        /// What it has.
        flags: u16,
    },
    /// Another header.
    #[error("the tap's header must be set to {HEADER_LEN} bytes; it has {len_bytes}")]
    HeaderLen {
        /// What it has.
        len_bytes: i32,
    },
    /// Its descriptor can't be made not to wait.
    #[error("the tap's descriptor can't be made non-blocking")]
    NonBlocking(#[source] io::Error),
}

/// One queue of a tap.
#[derive(Debug)]
pub struct Tap(OwnedFd);

impl Tap {
    /// Takes over an open tap, after checking that it is one and is set up for a device.
    pub fn new(fd: OwnedFd) -> Result<Self, TapError> {
        let mut request = TapRequest::default();
        let mut len_bytes: libc::c_int = 0;
        // SAFETY: the request writes a `struct ifreq`, which TapRequest has the size and layout of.
        check(unsafe { ioctl_with_mut_ref(&fd, libc::TUNGETIFF, &mut request) }).map_err(TapError::NotTap)?;
        // IFF_NO_PI must be set too, but can't be seen: its bit means something else here.
        let wanted = libc::IFF_TAP | libc::IFF_VNET_HDR;
        if libc::c_int::from(request.flags) & wanted != wanted {
            return Err(TapError::Flags { flags: request.flags });
        }
        // SAFETY: the request writes an int.
        check(unsafe { ioctl_with_mut_ref(&fd, libc::TUNGETVNETHDRSZ, &mut len_bytes) })
            .map_err(TapError::NotTap)?;
        if u32::try_from(len_bytes) != Ok(HEADER_LEN) {
            return Err(TapError::HeaderLen { len_bytes });
        }
        fcntl_getfl(&fd)
            .and_then(|flags| fcntl_setfl(&fd, flags | OFlags::NONBLOCK))
            .map_err(|errno| TapError::NonBlocking(errno.into()))?;
        Ok(Self(fd))
    }
}

impl AsFd for Tap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Backend for Tap {
    fn set_offloads(&self, offloads: u32) -> io::Result<()> {
        // SAFETY: the request takes its argument by value.
        check(unsafe { ioctl_with_val(&self.0, libc::TUNSETOFFLOAD, offloads.into()) })
    }

    fn set_enabled(&self, enabled: bool) -> io::Result<()> {
        let flags = if enabled {
            libc::IFF_ATTACH_QUEUE
        } else {
            libc::IFF_DETACH_QUEUE
        };
        let request = TapRequest {
            // Both are bits of a short.
            flags: u16::try_from(flags).unwrap_or(0),
            ..TapRequest::default()
        };
        // SAFETY: the request reads a `struct ifreq`, which TapRequest has the size and layout of.
        match check(unsafe { ioctl_with_ref(&self.0, libc::TUNSETQUEUE, &request) }) {
            // As it was already.
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => Ok(()),
            result => result,
        }
    }
}

impl AsRawFd for Tap {
    fn as_raw_fd(&self) -> std::os::fd::RawFd {
        self.0.as_raw_fd()
    }
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn request_has_the_size_of_an_ifreq() {
        assert_eq!(size_of::<TapRequest>(), size_of::<libc::ifreq>());
    }

    #[test]
    fn other_files_are_refused() {
        let file = tempfile::tempfile().unwrap();
        assert!(matches!(Tap::new(file.into()), Err(TapError::NotTap(_))));
    }
}
