//! The host's side of a container's terminal, for who gave a console socket.
//!
//! The guest has the real terminal, with its line discipline. On the host there is a pair in raw mode: its master goes to
//! the console socket, as runc sends it, and the monitor relays between its other end and the guest. That end is the
//! monitor's controlling terminal, so a change of size arrives as SIGWINCH, and the master's close as SIGHUP.

use std::{
    io::{self, IoSlice},
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::net::UnixStream,
    },
};

use rustix::{
    fs::{Mode, OFlags, open},
    net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg},
    process::ioctl_tiocsctty,
    pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt},
    termios::{OptionalActions, tcgetattr, tcgetwinsize, tcsetattr, tcsetwinsize},
};

use super::error::{BundleError, Result};
use crate::SandboxError;

/// The end of the pair that the monitor relays.
#[derive(Debug)]
pub(super) struct HostTerminal {
    device: OwnedFd,
}

impl HostTerminal {
    /// Makes a pair and gives its master away. The caller leads a session without a terminal.
    pub(super) fn give_to(socket: &UnixStream, size: Option<(u16, u16)>) -> Result<Self> {
        let opening = SandboxError::system::<io::Error>;
        let (master, name, device) = open_pair().map_err(opening("opening a terminal"))?;
        prepare(&device, size).map_err(opening("preparing a terminal"))?;
        send_master(socket, &master, name.as_bytes())
            .map_err(|source| BundleError::ConsoleSocket { source })?;
        Ok(Self { device })
    }

    /// Rows and columns, once somebody has said them.
    pub(super) fn size(&self) -> Option<(u16, u16)> {
        let size = tcgetwinsize(&self.device).ok()?;
        (size.ws_row != 0 && size.ws_col != 0).then_some((size.ws_row, size.ws_col))
    }

    pub(super) fn duplicate(&self) -> Result<OwnedFd> {
        self.device
            .try_clone()
            .map_err(SandboxError::system("duplicating a descriptor"))
            .map_err(Into::into)
    }
}

impl AsFd for HostTerminal {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.device.as_fd()
    }
}

fn open_pair() -> io::Result<(OwnedFd, String, OwnedFd)> {
    let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)?;
    grantpt(&master)?;
    unlockpt(&master)?;
    let name = ptsname(&master, Vec::new())?.to_string_lossy().into_owned();
    let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC | OFlags::NONBLOCK;
    let device = open(name.as_str(), flags, Mode::empty())?;
    Ok((master, name, device))
}

fn prepare(device: &OwnedFd, size: Option<(u16, u16)>) -> io::Result<()> {
    let mut attributes = tcgetattr(device)?;
    attributes.make_raw();
    tcsetattr(device, OptionalActions::Now, &attributes)?;
    if let Some((rows, columns)) = size {
        let mut window = tcgetwinsize(device)?;
        (window.ws_row, window.ws_col) = (rows, columns);
        tcsetwinsize(device, window)?;
    }
    ioctl_tiocsctty(device)?;
    Ok(())
}

/// One message: the terminal's name, and its master beside it.
fn send_master(socket: &UnixStream, master: &OwnedFd, name: &[u8]) -> io::Result<()> {
    let fds = [master.as_fd()];
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    ancillary.push(SendAncillaryMessage::ScmRights(&fds));
    sendmsg(socket, &[IoSlice::new(name)], &mut ancillary, SendFlags::NOSIGNAL)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pair_is_raw_and_has_a_name() {
        let (master, name, device) = open_pair().unwrap();
        assert!(name.starts_with("/dev/pts/"), "{name}");
        let mut attributes = tcgetattr(&device).unwrap();
        attributes.make_raw();
        tcsetattr(&device, OptionalActions::Now, &attributes).unwrap();
        rustix::io::write(&master, b"\x03a\n").unwrap();
        let mut buffer = [0; 8];
        let length = rustix::io::read(&device, &mut buffer).unwrap();
        // Neither a signal, nor an echo, nor another line end.
        assert_eq!(&buffer[..length], b"\x03a\n");
    }
}
