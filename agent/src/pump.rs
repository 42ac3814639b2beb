//! Moves bytes between a process's pipe and a stream of the host, inside the kernel.
//!
//! A pass is one system call, and no memory of the agent is touched: each of both would cost a PVM host's guest an exit.
//! A pipe that is once found full becomes larger, and its thread no longer interrupts the process whenever there is something
//! to move: a process that prints much runs until it has to wait, instead of changing places with the thread each time.
//!
//! Thread: one for each direction of each stream.
//!
//! Invariant: the kernel holds the pipe's lock while it moves bytes, and a process that wants the pipe then can't even be
//! killed. So the socket is non-blocking, and it is waited for outside.

use std::{fs::File, os::fd::AsFd as _};

use nix::{
    errno::Errno,
    fcntl::{FcntlArg, SpliceFFlags, fcntl, splice},
    poll::{PollFd, PollFlags, PollTimeout, poll},
};

use crate::sys;

/// What a pipe that was once full can hold from then on, the most that the kernel's `pipe-max-size` allows, and what one
/// pass may move.
const LARGE_PIPE_BYTES: i32 = 1 << 20;
const PASS_BYTES: usize = 1 << 20;
/// What a pipe can hold when it is made.
const PIPE_BYTES: usize = 64 << 10;

/// Which of the two is the socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// From a pipe to the host.
    Output,
    /// From the host to a pipe.
    Input,
}

/// Moves everything, until either end is closed. The socket must be non-blocking.
pub fn move_all(from: &File, to: &File, direction: Direction) -> Result<(), Errno> {
    let (socket, pipe, awaited) = match direction {
        Direction::Output => (to, from, PollFlags::POLLOUT),
        Direction::Input => (from, to, PollFlags::POLLIN),
    };
    let mut bulk = None;
    loop {
        match splice(from, None, to, None, PASS_BYTES, SpliceFFlags::empty()) {
            Ok(0) => return Ok(()),
            Ok(length) => {
                if length >= PIPE_BYTES && bulk.is_none() {
                    // One that can't be made larger works as well, in more passes.
                    let _ = fcntl(pipe, FcntlArg::F_SETPIPE_SZ(LARGE_PIPE_BYTES));
                    bulk = Some(Yielding::begin());
                }
            }
            Err(Errno::EINTR) => {}
            Err(Errno::EAGAIN) => {
                let mut fds = [PollFd::new(socket.as_fd(), awaited)];
                match poll(&mut fds, PollTimeout::NONE) {
                    Ok(_) | Err(Errno::EINTR) => {}
                    Err(errno) => return Err(errno),
                }
            }
            Err(errno) => return Err(errno),
        }
    }
}

/// While it exists, this thread waits for its turn when it is woken up.
struct Yielding;

impl Yielding {
    fn begin() -> Self {
        // A refusal costs time only.
        let _ = sys::set_batch(true);
        Self
    }
}

impl Drop for Yielding {
    fn drop(&mut self) {
        // The thread's next work may be urgent.
        let _ = sys::set_batch(false);
    }
}

#[cfg(test)]
mod tests {
    use std::{
        io::{Read as _, Write as _},
        os::{fd::OwnedFd, unix::net::UnixStream},
        thread::{self, JoinHandle},
    };

    use nix::fcntl::OFlag;

    use super::*;

    type Ends = (File, File, JoinHandle<Result<(), Errno>>);

    /// What is at the far ends of a pump: the writer's and the reader's.
    fn pumped(direction: Direction) -> Ends {
        let (read, write) = std::io::pipe().unwrap();
        let (read, write) = (File::from(OwnedFd::from(read)), File::from(OwnedFd::from(write)));
        let (ours, theirs) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        let (ours, theirs) = (File::from(OwnedFd::from(ours)), File::from(OwnedFd::from(theirs)));
        match direction {
            Direction::Output => {
                let pump = thread::spawn(move || move_all(&read, &ours, direction));
                (write, theirs, pump)
            }
            Direction::Input => {
                let pump = thread::spawn(move || move_all(&ours, &write, direction));
                (theirs, read, pump)
            }
        }
    }

    #[test]
    fn everything_arrives_in_order_and_then_the_end() {
        // A period that is no power of two shows lost, doubled or swapped blocks.
        let bytes: Vec<u8> = (0..5_000_000_u32).map(|i| (i % 251).to_le_bytes()[0]).collect();
        for direction in [Direction::Output, Direction::Input] {
            let (mut writer, mut reader, pump) = pumped(direction);
            let sent = bytes.clone();
            let writing = thread::spawn(move || {
                // Pieces of every size: single bytes, parts of a page, more than a pipe holds.
                let mut rest = &sent[..];
                for size in [1, 7, 4095, 4097, 70_000, 1 << 20].into_iter().cycle() {
                    if rest.is_empty() {
                        break;
                    }
                    let (piece, after) = rest.split_at(rest.len().min(size));
                    writer.write_all(piece).unwrap();
                    rest = after;
                }
            });
            let mut got = vec![0; bytes.len()];
            reader.read_exact(&mut got).unwrap();
            writing.join().unwrap();
            pump.join().unwrap().unwrap();
            assert!(got == bytes, "{direction:?}");
            assert_eq!(reader.read(&mut [0]).unwrap(), 0);
        }
    }

    #[test]
    fn reader_that_has_gone_ends_it() {
        for direction in [Direction::Output, Direction::Input] {
            let (mut writer, reader, pump) = pumped(direction);
            drop(reader);
            writer.write_all(b"x").unwrap();
            assert_eq!(pump.join().unwrap(), Err(Errno::EPIPE), "{direction:?}");
        }
    }

    #[test]
    fn slow_reader_of_the_socket_keeps_nobody_from_the_pipe() {
        let (mut writer, reader, pump) = pumped(Direction::Output);
        // Until neither socket nor pipe has room.
        fcntl(&writer, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).unwrap();
        let mut refused = 0;
        while refused < 100 {
            match writer.write(&[7; 4096]) {
                Ok(1..) => refused = 0,
                _ => {
                    refused += 1;
                    thread::sleep(std::time::Duration::from_millis(1));
                }
            }
        }
        // It would wait for the lock, for ever.
        drop(writer);
        drop(reader);
        assert!(pump.join().unwrap().is_err());
    }
}
