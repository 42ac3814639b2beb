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
//! Invariant: what clients are told about the end is told after the record says it and nothing is left of the microVM.

use std::{
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::net::{UnixListener, UnixStream},
    },
    time::{Duration, Instant},
};

use agent_protocol::{
    ErrorKind, ResizeTty, ResizeTtyRequest, SignalProcess, SignalProcessRequest, WaitProcess, WindowSize,
};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::Errno,
};

use crate::{
    ContainerRecord, Result, SandboxError, Status,
    agent_client::{CALL_TIMEOUT, Pending},
    attach::ExitStatus,
    container_store::{Home, now_ms},
    lifecycle::MicroVm,
    log_driver::LogWriter,
};

use super::{
    failure,
    output::{OutputEvent, Outputs, Token},
    protocol::{AttachRequest, Connection, ExitReport, Incoming, Reply, Request},
    sink::Sink,
};

/// After the container's process has exited, how long the rest of its output may take to come.
const LAST_OUTPUT_PATIENCE: Duration = Duration::from_secs(10);
/// How long a killed process may take to end; then its microVM is.
const KILL_PATIENCE: Duration = Duration::from_secs(5);
/// Connections at once.
const MAX_CLIENTS: usize = 1024;
const SIGKILL: i32 = 9;
/// The exit code of a container whose microVM was ended.
const KILLED: u8 = 137;

#[derive(Debug)]
struct Client {
    token: Token,
    connection: Connection,
    /// It wants to know the end.
    waits: bool,
    /// The container's input ends with this client.
    owns_input: bool,
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
    home: Home,
    record: ContainerRecord,
    vm: MicroVm,
    listener: UnixListener,
    input: Option<UnixStream>,
    outputs: Outputs,
    clients: Vec<Client>,
    next_token: Token,
    signals: Vec<(Token, Pending<SignalProcess>)>,
    resizes: Vec<Pending<ResizeTty>>,
    exit: Option<ExitStatus>,
    /// What happens if nothing else does: the microVM is ended.
    deadline: Option<Instant>,
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

    fn client(&mut self, token: Token) -> Option<&mut Client> {
        self.clients.iter_mut().find(|client| client.token == token)
    }

    /// Sends a message; a client that can't be told anything is forgotten.
    fn tell(&mut self, token: Token, reply: &Reply, fds: &[BorrowedFd<'_>]) {
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

    fn fail(&mut self, token: Token, error: &SandboxError) {
        self.tell(token, &failure::reply(error), &[]);
    }

    fn forget(&mut self, token: Token) {
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

    fn handle(&mut self, token: Token, request: Request, fds: Vec<OwnedFd>) {
        match request {
            Request::Attach(attach) => self.attach(token, attach, fds, &Reply::Attached),
            Request::Wait => {
                if let Some(client) = self.client(token) {
                    client.waits = true;
                }
            }
            Request::Signal { signal, all } => self.signal(token, signal, all),
            Request::Resize { rows, columns } => self.resize(rows, columns),
            Request::Pause => self.pause(token),
            Request::Resume => self.resume(token),
            Request::Rename { name } => match self.rename(name) {
                Ok(()) => self.tell(token, &Reply::Done, &[]),
                Err(error) => self.fail(token, &error),
            },
            // Once only, on a connection of its own.
            Request::Launch { .. } => self.forget(token),
        }
    }

    fn attach(&mut self, token: Token, attach: AttachRequest, fds: Vec<OwnedFd>, reply: &Reply) {
        let mut fds = fds.into_iter().map(Sink::new);
        let stdout = attach.stdout.then(|| fds.next()).flatten();
        let stderr = attach.stderr.then(|| fds.next()).flatten();
        let terminal = self.record.spec.process.terminal;
        let input = self
            .input
            .as_ref()
            .filter(|_| attach.stdin && self.record.spec.process.stdin);
        let input = input.and_then(|input| input.try_clone().ok());
        self.outputs.attach(token, attach.output_ends_it, stdout, stderr);
        if let Some(client) = self.client(token) {
            client.waits = true;
            // A terminal can be attached to again; another input ends with the one it comes from.
            client.owns_input = attach.owner && input.is_some() && !terminal;
        }
        let fds: Vec<BorrowedFd<'_>> = input.iter().map(AsFd::as_fd).collect();
        self.tell(token, reply, &fds);
    }

    fn signal(&mut self, token: Token, signal: i32, all: bool) {
        if self.record.status == Status::Paused
            && let Err(error) = self.set_paused(false)
        {
            self.fail(token, &error);
            return;
        }
        let sent = self.vm.agent.send::<SignalProcess>(&SignalProcessRequest {
            container_id: self.record.id.as_str().to_owned(),
            signal: signal.unsigned_abs(),
            all,
            ..SignalProcessRequest::default()
        });
        if signal == SIGKILL && self.deadline.is_none() {
            self.deadline = Some(Instant::now() + KILL_PATIENCE);
        }
        match sent {
            Ok(pending) => self.signals.push((token, pending)),
            Err(error) => self.fail(token, &error),
        }
    }

    fn resize(&mut self, rows: u16, columns: u16) {
        let window_size = WindowSize {
            rows: rows.into(),
            columns: columns.into(),
            ..WindowSize::default()
        };
        let sent = self.vm.agent.send::<ResizeTty>(&ResizeTtyRequest {
            container_id: self.record.id.as_str().to_owned(),
            window_size: Some(window_size).into(),
            ..ResizeTtyRequest::default()
        });
        self.resizes.extend(sent);
    }

    fn set_paused(&mut self, paused: bool) -> Result<()> {
        if paused {
            self.vm.vmm.pause()?;
            self.record.status = Status::Paused;
        } else {
            self.vm.vmm.resume()?;
            self.record.status = Status::Running;
        }
        self.home.write(&self.record)
    }

    fn pause(&mut self, token: Token) {
        let name = self.record.name.clone();
        let result = match self.record.status {
            Status::Running => self.set_paused(true),
            _ => Err(SandboxError::Paused { name }),
        };
        match result {
            Ok(()) => self.tell(token, &Reply::Done, &[]),
            Err(error) => self.fail(token, &error),
        }
    }

    fn resume(&mut self, token: Token) {
        let name = self.record.name.clone();
        let result = match self.record.status {
            Status::Paused => self.set_paused(false),
            _ => Err(SandboxError::NotPaused { name }),
        };
        match result {
            Ok(()) => self.tell(token, &Reply::Done, &[]),
            Err(error) => self.fail(token, &error),
        }
    }

    fn rename(&mut self, name: String) -> Result<()> {
        self.home.give_name(&name, &self.record.id)?;
        let old = std::mem::replace(&mut self.record.name, name);
        self.home.write(&self.record)?;
        self.home.drop_name(&old);
        Ok(())
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

    fn tell_output_events(&mut self) {
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

    /// Ends the microVM, records the exit, tells everybody.
    fn finish(mut self) {
        self.vm.begin_end();
        self.outputs.finish_log();
        self.tell_output_events();
        let Self {
            home,
            mut record,
            vm,
            listener,
            mut outputs,
            mut clients,
            exit,
            ..
        } = self;
        drop(listener);
        let exit = exit.unwrap_or(ExitStatus {
            code: KILLED,
            oom_killed: false,
        });
        record.status = Status::Exited;
        record.finished_ms = Some(now_ms());
        record.exit_code = Some(exit.code);
        record.oom_killed = exit.oom_killed;
        record.run = None;
        let timing = vm.finish();
        let report = ExitReport {
            code: exit.code,
            oom_killed: exit.oom_killed,
            error: record.error.clone(),
            timing,
        };
        settle(home, &record);
        clients.retain(|client| client.waits);
        deliver_rest(&mut outputs, &mut clients);
        // Whoever reads the other end of a pipe sees its end as soon as it is told.
        drop(outputs);
        for client in clients {
            drop(client.connection.send(&Reply::Exited(report.clone()), &[]));
        }
    }
}

/// Leaves the home as its container wants it: with the exit recorded, or not at all.
fn settle(home: Home, record: &ContainerRecord) {
    let settled = if record.spec.auto_remove {
        home.remove(&record.name)
    } else {
        home.write(record)
    };
    if let Err(error) = settled {
        // The next command finds a record that says "running" and no owner, and records what it can.
        tracing::error!(%error, "recording the container's end");
    }
}

/// Writes what slow clients have not taken yet, as long as they are there.
fn deliver_rest(outputs: &mut Outputs, clients: &mut Vec<Client>) {
    while outputs.is_blocked() {
        let mut fds: Vec<PollFd<'_>> = outputs
            .blocked()
            .map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::OUT))
            .collect();
        let writable = fds.len();
        fds.extend(
            clients
                .iter()
                .map(|client| PollFd::from_borrowed_fd(client.connection.as_fd(), PollFlags::IN)),
        );
        if poll(&mut fds, None).is_err_and(|errno| errno != Errno::INTR) {
            return;
        }
        let gone: Vec<bool> = fds[writable..]
            .iter()
            .map(|fd| !fd.revents().is_empty())
            .collect();
        drop(fds);
        outputs.flush();
        let mut gone = gone.into_iter();
        clients.retain_mut(|client| {
            let gone = gone.next().unwrap_or(false)
                && matches!(client.connection.receive::<Request>(), Incoming::Closed);
            if gone {
                outputs.detach(client.token);
            }
            !gone
        });
    }
}

/// A signal that comes when the process has just exited is no error.
fn is_exited(error: &SandboxError) -> bool {
    matches!(error, SandboxError::Agent { detail, .. } if matches!(
        detail.kind.enum_value_or_default(),
        ErrorKind::WRONG_STATE | ErrorKind::PROCESS_NOT_FOUND
    ))
}
