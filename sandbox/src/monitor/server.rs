//! The monitor's loop: one container, its output, its clients.
//!
//! ```text
//!  launch ─► Running ──── exit reported, streams at their end ────► Ending ─► (record written, home unlocked)
//!               │                                                     ▲              │
//!               └──────── the VMM has gone ───────────────────────────┘      clients told, process ends
//! ```
//!
//! Thread: the process's only one. It waits in `poll` for whatever happens next, and never for a client or the guest,
//! with two exceptions that are bounded in time: a request to the VMM, and a guest that writes its files to the disk.
//!
//! How it ends is in `ending`.

use std::{
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::net::{UnixListener, UnixStream},
    },
    time::{Duration, Instant},
};

use agent_protocol::{ErrorKind, ResizeTty, SignalProcess, WaitProcess};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::Errno,
};

use crate::{
    ContainerRecord, Result, SandboxError,
    agent_client::{CALL_TIMEOUT, Pending},
    attach::ExitStatus,
    container_store::Home,
    lifecycle::MicroVm,
    log_driver::LogWriter,
};

use super::{
    failure,
    output::{OutputEvent, Outputs, Token},
    protocol::{AttachRequest, Connection, Incoming, Reply},
};

/// After the container's process has exited, how long the rest of its output may take to come.
const LAST_OUTPUT_PATIENCE: Duration = Duration::from_secs(10);
/// Connections at once.
const MAX_CLIENTS: usize = 1024;
/// The exit code of a container whose microVM was ended.
pub(super) const KILLED: u8 = 137;

#[derive(Debug)]
pub(super) struct Client {
    pub(super) token: Token,
    pub(super) connection: Connection,
    /// It wants to know the end.
    pub(super) waits: bool,
    /// The container's input ends with this client.
    pub(super) owns_input: bool,
}

/// What `poll` waits for.
#[derive(Debug, Clone, Copy)]
enum Source {
    Listener,
    Client(Token),
    Agent,
    VmmMessage,
    VmmExit,
    VmmStderr,
    Output(usize),
    Blocked,
}

/// A running container.
#[derive(Debug)]
pub(crate) struct Server {
    pub(super) home: Home,
    pub(super) record: ContainerRecord,
    pub(super) vm: MicroVm,
    pub(super) listener: UnixListener,
    pub(super) input: Option<UnixStream>,
    pub(super) outputs: Outputs,
    pub(super) clients: Vec<Client>,
    next_token: Token,
    pub(super) signals: Vec<(Token, Pending<SignalProcess>)>,
    pub(super) resizes: Vec<Pending<ResizeTty>>,
    pub(super) exit: Option<ExitStatus>,
    /// What happens if nothing else does: the microVM is ended.
    pub(super) deadline: Option<Instant>,
    /// Why nothing is kept of the output.
    complaint: Option<String>,
}

impl Server {
    /// Where `log` is an error nothing is kept of the output, and the first client is told.
    pub(crate) fn new(
        home: Home,
        record: ContainerRecord,
        mut vm: MicroVm,
        log: Result<LogWriter>,
    ) -> Result<Self> {
        let listener = vm.sockets.listen_monitor()?;
        listener
            .set_nonblocking(true)
            .map_err(SandboxError::system("preparing the monitor's socket"))?;
        let (input, streams) = vm
            .streams
            .take()
            .map(|streams| streams.into_parts())
            .unwrap_or_default();
        let (log, complaint) = match log {
            Ok(log) => (log, None),
            Err(error) => (LogWriter::nowhere(), Some(error)),
        };
        Ok(Self {
            home,
            record,
            vm,
            listener,
            input,
            outputs: Outputs::new(streams, log),
            clients: Vec::new(),
            next_token: 0,
            signals: Vec::new(),
            resizes: Vec::new(),
            exit: None,
            deadline: None,
            complaint: complaint.map(|error| failure::chain(&error)),
        })
    }

    /// Tells the client that launched the container that it runs, and attaches it if it wants that.
    pub(crate) fn welcome(
        &mut self,
        connection: Connection,
        attach: Option<AttachRequest>,
        fds: Vec<OwnedFd>,
    ) {
        let token = self.add_client(connection);
        let reply = Reply::Started {
            timing: self.vm.timing,
        };
        match attach {
            Some(attach) => self.attach(token, attach, fds, &reply),
            None => self.tell(token, &reply, &[]),
        }
        if let Some(error) = self.complaint.take() {
            self.warn(&format!("the container's output is not kept: {error}"));
        }
    }

    fn add_client(&mut self, connection: Connection) -> Token {
        self.next_token += 1;
        self.clients.push(Client {
            token: self.next_token,
            connection,
            waits: false,
            owns_input: false,
        });
        self.next_token
    }

    /// Serves until the container has ended, its record says so, and everybody who waits knows.
    pub(crate) fn run(mut self) {
        // A short command's end may have come with the answer to its start.
        self.take_answers();
        while self.exit.is_none() || !self.outputs.ended() {
            self.turn();
            if self.exit.is_some() && self.deadline.is_some_and(|deadline| deadline <= Instant::now()) {
                break;
            }
        }
        self.finish();
    }

    fn turn(&mut self) {
        for source in self.wait() {
            match source {
                Source::Listener => self.accept(),
                Source::Client(token) => self.serve(token),
                Source::Agent => self.hear_agent(),
                Source::VmmMessage | Source::VmmExit => self.vm_stopped(),
                Source::VmmStderr => self.vm.vmm.drain_stderr(),
                Source::Output(index) => self.outputs.pump(index),
                Source::Blocked => self.outputs.flush(),
            }
        }
        self.outputs.drop_stalled();
        self.tell_output_events();
        if self.exit.is_none() && self.deadline.is_some_and(|deadline| deadline <= Instant::now()) {
            // A process that can't be killed: its guest doesn't answer.
            self.vm.vmm.kill();
            self.deadline = None;
        }
    }

    /// Waits until something can be done; says what.
    fn wait(&self) -> Vec<Source> {
        let mut sources = vec![
            Source::Listener,
            Source::Agent,
            Source::VmmMessage,
            Source::VmmExit,
            Source::VmmStderr,
        ];
        let mut fds: Vec<PollFd<'_>> = [
            self.listener.as_fd(),
            self.vm.agent.as_fd(),
            self.vm.vmm.control_fd(),
            self.vm.vmm.as_fd(),
            self.vm.vmm.stderr_fd(),
        ]
        .map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN))
        .to_vec();
        if self.exit.is_some() {
            // The microVM has nothing more to say; its end is not news.
            sources.truncate(1);
            fds.truncate(1);
        }
        for client in &self.clients {
            sources.push(Source::Client(client.token));
            fds.push(PollFd::from_borrowed_fd(client.connection.as_fd(), PollFlags::IN));
        }
        for (index, fd) in self.outputs.wanted() {
            sources.push(Source::Output(index));
            fds.push(PollFd::from_borrowed_fd(fd, PollFlags::IN));
        }
        for fd in self.outputs.blocked() {
            sources.push(Source::Blocked);
            fds.push(PollFd::from_borrowed_fd(fd, PollFlags::OUT));
        }
        let deadline = [self.deadline, self.outputs.next_stall()]
            .into_iter()
            .flatten()
            .min();
        let timeout = deadline.map(|deadline| {
            let left = deadline.saturating_duration_since(Instant::now());
            Timespec {
                tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
                tv_nsec: i64::from(left.subsec_nanos()),
            }
        });
        match poll(&mut fds, timeout.as_ref()) {
            Ok(_) => {}
            Err(Errno::INTR) => return Vec::new(),
            Err(errno) => {
                tracing::error!(%errno, "waiting");
                return Vec::new();
            }
        }
        let ready = fds.iter().map(|fd| !fd.revents().is_empty());
        sources
            .into_iter()
            .zip(ready)
            .filter(|(_, ready)| *ready)
            .map(|(source, _)| source)
            .collect()
    }

    fn accept(&mut self) {
        let Ok((stream, _)) = self.listener.accept() else {
            return;
        };
        if self.clients.len() < MAX_CLIENTS
            && let Ok(connection) = Connection::new(stream)
        {
            self.add_client(connection);
        }
    }

    pub(super) fn client(&mut self, token: Token) -> Option<&mut Client> {
        self.clients.iter_mut().find(|client| client.token == token)
    }

    /// Sends a message; a client that can't be told anything is forgotten.
    pub(super) fn tell(&mut self, token: Token, reply: &Reply, fds: &[BorrowedFd<'_>]) {
        let Some(client) = self.client(token) else { return };
        if client.connection.send(reply, fds).is_err() {
            self.forget(token);
        }
    }

    fn warn(&mut self, message: &str) {
        let tokens: Vec<Token> = self.clients.iter().map(|client| client.token).collect();
        for token in tokens {
            self.tell(
                token,
                &Reply::Warning {
                    message: message.to_owned(),
                },
                &[],
            );
        }
    }

    pub(super) fn fail(&mut self, token: Token, error: &SandboxError) {
        self.tell(token, &failure::reply(error), &[]);
    }

    pub(super) fn forget(&mut self, token: Token) {
        self.outputs.detach(token);
        let Some(index) = self.clients.iter().position(|client| client.token == token) else {
            return;
        };
        if self.clients.swap_remove(index).owns_input
            && let Some(input) = &self.input
        {
            drop(input.shutdown(std::net::Shutdown::Write));
        }
    }

    fn serve(&mut self, token: Token) {
        let Some(client) = self.client(token) else { return };
        match client.connection.receive() {
            Incoming::Nothing => {}
            Incoming::Closed => self.forget(token),
            Incoming::Message(request, fds) => self.handle(token, request, fds),
        }
    }

    /// Takes the agent's answers.
    fn hear_agent(&mut self) {
        if let Err(error) = self.vm.agent.receive(Some(Instant::now() + CALL_TIMEOUT)) {
            tracing::debug!(%error, "the agent");
            self.vm_stopped();
            return;
        }
        self.take_answers();
    }

    fn take_answers(&mut self) {
        let agent = &mut self.vm.agent;
        let exit = agent.take::<WaitProcess>(&self.vm.exit);
        self.resizes
            .retain(|pending| matches!(agent.take(pending), Ok(None)));
        let mut answered = Vec::new();
        self.signals.retain(|(token, pending)| match agent.take(pending) {
            Ok(None) => true,
            result => {
                answered.push((*token, result));
                false
            }
        });
        for (token, result) in answered {
            match result {
                Err(error) if !is_exited(&error) => self.fail(token, &error),
                _ => self.tell(token, &Reply::Done, &[]),
            }
        }
        match exit {
            Ok(Some(exit)) => self.exited(exit.into()),
            Ok(None) => {}
            Err(error) => {
                tracing::debug!(%error, "waiting for the container");
                self.vm_stopped();
            }
        }
    }

    fn exited(&mut self, exit: ExitStatus) {
        self.vm.timing.run_us = self.vm.lap_us();
        self.exit = Some(exit);
        self.outputs.expect_last();
        self.deadline = Some(Instant::now() + LAST_OUTPUT_PATIENCE);
    }

    /// The microVM has gone, or is of no use any more.
    fn vm_stopped(&mut self) {
        if self.exit.is_some() {
            return;
        }
        self.vm.vmm.kill();
        self.record.error = Some(failure::chain(&self.vm.vmm.stopped()));
        self.exited(ExitStatus {
            code: KILLED,
            oom_killed: false,
        });
    }

    pub(super) fn tell_output_events(&mut self) {
        for event in self.outputs.take_events() {
            match event {
                OutputEvent::LogFailed(error) => {
                    self.warn(&format!(
                        "the container's output can't be kept in its log: {error}"
                    ));
                }
                OutputEvent::SinkFailed(token, errno) => {
                    let message = match errno {
                        Errno::PIPE | Errno::IO => String::new(),
                        errno => std::io::Error::from(errno).to_string(),
                    };
                    self.tell(token, &Reply::OutputFailed { message }, &[]);
                }
                OutputEvent::Stalled(token) => {
                    let message =
                        "detached: other clients waited for this one to take the container's output";
                    self.tell(
                        token,
                        &Reply::Warning {
                            message: message.into(),
                        },
                        &[],
                    );
                    self.forget(token);
                }
            }
        }
    }
}

/// A signal that comes when the process has just exited is no error.
fn is_exited(error: &SandboxError) -> bool {
    matches!(error, SandboxError::Agent { detail, .. } if matches!(
        detail.kind.enum_value_or_default(),
        ErrorKind::WRONG_STATE | ErrorKind::PROCESS_NOT_FOUND
    ))
}
