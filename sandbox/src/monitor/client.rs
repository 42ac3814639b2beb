//! The clients' side: starts monitors, and asks running ones.

use std::{
    io::ErrorKind,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::{net::UnixStream, process::CommandExt as _},
    },
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use crate::{
    Components, Result, SandboxError, SandboxId, Signals, Timing, container_store::Home, run_dir::RunDir,
    wait,
};

use super::{
    VERB,
    protocol::{AttachRequest, Connection, ExitReport, Incoming, Reply, Request},
};

/// How long a monitor that was told to give up may take to clean up.
const GIVING_UP_PATIENCE: Duration = Duration::from_secs(15);
/// How long a monitor may take to answer; a pause waits for the VMM.
const ANSWER_PATIENCE: Duration = Duration::from_secs(30);

/// A monitor that has been started and waits for its container. Dropping it ends it.
#[derive(Debug)]
pub struct Launcher {
    connection: Connection,
    child: Child,
}

/// A connection to the monitor of a container that runs.
#[derive(Debug)]
pub(crate) struct Running {
    pub(crate) connection: Connection,
    /// The container's input, where it was asked for and there is one.
    pub(crate) input: Option<UnixStream>,
    pub(crate) timing: Timing,
}

fn monitor_error(message: String, exit_code: u8) -> SandboxError {
    SandboxError::Monitor { message, exit_code }
}

impl Launcher {
    /// Starts a monitor, to be ready when everything else is.
    ///
    /// # Errors
    ///
    /// The system refuses to start a process.
    pub fn spawn() -> Result<Self> {
        let (ours, theirs) = UnixStream::pair().map_err(SandboxError::system("creating a socket pair"))?;
        let child = Command::new("/proc/self/exe")
            .arg0("hull")
            .arg(VERB)
            // One arena, and nothing kept that is free: most of its life it waits.
            .env("MALLOC_ARENA_MAX", "1")
            .env("MALLOC_TRIM_THRESHOLD_", "65536")
            .env("MALLOC_TOP_PAD_", "4096")
            .stdin(OwnedFd::from(theirs))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .map_err(SandboxError::io("starting a monitor by", "/proc/self/exe"))?;
        Ok(Self {
            connection: Connection::new(ours)
                .map_err(SandboxError::system("preparing the monitor's socket"))?,
            child,
        })
    }

    /// The connection and the process, for who speaks with it by himself.
    pub(crate) fn into_parts(self) -> (Connection, Child) {
        (self.connection, self.child)
    }

    /// Hands a container over and waits until its process runs.
    pub(crate) fn launch(
        self,
        home: Home,
        run: &RunDir,
        components: &Components,
        attach: Option<(AttachRequest, Vec<OwnedFd>)>,
        (client_us, signals): (u64, Option<&Signals>),
    ) -> Result<Running> {
        let (attach, targets) = attach.map_or((None, Vec::new()), |(attach, fds)| (Some(attach), fds));
        let request = Request::Launch {
            home: home.path().to_owned(),
            run: run.root().to_owned(),
            components: components.clone(),
            attach,
            client_us,
        };
        let fds: Vec<BorrowedFd<'_>> = std::iter::once(home.as_fd())
            .chain(targets.iter().map(AsFd::as_fd))
            .collect();
        let sent = self.connection.send(&request, &fds);
        drop(fds);
        // The lock is the monitor's from here on, and the targets too.
        drop((home, targets));
        if sent.is_err() {
            return Err(SandboxError::MonitorGone);
        }
        self.wait_started(signals)
    }

    fn wait_started(mut self, signals: Option<&Signals>) -> Result<Running> {
        loop {
            match self.connection.receive::<Reply>() {
                Incoming::Message(Reply::Started { timing }, fds) => {
                    return Ok(Running {
                        connection: self.connection,
                        input: fds.into_iter().next().map(UnixStream::from),
                        timing,
                    });
                }
                Incoming::Message(Reply::Failed { message, exit_code }, _) => {
                    self.reap();
                    return Err(monitor_error(message, exit_code));
                }
                Incoming::Message(..) | Incoming::Closed => {
                    self.reap();
                    return Err(match signals.and_then(Signals::interruption) {
                        Some(signal) => SandboxError::Interrupted { signal },
                        None => SandboxError::MonitorGone,
                    });
                }
                Incoming::Nothing => {}
            }
            let never = self.connection.as_fd();
            let [answered, signalled] = wait::any_readable([never, signals.map_or(never, AsFd::as_fd)], None)
                .map_err(SandboxError::system("waiting for the container"))?;
            // A container that has started gets the signal itself: whoever has seen its output knows that it has.
            if signalled
                && !answered
                && let Some(signal) = signals.and_then(Signals::interruption)
            {
                self.give_up();
                return Err(SandboxError::Interrupted { signal });
            }
        }
    }

    /// Lets the monitor clean up and waits for it.
    fn give_up(mut self) {
        self.connection.close_sending();
        while let Ok(Some((reply, _))) = self.connection.wait::<Reply>(Some(GIVING_UP_PATIENCE)) {
            tracing::debug!(?reply, "given up");
        }
        self.reap();
    }

    fn reap(&mut self) {
        drop(self.child.wait());
    }
}

/// Asks a running monitor.
#[derive(Debug)]
pub(crate) struct MonitorClient {
    pub(crate) connection: Connection,
}

impl MonitorClient {
    /// Connects to a container's monitor; `None` if it has none.
    pub(crate) fn connect(run: &RunDir, id: &SandboxId) -> Result<Option<Self>> {
        let stream = match run.connect_monitor(id) {
            Ok(stream) => stream,
            Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::ConnectionRefused) => {
                return Ok(None);
            }
            Err(error) => {
                return Err(SandboxError::system("connecting to the container's monitor")(
                    error,
                ));
            }
        };
        let connection =
            Connection::new(stream).map_err(SandboxError::system("preparing the monitor's socket"))?;
        Ok(Some(Self { connection }))
    }

    /// Sends a request, without waiting for an answer; false if the monitor has gone.
    pub(crate) fn send(&self, request: &Request, fds: &[BorrowedFd<'_>]) -> bool {
        self.connection.send(request, fds).is_ok()
    }

    /// Asks for something to be done; `None` if the container ended meanwhile.
    pub(crate) fn ask(&mut self, request: &Request) -> Result<Option<()>> {
        if !self.send(request, &[]) {
            return Ok(None);
        }
        let deadline = Instant::now() + ANSWER_PATIENCE;
        loop {
            match self.connection.wait::<Reply>(Some(ANSWER_PATIENCE))? {
                Some((Reply::Done, _)) => return Ok(Some(())),
                Some((Reply::Failed { message, exit_code }, _)) => {
                    return Err(monitor_error(message, exit_code));
                }
                None if Instant::now() >= deadline => return Err(SandboxError::Silent),
                Some((Reply::Exited(_), _)) | None => return Ok(None),
                Some(_) => {}
            }
        }
    }

    /// Waits for the container's end; `None` if the monitor goes without telling it.
    pub(crate) fn wait_exit(&mut self) -> Result<Option<ExitReport>> {
        loop {
            match self.connection.wait::<Reply>(None)? {
                Some((Reply::Exited(report), _)) => return Ok(Some(report)),
                Some(_) => {}
                None => return Ok(None),
            }
        }
    }

    /// Sends a signal and waits for the end; false if it doesn't come in time.
    pub(crate) fn end(&mut self, signal: i32, all: bool, patience: Duration) -> Result<bool> {
        let deadline = Instant::now() + patience;
        if !self.send(&Request::Wait, &[]) || !self.send(&Request::Signal { signal, all }, &[]) {
            return Ok(true);
        }
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            match self.connection.wait::<Reply>(Some(left))? {
                Some((Reply::Failed { message, exit_code }, _)) => {
                    return Err(monitor_error(message, exit_code));
                }
                Some((Reply::Exited(_), _)) => return Ok(true),
                Some(_) => {}
                None => return Ok(Instant::now() < deadline),
            }
        }
    }

    /// Attaches; `None` if the container ended meanwhile.
    pub(crate) fn attach(mut self, attach: AttachRequest, targets: Vec<OwnedFd>) -> Result<Option<Running>> {
        let fds: Vec<BorrowedFd<'_>> = targets.iter().map(AsFd::as_fd).collect();
        if !self.send(&Request::Attach(attach), &fds) {
            return Ok(None);
        }
        drop(fds);
        drop(targets);
        loop {
            match self.connection.wait::<Reply>(Some(ANSWER_PATIENCE))? {
                Some((Reply::Attached, fds)) => {
                    return Ok(Some(Running {
                        connection: self.connection,
                        input: fds.into_iter().next().map(UnixStream::from),
                        timing: Timing::default(),
                    }));
                }
                Some((Reply::Failed { message, exit_code }, _)) => {
                    return Err(monitor_error(message, exit_code));
                }
                Some((Reply::Exited(_), _)) | None => return Ok(None),
                Some(_) => {}
            }
        }
    }
}
