//! Streams between the host and a process: each a vsock connection of its own, each moved by a thread of its own.
//!
//! A stream waits in [`Streams`] from its arrival until its process starts. The process sees pipes (or its
//! terminal), never the socket: `/dev/stdout` can be opened again, and the end of a pipe is the end of
//! everybody who had it. The half-close of a socket is the end of the stream in that direction.

use std::{
    collections::HashMap,
    fs::File,
    io::{ErrorKind, Read as _, Write as _},
    os::fd::{AsFd as _, AsRawFd as _, OwnedFd},
    sync::{Arc, Condvar, Mutex, PoisonError},
    thread,
    time::{Duration, Instant},
};

use agent_protocol::{
    Process,
    stdio::{FIXED_BYTES, FixedPart, Stream, StreamHeader},
};
use nix::{
    errno::Errno,
    fcntl::{FcntlArg, OFlag, fcntl, open},
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::{
        socket::{Shutdown, SockFlag, shutdown},
        stat::Mode,
    },
    unistd::{dup, pipe2},
};

use crate::{
    error::AgentError,
    log::log,
    pump::{self, Direction},
    terminal::Terminal,
    vsock, workers,
};

/// How long the host may take for the header, and for attaching what it declared.
const PATIENCE: Duration = Duration::from_secs(10);
/// Streams that wait for their process; beyond it the oldest is closed.
const MAX_WAITING: usize = 1024;
/// A header and what may have come behind it.
const HEADER_BUFFER_BYTES: usize = 1024;
/// One read or write of a terminal, which passes no more at a time.
const BUFFER_BYTES: usize = 4096;

/// A stream of the host.
#[derive(Debug)]
pub struct Arrived {
    /// Non-blocking.
    socket: File,
    /// What came with its header.
    ahead: Vec<u8>,
    since: Instant,
}

impl Arrived {
    /// To be read and written by whoever may wait for the host: what was read already, and the rest.
    pub fn into_blocking(self) -> Result<(Vec<u8>, File), AgentError> {
        fcntl(&self.socket, FcntlArg::F_SETFL(OFlag::empty()))
            .map_err(AgentError::setup("preparing a stream"))?;
        Ok((self.ahead, self.socket))
    }
}

/// Streams that have arrived and whose process hasn't started.
#[derive(Debug, Default)]
pub struct Streams {
    waiting: Mutex<HashMap<StreamHeader, Arrived>>,
    arrived: Condvar,
}

impl Streams {
    fn offer(&self, header: StreamHeader, stream: Arrived) {
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        if waiting.len() >= MAX_WAITING {
            let oldest = waiting
                .iter()
                .min_by_key(|(_, stream)| stream.since)
                .map(|(header, _)| header.clone());
            oldest.and_then(|header| waiting.remove(&header));
        }
        waiting.insert(header, stream);
        self.arrived.notify_all();
    }

    /// Closes the streams of a process that won't be started.
    pub fn forget(&self, container_id: &str, exec_id: &str) {
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        waiting.retain(|header, _| header.container_id != container_id || header.exec_id != exec_id);
    }

    /// Takes a stream, waiting for it to arrive.
    pub fn take(&self, header: &StreamHeader) -> Result<Arrived, AgentError> {
        let deadline = Instant::now() + PATIENCE;
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            if let Some(stream) = waiting.remove(header) {
                return Ok(stream);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(AgentError::StreamsMissing);
            }
            (waiting, _) = self
                .arrived
                .wait_timeout(waiting, left)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Accepts streams for ever.
    pub fn serve(self: &Arc<Self>, listener: &OwnedFd) {
        loop {
            let socket = match vsock::accept_host(listener, SockFlag::SOCK_NONBLOCK) {
                Ok(socket) => socket,
                Err(errno) => {
                    log!("accepting a stream: {errno}");
                    thread::sleep(Duration::from_millis(100));
                    continue;
                }
            };
            // The header follows the connection at once; a host that stalls here stalls only itself.
            match read_header(socket) {
                Ok((header, stream)) => self.offer(header, stream),
                Err(error) => log!("reading a stream's header: {error}"),
            }
        }
    }
}

/// Reads a header, and whatever came with it, in one go if it is there in one piece.
fn read_header(mut socket: File) -> Result<(StreamHeader, Arrived), Box<dyn std::error::Error>> {
    let since = Instant::now();
    let mut buffer = [0; HEADER_BUFFER_BYTES];
    let mut filled = 0;
    loop {
        let left = PATIENCE.saturating_sub(since.elapsed());
        let mut fds = [PollFd::new(socket.as_fd(), PollFlags::POLLIN)];
        if poll(&mut fds, PollTimeout::try_from(left)?)? == 0 {
            return Err(std::io::Error::from(ErrorKind::TimedOut).into());
        }
        match socket.read(&mut buffer[filled..]) {
            Ok(0) => return Err(std::io::Error::from(ErrorKind::UnexpectedEof).into()),
            Ok(length) => filled += length,
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {}
            Err(error) => return Err(error.into()),
        }
        let Some((fixed, rest)) = buffer[..filled].split_first_chunk::<FIXED_BYTES>() else {
            continue;
        };
        let fixed = FixedPart::parse(*fixed)?;
        // It is at most half of the buffer.
        if let Some((ids, ahead)) = rest.split_at_checked(fixed.remaining_bytes()) {
            let header = fixed.complete(ids)?;
            let ahead = ahead.to_vec();
            return Ok((header, Arrived { socket, ahead, since }));
        }
    }
}

/// The agent's ends of a process's streams.
#[derive(Debug, Default)]
pub struct AgentEnds {
    stdin: Option<OwnedFd>,
    stdout: Option<OwnedFd>,
    stderr: Option<OwnedFd>,
    /// The process's terminal, in place of the other three.
    pub terminal: Option<Arc<File>>,
    attach_terminal: bool,
}

/// Makes a process's streams: what it gets as stdin, stdout and stderr, and the agent's ends of them.
pub fn prepare(
    process: &Process,
    terminal: Option<Terminal>,
) -> Result<([OwnedFd; 3], AgentEnds), AgentError> {
    let mut ends = AgentEnds::default();
    if let Some(Terminal { master, peer, .. }) = terminal {
        ends.attach_terminal = process.attach_stdin || process.attach_stdout;
        ends.terminal = Some(Arc::new(File::from(master)));
        let copy = || dup(&peer).map_err(AgentError::setup("duplicating a terminal"));
        return Ok(([copy()?, copy()?, peer], ends));
    }
    let null = || open("/dev/null", OFlag::O_RDWR | OFlag::O_CLOEXEC, Mode::empty());
    let output = |attach: bool| -> Result<(OwnedFd, Option<OwnedFd>), Errno> {
        if !attach {
            return Ok((null()?, None));
        }
        let (read, write) = pipe2(OFlag::O_CLOEXEC)?;
        Ok((write, Some(read)))
    };
    let (stdout, stdout_end) = output(process.attach_stdout).map_err(AgentError::setup("creating stdout"))?;
    let (stderr, stderr_end) = output(process.attach_stderr).map_err(AgentError::setup("creating stderr"))?;
    (ends.stdout, ends.stderr) = (stdout_end, stderr_end);
    let stdin = if process.attach_stdin {
        let (read, write) = pipe2(OFlag::O_CLOEXEC).map_err(AgentError::setup("creating stdin"))?;
        ends.stdin = Some(write);
        read
    } else {
        null().map_err(AgentError::setup("opening /dev/null"))?
    };
    Ok(([stdin, stdout, stderr], ends))
}

/// Ends a process's stdin from outside of its pump.
#[derive(Debug, Clone)]
pub struct StdinCloser {
    socket: Arc<File>,
}

impl StdinCloser {
    /// Makes the pump see the end of its stream.
    pub fn close(&self) {
        let _ = shutdown(self.socket.as_raw_fd(), Shutdown::Read);
    }
}

/// A process's streams, joined with those that the host attached.
#[derive(Debug)]
pub struct Connected {
    /// (from, to)
    outputs: Vec<(Arc<File>, Arc<File>)>,
    /// (from, what was read of it, to)
    input: Option<(Arc<File>, Vec<u8>, Arc<File>)>,
    has_terminal: bool,
}

impl AgentEnds {
    /// Joins the ends with the streams the host attached. All are taken before the process is made, so that a missing
    /// one fails the start.
    pub fn take_streams(
        self,
        streams: &Streams,
        container_id: &str,
        exec_id: &str,
    ) -> Result<Connected, AgentError> {
        let take = |stream| {
            let header = StreamHeader {
                container_id: container_id.to_owned(),
                exec_id: exec_id.to_owned(),
                stream,
            };
            streams.take(&header)
        };
        if let Some(terminal) = self.terminal {
            if !self.attach_terminal {
                return Ok(Connected {
                    outputs: Vec::new(),
                    input: None,
                    has_terminal: true,
                });
            }
            // Both directions share it, and each of their threads waits in its own read or write.
            let (ahead, socket) = take(Stream::Terminal)?.into_blocking()?;
            let socket = Arc::new(socket);
            return Ok(Connected {
                outputs: vec![(Arc::clone(&terminal), Arc::clone(&socket))],
                input: Some((socket, ahead, terminal)),
                has_terminal: true,
            });
        }
        let mut outputs = Vec::new();
        for (end, stream) in [(self.stdout, Stream::Stdout), (self.stderr, Stream::Stderr)] {
            if let Some(end) = end {
                outputs.push((Arc::new(File::from(end)), Arc::new(take(stream)?.socket)));
            }
        }
        let input = match self.stdin {
            Some(end) => {
                let Arrived { socket, ahead, .. } = take(Stream::Stdin)?;
                Some((Arc::new(socket), ahead, Arc::new(File::from(end))))
            }
            None => None,
        };
        Ok(Connected {
            outputs,
            input,
            has_terminal: false,
        })
    }
}

impl Connected {
    /// What ends the process's stdin.
    pub fn closer(&self) -> Option<StdinCloser> {
        let (socket, ..) = self.input.as_ref()?;
        Some(StdinCloser {
            socket: Arc::clone(socket),
        })
    }

    /// Starts to move bytes.
    pub fn move_bytes(self) -> Result<(), AgentError> {
        let is_terminal = self.has_terminal;
        for (from, to) in self.outputs {
            spawn(move || {
                run(&from, &to, Direction::Output, is_terminal);
                let _ = shutdown(to.as_raw_fd(), Shutdown::Write);
            })?;
        }
        match self.input {
            Some((from, ahead, to)) => spawn(move || {
                if (&*to).write_all(&ahead).is_ok() {
                    run(&from, &to, Direction::Input, is_terminal);
                }
            }),
            None => Ok(()),
        }
    }
}

fn spawn(body: impl FnOnce() + Send + 'static) -> Result<(), AgentError> {
    workers::spawn(body).map_err(|error| {
        AgentError::setup("starting a stream's thread")(
            error.raw_os_error().map_or(Errno::EAGAIN, Errno::from_raw),
        )
    })
}

/// Moves bytes from one end to the other, until either ends: whichever it was, there is nothing more to do.
fn run(from: &File, to: &File, direction: Direction, is_terminal: bool) {
    if is_terminal {
        copy(from, to);
    } else {
        let _ = pump::move_all(from, to, direction);
    }
}

/// Between a terminal and the host, whose one socket both directions share.
fn copy(mut from: &File, mut to: &File) {
    let mut buffer = [0; BUFFER_BYTES];
    loop {
        match from.read(&mut buffer) {
            Ok(0) => return,
            Ok(length) => {
                if to.write_all(&buffer[..length]).is_err() {
                    return;
                }
            }
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            // A terminal whose other end was closed by its last user gives EIO: its end of file.
            Err(_) => return,
        }
    }
}
