//! vsock, as far as the agent needs it: it listens, and connects once to say that it does.

use std::{
    fs::File,
    os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd},
};

use nix::{
    errno::Errno,
    sys::socket::{
        AddressFamily, Backlog, SockFlag, SockType, VsockAddr, accept4, bind, connect, getpeername, listen,
        socket,
    },
};

/// The host's context id, the only peer the agent talks to.
const HOST_CID: u32 = libc::VMADDR_CID_HOST;

fn stream_socket() -> Result<OwnedFd, Errno> {
    socket(
        AddressFamily::Vsock,
        SockType::Stream,
        SockFlag::SOCK_CLOEXEC,
        None,
    )
}

/// Listens on a port.
pub fn listen_on(port: u32) -> Result<OwnedFd, Errno> {
    let fd = stream_socket()?;
    bind(fd.as_raw_fd(), &VsockAddr::new(libc::VMADDR_CID_ANY, port))?;
    // A host may open hundreds at once, for as many execs.
    listen(&fd, Backlog::new(1024)?)?;
    Ok(fd)
}

/// The next connection from the host. A peer inside the microVM is turned away.
#[expect(unsafe_code, reason = "takes over the descriptor of accept4")]
pub fn accept_host(listener: &OwnedFd) -> Result<File, Errno> {
    loop {
        let fd = match accept4(listener.as_raw_fd(), SockFlag::SOCK_CLOEXEC) {
            Ok(fd) => fd,
            Err(Errno::EINTR | Errno::ECONNABORTED) => continue,
            Err(errno) => return Err(errno),
        };
        // SAFETY: the kernel has just given us this descriptor; nobody else owns it.
        let stream = unsafe { File::from_raw_fd(fd) };
        if getpeername::<VsockAddr>(stream.as_raw_fd()).is_ok_and(|peer| peer.cid() == HOST_CID) {
            return Ok(stream);
        }
    }
}

/// Connects to a port of the host.
pub fn connect_host(port: u32) -> Result<File, Errno> {
    let fd = stream_socket()?;
    connect(fd.as_raw_fd(), &VsockAddr::new(HOST_CID, port))?;
    Ok(File::from(fd))
}
