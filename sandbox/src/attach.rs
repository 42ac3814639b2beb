//! `exec`: a further process in a running container, its streams, its signals, its terminal, its exit.
//!
//! It goes straight to the agent; the container's monitor knows nothing of it.

use std::{
    os::fd::AsFd as _,
    time::{Duration, Instant},
};

use agent_protocol::{
    Connect, CreateExec, CreateExecRequest, ErrorKind, ProcessRef, RPC_PORT, ResizeTty, ResizeTtyRequest,
    SignalProcess, SignalProcessRequest, StartProcess, WaitProcess, WaitProcessResponse, WindowSize,
    wait_process_response::Outcome,
};

use crate::{
    ContainerRecord, DetachKeys, Result, Runtime, SandboxError, SignalEvent, Signals, Status,
    agent_client::{AgentClient, CALL_TIMEOUT, Pending},
    identity::random_bytes,
    spec::ProcessSpec,
    stdio::{ProcessStreams, Pumps},
    wait,
};

/// How often somebody must ask a program that doesn't listen to end before it is ended, as with docker.
const PATIENCE_WITH_SIGNALS: u32 = 3;
/// After the process has exited, how long others that hold its output may still add to it.
const OUTPUT_PATIENCE: Duration = Duration::from_millis(500);

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ExitStatus {
    /// Its exit code, or 128 + the signal that ended it.
    pub code: u8,
    /// Whether it was the kernel, for want of memory.
    pub oom_killed: bool,
}

impl From<WaitProcessResponse> for ExitStatus {
    fn from(response: WaitProcessResponse) -> Self {
        let code = match response.outcome {
            Some(Outcome::ExitCode(code)) => code,
            Some(Outcome::Signal(signal)) => 128 + signal,
            _ => 255,
        };
        Self {
            code: u8::try_from(code).unwrap_or(255),
            oom_killed: response.oom_killed,
        }
    }
}

/// What the front-end wants to happen to a process it is attached to.
#[derive(Debug, Clone)]
pub struct AttachOptions<'a> {
    /// Where signals come from.
    pub signals: &'a Signals,
    /// The size of the terminal, asked for when it changed.
    pub window: fn() -> Option<(u16, u16)>,
    /// The keys that detach, where stdin is a terminal.
    pub detach_keys: Option<DetachKeys>,
}

/// How an attached process was left.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Left {
    /// It has exited.
    Exited(ExitStatus),
    /// It goes on.
    Detached,
}

/// A started process and what moves its bytes.
#[derive(Debug)]
pub(crate) struct Attached {
    process: ProcessRef,
    wait: Pending<WaitProcess>,
    pumps: Pumps,
}

pub(crate) fn process_ref(container_id: &str, exec_id: &str) -> ProcessRef {
    ProcessRef {
        container_id: container_id.to_owned(),
        exec_id: exec_id.to_owned(),
        ..ProcessRef::default()
    }
}

impl Attached {
    /// Hands signals on until the process has exited, then waits for the rest of its output.
    fn drive(mut self, agent: &mut AgentClient, options: &AttachOptions<'_>) -> Result<Left> {
        let mut asked_to_end = 0;
        let exit = loop {
            if let Some(exit) = agent.take(&self.wait)? {
                break exit;
            }
            let never = agent.as_fd();
            let detached = self
                .pumps
                .detached
                .as_ref()
                .map_or(never, |detached| detached.as_fd());
            let ready = wait::any_readable([agent.as_fd(), options.signals.as_fd(), detached], None);
            let [answered, signalled, detaching] =
                ready.map_err(SandboxError::system("waiting for the process"))?;
            if answered {
                agent.receive(Some(Instant::now() + CALL_TIMEOUT))?;
            }
            if detaching && self.pumps.detached.is_some() {
                return Ok(Left::Detached);
            }
            if signalled {
                asked_to_end += self.hand_on_signals(agent, options)?;
                if asked_to_end >= PATIENCE_WITH_SIGNALS {
                    return Err(SandboxError::Interrupted { signal: 9 });
                }
            }
        };
        // The output may be held open by what the process left running.
        self.pumps.finish(Some(OUTPUT_PATIENCE));
        Ok(Left::Exited(exit.into()))
    }

    /// Returns how many of the signals asked the process to end.
    fn hand_on_signals(&self, agent: &mut AgentClient, options: &AttachOptions<'_>) -> Result<u32> {
        const ENDING: [i32; 2] = [2, 15];
        let mut ending = 0;
        while let Some(event) = options.signals.next() {
            match event {
                SignalEvent::Resized => {
                    let Some(size) = (options.window)() else { continue };
                    ignore_exited(resize(agent, &self.process, size))?;
                }
                SignalEvent::Forward(signal) => {
                    ending += u32::from(ENDING.contains(&signal));
                    ignore_exited(send_signal(agent, &self.process, signal, false))?;
                }
            }
        }
        Ok(ending)
    }
}

/// A signal or a size that comes when the process has just exited is no error.
fn ignore_exited(result: Result<()>) -> Result<()> {
    match result {
        Err(SandboxError::Agent { detail, .. })
            if matches!(
                detail.kind.enum_value_or_default(),
                ErrorKind::WRONG_STATE | ErrorKind::PROCESS_NOT_FOUND | ErrorKind::SETUP
            ) =>
        {
            Ok(())
        }
        result => result,
    }
}

pub(crate) fn send_signal(
    agent: &mut AgentClient,
    process: &ProcessRef,
    signal: i32,
    all: bool,
) -> Result<()> {
    agent
        .call::<SignalProcess>(&SignalProcessRequest {
            container_id: process.container_id.clone(),
            exec_id: process.exec_id.clone(),
            signal: signal.unsigned_abs(),
            all,
            ..SignalProcessRequest::default()
        })
        .map(drop)
}

fn resize(agent: &mut AgentClient, process: &ProcessRef, (rows, columns): (u16, u16)) -> Result<()> {
    let window_size = WindowSize {
        rows: rows.into(),
        columns: columns.into(),
        ..WindowSize::default()
    };
    agent
        .call::<ResizeTty>(&ResizeTtyRequest {
            container_id: process.container_id.clone(),
            exec_id: process.exec_id.clone(),
            window_size: Some(window_size).into(),
            ..ResizeTtyRequest::default()
        })
        .map(drop)
}

impl Runtime {
    /// Runs a further process in a running container, attached, until it has exited or the user detaches.
    ///
    /// # Errors
    ///
    /// The container isn't running, or the process can't be started.
    pub fn exec(
        &self,
        record: &ContainerRecord,
        process: &ProcessSpec,
        options: &AttachOptions<'_>,
    ) -> Result<Left> {
        self.check_running(record)?;
        let exec_id = new_exec_id()?;
        let ids = (record.id.as_str(), exec_id.as_str());
        let lost = |error| explain_lost(record, error);
        let connect = || self.run.connect_vsock(&record.id);
        let (rpc, mut streams) = ProcessStreams::open_with(connect, RPC_PORT, ids, process).map_err(lost)?;
        let accepted = rpc.try_clone();
        let mut accepted = accepted.map_err(SandboxError::system("duplicating a descriptor"))?;
        let mut agent = AgentClient::new(rpc);
        let calls = ExecCalls::send(&mut agent, record, &exec_id, process, true).map_err(lost)?;
        streams.confirm([&mut accepted]).map_err(lost)?;
        let wait = calls.finish(&mut agent)?;
        let pumps = streams.start(process.stdin, options.detach_keys.clone())?;
        let attached = Attached {
            process: process_ref(ids.0, ids.1),
            wait,
            pumps,
        };
        attached.drive(&mut agent, options)
    }

    /// Starts a further process in a running container and leaves it to itself.
    ///
    /// # Errors
    ///
    /// As [`Runtime::exec`].
    pub fn exec_detached(&self, record: &ContainerRecord, process: &ProcessSpec) -> Result<()> {
        self.check_running(record)?;
        let mut rpc = self.connect_ports(record, &[RPC_PORT])?;
        let mut agent = AgentClient::new(rpc.pop().ok_or(SandboxError::MonitorGone)?);
        let calls = ExecCalls::send(&mut agent, record, &new_exec_id()?, process, false)?;
        calls.finish(&mut agent).map(drop)
    }

    fn check_running(&self, record: &ContainerRecord) -> Result<()> {
        let name = || record.name.clone();
        match record.status {
            Status::Running => Ok(()),
            Status::Paused => Err(SandboxError::Paused { name: name() }),
            _ => Err(SandboxError::NotRunning { name: name() }),
        }
    }
}

/// A connection that can't be made, or breaks at once: the container has just ended.
fn explain_lost(record: &ContainerRecord, error: SandboxError) -> SandboxError {
    match error {
        SandboxError::AgentConnection { source } => {
            tracing::debug!(%source, "connecting to the agent");
            SandboxError::NotRunning {
                name: record.name.clone(),
            }
        }
        error => error,
    }
}

fn new_exec_id() -> Result<String> {
    Ok(format!("{:016x}", u64::from_le_bytes(random_bytes()?)))
}

/// The calls that start a further process: under way at once, and handled in order.
#[derive(Debug)]
struct ExecCalls {
    hello: Pending<Connect>,
    create: Pending<CreateExec>,
    start: Pending<StartProcess>,
    wait: Pending<WaitProcess>,
}

impl ExecCalls {
    fn send(
        agent: &mut AgentClient,
        record: &ContainerRecord,
        exec_id: &str,
        process: &ProcessSpec,
        attached: bool,
    ) -> Result<Self> {
        let reference = process_ref(record.id.as_str(), exec_id);
        let mut process = process.for_agent(&record.spec.confinement)?;
        if !attached {
            (process.attach_stdin, process.attach_stdout, process.attach_stderr) = (false, false, false);
        }
        Ok(Self {
            hello: agent.send_connect(false)?,
            create: agent.send::<CreateExec>(&CreateExecRequest {
                container_id: record.id.as_str().to_owned(),
                exec_id: exec_id.to_owned(),
                process: Some(process).into(),
                ..CreateExecRequest::default()
            })?,
            start: agent.send::<StartProcess>(&reference)?,
            wait: agent.send::<WaitProcess>(&reference)?,
        })
    }

    /// Waits until the process runs.
    fn finish(self, agent: &mut AgentClient) -> Result<Pending<WaitProcess>> {
        agent.finish_connect(&self.hello)?;
        agent.wait(&self.create, Some(CALL_TIMEOUT))?;
        agent.wait(&self.start, Some(CALL_TIMEOUT))?;
        Ok(self.wait)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signal_becomes_128_and_its_number() {
        let response = WaitProcessResponse {
            outcome: Some(Outcome::Signal(9)),
            ..WaitProcessResponse::default()
        };
        assert_eq!(ExitStatus::from(response).code, 137);
    }
}
