//! Sockets that a caller passes by path, and the terminal of the caller itself.

use std::{
    fs,
    io::{self, IoSlice},
    os::{
        fd::{AsFd as _, AsRawFd as _},
        unix::net::UnixStream,
    },
    path::Path,
};

use anyhow::{Context as _, Result};
use rustix::{
    net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg},
    process::{Pid, PidfdFlags, pidfd_open},
    stdio,
    termios::{OptionalActions, Termios, isatty, tcgetattr, tcgetwinsize, tcsetattr},
};

/// Connects to a socket, also where its path is longer than a socket's address.
fn connect(path: &Path) -> io::Result<UnixStream> {
    match UnixStream::connect(path) {
        Err(error) if error.kind() == io::ErrorKind::InvalidInput => {
            let dir = fs::File::open(path.parent().unwrap_or(Path::new(".")))?;
            let name = path.file_name().unwrap_or_default();
            let short = Path::new("/proc/self/fd")
                .join(dir.as_raw_fd().to_string())
                .join(name);
            UnixStream::connect(short)
        }
        connected => connected,
    }
}

/// Connects to `--console-socket`.
pub(crate) fn connect_console(path: &Path) -> Result<UnixStream> {
    connect(path).with_context(|| format!("cannot connect to the console socket {}", path.display()))
}

/// Sends the descriptor of a process to `--pidfd-socket`.
pub(crate) fn send_pidfd(path: &Path, pid: i32) -> Result<()> {
    let send = || -> io::Result<()> {
        let socket = connect(path)?;
        let pid = Pid::from_raw(pid).ok_or(io::ErrorKind::NotFound)?;
        let pidfd = pidfd_open(pid, PidfdFlags::empty())?;
        let fds = [pidfd.as_fd()];
        let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        ancillary.push(SendAncillaryMessage::ScmRights(&fds));
        sendmsg(
            &socket,
            &[IoSlice::new(b"pidfd")],
            &mut ancillary,
            SendFlags::NOSIGNAL,
        )?;
        Ok(())
    };
    send().with_context(|| format!("cannot send to the pidfd socket {}", path.display()))
}

/// This process's terminal in raw mode, until it is dropped.
#[derive(Debug)]
pub(crate) struct RawTerminal {
    before: Termios,
}

impl RawTerminal {
    /// `None` where standard input is no terminal.
    pub(crate) fn enter() -> Option<Self> {
        let input = stdio::stdin();
        if !isatty(input) {
            return None;
        }
        let before = tcgetattr(input).ok()?;
        let mut raw = before.clone();
        raw.make_raw();
        tcsetattr(input, OptionalActions::Now, &raw).ok()?;
        Some(Self { before })
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        let _ = tcsetattr(stdio::stdin(), OptionalActions::Now, &self.before);
    }
}

/// Rows and columns of this process's terminal.
pub(crate) fn window() -> Option<(u16, u16)> {
    let size = tcgetwinsize(stdio::stdout())
        .or_else(|_| tcgetwinsize(stdio::stdin()))
        .ok()?;
    Some((size.ws_row, size.ws_col))
}
