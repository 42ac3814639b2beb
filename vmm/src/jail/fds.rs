//! Descriptors the process was started with.

use rustix::{
    fd::{AsFd, BorrowedFd, OwnedFd},
    net::{AddressFamily, SocketType, sockopt},
};
use std::{io, os::fd::RawFd};

const FIRST_AFTER_STDIO: u32 = 3;

/// Closes everything but stdio and `keep`.
///
/// # Errors
/// If the kernel refuses.
pub fn close_all_but(keep: Option<RawFd>) -> io::Result<()> {
    match keep
        .and_then(|fd| u32::try_from(fd).ok())
        .filter(|fd| *fd >= FIRST_AFTER_STDIO)
    {
        None => raw::close_range(FIRST_AFTER_STDIO, u32::MAX),
        Some(fd) => {
            if fd > FIRST_AFTER_STDIO {
                raw::close_range(FIRST_AFTER_STDIO, fd - 1)?;
            }
            raw::close_range(fd + 1, u32::MAX)
        }
    }
}

/// Gives the calling thread a descriptor table of its own with nothing in it but stdio and `keep`. The numbers stay the same,
/// but what `stdin` says becomes standard input.
///
/// # Errors
/// If the kernel refuses; the thread must then not go on.
pub fn own_table(keep: &[RawFd], stdin: Option<BorrowedFd<'_>>) -> io::Result<()> {
    raw::unshare_table()?;
    if let Some(stdin) = stdin {
        rustix::stdio::dup2_stdin(stdin)?;
    }
    let mut keep: Vec<u32> = keep.iter().filter_map(|fd| u32::try_from(*fd).ok()).collect();
    keep.sort_unstable();
    let mut first = FIRST_AFTER_STDIO;
    for fd in keep.into_iter().filter(|fd| *fd >= FIRST_AFTER_STDIO) {
        if fd > first {
            raw::close_range(first, fd - 1)?;
        }
        first = fd + 1;
    }
    raw::close_range(first, u32::MAX)
}

/// An inherited control socket.
#[derive(Debug)]
pub enum InheritedSocket {
    /// Clients connect to it.
    Listening(OwnedFd),
    /// It is a connection.
    Connected(OwnedFd),
}

/// Why an inherited descriptor is no control socket.
#[derive(Debug, thiserror::Error)]
pub enum InheritedSocketError {
    /// Nothing there, or stdio.
    #[error("not an open file descriptor above 2")]
    NotOpen,
    /// Another kind of file.
    #[error("not a Unix stream socket")]
    NotUnixStream,
}

/// Takes over descriptor `fd`, which the creator passed for this use.
///
/// # Errors
/// [`InheritedSocketError`].
pub fn inherited_socket(fd: RawFd) -> Result<InheritedSocket, InheritedSocketError> {
    let fd = raw::take(fd).ok_or(InheritedSocketError::NotOpen)?;
    let is_stream = sockopt::socket_domain(fd.as_fd()) == Ok(AddressFamily::UNIX)
        && sockopt::socket_type(fd.as_fd()) == Ok(SocketType::STREAM);
    if !is_stream {
        return Err(InheritedSocketError::NotUnixStream);
    }
    match sockopt::socket_acceptconn(fd.as_fd()) {
        Ok(true) => Ok(InheritedSocket::Listening(fd)),
        Ok(false) => Ok(InheritedSocket::Connected(fd)),
        Err(_) => Err(InheritedSocketError::NotUnixStream),
    }
}

#[expect(unsafe_code, reason = "descriptor numbers from the command line")]
mod raw {
    use rustix::{
        fd::{FromRawFd, OwnedFd},
        thread::{UnshareFlags, unshare_unsafe},
    };
    use std::{io, os::fd::RawFd};

    pub(super) fn unshare_table() -> io::Result<()> {
        // SAFETY: the thread keeps every descriptor under its number, until it closes those that it doesn't use.
        Ok(unsafe { unshare_unsafe(UnshareFlags::FILES) }?)
    }

    pub(super) fn close_range(first: u32, last: u32) -> io::Result<()> {
        // SAFETY: called first thing in `main`, when nothing in this process owns a descriptor yet, or on a table of this
        // thread's own, in which those that own one of them don't look it up any more.
        let result = unsafe { libc::syscall(libc::SYS_close_range, first, last, 0u32) };
        if result == 0 {
            Ok(())
        } else {
            Err(io::Error::last_os_error())
        }
    }

    pub(super) fn take(fd: RawFd) -> Option<OwnedFd> {
        // SAFETY: F_GETFD and F_SETFD on a number that isn't open only fail.
        let open = unsafe { libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC) } == 0;
        // SAFETY: it is open, above stdio, and named on the command line for this process to own; nothing else here
        // knows of it.
        (fd >= 3 && open).then(|| unsafe { OwnedFd::from_raw_fd(fd) })
    }
}
