//! vsock, as far as the agent needs it: it listens, and connects once to say that it does.

use std::{
    fs::File,
    os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd},
};

use nix::{
    errno::Errno,
    sys::socket::{AddressFamily, Backlog, SockFlag, SockType, VsockAddr, bind, connect, listen, socket},
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
pub fn accept_host(listener: &OwnedFd, flags: SockFlag) -> Result<File, Errno> {
    loop {
        match accept(listener, flags | SockFlag::SOCK_CLOEXEC) {
            Ok((stream, HOST_CID)) => return Ok(stream),
            Ok(_) | Err(Errno::EINTR | Errno::ECONNABORTED) => {}
            Err(errno) => return Err(errno),
        }
    }
}

/// A connection and its peer's context id, which one system call gives together.
#[expect(
    unsafe_code,
    reason = "calls accept4 for the peer's address, which nix leaves out"
)]
fn accept(listener: &OwnedFd, flags: SockFlag) -> Result<(File, u32), Errno> {
    const LENGTH: libc::socklen_t = 16;
    const { assert!(size_of::<libc::sockaddr_vm>() == LENGTH as usize) };
    let mut length = LENGTH;
    // SAFETY: a plain structure of integers, for which zeroes are values.
    let mut peer: libc::sockaddr_vm = unsafe { std::mem::zeroed() };
    let address = (&raw mut peer).cast();
    // SAFETY: the address and its length are valid and as large as they say.
    let fd = unsafe { libc::accept4(listener.as_raw_fd(), address, &raw mut length, flags.bits()) };
    let fd = Errno::result(fd)?;
    // SAFETY: the kernel has just given us this descriptor; nobody else owns it.
    let stream = unsafe { File::from_raw_fd(fd) };
    let whole = length == LENGTH && i32::from(peer.svm_family) == libc::AF_VSOCK;
    Ok((stream, if whole { peer.svm_cid } else { libc::VMADDR_CID_ANY }))
}

/// Connects to a port of the host.
pub fn connect_host(port: u32) -> Result<File, Errno> {
    let fd = stream_socket()?;
    connect(fd.as_raw_fd(), &VsockAddr::new(HOST_CID, port))?;
    Ok(File::from(fd))
}
