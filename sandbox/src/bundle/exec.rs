//! Further processes in a running container.
//!
//! They go straight to the agent; the container's monitor knows nothing of them. A detached one has a process of its own
//! on the host, which relays its streams, hands its signals on and ends as it does; an attached one is relayed by the
//! caller's process; and a caller that has a loop of its own takes the [`OpenedExec`].

use std::{
    fs::File,
    io::{Read as _, Write as _},
    os::{
        fd::{AsFd as _, BorrowedFd, OwnedFd},
        unix::net::UnixStream,
    },
    time::{Duration, Instant},
};

use agent_protocol::{
    CreateExec, CreateExecRequest, Message as _, Process, ProcessRef, RPC_PORT, ResizeTty, ResizeTtyRequest,
    SignalProcess, SignalProcessRequest, StartProcess, WaitProcess, WindowSize, decode,
};
use rustix::{
    event::PollFlags,
    fs::{MemfdFlags, memfd_create},
};

use super::{
    control::Bundles,
    error::{BundleError, Refusal, Result},
    exit::end_like,
    home::{Homes, sandbox_id},
    protocol::{ExecRequest, Reply},
    record::{BundleStatus, ProcessExit},
    relay::{AllSignals, BundleStdio, Ends, Incident, Relay},
    server::{deliver_rest, is_exited, ready},
};
use crate::{
    SandboxError, Window,
    agent_client::{AgentClient, CALL_TIMEOUT, Pending},
    attach::process_ref,
    identity::random_bytes,
    log_driver::OutputStream,
    monitor::{Connection, Launcher, Request as MonitorRequest},
    oci_spec::translate_process,
    stdio::ProcessStreams,
};

/// After the process has exited, how long others that hold its output may still add to it.
const OUTPUT_PATIENCE: Duration = Duration::from_secs(2);
/// Longest request; what the agent takes is shorter.
const MAX_REQUEST_BYTES: u64 = 8 << 20;

/// A further process.
#[derive(Debug)]
pub struct ExecBundle<'a> {
    /// What it runs, and as whom.
    pub process: &'a oci_spec::runtime::Process,
    /// What it is connected to.
    pub stdio: BundleStdio,
    /// What the caller calls it; a random name where there is none.
    pub exec_id: Option<&'a str>,
    /// Also in a container that is paused, where it waits for the container to go on.
    pub ignore_paused: bool,
}

/// A further process that runs, for a caller that relays its streams by itself.
#[derive(Debug)]
pub struct OpenedExec {
    /// Answers `wait`, and takes signals and sizes for `process`.
    pub agent: AgentClient,
    /// What it is called there.
    pub process: ProcessRef,
    /// Answered when it has exited.
    pub wait: Pending<WaitProcess>,
    /// Where its input goes; a half-close ends it.
    pub input: Option<UnixStream>,
    /// Where its output comes from.
    pub outputs: Vec<(OutputStream, UnixStream)>,
    /// Its id in the guest.
    pub guest_pid: u32,
}

/// What the agent calls the process that somebody calls so: of the form its names have, whatever the caller's is.
pub(super) fn agent_id(exec_id: &str) -> String {
    sandbox_id(exec_id).as_str().to_owned()
}

/// A process that runs, before bytes move.
struct Started {
    agent: AgentClient,
    process: ProcessRef,
    wait: Pending<WaitProcess>,
    streams: ProcessStreams,
    guest_pid: u32,
}

/// Creates and starts a process: one round trip.
fn start(homes: &Homes, id: &str, request: &CreateExecRequest) -> Result<Started> {
    let lost = |error| match error {
        SandboxError::AgentConnection { source } => {
            tracing::debug!(%source, "connecting to the agent");
            BundleError::ExecInStopped
        }
        error => BundleError::from_agent(error),
    };
    let process = process_ref(&request.container_id, &request.exec_id);
    let connect = || homes.connect_vsock(id);
    let ids = (request.container_id.as_str(), request.exec_id.as_str());
    let (terminal, stdin) = (request.process.terminal, request.process.attach_stdin);
    let (rpc, mut streams) =
        ProcessStreams::open_beside(connect, RPC_PORT, ids, terminal, stdin).map_err(lost)?;
    let mut accepted = rpc
        .try_clone()
        .map_err(SandboxError::system("duplicating a descriptor"))?;
    let mut agent = AgentClient::new(rpc);
    let hello = agent.send_connect(false).map_err(lost)?;
    let create = agent.send::<CreateExec>(request).map_err(lost)?;
    let start = agent.send::<StartProcess>(&process).map_err(lost)?;
    let wait = agent.send::<WaitProcess>(&process).map_err(lost)?;
    streams.confirm([&mut accepted]).map_err(lost)?;
    agent.finish_connect(&hello).map_err(lost)?;
    agent.wait(&create, Some(CALL_TIMEOUT)).map_err(lost)?;
    let started = agent.wait(&start, Some(CALL_TIMEOUT)).map_err(lost)?;
    Ok(Started {
        agent,
        process,
        wait,
        streams,
        guest_pid: started.pid,
    })
}

impl Bundles {
    /// The agent's request, if the container takes one.
    fn exec_request(
        &self,
        id: &str,
        exec_id: Option<&str>,
        process: &oci_spec::runtime::Process,
        (has_input, ignore_paused): (bool, bool),
    ) -> Result<CreateExecRequest> {
        let record = self.require(id)?;
        match record.status {
            BundleStatus::Running | BundleStatus::Created => {}
            BundleStatus::Paused if ignore_paused => {}
            BundleStatus::Paused => return Err(BundleError::ExecInPaused),
            BundleStatus::Stopped | BundleStatus::Creating => return Err(BundleError::ExecInStopped),
        }
        let mut process: Process = translate_process(process, &self.spec(id)?).map_err(SandboxError::from)?;
        process.attach_stdin = has_input;
        process.attach_stdout = true;
        process.attach_stderr = !process.terminal;
        let exec_id = match exec_id {
            Some(exec_id) => agent_id(exec_id),
            None => format!("{:016x}", u64::from_le_bytes(random_bytes()?)),
        };
        Ok(CreateExecRequest {
            container_id: record.sandbox_id.as_str().to_owned(),
            exec_id,
            process: Some(process).into(),
            ..CreateExecRequest::default()
        })
    }

    /// Starts a further process and gives the caller everything of it. `has_input`: whether it gets one.
    ///
    /// # Errors
    ///
    /// The container doesn't run, or the process can't be started.
    pub fn open_exec(
        &self,
        id: &str,
        exec_id: &str,
        process: &oci_spec::runtime::Process,
        has_input: bool,
    ) -> Result<OpenedExec> {
        let request = self.exec_request(id, Some(exec_id), process, (has_input, false))?;
        let Started {
            agent,
            process,
            wait,
            streams,
            guest_pid,
        } = start(&self.homes, id, &request)?;
        let (input, outputs) = streams.into_parts();
        Ok(OpenedExec {
            agent,
            process,
            wait,
            input,
            outputs,
            guest_pid,
        })
    }

    /// Runs a further process to its end, relayed by this process, whose signals become the process's.
    ///
    /// # Errors
    ///
    /// The container doesn't run, or the process can't be started.
    pub fn exec_attached(
        &self,
        id: &str,
        exec: ExecBundle<'_>,
        window: Option<Window>,
    ) -> Result<ProcessExit> {
        let has_input = exec.stdio.has_input();
        let request = self.exec_request(id, exec.exec_id, exec.process, (has_input, exec.ignore_paused))?;
        let signals = AllSignals::take()?;
        let ends = Ends::new(exec.stdio, request.process.terminal, None)?;
        let started = start(&self.homes, id, &request)?;
        drive(started, ends, &signals, window)
    }

    /// Starts a further process that has a process of its own on the host, a child of the caller; returns its id.
    ///
    /// # Errors
    ///
    /// The container doesn't run, or the process can't be started.
    pub fn exec_detached(&self, id: &str, exec: ExecBundle<'_>) -> Result<u32> {
        let has_input = exec.stdio.has_input();
        let request = self.exec_request(id, exec.exec_id, exec.process, (has_input, exec.ignore_paused))?;
        let file = memory_file(&request)?;
        let (mut connection, mut child) = Launcher::spawn()?.into_parts();
        let (stdio, streams) = exec.stdio.plan();
        let message = MonitorRequest::ExecBundle(ExecRequest {
            root: self.homes.root().to_owned(),
            id: id.to_owned(),
            stdio,
        });
        let fds: Vec<BorrowedFd<'_>> = std::iter::once(file.as_fd()).chain(streams).collect();
        let sent = connection.send(&message, &fds);
        let reply = match sent {
            Ok(()) => connection.wait::<Reply>(None)?,
            Err(_) => None,
        };
        let error = match reply {
            Some((Reply::Started { .. }, _)) => return Ok(child.id()),
            Some((Reply::Failed(refusal), _)) => refusal.into(),
            _ => BundleError::Sandbox(SandboxError::MonitorGone),
        };
        drop(connection);
        drop(child.wait());
        Err(error)
    }
}

fn memory_file(request: &CreateExecRequest) -> Result<File> {
    let bytes = request
        .write_to_bytes()
        .map_err(|error| SandboxError::AgentProtocol {
            problem: error.to_string(),
        })?;
    let file = memfd_create("exec", MemfdFlags::CLOEXEC).map_err(SandboxError::system("making a file"))?;
    let mut file = File::from(file);
    file.write_all(&bytes)
        .map_err(SandboxError::system("writing a file"))?;
    Ok(file)
}

/// The whole life of a process that stands for a detached exec.
pub(crate) fn serve(connection: Connection, request: ExecRequest, mut fds: impl Iterator<Item = OwnedFd>) {
    let Some(file) = fds.next() else { return };
    let stdio = BundleStdio::planned(request.stdio, fds);
    let started = read_request(file).and_then(|exec| {
        let signals = AllSignals::take()?;
        let ends = Ends::new(stdio, exec.process.terminal, None)?;
        let started = start(&Homes::open(&request.root)?, &request.id, &exec)?;
        Ok((started, ends, signals))
    });
    match started {
        Ok((started, ends, signals)) => {
            let told = Reply::Started {
                guest_pid: started.guest_pid,
            };
            drop(connection.send(&told, &[]));
            drop(connection);
            match drive(started, ends, &signals, None) {
                Ok(exit) => end_like(exit),
                // The container has ended under it.
                Err(_) => end_like(super::exit::KILLED),
            }
        }
        Err(error) => drop(connection.send(&Reply::Failed(Refusal::from(&error)), &[])),
    }
}

fn read_request(file: OwnedFd) -> Result<CreateExecRequest> {
    use std::io::Seek as _;
    let mut bytes = Vec::new();
    let mut file = File::from(file);
    let read = file
        .rewind()
        .and_then(|()| file.take(MAX_REQUEST_BYTES).read_to_end(&mut bytes));
    read.map_err(SandboxError::system("reading a request"))?;
    decode::<CreateExecRequest>(&bytes)
        .map_err(|error| SandboxError::AgentProtocol {
            problem: error.to_string(),
        })
        .map_err(Into::into)
}

/// What is waited for.
#[derive(Debug, Clone, Copy)]
enum Source {
    Agent,
    Signals,
    Output(usize),
    Blocked,
}

/// Relays a process until it has exited and its output has come.
fn drive(started: Started, ends: Ends, signals: &AllSignals, window: Option<Window>) -> Result<ProcessExit> {
    let Started {
        mut agent,
        process,
        wait,
        streams,
        ..
    } = started;
    let mut relay = ends.connect(streams)?;
    let size = |relay: &Relay| match (&relay.terminal, window) {
        (Some(terminal), _) => terminal.size(),
        (None, Some(window)) => window(),
        (None, None) => None,
    };
    if let Some(size) = size(&relay) {
        resize(&mut agent, &process, size)?;
    }
    let mut exit = None;
    let mut deadline = None;
    while exit.is_none() || !relay.outputs.ended() {
        if exit.is_none()
            && let Some(response) = agent.take(&wait)?
        {
            exit = Some(ProcessExit::from(&response));
            deadline = Some(Instant::now() + OUTPUT_PATIENCE);
            relay.outputs.expect_last();
            continue;
        }
        if deadline.is_some_and(|deadline| deadline <= Instant::now()) {
            break;
        }
        let mut entries = Vec::new();
        // First, and so served first: a call that is made for a signal reads whatever the agent has sent.
        if exit.is_none() {
            entries.push((Source::Agent, agent.as_fd(), PollFlags::IN));
        }
        entries.push((Source::Signals, signals.as_fd(), PollFlags::IN));
        let wanted = relay.outputs.wanted();
        entries.extend(wanted.map(|(index, fd)| (Source::Output(index), fd, PollFlags::IN)));
        entries.extend(
            relay
                .outputs
                .blocked()
                .map(|fd| (Source::Blocked, fd, PollFlags::OUT)),
        );
        for source in ready(&entries, deadline) {
            match source {
                Source::Agent => agent.receive(Some(Instant::now() + CALL_TIMEOUT))?,
                Source::Signals => {
                    while let Some(incident) = signals.next() {
                        hand_on(&mut agent, &process, incident, size(&relay))?;
                    }
                }
                Source::Output(index) => relay.outputs.pump(index),
                Source::Blocked => relay.outputs.flush(),
            }
        }
        drop(relay.outputs.take_events());
    }
    deliver_rest(&mut relay);
    Ok(exit.unwrap_or(ProcessExit::Code(255)))
}

fn hand_on(
    agent: &mut AgentClient,
    process: &ProcessRef,
    incident: Incident,
    size: Option<(u16, u16)>,
) -> Result<()> {
    const SIGWINCH: i32 = 28;
    match incident {
        Incident::Resized | Incident::Signal(SIGWINCH) if size.is_some() => {
            size.map_or(Ok(()), |size| resize(agent, process, size))
        }
        Incident::Resized => Ok(()),
        Incident::Signal(signal) => {
            let sent = agent.call::<SignalProcess>(&SignalProcessRequest {
                container_id: process.container_id.clone(),
                exec_id: process.exec_id.clone(),
                signal: signal.unsigned_abs(),
                ..SignalProcessRequest::default()
            });
            match sent {
                Err(error) if !is_exited(&error) => Err(error.into()),
                _ => Ok(()),
            }
        }
    }
}

fn resize(agent: &mut AgentClient, process: &ProcessRef, (rows, columns): (u16, u16)) -> Result<()> {
    let window_size = WindowSize {
        rows: rows.into(),
        columns: columns.into(),
        ..WindowSize::default()
    };
    let resized = agent.call::<ResizeTty>(&ResizeTtyRequest {
        container_id: process.container_id.clone(),
        exec_id: process.exec_id.clone(),
        window_size: Some(window_size).into(),
        ..ResizeTtyRequest::default()
    });
    match resized {
        // It has just exited, or has closed its terminal.
        Err(SandboxError::Agent { .. }) | Ok(_) => Ok(()),
        Err(error) => Err(error.into()),
    }
}
