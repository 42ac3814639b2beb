//! The loop of the monitor of a bundle's container: its signals, its streams, its clients, its end.
//!
//! ```text
//!  created ─► Created ── Start ─► Running ── exit reported, streams at their end ──► (record written) ─► this process
//!                │                   │                                                   ▲                ends alike
//!                └── a signal that ──┴───────── the VMM has gone ────────────────────────┘
//!                    ends a process
//! ```
//!
//! Thread: the process's main one, which waits in `poll`; input is read by another (`relay`). It never waits for a client,
//! and for the guest only while it starts the container's process.

use std::{
    os::{
        fd::{AsFd as _, BorrowedFd},
        unix::net::UnixListener,
    },
    time::{Duration, Instant},
};

use agent_protocol::{ErrorKind, ResizeTty, SignalProcess, WaitProcess};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::Errno,
};

use super::{
    error::{Refusal, Result},
    exit::{KILLED, end_like},
    home::Home,
    launch::Created,
    machine::Machine,
    mount_view::MountView,
    protocol::{Reply, Request},
    record::{BundleExit, BundleRecord, BundleStatus, ProcessExit},
    relay::{AllSignals, Ends, Incident, Relay},
};
use crate::{
    SandboxError,
    agent_client::{AgentClient, CALL_TIMEOUT, Pending},
    monitor::{Connection, Incoming},
};

/// After the process has exited, how long the rest of its output may take to come.
const LAST_OUTPUT_PATIENCE: Duration = Duration::from_secs(10);
/// Connections at once.
const MAX_CLIENTS: usize = 1024;

/// Which client; never used twice.
pub(super) type Token = u64;

#[derive(Debug)]
pub(super) struct Client {
    pub(super) token: Token,
    pub(super) connection: Connection,
    /// It wants to know the end.
    pub(super) waits: bool,
}

/// What `poll` waits for.
#[derive(Debug, Clone, Copy)]
enum Source {
    Listener,
    Signals,
    Agent,
    Machine,
    VmmStderr,
    Client(Token),
    Output(usize),
    Blocked,
}

/// A container that has been created.
#[derive(Debug)]
pub(super) struct Server {
    pub(super) home: Home,
    pub(super) record: BundleRecord,
    pub(super) agent: AgentClient,
    pub(super) machine: Machine,
    /// What the host sees of the container's mounts.
    pub(super) view: Option<MountView>,
    listener: UnixListener,
    incidents: AllSignals,
    clients: Vec<Client>,
    next_token: Token,
    /// Until it is started.
    pub(super) ends: Option<Ends>,
    pub(super) input: bool,
    /// From then on.
    pub(super) relay: Option<Relay>,
    pub(super) wait: Option<Pending<WaitProcess>>,
    /// Signals under way, and who wants to know of them.
    pub(super) signals: Vec<(Option<Token>, Pending<SignalProcess>)>,
    pub(super) resizes: Vec<Pending<ResizeTty>>,
    exit: Option<BundleExit>,
    /// When the microVM is ended if nothing else happens.
    pub(super) deadline: Option<Instant>,
}

impl Server {
    pub(super) fn new(home: Home, record: BundleRecord, created: Created) -> Result<Self> {
        let listener = home.listen_monitor()?;
        listener
            .set_nonblocking(true)
            .map_err(SandboxError::system("preparing the monitor's socket"))?;
        let Created {
            agent,
            machine,
            view,
            ends,
            input,
            signals,
        } = created;
        Ok(Self {
            home,
            record,
            agent,
            machine,
            view,
            listener,
            incidents: signals,
            clients: Vec::new(),
            next_token: 0,
            ends: Some(ends),
            input,
            relay: None,
            wait: None,
            signals: Vec::new(),
            resizes: Vec::new(),
            exit: None,
            deadline: None,
        })
    }

    /// Serves until the container has ended, and ends as it did.
    pub(super) fn run(mut self, creator: Connection) -> ! {
        self.record.status = BundleStatus::Created;
        let token = self.add_client(creator);
        match self.home.write(&self.record) {
            Ok(()) => self.tell(token, &Reply::Created),
            Err(error) => {
                self.tell(token, &Reply::Failed(Refusal::from(&error)));
                self.ended(KILLED, false, Some(error.to_string()));
            }
        }
        while self.exit.is_none() || self.relay.as_ref().is_some_and(|relay| !relay.outputs.ended()) {
            self.turn();
            if self.exit.is_some() && self.is_late() {
                break;
            }
        }
        self.finish()
    }

    fn is_late(&self) -> bool {
        self.deadline.is_some_and(|deadline| deadline <= Instant::now())
    }

    fn turn(&mut self) {
        for source in self.wait() {
            match source {
                Source::Listener => self.accept(),
                Source::Signals => self.take_incidents(),
                Source::Agent => self.hear_agent(),
                Source::Machine => self.vm_stopped(),
                Source::VmmStderr => {
                    if let Some(own) = self.machine.own() {
                        own.vmm.drain_stderr();
                    }
                }
                Source::Client(token) => self.serve(token),
                Source::Output(index) => {
                    if let Some(relay) = &mut self.relay {
                        relay.outputs.pump(index);
                    }
                }
                Source::Blocked => {
                    if let Some(relay) = &mut self.relay {
                        relay.outputs.flush();
                    }
                }
            }
        }
        if let Some(relay) = &mut self.relay {
            // Who gave the descriptors sees for itself what became of them.
            drop(relay.outputs.take_events());
        }
        if self.exit.is_none() && self.is_late() {
            // A process that can't be killed: its guest doesn't answer.
            if self.machine.kill() {
                self.deadline = None;
            } else {
                let error = "its process can't be killed: the guest doesn't answer".to_owned();
                self.ended(KILLED, false, Some(error));
            }
        }
    }

    /// Waits until something can be done; says what.
    fn wait(&self) -> Vec<Source> {
        let mut entries = vec![
            (Source::Listener, self.listener.as_fd(), PollFlags::IN),
            (Source::Signals, self.incidents.as_fd(), PollFlags::IN),
        ];
        if self.exit.is_none() {
            entries.push((Source::Agent, self.agent.as_fd(), PollFlags::IN));
            let ends = self.machine.end_fds();
            entries.extend(ends.into_iter().map(|fd| (Source::Machine, fd, PollFlags::IN)));
            if let Machine::Own(own) = &self.machine {
                entries.push((Source::VmmStderr, own.vmm.stderr_fd(), PollFlags::IN));
            }
        }
        let clients = self.clients.iter();
        entries.extend(clients.map(|client| {
            (
                Source::Client(client.token),
                client.connection.as_fd(),
                PollFlags::IN,
            )
        }));
        if let Some(relay) = &self.relay {
            let wanted = relay.outputs.wanted();
            entries.extend(wanted.map(|(index, fd)| (Source::Output(index), fd, PollFlags::IN)));
            let blocked = relay.outputs.blocked();
            entries.extend(blocked.map(|fd| (Source::Blocked, fd, PollFlags::OUT)));
        }
        ready(&entries, self.deadline)
    }

    fn add_client(&mut self, connection: Connection) -> Token {
        self.next_token += 1;
        self.clients.push(Client {
            token: self.next_token,
            connection,
            waits: false,
        });
        self.next_token
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
    pub(super) fn tell(&mut self, token: Token, reply: &Reply) {
        let sent = self
            .client(token)
            .map(|client| client.connection.send(reply, &[]).is_ok());
        if sent == Some(false) {
            self.forget(token);
        }
    }

    pub(super) fn answer(&mut self, token: Token, result: Result<()>) {
        match result {
            Ok(()) => self.tell(token, &Reply::Done),
            Err(error) => self.tell(token, &Reply::Failed(Refusal::from(&error))),
        }
    }

    fn forget(&mut self, token: Token) {
        // Of a pod's container, the end of its monitor is the end.
        self.leave(token, false);
        self.clients.retain(|client| client.token != token);
    }

    fn serve(&mut self, token: Token) {
        let Some(client) = self.client(token) else { return };
        match client.connection.receive::<Request>() {
            Incoming::Nothing => {}
            Incoming::Closed => self.forget(token),
            Incoming::Message(request, fds) => self.handle(token, request, fds),
        }
    }

    fn take_incidents(&mut self) {
        while let Some(incident) = self.incidents.next() {
            match incident {
                Incident::Resized => self.follow_terminal(),
                Incident::Signal(signal) => drop(self.signal(None, signal, false)),
            }
        }
    }

    /// Takes the agent's answers.
    fn hear_agent(&mut self) {
        if let Err(error) = self.agent.receive(Some(Instant::now() + CALL_TIMEOUT)) {
            tracing::debug!(%error, "the agent");
            self.vm_stopped();
            return;
        }
        self.take_answers();
    }

    pub(super) fn take_answers(&mut self) {
        self.see_off();
        let agent = &mut self.agent;
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
        let exit = self.wait.as_ref().map(|wait| agent.take::<WaitProcess>(wait));
        for (token, result) in answered {
            let Some(token) = token else { continue };
            let result = match result {
                Err(error) if !is_exited(&error) => Err(error.into()),
                _ => Ok(()),
            };
            self.answer(token, result);
        }
        match exit {
            Some(Ok(Some(exit))) => self.ended(ProcessExit::from(&exit), exit.oom_killed, None),
            Some(Err(error)) => {
                tracing::debug!(%error, "waiting for the container");
                self.vm_stopped();
            }
            Some(Ok(None)) | None => {}
        }
    }

    pub(super) fn ended(&mut self, status: ProcessExit, oom_killed: bool, error: Option<String>) {
        if self.exit.is_some() {
            return;
        }
        self.exit = Some(BundleExit::now(status, oom_killed, error));
        self.deadline = Some(Instant::now() + LAST_OUTPUT_PATIENCE);
        if let Some(relay) = &mut self.relay {
            relay.outputs.expect_last();
        }
    }

    /// The microVM has gone, or is of no use any more.
    fn vm_stopped(&mut self) {
        if self.exit.is_none() {
            self.machine.kill();
            let error = self.machine.stopped();
            self.ended(KILLED, false, Some(error.to_string()));
        }
    }

    /// Ends the microVM, records the exit, tells everybody, ends.
    fn finish(mut self) -> ! {
        self.machine.kill();
        let exit = self.exit.take();
        let exit = exit.unwrap_or_else(|| BundleExit::now(KILLED, false, None));
        self.machine.end();
        self.home.remove_sockets();
        self.record.status = BundleStatus::Stopped;
        self.record.exit = Some(exit.clone());
        self.record.run = None;
        if let Err(error) = self.home.write(&self.record) {
            // The next command finds a record that says "running" and no owner, and records what it can.
            tracing::error!(%error, "recording the container's end");
        }
        let status = exit.status;
        // Signals whose answer the end has overtaken: they came when it was there.
        for (token, _) in std::mem::take(&mut self.signals) {
            if let Some(token) = token {
                self.answer(token, Ok(()));
            }
        }
        for client in &self.clients {
            if client.waits {
                drop(client.connection.send(&Reply::Exited(exit.clone()), &[]));
            }
        }
        // Nobody waits for an answer any more, however long its readers take.
        drop((self.listener, self.clients));
        // Its readers see the end of the output, where they have the last of it.
        if let Some(relay) = &mut self.relay {
            deliver_rest(relay);
        }
        drop(self.relay);
        end_like(status)
    }
}

/// Writes what a slow reader has not taken yet, as long as it is there.
pub(super) fn deliver_rest(relay: &mut Relay) {
    while relay.outputs.is_blocked() {
        let mut fds: Vec<PollFd<'_>> = relay
            .outputs
            .blocked()
            .map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::OUT))
            .collect();
        if poll(&mut fds, None).is_err_and(|errno| errno != Errno::INTR) {
            return;
        }
        drop(fds);
        relay.outputs.flush();
    }
}

/// How long `poll` may wait.
pub(super) fn timeout(deadline: Option<Instant>) -> Option<Timespec> {
    deadline.map(|deadline| {
        let left = deadline.saturating_duration_since(Instant::now());
        Timespec {
            tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: i64::from(left.subsec_nanos()),
        }
    })
}

/// A signal that comes when the process has just exited is no error.
pub(super) fn is_exited(error: &SandboxError) -> bool {
    matches!(error, SandboxError::Agent { detail, .. } if matches!(
        detail.kind.enum_value_or_default(),
        ErrorKind::WRONG_STATE | ErrorKind::PROCESS_NOT_FOUND
    ))
}

/// What `fds` are for.
pub(super) fn ready<'a, S: Copy>(
    entries: &[(S, BorrowedFd<'a>, PollFlags)],
    deadline: Option<Instant>,
) -> Vec<S> {
    let mut fds: Vec<PollFd<'a>> = entries
        .iter()
        .map(|(_, fd, flags)| PollFd::from_borrowed_fd(*fd, *flags))
        .collect();
    if let Err(errno) = poll(&mut fds, timeout(deadline).as_ref()) {
        if errno != Errno::INTR {
            tracing::error!(%errno, "waiting");
        }
        return Vec::new();
    }
    let sources = entries.iter().map(|(source, ..)| *source);
    sources
        .zip(fds.iter())
        .filter(|(_, fd)| !fd.revents().is_empty())
        .map(|(source, _)| source)
        .collect()
}
