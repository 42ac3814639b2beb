//! Moves the bytes of one exec between its FIFOs and its streams in the microVM, and hears of its end.
//!
//! Owner: one thread for each exec that runs, with a small stack and one small buffer; hundreds may run at once.
//!
//! Invariant: nothing is dropped and nothing piles up. A FIFO that takes no more makes the stream wait, as a pipe would.

use std::{
    io::{self, Read as _, Write as _},
    net::Shutdown,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::net::UnixStream,
    },
    time::{Duration, Instant},
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::Errno,
};

/// One reading.
const BUFFER_BYTES: usize = 32 * 1024;
/// After the process has exited, how long others that hold its output may still add to it.
const OUTPUT_PATIENCE: Duration = Duration::from_secs(2);

/// Where bytes come from or go to.
#[derive(Debug)]
pub enum End {
    Fifo(OwnedFd),
    Stream(UnixStream),
    /// Takes everything and keeps nothing.
    Nowhere,
}

impl End {
    fn read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Fifo(fd) => rustix::io::read(fd, buffer).map_err(Into::into),
            Self::Stream(stream) => (&*stream).read(buffer),
            Self::Nowhere => Ok(0),
        }
    }

    fn write(&self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Self::Fifo(fd) => rustix::io::write(fd, bytes).map_err(Into::into),
            Self::Stream(stream) => (&*stream).write(bytes),
            Self::Nowhere => Ok(bytes.len()),
        }
    }

    /// Says that nothing more will come.
    fn finish(&self) {
        if let Self::Stream(stream) = self {
            drop(stream.shutdown(Shutdown::Write));
        }
    }
}

impl End {
    fn fd(&self) -> Option<BorrowedFd<'_>> {
        match self {
            Self::Fifo(fd) => Some(fd.as_fd()),
            Self::Stream(stream) => Some(stream.as_fd()),
            Self::Nowhere => None,
        }
    }
}

/// One direction.
#[derive(Debug)]
pub struct Channel {
    from: End,
    to: End,
    /// Read and not written yet.
    waiting: Vec<u8>,
    is_input: bool,
}

impl Channel {
    /// From a FIFO into the process.
    pub fn input(fifo: OwnedFd, stream: UnixStream) -> io::Result<Self> {
        stream.set_nonblocking(true)?;
        Ok(Self {
            from: End::Fifo(fifo),
            to: End::Stream(stream),
            waiting: Vec::new(),
            is_input: true,
        })
    }

    /// From the process into a FIFO, or nowhere.
    pub fn output(stream: UnixStream, fifo: Option<OwnedFd>) -> io::Result<Self> {
        stream.set_nonblocking(true)?;
        Ok(Self {
            from: End::Stream(stream),
            to: fifo.map_or(End::Nowhere, End::Fifo),
            waiting: Vec::new(),
            is_input: false,
        })
    }

    /// What can be waited for; what goes nowhere never waits.
    fn wanted(&self) -> Option<(BorrowedFd<'_>, PollFlags)> {
        if self.waiting.is_empty() {
            self.from.fd().map(|fd| (fd, PollFlags::IN))
        } else {
            self.to.fd().map(|fd| (fd, PollFlags::OUT))
        }
    }

    /// Moves what can be moved; false when this direction has ended.
    fn step(&mut self, buffer: &mut [u8]) -> bool {
        if self.waiting.is_empty() {
            match self.from.read(buffer) {
                Ok(0) => {
                    self.to.finish();
                    return false;
                }
                Ok(length) => self.waiting.extend_from_slice(&buffer[..length]),
                Err(error) => return is_for_now(&error),
            }
        }
        match self.to.write(&self.waiting) {
            Ok(length) if length == self.waiting.len() => {
                // An idle exec keeps no buffer.
                self.waiting = Vec::new();
                true
            }
            Ok(length) => {
                self.waiting.drain(..length);
                true
            }
            Err(error) => is_for_now(&error),
        }
    }
}

fn is_for_now(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
    )
}

/// What tells that a process has ended.
pub trait ExitSource {
    /// How it ended.
    type Exit;
    /// Readable when there is something to hear.
    fn as_fd(&self) -> BorrowedFd<'_>;
    /// Hears it; `None` when it wasn't the end.
    fn hear(&mut self) -> Option<Self::Exit>;
}

/// Moves bytes until the process has exited (`exited` is told at once) and its output has ended, or somebody wants it to stop by
/// closing the other end of `stop`.
pub fn run<S: ExitSource>(
    mut channels: Vec<Channel>,
    mut source: S,
    stop: &OwnedFd,
    exited: impl FnOnce(S::Exit),
) {
    let mut exited = Some(exited);
    let mut deadline = None;
    let mut buffer = vec![0; BUFFER_BYTES];
    while exited.is_some() || channels.iter().any(|channel| !channel.is_input) {
        let Some(ready) = wait(&channels, exited.is_some().then_some(&source), stop, deadline) else {
            return;
        };
        let mut ready = ready.into_iter();
        channels.retain_mut(|channel| !ready.next().unwrap_or(false) || channel.step(&mut buffer));
        if exited.is_some()
            && ready.next().unwrap_or(false)
            && let Some(exit) = source.hear()
            && let Some(exited) = exited.take()
        {
            exited(exit);
            channels.retain(|channel| !channel.is_input);
            deadline = Some(Instant::now() + OUTPUT_PATIENCE);
        }
    }
}

/// Which of them can do something: the channels in their order, then the source. `None` when it is over.
fn wait<S: ExitSource>(
    channels: &[Channel],
    source: Option<&S>,
    stop: &OwnedFd,
    deadline: Option<Instant>,
) -> Option<Vec<bool>> {
    let mut fds: Vec<PollFd<'_>> = channels
        .iter()
        .map(|channel| {
            let (fd, flags) = channel.wanted().unwrap_or((stop.as_fd(), PollFlags::empty()));
            PollFd::from_borrowed_fd(fd, flags)
        })
        .collect();
    if let Some(source) = source {
        fds.push(PollFd::from_borrowed_fd(source.as_fd(), PollFlags::IN));
    }
    fds.push(PollFd::from_borrowed_fd(stop.as_fd(), PollFlags::IN));
    let timeout = match deadline.map(|deadline| deadline.saturating_duration_since(Instant::now())) {
        Some(Duration::ZERO) => return None,
        left => left.and_then(|left| Timespec::try_from(left).ok()),
    };
    match poll(&mut fds, timeout.as_ref()) {
        Ok(_) | Err(Errno::INTR) => {}
        Err(errno) => {
            tracing::error!(%errno, "waiting for an exec");
            return None;
        }
    }
    let mut ready: Vec<bool> = fds.iter().map(|fd| !fd.revents().is_empty()).collect();
    (!ready.pop().unwrap_or(true)).then_some(ready)
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use rustix::pipe::{PipeFlags, pipe_with};

    use super::*;

    /// The end is a byte on a socket.
    struct Byte(UnixStream);

    impl ExitSource for Byte {
        type Exit = u8;

        fn as_fd(&self) -> BorrowedFd<'_> {
            self.0.as_fd()
        }

        fn hear(&mut self) -> Option<u8> {
            let mut byte = [0];
            self.0.read_exact(&mut byte).ok().map(|()| byte[0])
        }
    }

    struct Rig {
        guest_out: UnixStream,
        guest_in: UnixStream,
        guest_exit: UnixStream,
        stdout: std::fs::File,
        stdin: Option<std::fs::File>,
        exits: mpsc::Receiver<u8>,
        thread: std::thread::JoinHandle<()>,
        stop: Option<OwnedFd>,
    }

    fn rig() -> Rig {
        let (guest_out, out) = UnixStream::pair().unwrap();
        let (guest_in, input) = UnixStream::pair().unwrap();
        let (guest_exit, exit) = UnixStream::pair().unwrap();
        let (stdout, stdout_write) = pipe_with(PipeFlags::CLOEXEC).unwrap();
        rustix::io::ioctl_fionbio(&stdout_write, true).unwrap();
        let (stdin_read, stdin) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK).unwrap();
        let (stop_read, stop) = pipe_with(PipeFlags::CLOEXEC).unwrap();
        let (sender, exits) = mpsc::channel();
        let channels = vec![
            Channel::input(stdin_read, input).unwrap(),
            Channel::output(out, Some(stdout_write)).unwrap(),
        ];
        let thread = std::thread::spawn(move || {
            run(channels, Byte(exit), &stop_read, |exit| {
                sender.send(exit).unwrap()
            });
        });
        Rig {
            guest_out,
            guest_in,
            guest_exit,
            stdout: stdout.into(),
            stdin: Some(stdin.into()),
            exits,
            thread,
            stop: Some(stop),
        }
    }

    #[test]
    fn bytes_pass_in_both_directions_and_input_ends() {
        let mut rig = rig();
        let mut stdin = rig.stdin.take().unwrap();
        stdin.write_all(b"question").unwrap();
        drop(stdin);
        let mut text = String::new();
        rig.guest_in.read_to_string(&mut text).unwrap();
        assert_eq!(text, "question");
        rig.guest_out.write_all(b"answer").unwrap();
        drop(rig.guest_out);
        rig.guest_exit.write_all(&[3]).unwrap();
        assert_eq!(rig.exits.recv().unwrap(), 3);
        rig.thread.join().unwrap();
        let mut text = String::new();
        rig.stdout.read_to_string(&mut text).unwrap();
        assert_eq!(text, "answer");
    }

    #[test]
    fn more_than_a_pipe_holds_waits_for_its_reader_and_loses_nothing() {
        let mut rig = rig();
        let sent: Vec<u8> = (0..1_000_000_u32).map(|i| i.to_le_bytes()[0]).collect();
        let (mut guest, bytes) = (rig.guest_out, sent.clone());
        let writer = std::thread::spawn(move || guest.write_all(&bytes).unwrap());
        // The exit is told although the output isn't through.
        rig.guest_exit.write_all(&[0]).unwrap();
        assert_eq!(rig.exits.recv().unwrap(), 0);
        let mut received = Vec::new();
        rig.stdout.read_to_end(&mut received).unwrap();
        assert!(received == sent);
        writer.join().unwrap();
        rig.thread.join().unwrap();
    }

    #[test]
    fn stop_ends_it_although_nobody_reads() {
        let mut rig = rig();
        rig.guest_out.set_nonblocking(true).unwrap();
        while rig.guest_out.write(&[0; 65536]).is_ok() {}
        rig.stop = None;
        rig.thread.join().unwrap();
    }
}
