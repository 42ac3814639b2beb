//! What a process being set up and the agent tell each other, over a `SOCK_SEQPACKET` pair.
//!
//! ```text
//!  agent                       intermediate            process
//!    │ ──────── fork ──────────────► │                    │
//!    │ ◄─────────────── Pid ──────── │ ───── fork ──────► │
//!    │ ◄───────────────────── Terminal (descriptor), if any │
//!    │ ◄───────────────────── Ready ───────────────────────│
//!    │ ────────────────────── Start ──────────────────────►│
//!    │ ◄───────────────────── end of file: execve worked ──│   (or Failure, at any point)
//! ```

use std::{
    io::{IoSlice, IoSliceMut},
    os::fd::{AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd},
};

use nix::{
    errno::Errno,
    sys::socket::{
        AddressFamily, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType, recvmsg, sendmsg,
        socketpair,
    },
};

use crate::error::AgentError;

/// Which part of the setup failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum FailureKind {
    /// A step before the program.
    Setup = 1,
    /// The working directory.
    WorkingDirectory = 2,
    /// `execve` itself.
    Exec = 3,
}

/// A failed setup, as the process reports it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    /// Which part.
    pub kind: FailureKind,
    /// What was tried, or the path it was about.
    pub subject: String,
    /// What the kernel said.
    pub errno: Errno,
}

impl From<Failure> for AgentError {
    fn from(failure: Failure) -> Self {
        let Failure { kind, subject, errno } = failure;
        match kind {
            FailureKind::Setup => Self::Setup { step: subject, errno },
            FailureKind::WorkingDirectory => Self::WorkingDirectory { path: subject, errno },
            FailureKind::Exec => Self::Exec {
                command: subject,
                errno,
            },
        }
    }
}

/// One message to the agent.
#[derive(Debug)]
pub enum Message {
    /// The process exists.
    Pid(i32),
    /// The agent's end of the process's terminal.
    Terminal(OwnedFd),
    /// The process waits for [`START`].
    Ready,
    /// The setup failed; the process exits.
    Failure(Failure),
}

/// What the agent sends to let a process execute its program.
pub const START: &[u8] = b"S";

/// Longest subject of a failure that is sent.
const MAX_SUBJECT_BYTES: usize = 4096;

/// A connected pair, closed on exec: the agent's end and the process's.
pub fn pair() -> Result<(OwnedFd, OwnedFd), Errno> {
    socketpair(
        AddressFamily::Unix,
        SockType::SeqPacket,
        None,
        SockFlag::SOCK_CLOEXEC,
    )
}

/// Sends a message to the agent.
pub fn send(channel: BorrowedFd<'_>, message: &Message) -> Result<(), Errno> {
    let mut bytes = Vec::with_capacity(64);
    let mut fds = Vec::new();
    match message {
        Message::Pid(pid) => {
            bytes.push(b'P');
            bytes.extend(pid.to_ne_bytes());
        }
        Message::Terminal(fd) => {
            bytes.push(b'T');
            fds.push(fd.as_raw_fd());
        }
        Message::Ready => bytes.push(b'R'),
        Message::Failure(failure) => {
            bytes.extend([b'F', failure.kind as u8]);
            bytes.extend((failure.errno as i32).to_ne_bytes());
            bytes.extend(failure.subject.bytes().take(MAX_SUBJECT_BYTES));
        }
    }
    let rights = [ControlMessage::ScmRights(&fds)];
    let control: &[ControlMessage<'_>] = if fds.is_empty() { &[] } else { &rights };
    sendmsg::<()>(
        channel.as_raw_fd(),
        &[IoSlice::new(&bytes)],
        control,
        MsgFlags::MSG_NOSIGNAL,
        None,
    )
    .map(drop)
}

/// Receives a message; `None` at the end of file.
#[expect(unsafe_code, reason = "takes over a descriptor received by SCM_RIGHTS")]
pub fn receive(channel: BorrowedFd<'_>) -> Result<Option<Message>, Errno> {
    let mut bytes = [0; 6 + MAX_SUBJECT_BYTES];
    let mut control = nix::cmsg_space!([std::os::fd::RawFd; 1]);
    let (length, terminal) = loop {
        let mut slices = [IoSliceMut::new(&mut bytes)];
        let flags = MsgFlags::MSG_CMSG_CLOEXEC;
        let received = match recvmsg::<()>(channel.as_raw_fd(), &mut slices, Some(&mut control), flags) {
            Ok(received) => received,
            Err(Errno::EINTR) => continue,
            // The process ended with our last message unread.
            Err(Errno::ECONNRESET) => return Ok(None),
            Err(errno) => return Err(errno),
        };
        let mut terminal = None;
        for message in received.cmsgs()? {
            if let ControlMessageOwned::ScmRights(fds) = message {
                for fd in fds {
                    // SAFETY: the kernel has just given us this descriptor; nobody else owns it.
                    terminal = Some(unsafe { OwnedFd::from_raw_fd(fd) });
                }
            }
        }
        break (received.bytes, terminal);
    };
    match (&bytes[..length], terminal) {
        ([], _) => Ok(None),
        ([b'R'], _) => Ok(Some(Message::Ready)),
        ([b'T'], Some(terminal)) => Ok(Some(Message::Terminal(terminal))),
        ([b'P', a, b, c, d], _) => Ok(Some(Message::Pid(i32::from_ne_bytes([*a, *b, *c, *d])))),
        ([b'F', kind, a, b, c, d, subject @ ..], _) => Ok(Some(Message::Failure(Failure {
            kind: match kind {
                2 => FailureKind::WorkingDirectory,
                3 => FailureKind::Exec,
                _ => FailureKind::Setup,
            },
            subject: String::from_utf8_lossy(subject).into_owned(),
            errno: Errno::from_raw(i32::from_ne_bytes([*a, *b, *c, *d])),
        }))),
        _ => Err(Errno::EBADMSG),
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd as _;

    use super::*;

    #[test]
    fn failure_survives_the_channel() {
        let (ours, theirs) = pair().unwrap();
        let failure = Failure {
            kind: FailureKind::Exec,
            subject: "/bin/none".into(),
            errno: Errno::ENOENT,
        };
        send(theirs.as_fd(), &Message::Failure(failure.clone())).unwrap();
        drop(theirs);
        assert!(matches!(receive(ours.as_fd()), Ok(Some(Message::Failure(got))) if got == failure));
        assert!(matches!(receive(ours.as_fd()), Ok(None)));
    }

    #[test]
    fn terminal_arrives_as_a_descriptor() {
        let (ours, theirs) = pair().unwrap();
        let (keep, give) = pair().unwrap();
        send(theirs.as_fd(), &Message::Terminal(give)).unwrap();
        let Ok(Some(Message::Terminal(got))) = receive(ours.as_fd()) else {
            panic!("no terminal")
        };
        send(got.as_fd(), &Message::Ready).unwrap();
        assert!(matches!(receive(keep.as_fd()), Ok(Some(Message::Ready))));
    }
}
