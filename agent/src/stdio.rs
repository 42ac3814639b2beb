//! Streams between the host and a process: each a vsock connection of its own, each moved by a thread of its own.
//!
//! A stream waits in [`Streams`] from its arrival until its process starts. The process sees pipes (or its
//! terminal), never the socket: `/dev/stdout` can be opened again, and the end of a pipe is the end of
//! everybody who had it. The half-close of a socket is the end of the stream in that direction.

use std::{
    collections::HashMap,
    fs::File,
    io::{Read as _, Write as _},
    os::fd::{AsRawFd as _, OwnedFd},
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
    fcntl::{OFlag, open},
    sys::{
        socket::{Shutdown, setsockopt, shutdown, sockopt},
        stat::Mode,
        time::{TimeVal, TimeValLike as _},
    },
    unistd::{dup, pipe2},
};

use crate::{error::AgentError, log::log, terminal::Terminal, vsock};

/// How long the host may take for the header, and for attaching what it declared.
const PATIENCE: Duration = Duration::from_secs(10);
/// Streams that wait for their process; beyond it the oldest is closed.
const MAX_WAITING: usize = 1024;
/// One read or write of a pump. As large as the pipe.
const BUFFER_BYTES: usize = 256 * 1024;

/// Streams that have arrived and whose process hasn't started.
#[derive(Debug, Default)]
pub struct Streams {
    waiting: Mutex<HashMap<StreamHeader, (Instant, File)>>,
    arrived: Condvar,
}

impl Streams {
    fn offer(&self, header: StreamHeader, socket: File) {
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        if waiting.len() >= MAX_WAITING {
            let oldest = waiting
                .iter()
                .min_by_key(|(_, (since, _))| *since)
                .map(|(header, _)| header.clone());
            oldest.and_then(|header| waiting.remove(&header));
        }
        waiting.insert(header, (Instant::now(), socket));
        self.arrived.notify_all();
    }

    /// Closes the streams of a process that won't be started.
    pub fn forget(&self, container_id: &str, exec_id: &str) {
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        waiting.retain(|header, _| header.container_id != container_id || header.exec_id != exec_id);
    }

    /// Takes a stream, waiting for it to arrive.
    pub fn take(&self, header: &StreamHeader) -> Result<File, AgentError> {
        let deadline = Instant::now() + PATIENCE;
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            if let Some((_, socket)) = waiting.remove(header) {
                return Ok(socket);
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
            let socket = match vsock::accept_host(listener) {
                Ok(socket) => socket,
                Err(errno) => {
                    log!("accepting a stream: {errno}");
                    thread::sleep(Duration::from_millis(100));
                    continue;
                }
            };
            // The header follows the connection at once; a host that stalls here stalls only itself.
            match read_header(socket) {
                Ok((header, socket)) => self.offer(header, socket),
                Err(error) => log!("reading a stream's header: {error}"),
            }
        }
    }
}

fn read_header(mut socket: File) -> Result<(StreamHeader, File), Box<dyn std::error::Error>> {
    let limit = |milliseconds| TimeVal::milliseconds(milliseconds);
    setsockopt(
        &socket,
        sockopt::ReceiveTimeout,
        &limit(i64::try_from(PATIENCE.as_millis())?),
    )?;
    let mut fixed = [0; FIXED_BYTES];
    socket.read_exact(&mut fixed)?;
    let fixed = FixedPart::parse(fixed)?;
    let mut ids = vec![0; fixed.remaining_bytes()];
    socket.read_exact(&mut ids)?;
    let header = fixed.complete(&ids)?;
    setsockopt(&socket, sockopt::ReceiveTimeout, &limit(0))?;
    Ok((header, socket))
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
    /// (from, to)
    input: Option<(Arc<File>, Arc<File>)>,
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
            streams.take(&header).map(Arc::new)
        };
        if let Some(terminal) = self.terminal {
            if !self.attach_terminal {
                return Ok(Connected {
                    outputs: Vec::new(),
                    input: None,
                });
            }
            let socket = take(Stream::Terminal)?;
            return Ok(Connected {
                outputs: vec![(Arc::clone(&terminal), Arc::clone(&socket))],
                input: Some((socket, terminal)),
            });
        }
        let mut outputs = Vec::new();
        for (end, stream) in [(self.stdout, Stream::Stdout), (self.stderr, Stream::Stderr)] {
            if let Some(end) = end {
                outputs.push((Arc::new(File::from(end)), take(stream)?));
            }
        }
        let input = match self.stdin {
            Some(end) => Some((take(Stream::Stdin)?, Arc::new(File::from(end)))),
            None => None,
        };
        Ok(Connected { outputs, input })
    }
}

impl Connected {
    /// What ends the process's stdin.
    pub fn closer(&self) -> Option<StdinCloser> {
        let (socket, _) = self.input.as_ref()?;
        Some(StdinCloser {
            socket: Arc::clone(socket),
        })
    }

    /// Starts to move bytes.
    pub fn move_bytes(self) -> Result<(), AgentError> {
        for (from, to) in self.outputs {
            pump("output", from, to, true)?;
        }
        match self.input {
            Some((from, to)) => pump("input", from, to, false),
            None => Ok(()),
        }
    }
}

/// Moves bytes from one end to the other on a thread, until either ends.
fn pump(name: &str, from: Arc<File>, to: Arc<File>, to_host: bool) -> Result<(), AgentError> {
    thread::Builder::new()
        .name(name.to_owned())
        .stack_size(64 * 1024)
        .spawn(move || {
            copy(&from, &to);
            if to_host {
                let _ = shutdown(to.as_raw_fd(), Shutdown::Write);
            }
        })
        .map(drop)
        .map_err(|error| {
            AgentError::setup("starting a stream's thread")(
                error.raw_os_error().map_or(Errno::EAGAIN, Errno::from_raw),
            )
        })
}

fn copy(mut from: &File, mut to: &File) {
    let mut buffer = vec![0; BUFFER_BYTES];
    loop {
        match from.read(&mut buffer) {
            Ok(0) => return,
            Ok(length) => {
                if to.write_all(&buffer[..length]).is_err() {
                    return;
                }
            }
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            // A terminal whose other end was closed by its last user gives EIO: its end of file.
            Err(_) => return,
        }
    }
}
