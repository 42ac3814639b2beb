//! What a client gave for its output: written without ever waiting for it.
//!
//! A pipe or a terminal must have been opened non-blocking by the client (the descriptor it shares with others stays as
//! it is), a socket is written with `MSG_DONTWAIT`, and a regular file never blocks for long. What doesn't fit is kept
//! until the descriptor takes it; how much that may become is the owner's to decide.

use std::{
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    time::Instant,
};

use rustix::{
    fs::{FileType, fstat},
    io::Errno,
    net::{SendFlags, send},
};

/// A descriptor of a client and what waits for it.
#[derive(Debug)]
pub(crate) struct Sink {
    fd: OwnedFd,
    is_socket: bool,
    waiting: Vec<u8>,
    written: usize,
    stalled_since: Option<Instant>,
}

impl Sink {
    pub(crate) fn new(fd: OwnedFd) -> Self {
        let is_socket =
            fstat(&fd).is_ok_and(|stat| FileType::from_raw_mode(stat.st_mode) == FileType::Socket);
        Self {
            fd,
            is_socket,
            waiting: Vec::new(),
            written: 0,
            stalled_since: None,
        }
    }

    fn write(&self, bytes: &[u8]) -> Result<usize, Errno> {
        loop {
            let written = if self.is_socket {
                send(&self.fd, bytes, SendFlags::DONTWAIT | SendFlags::NOSIGNAL)
            } else {
                rustix::io::write(&self.fd, bytes)
            };
            match written {
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Ok(0),
                written => return written,
            }
        }
    }

    /// Writes what the descriptor takes, and keeps the rest.
    pub(crate) fn push(&mut self, mut bytes: &[u8]) -> Result<(), Errno> {
        while self.waiting.is_empty() && !bytes.is_empty() {
            match self.write(bytes)? {
                0 => {
                    self.stalled_since = Some(Instant::now());
                    break;
                }
                length => bytes = &bytes[length..],
            }
        }
        self.waiting.extend_from_slice(bytes);
        Ok(())
    }

    /// Writes more of what waits; call it when the descriptor is writable.
    pub(crate) fn flush(&mut self) -> Result<(), Errno> {
        while self.written < self.waiting.len() {
            match self.write(&self.waiting[self.written..])? {
                0 => return Ok(()),
                length => {
                    self.written += length;
                    self.stalled_since = Some(Instant::now());
                }
            }
        }
        // The memory is given back: a stalled reader is an exception.
        self.waiting = Vec::new();
        self.written = 0;
        self.stalled_since = None;
        Ok(())
    }

    /// How many bytes wait.
    pub(crate) fn backlog(&self) -> usize {
        self.waiting.len() - self.written
    }

    /// Since when it has taken nothing, if bytes wait.
    pub(crate) fn stalled_since(&self) -> Option<Instant> {
        self.stalled_since
    }
}

impl AsFd for Sink {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use std::{io::Read as _, os::unix::net::UnixStream};

    use rustix::pipe::{PipeFlags, pipe_with};

    use super::*;

    #[test]
    fn bytes_a_reader_does_not_take_are_kept_in_order() {
        let (read, write) = pipe_with(PipeFlags::NONBLOCK).unwrap();
        let mut sink = Sink::new(write);
        let bytes: Vec<u8> = (0..300_000_u32).map(|i| i.to_le_bytes()[0]).collect();
        sink.push(&bytes[..200_000]).unwrap();
        sink.push(&bytes[200_000..]).unwrap();
        assert!(sink.backlog() > 0 && sink.stalled_since().is_some());
        let mut got = Vec::new();
        let mut buffer = [0; 4096];
        while got.len() < bytes.len() {
            let length = rustix::io::read(&read, &mut buffer).unwrap();
            got.extend_from_slice(&buffer[..length]);
            sink.flush().unwrap();
        }
        assert!(got == bytes && sink.backlog() == 0 && sink.stalled_since().is_none());
    }

    #[test]
    fn socket_is_not_waited_for_although_it_blocks() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let mut sink = Sink::new(ours.into());
        sink.push(&vec![7; 4 << 20]).unwrap();
        assert!(sink.backlog() > 0);
        let mut buffer = vec![0; 128 * 1024];
        theirs.read_exact(&mut buffer).unwrap();
        let before = sink.backlog();
        sink.flush().unwrap();
        assert!(sink.backlog() < before);
    }

    #[test]
    fn reader_that_has_gone_is_an_error() {
        let (read, write) = pipe_with(PipeFlags::NONBLOCK).unwrap();
        drop(read);
        assert_eq!(Sink::new(write).push(b"x"), Err(Errno::PIPE));
    }
}
