//! Moves a process's bytes between the guest and what the caller gave: pipes, files, sockets, a terminal.
//!
//! Output is written by the owner's only thread, without waiting (`monitor::output`): a reader that is slow slows the
//! process down, and nothing is lost. Input is read by a thread of its own, as reading may wait.

use std::{
    net::Shutdown,
    os::{
        fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd},
        unix::net::UnixStream,
    },
    thread,
};

use nix::sys::{
    signal::{SigSet, Signal},
    signalfd::{SfdFlags, SignalFd, siginfo},
};
use rustix::fs::{FileType, Mode, OFlags, fstat, open};

use super::{
    error::{BundleError, Result},
    protocol::StdioPlan,
    terminal::HostTerminal,
};
use crate::{
    SandboxError,
    log_driver::LogWriter,
    monitor::{Outputs, Sink},
    session::Input,
    stdio::{ProcessStreams, copy_output},
};

/// Stack of a thread that moves bytes; its buffer isn't on it.
const STACK_BYTES: usize = 64 * 1024;
/// The caller's descriptors, among those that may be attached.
const CALLER: u64 = 0;

/// What a process is connected to on the host.
///
/// Where there is a terminal and no console socket, `stdin` and `stdout` are connected to it directly.
#[derive(Debug, Default)]
pub struct BundleStdio {
    /// What it reads; nothing where there is none.
    pub stdin: Option<OwnedFd>,
    /// Where its output goes.
    pub stdout: Option<OwnedFd>,
    /// Where its errors go.
    pub stderr: Option<OwnedFd>,
    /// A connected socket that gets the master of its terminal.
    pub console_socket: Option<UnixStream>,
}

impl BundleStdio {
    /// The standard streams of this process.
    ///
    /// # Errors
    ///
    /// The system gives no further descriptors.
    pub fn of_this_process() -> Result<Self> {
        let duplicate = |fd: BorrowedFd<'_>| {
            fd.try_clone_to_owned()
                .map_err(SandboxError::system("duplicating a descriptor"))
        };
        Ok(Self {
            stdin: Some(duplicate(rustix::stdio::stdin())?),
            stdout: Some(duplicate(rustix::stdio::stdout())?),
            stderr: Some(duplicate(rustix::stdio::stderr())?),
            console_socket: None,
        })
    }

    /// What goes with a message, and what the message says about it.
    pub(super) fn plan(&self) -> (StdioPlan, Vec<BorrowedFd<'_>>) {
        let plan = StdioPlan {
            stdin: self.stdin.is_some(),
            stdout: self.stdout.is_some(),
            stderr: self.stderr.is_some(),
            console: self.console_socket.is_some(),
        };
        let streams = [&self.stdin, &self.stdout, &self.stderr];
        let mut fds: Vec<BorrowedFd<'_>> = streams.into_iter().flatten().map(AsFd::as_fd).collect();
        fds.extend(self.console_socket.iter().map(AsFd::as_fd));
        (plan, fds)
    }

    /// The reverse.
    pub(super) fn planned(plan: StdioPlan, mut fds: impl Iterator<Item = OwnedFd>) -> Self {
        let mut next = |wanted: bool| wanted.then(|| fds.next()).flatten();
        Self {
            stdin: next(plan.stdin),
            stdout: next(plan.stdout),
            stderr: next(plan.stderr),
            console_socket: next(plan.console).map(UnixStream::from),
        }
    }

    /// Whether a process that has it has any input; `/dev/null` is none, and costs nothing so.
    pub(super) fn has_input(&self) -> bool {
        self.console_socket.is_some() || self.stdin.as_ref().is_some_and(|fd| !is_null(fd))
    }
}

fn is_null(fd: &OwnedFd) -> bool {
    let null = rustix::fs::stat("/dev/null").map(|stat| stat.st_rdev);
    match (fstat(fd), null) {
        (Ok(stat), Ok(null)) => {
            FileType::from_raw_mode(stat.st_mode) == FileType::CharacterDevice && stat.st_rdev == null
        }
        _ => false,
    }
}

/// Opens a pipe or a terminal once more, so that not waiting is no matter of those who share the descriptor.
fn reopened(fd: OwnedFd, access: OFlags) -> std::result::Result<OwnedFd, OwnedFd> {
    let kind = fstat(&fd).map(|stat| FileType::from_raw_mode(stat.st_mode));
    match kind {
        Ok(FileType::Fifo | FileType::CharacterDevice) => {
            let flags = access | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
            open(format!("/proc/self/fd/{}", fd.as_raw_fd()), flags, Mode::empty()).map_err(|_| fd)
        }
        _ => Ok(fd),
    }
}

/// What the monitor can write without waiting.
fn sink(fd: OwnedFd) -> Result<Sink> {
    let fd = match reopened(fd, OFlags::WRONLY) {
        Ok(fd) => fd,
        // The last resort: a socket, and a thread that writes what comes out of it.
        Err(fd) => {
            let (ours, theirs) =
                UnixStream::pair().map_err(SandboxError::system("creating a socket pair"))?;
            spawn("output", move || copy_output(&ours, fd.as_fd()))?;
            theirs.into()
        }
    };
    Ok(Sink::new(fd))
}

fn spawn(name: &str, body: impl FnOnce() + Send + 'static) -> Result<()> {
    thread::Builder::new()
        .name(name.to_owned())
        .stack_size(STACK_BYTES)
        .spawn(body)
        .map(drop)
        .map_err(SandboxError::system("starting a thread"))
        .map_err(Into::into)
}

/// What a process is connected to, before it is started.
#[derive(Debug)]
pub(super) struct Ends {
    stdin: Option<OwnedFd>,
    stdout: Option<OwnedFd>,
    stderr: Option<OwnedFd>,
    pub(super) terminal: Option<HostTerminal>,
}

impl Ends {
    /// Makes the host's terminal where one is asked for. Nothing else is opened or read yet.
    pub(super) fn new(stdio: BundleStdio, terminal: bool, size: Option<(u16, u16)>) -> Result<Self> {
        let BundleStdio {
            stdin,
            stdout,
            stderr,
            console_socket,
        } = stdio;
        let Some(socket) = console_socket.filter(|_| terminal) else {
            return Ok(Self {
                stdin: stdin.filter(|fd| !is_null(fd)),
                stdout,
                stderr,
                terminal: None,
            });
        };
        let terminal = HostTerminal::give_to(&socket, size)?;
        Ok(Self {
            stdin: Some(terminal.duplicate()?),
            stdout: Some(terminal.duplicate()?),
            stderr: None,
            terminal: Some(terminal),
        })
    }

    /// Joins them with the streams to the guest; bytes move from now on.
    pub(super) fn connect(self, streams: ProcessStreams) -> Result<Relay> {
        let (input, outputs) = streams.into_parts();
        let mut outputs = Outputs::new(outputs, LogWriter::nowhere());
        let stdout = self.stdout.map(sink).transpose()?;
        let stderr = self.stderr.map(sink).transpose()?;
        // Where the reader of its output has gone, the process learns it as it would without a microVM in between.
        outputs.attach(CALLER, true, stdout, stderr);
        if let (Some(stream), Some(stdin)) = (&input, self.stdin) {
            let stream = stream
                .try_clone()
                .map_err(SandboxError::system("duplicating a descriptor"))?;
            // Where a pipe can't be opened again, reading it is still only this thread's.
            let stdin = reopened(stdin, OFlags::RDONLY).unwrap_or_else(|fd| fd);
            spawn("input", move || pump_input(stream, &stdin))?;
        }
        Ok(Relay {
            outputs,
            input,
            terminal: self.terminal,
        })
    }
}

fn pump_input(stream: UnixStream, stdin: &OwnedFd) {
    let mut input = Input {
        stream,
        keys: None,
        ends: true,
    };
    input.run(stdin.as_fd());
    drop(input.stream.shutdown(Shutdown::Write));
}

/// A running process's streams.
#[derive(Debug)]
pub(super) struct Relay {
    pub(super) outputs: Outputs,
    input: Option<UnixStream>,
    pub(super) terminal: Option<HostTerminal>,
}

impl Relay {
    /// Ends the process's input.
    pub(super) fn close_input(&self) {
        if let Some(input) = &self.input {
            drop(input.shutdown(Shutdown::Write));
        }
    }
}

/// What a process that stands for another one hands on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Incident {
    /// The terminal it relays has another size.
    Resized,
    /// Somebody sent this signal.
    Signal(i32),
}

/// Every signal that can be caught, taken from a descriptor.
///
/// Invariant: made before the first thread, so that every thread has them blocked.
#[derive(Debug)]
pub(super) struct AllSignals {
    fd: SignalFd,
}

/// The kernel's own word for a signal that no process sent.
const SI_KERNEL: i32 = 0x80;

impl AllSignals {
    pub(super) fn take() -> Result<Self> {
        let mut mask = SigSet::all();
        // Its own children and its own writes; and what a fault of its own must not be turned into.
        for own in [
            Signal::SIGCHLD,
            Signal::SIGPIPE,
            Signal::SIGSEGV,
            Signal::SIGBUS,
            Signal::SIGILL,
            Signal::SIGFPE,
        ] {
            mask.remove(own);
        }
        mask.thread_block()
            .map_err(SandboxError::system("blocking signals"))?;
        let fd = SignalFd::with_flags(&mask, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)
            .map_err(SandboxError::system("opening a signalfd"))?;
        Ok(Self { fd })
    }

    pub(super) fn next(&self) -> Option<Incident> {
        let info: siginfo = self.fd.read_signal().ok()??;
        let signal = i32::try_from(info.ssi_signo).ok()?;
        Some(
            if signal == Signal::SIGWINCH as i32 && info.ssi_code == SI_KERNEL {
                Incident::Resized
            } else {
                Incident::Signal(signal)
            },
        )
    }
}

impl AsFd for AllSignals {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl From<nix::errno::Errno> for BundleError {
    fn from(errno: nix::errno::Errno) -> Self {
        SandboxError::system("a system call")(errno).into()
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use super::*;

    #[test]
    fn null_is_no_input_and_a_pipe_is() {
        let null = File::open("/dev/null").unwrap();
        let zero = File::open("/dev/zero").unwrap();
        let (read, _write) = std::io::pipe().unwrap();
        let stdio = |fd: OwnedFd| BundleStdio {
            stdin: Some(fd),
            ..BundleStdio::default()
        };
        assert!(!stdio(null.into()).has_input());
        assert!(stdio(zero.into()).has_input());
        assert!(stdio(read.into()).has_input());
        assert!(!BundleStdio::default().has_input());
    }

    #[test]
    fn planned_descriptors_arrive_in_their_places() {
        let (out, _keep) = UnixStream::pair().unwrap();
        let stdio = BundleStdio {
            stderr: Some(File::open("/dev/null").unwrap().into()),
            console_socket: Some(out),
            ..BundleStdio::default()
        };
        let (plan, fds) = stdio.plan();
        let owned: Vec<OwnedFd> = fds.iter().map(|fd| fd.try_clone_to_owned().unwrap()).collect();
        let arrived = BundleStdio::planned(plan, owned.into_iter());
        assert!(arrived.stdin.is_none() && arrived.stdout.is_none());
        assert!(arrived.stderr.is_some() && arrived.console_socket.is_some());
    }
}
