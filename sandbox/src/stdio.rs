//! Streams to a process: connections through the VMM to the agent's stdio port, and the threads that move bytes.
//!
//! A stream's end is the half-close of its connection; nothing in between keeps, reorders or drops bytes.

use std::{
    io::{self, ErrorKind, Read as _, Write as _},
    net::Shutdown,
    os::{fd::BorrowedFd, unix::net::UnixStream},
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

use agent_protocol::{
    STDIO_PORT,
    stdio::{Stream, StreamHeader},
};
use rustix::{
    io::Errno,
    net::{RecvFlags, recv},
};

use crate::{
    DetachKeys, Result, SandboxError, detach_keys::KeyFilter, log_driver::OutputStream, session::Input,
    spec::ProcessSpec,
};

/// How long the VMM and the agent may take to accept a connection.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// One read or write.
const BUFFER_BYTES: usize = 256 * 1024;
/// Longest answer to `CONNECT`.
const MAX_ANSWER_BYTES: usize = 32;

/// Connects to ports of the guest, all at once.
pub(crate) fn connect_ports(
    connect: impl Fn() -> io::Result<UnixStream>,
    ports: &[u32],
) -> io::Result<Vec<UnixStream>> {
    let mut streams = Vec::with_capacity(ports.len());
    for port in ports {
        streams.push(request_port(&connect, *port)?);
    }
    for stream in &mut streams {
        read_answer(stream)?;
    }
    Ok(streams)
}

/// Asks for a connection to a port; the answer is yet to come.
fn request_port(connect: &impl Fn() -> io::Result<UnixStream>, port: u32) -> io::Result<UnixStream> {
    let mut stream = connect()?;
    stream.write_all(format!("CONNECT {port}\n").as_bytes())?;
    Ok(stream)
}

/// Reads `OK <port>\n`, and not one byte more: what follows belongs to the stream.
fn read_answer(stream: &mut UnixStream) -> io::Result<()> {
    stream.set_read_timeout(Some(CONNECT_TIMEOUT))?;
    let mut answer = Vec::with_capacity(MAX_ANSWER_BYTES);
    while answer.last() != Some(&b'\n') {
        let mut seen = [0; MAX_ANSWER_BYTES];
        let room = MAX_ANSWER_BYTES - answer.len();
        let (length, _) = recv(&*stream, &mut seen[..room], RecvFlags::PEEK)?;
        let line = memchr::memchr(b'\n', &seen[..length]).map_or(length, |end| end + 1);
        if line == 0 {
            return Err(io::Error::new(
                ErrorKind::ConnectionRefused,
                "the guest refused the connection",
            ));
        }
        stream.read_exact(&mut seen[..line])?;
        answer.extend_from_slice(&seen[..line]);
    }
    stream.set_read_timeout(None)?;
    if answer.starts_with(b"OK ") {
        Ok(())
    } else {
        Err(ErrorKind::InvalidData.into())
    }
}

/// The streams a process with or without a terminal, with or without an input, declares to have.
fn declared(terminal: bool, stdin: bool) -> &'static [Stream] {
    match (terminal, stdin) {
        (true, _) => &[Stream::Terminal],
        (false, true) => &[Stream::Stdout, Stream::Stderr, Stream::Stdin],
        (false, false) => &[Stream::Stdout, Stream::Stderr],
    }
}

/// A process's connected streams.
#[derive(Debug)]
pub(crate) struct ProcessStreams {
    input: Option<UnixStream>,
    outputs: Vec<(Stream, UnixStream)>,
}

impl ProcessStreams {
    /// Asks for the streams a process declares and, first, for one to `port`. Nothing is waited for: what is written
    /// to a stream before it stands waits in the VMM. [`ProcessStreams::confirm`] must follow before anything is read.
    pub(crate) fn open_with(
        connect: impl Fn() -> io::Result<UnixStream>,
        port: u32,
        (container_id, exec_id): (&str, &str),
        process: &ProcessSpec,
    ) -> Result<(UnixStream, Self)> {
        Self::open_beside(
            connect,
            port,
            (container_id, exec_id),
            process.terminal,
            process.stdin,
        )
    }

    /// The same for a process of which only that is known that matters.
    pub(crate) fn open_beside(
        connect: impl Fn() -> io::Result<UnixStream>,
        port: u32,
        ids: (&str, &str),
        terminal: bool,
        stdin: bool,
    ) -> Result<(UnixStream, Self)> {
        let first =
            request_port(&connect, port).map_err(|source| SandboxError::AgentConnection { source })?;
        Ok((first, Self::open(connect, ids, terminal, stdin)?))
    }

    /// The same without a stream to another port.
    pub(crate) fn open(
        connect: impl Fn() -> io::Result<UnixStream>,
        (container_id, exec_id): (&str, &str),
        terminal: bool,
        stdin: bool,
    ) -> Result<Self> {
        let connection = |source| SandboxError::AgentConnection { source };
        let kinds = declared(terminal, stdin);
        let mut streams = Self {
            input: None,
            outputs: Vec::with_capacity(kinds.len()),
        };
        for stream in kinds.iter().copied() {
            let mut connected = request_port(&connect, STDIO_PORT).map_err(connection)?;
            let header = StreamHeader {
                container_id: container_id.to_owned(),
                exec_id: exec_id.to_owned(),
                stream,
            };
            connected.write_all(&header.encode()?).map_err(connection)?;
            match stream {
                Stream::Stdin => streams.input = Some(connected),
                Stream::Terminal => {
                    let input = connected
                        .try_clone()
                        .map_err(SandboxError::system("duplicating a descriptor"))?;
                    streams.input = Some(input);
                    streams.outputs.push((stream, connected));
                }
                Stream::Stdout | Stream::Stderr => streams.outputs.push((stream, connected)),
            }
        }
        Ok(streams)
    }

    /// Waits until the guest has accepted every stream, and `first`.
    pub(crate) fn confirm<'a>(
        &'a mut self,
        first: impl IntoIterator<Item = &'a mut UnixStream>,
    ) -> Result<()> {
        let has_terminal = self.outputs.iter().any(|(stream, _)| *stream == Stream::Terminal);
        let input = self.input.iter_mut().filter(|_| !has_terminal);
        let outputs = self.outputs.iter_mut().map(|(_, stream)| stream);
        first
            .into_iter()
            .chain(outputs)
            .chain(input)
            .try_for_each(read_answer)
            .map_err(|source| SandboxError::AgentConnection { source })
    }

    /// The process's input, and its outputs as a log names them.
    pub(crate) fn into_parts(self) -> (Option<UnixStream>, Vec<(OutputStream, UnixStream)>) {
        let kind = |stream| match stream {
            Stream::Stderr => OutputStream::Stderr,
            _ => OutputStream::Stdout,
        };
        let outputs = self
            .outputs
            .into_iter()
            .map(|(stream, socket)| (kind(stream), socket));
        (self.input, outputs.collect())
    }

    /// Starts to move bytes between the streams and this process's own; stdin's with the keys that detach, if it is a
    /// terminal's.
    pub(crate) fn start(self, forward_stdin: bool, keys: Option<DetachKeys>) -> Result<Pumps> {
        let (sender, finished) = mpsc::channel();
        let count = self.outputs.len();
        for (kind, stream) in self.outputs {
            let sender = sender.clone();
            spawn("output", move || {
                let target = match kind {
                    Stream::Stderr => rustix::stdio::stderr(),
                    _ => rustix::stdio::stdout(),
                };
                copy_output(&stream, target);
                let _ = sender.send(());
            })?;
        }
        let input = self.input.filter(|_| forward_stdin).map(|stream| {
            Input {
                stream,
                keys: keys.map(KeyFilter::new),
                ends: true,
            }
            .spawn()
        });
        let detached = input.transpose()?;
        Ok(Pumps {
            finished,
            running: count,
            detached,
        })
    }
}

fn spawn(name: &str, body: impl FnOnce() + Send + 'static) -> Result<()> {
    thread::Builder::new()
        .name(name.to_owned())
        .spawn(body)
        .map(drop)
        .map_err(SandboxError::system("starting a thread"))
}

/// The threads that move a process's output.
#[derive(Debug)]
pub(crate) struct Pumps {
    finished: mpsc::Receiver<()>,
    running: usize,
    /// Readable when the user detaches.
    pub(crate) detached: Option<UnixStream>,
}

impl Pumps {
    /// Waits until all output has arrived and been written, or the time has passed.
    pub(crate) fn finish(&mut self, timeout: Option<Duration>) {
        let deadline = timeout.map(|timeout| Instant::now() + timeout);
        while self.running > 0 {
            let finished = match deadline {
                None => self.finished.recv().is_ok(),
                Some(deadline) => {
                    let left = deadline.saturating_duration_since(Instant::now());
                    self.finished.recv_timeout(left).is_ok()
                }
            };
            if !finished {
                return;
            }
            self.running -= 1;
        }
    }
}

fn write_all(target: BorrowedFd<'_>, mut bytes: &[u8]) -> std::result::Result<(), Errno> {
    while !bytes.is_empty() {
        match rustix::io::write(target, bytes) {
            Ok(length) => bytes = &bytes[length..],
            Err(Errno::INTR) => {}
            // Somebody we share the descriptor with made it non-blocking.
            Err(Errno::AGAIN) => wait_writable(target)?,
            Err(errno) => return Err(errno),
        }
    }
    Ok(())
}

fn wait_writable(target: BorrowedFd<'_>) -> std::result::Result<(), Errno> {
    use rustix::event::{PollFd, PollFlags, poll};
    match poll(&mut [PollFd::from_borrowed_fd(target, PollFlags::OUT)], None) {
        Ok(_) | Err(Errno::INTR) => Ok(()),
        Err(errno) => Err(errno),
    }
}

pub(crate) fn copy_output(mut stream: &UnixStream, target: BorrowedFd<'_>) {
    let mut buffer = vec![0; BUFFER_BYTES];
    loop {
        match stream.read(&mut buffer) {
            Ok(0) => return,
            Ok(length) => {
                if write_all(target, &buffer[..length]).is_err() {
                    // Our reader has gone; the process learns it by SIGPIPE.
                    drop(stream.shutdown(Shutdown::Both));
                    return;
                }
            }
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(_) => return,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answer_is_read_to_its_end_and_no_further() {
        let (mut ours, mut theirs) = UnixStream::pair().unwrap();
        theirs.write_all(b"OK 1073741824\nrest").unwrap();
        read_answer(&mut ours).unwrap();
        drop(theirs);
        let mut rest = String::new();
        ours.read_to_string(&mut rest).unwrap();
        assert_eq!(rest, "rest");
    }

    #[test]
    fn closed_connection_is_a_refusal() {
        let (mut ours, theirs) = UnixStream::pair().unwrap();
        drop(theirs);
        assert_eq!(
            read_answer(&mut ours).unwrap_err().kind(),
            ErrorKind::ConnectionRefused
        );
    }

    #[test]
    fn all_output_arrives_before_it_counts_as_finished() {
        let (sender, finished) = mpsc::channel();
        let mut pumps = Pumps {
            finished,
            running: 2,
            detached: None,
        };
        sender.send(()).unwrap();
        pumps.finish(Some(Duration::from_millis(5)));
        assert_eq!(pumps.running, 1);
        sender.send(()).unwrap();
        pumps.finish(None);
        assert_eq!(pumps.running, 0);
    }
}
