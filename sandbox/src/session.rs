//! A front-end attached to a container: its terminal, its signals, its keys, until the container ends or it detaches.
//!
//! The container's output doesn't come through here: the monitor writes it to the descriptors that [`Targets`] passed.
//! Input goes from this process's stdin straight into the container's stream, by one thread.

use std::{
    io::{self, Write as _},
    net::Shutdown,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::net::UnixStream,
    },
    thread::{self, JoinHandle},
};

use rustix::{
    event::{PollFd, PollFlags, poll},
    fs::{FileType, Mode, OFlags, fstat, open},
    io::{Errno, ioctl_fionread},
    net::{SendFlags, send},
};

use crate::{
    DetachKeys, Result, SandboxError, SignalEvent, Signals, Timing,
    detach_keys::KeyFilter,
    monitor::{AttachRequest, Connection, ExitReport, Incoming, Reply, Request, Running},
    stdio::copy_output,
    wait,
};

/// How often somebody must ask a program that doesn't listen to end before it is ended.
const PATIENCE_WITH_SIGNALS: u32 = 3;
/// One reading of input that is no terminal.
const BUFFER_BYTES: usize = 256 * 1024;
/// Input that a container has not taken: beyond it nothing more is read.
const MAX_BACKLOG_BYTES: usize = 1 << 20;
const SIGKILL: i32 = 9;

/// Says the rows and columns of the terminal, if there is one.
pub type Window = fn() -> Option<(u16, u16)>;

/// Which streams a front-end attaches, and how.
#[derive(Debug, Clone, Copy, Default)]
pub struct Attachment {
    /// The container reads what this process reads.
    pub stdin: bool,
    /// Its stdout comes here.
    pub stdout: bool,
    /// Its stderr comes here.
    pub stderr: bool,
    /// It was started for this front-end: its input ends with ours, and whoever insists ends it.
    pub owner: bool,
    /// The container is removed when it ends, so it ends when nobody reads its output any more.
    pub output_ends_it: bool,
}

/// What the front-end wants to happen while it is attached.
#[derive(Debug)]
pub struct SessionOptions<'a> {
    /// Where signals come from.
    pub signals: &'a Signals,
    /// Whether they are handed on.
    pub proxy_signals: bool,
    /// The size of the terminal, asked for when it changed; `None` where the container has no terminal.
    pub window: Option<Window>,
    /// The keys that detach, where stdin is a terminal.
    pub detach_keys: Option<DetachKeys>,
    /// Told what the user should know.
    pub warn: fn(&str),
}

/// How a container ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ContainerExit {
    /// Its exit code, or 128 + the signal that ended it.
    pub code: u8,
    /// Whether it was the kernel, for want of memory.
    pub oom_killed: bool,
    /// Why its microVM stopped, if that is what ended it.
    pub error: Option<String>,
    /// How long everything took.
    pub timing: Timing,
}

impl From<ExitReport> for ContainerExit {
    fn from(report: ExitReport) -> Self {
        Self {
            code: report.code,
            oom_killed: report.oom_killed,
            error: report.error,
            timing: report.timing,
        }
    }
}

/// How a session ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ended {
    /// The container has exited.
    Exited(ContainerExit),
    /// The container goes on.
    Detached,
    /// The monitor has gone without a word; the container's record says more.
    Unknown,
}

/// Where a container's output goes: descriptors the monitor can write without waiting.
#[derive(Debug, Default)]
pub(crate) struct Targets {
    fds: Vec<OwnedFd>,
    /// Move bytes where the monitor can't write by itself.
    pumps: Vec<JoinHandle<()>>,
}

impl Targets {
    pub(crate) fn of(attachment: Attachment) -> Result<Self> {
        let mut targets = Self::default();
        if attachment.stdout {
            targets.add(rustix::stdio::stdout())?;
        }
        if attachment.stderr {
            targets.add(rustix::stdio::stderr())?;
        }
        Ok(targets)
    }

    fn add(&mut self, fd: BorrowedFd<'static>) -> Result<()> {
        let kind = fstat(fd).map(|stat| FileType::from_raw_mode(stat.st_mode));
        let target = match kind {
            Ok(FileType::Fifo | FileType::CharacterDevice) => reopen(fd),
            _ => fd.try_clone_to_owned().ok(),
        };
        let target = match target {
            Some(target) => target,
            None => self.pump(fd)?,
        };
        self.fds.push(target);
        Ok(())
    }

    /// The last resort: a socket, and a thread that writes what comes out of it.
    fn pump(&mut self, fd: BorrowedFd<'static>) -> Result<OwnedFd> {
        let (ours, theirs) = UnixStream::pair().map_err(SandboxError::system("creating a socket pair"))?;
        let pump = thread::Builder::new()
            .name("output".into())
            .spawn(move || copy_output(&ours, fd))
            .map_err(SandboxError::system("starting a thread"))?;
        self.pumps.push(pump);
        Ok(theirs.into())
    }

    pub(crate) fn into_request(
        self,
        attachment: Attachment,
    ) -> (AttachRequest, Vec<OwnedFd>, Vec<JoinHandle<()>>) {
        let request = AttachRequest {
            stdin: attachment.stdin,
            stdout: attachment.stdout,
            stderr: attachment.stderr,
            owner: attachment.owner,
            output_ends_it: attachment.output_ends_it,
        };
        (request, self.fds, self.pumps)
    }
}

/// Opens what a descriptor refers to once more, so that not waiting is no matter of those who share it.
fn reopen(fd: BorrowedFd<'_>) -> Option<OwnedFd> {
    use std::os::fd::AsRawFd as _;
    let flags = OFlags::WRONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    open(format!("/proc/self/fd/{}", fd.as_raw_fd()), flags, Mode::empty()).ok()
}

/// An attached container.
#[derive(Debug)]
pub struct Session {
    connection: Connection,
    input: Option<UnixStream>,
    pumps: Vec<JoinHandle<()>>,
    attachment: Attachment,
    /// Until its process ran, as far as it was started for this session.
    timing: Timing,
}

impl Session {
    pub(crate) fn new(running: Running, attachment: Attachment, pumps: Vec<JoinHandle<()>>) -> Self {
        Self {
            connection: running.connection,
            input: running.input,
            pumps,
            attachment,
            timing: running.timing,
        }
    }

    /// How long the start took.
    #[must_use]
    pub fn timing(&self) -> &Timing {
        &self.timing
    }

    /// Tells the container the size of the terminal it is attached to.
    fn resize(&self, window: Option<Window>) {
        if let Some((rows, columns)) = window.and_then(|window| window()) {
            if !self.attachment.owner {
                // A program that was there before sees a change, and draws itself for whoever looks now.
                let rows = rows.saturating_add(1);
                drop(self.connection.send(&Request::Resize { rows, columns }, &[]));
            }
            drop(self.connection.send(&Request::Resize { rows, columns }, &[]));
        }
    }

    /// Stays attached until the container has exited, or the user detaches.
    ///
    /// # Errors
    ///
    /// The system refuses what it has no reason to.
    pub fn drive(mut self, options: SessionOptions<'_>) -> Result<Ended> {
        let detached = match self.input.take() {
            None => None,
            Some(stream) => Some(
                Input {
                    stream,
                    keys: options.detach_keys.clone().map(KeyFilter::new),
                    // Another input ends with the one it comes from; a terminal can be attached to again.
                    ends: self.attachment.owner && options.window.is_none(),
                }
                .spawn()?,
            ),
        };
        self.resize(options.window);
        let mut asked_to_end = 0;
        loop {
            match self.connection.receive::<Reply>() {
                Incoming::Message(reply, _) => {
                    if let Some(ended) = self.heard(reply, &options) {
                        return Ok(ended);
                    }
                    continue;
                }
                Incoming::Closed => return Ok(Ended::Unknown),
                Incoming::Nothing => {}
            }
            let never = self.connection.as_fd();
            let fds = [
                never,
                options.signals.as_fd(),
                detached.as_ref().map_or(never, AsFd::as_fd),
            ];
            let [_, signalled, detaching] =
                wait::any_readable(fds, None).map_err(SandboxError::system("waiting for the container"))?;
            if detaching && detached.is_some() {
                return Ok(Ended::Detached);
            }
            if signalled && self.hand_on_signals(&options, &mut asked_to_end) {
                return Ok(Ended::Detached);
            }
        }
    }

    fn heard(&mut self, reply: Reply, options: &SessionOptions<'_>) -> Option<Ended> {
        match reply {
            Reply::Exited(report) => {
                for pump in self.pumps.drain(..) {
                    drop(pump.join());
                }
                Some(Ended::Exited(report.into()))
            }
            Reply::Warning { message } => {
                (options.warn)(&message);
                None
            }
            Reply::OutputFailed { message } => {
                if !message.is_empty() {
                    (options.warn)(&format!("the container's output can't be written: {message}"));
                    return None;
                }
                // Nobody reads it any more. A container that is removed when it ends has been told.
                (!self.attachment.output_ends_it).then_some(Ended::Detached)
            }
            _ => None,
        }
    }

    /// True if the user insists on leaving a container that isn't this front-end's own.
    fn hand_on_signals(&self, options: &SessionOptions<'_>, asked_to_end: &mut u32) -> bool {
        const ENDING: [i32; 3] = [1, 2, 15];
        while let Some(event) = options.signals.next() {
            match event {
                SignalEvent::Resized => self.resize(options.window),
                SignalEvent::Forward(signal) => {
                    *asked_to_end += u32::from(ENDING.contains(&signal));
                    let insists = *asked_to_end >= PATIENCE_WITH_SIGNALS;
                    if (insists && !self.attachment.owner)
                        || (!options.proxy_signals && ENDING.contains(&signal))
                    {
                        return true;
                    }
                    let (signal, all) = if insists { (SIGKILL, true) } else { (signal, false) };
                    if options.proxy_signals {
                        drop(self.connection.send(&Request::Signal { signal, all }, &[]));
                    }
                }
            }
        }
        false
    }
}

/// What moves this process's stdin into the container.
#[derive(Debug)]
pub(crate) struct Input {
    pub(crate) stream: UnixStream,
    /// Where stdin is a terminal.
    pub(crate) keys: Option<KeyFilter>,
    /// The container's input ends with ours.
    pub(crate) ends: bool,
}

/// How reading went.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Step {
    GoOn,
    End,
    Detach,
}

impl Input {
    /// Moves bytes on a thread; what it returns becomes readable when the user detaches.
    pub(crate) fn spawn(mut self) -> Result<UnixStream> {
        let (detached, mut detach) =
            UnixStream::pair().map_err(SandboxError::system("creating a socket pair"))?;
        let body = move || {
            let step = self.run(rustix::stdio::stdin());
            if step == Step::Detach {
                drop(detach.write_all(b"d"));
            } else if self.ends {
                drop(self.stream.shutdown(Shutdown::Write));
            }
            // Its end would say "detach"; it ends with the process.
            std::mem::forget(detach);
        };
        thread::Builder::new()
            .name("input".into())
            .spawn(body)
            .map_err(SandboxError::system("starting a thread"))?;
        Ok(detached)
    }

    /// Moves bytes until stdin ends, the container's stream does, or the keys to detach were typed. Keys are read even
    /// while the container takes no input, so that one can always leave.
    pub(crate) fn run(&mut self, stdin: BorrowedFd<'_>) -> Step {
        let mut backlog: Vec<u8> = Vec::new();
        let mut buffer = if self.keys.is_some() {
            Vec::new()
        } else {
            vec![0; BUFFER_BYTES]
        };
        let mut step = Step::GoOn;
        loop {
            if backlog.is_empty() && step != Step::GoOn {
                return step;
            }
            let reads = step == Step::GoOn && (backlog.is_empty() || self.keys.is_some());
            let reads = reads && backlog.len() < MAX_BACKLOG_BYTES;
            let (readable, writable) = match self.wait(stdin, reads, !backlog.is_empty()) {
                Ok(ready) => ready,
                Err(_) => return Step::End,
            };
            if writable && self.write(&mut backlog).is_err() {
                return Step::End;
            }
            if readable {
                step = self.read(stdin, &mut buffer, &mut backlog);
                // The keys were typed: what the container has not taken by now must not keep anybody.
                if self.write(&mut backlog).is_err() || step == Step::Detach {
                    return if step == Step::Detach { step } else { Step::End };
                }
            }
        }
    }

    fn wait(&self, stdin: BorrowedFd<'_>, reads: bool, writes: bool) -> io::Result<(bool, bool)> {
        let flags = |wanted, flag| if wanted { flag } else { PollFlags::empty() };
        let mut fds = vec![PollFd::from_borrowed_fd(
            self.stream.as_fd(),
            flags(writes, PollFlags::OUT),
        )];
        if reads {
            fds.push(PollFd::from_borrowed_fd(stdin, PollFlags::IN));
        }
        loop {
            match poll(&mut fds, None) {
                Err(Errno::INTR) => {}
                Err(errno) => return Err(errno.into()),
                Ok(_) => break,
            }
        }
        if fds[0].revents().intersects(PollFlags::HUP | PollFlags::ERR) {
            // The container's stream has ended.
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        let readable = fds.get(1).is_some_and(|fd| !fd.revents().is_empty());
        Ok((readable, fds[0].revents().contains(PollFlags::OUT)))
    }

    fn write(&self, backlog: &mut Vec<u8>) -> rustix::io::Result<()> {
        let mut written = 0;
        while written < backlog.len() {
            match send(
                &self.stream,
                &backlog[written..],
                SendFlags::DONTWAIT | SendFlags::NOSIGNAL,
            ) {
                Ok(length) => written += length,
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => break,
                Err(errno) => return Err(errno),
            }
        }
        backlog.drain(..written);
        Ok(())
    }

    fn read(&mut self, stdin: BorrowedFd<'_>, buffer: &mut [u8], backlog: &mut Vec<u8>) -> Step {
        let Some(keys) = &mut self.keys else {
            return match rustix::io::read(stdin, &mut *buffer) {
                Ok(0) => Step::End,
                Ok(length) => {
                    backlog.extend_from_slice(&buffer[..length]);
                    Step::GoOn
                }
                Err(Errno::INTR | Errno::AGAIN) => Step::GoOn,
                Err(_) => Step::End,
            };
        };
        // Byte by byte: what is typed behind the keys that detach is for whoever reads the terminal then.
        let ready = ioctl_fionread(stdin).unwrap_or(1).max(1);
        for _ in 0..ready {
            let mut byte = [0];
            match rustix::io::read(stdin, &mut byte) {
                Ok(0) => return Step::End,
                Ok(_) if keys.feed(byte[0], backlog) => return Step::Detach,
                Ok(_) => {}
                Err(Errno::INTR | Errno::AGAIN) => return Step::GoOn,
                Err(_) => return Step::End,
            }
        }
        Step::GoOn
    }
}
