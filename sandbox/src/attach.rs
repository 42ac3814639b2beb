//! A front-end attached to a process: its streams, its signals, its terminal, its exit.

use std::{
    os::fd::AsFd as _,
    time::{Duration, Instant},
};

use agent_protocol::{
    CreateExec, CreateExecRequest, ErrorKind, ProcessRef, RPC_PORT, ResizeTty, ResizeTtyRequest,
    SignalProcess, SignalProcessRequest, StartProcess, WaitProcess, WaitProcessResponse, WindowSize,
    wait_process_response::Outcome,
};

use crate::{
    Result, Runtime, SandboxError, SandboxRecord, SignalEvent, Signals, Status,
    agent_client::{AgentClient, CALL_TIMEOUT, Pending},
    identity::random_bytes,
    spec::ProcessSpec,
    stdio::{ProcessStreams, Pumps},
    vmm_client::Vmm,
    wait,
};

/// How often somebody must ask a program that doesn't listen to end before it is ended, as with docker.
const PATIENCE_WITH_SIGNALS: u32 = 3;
/// After an exec'd process has exited, how long others that hold its output may still add to it.
const EXEC_OUTPUT_PATIENCE: Duration = Duration::from_millis(500);

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
#[derive(Debug, Clone, Copy)]
pub struct AttachOptions<'a> {
    /// Where signals come from.
    pub signals: &'a Signals,
    /// The size of the terminal, asked for when it changed.
    pub window: fn() -> Option<(u16, u16)>,
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
    /// Starts a created process with its streams attached.
    pub(crate) fn start(
        agent: &mut AgentClient,
        process: ProcessRef,
        streams: ProcessStreams,
        spec: &ProcessSpec,
    ) -> Result<Self> {
        let start = agent.send::<StartProcess>(&process)?;
        let wait = agent.send::<WaitProcess>(&process)?;
        agent.wait(&start, Some(CALL_TIMEOUT))?;
        let pumps = streams.start(spec.stdin || spec.terminal)?;
        Ok(Self { process, wait, pumps })
    }

    /// Hands signals on until the process has exited, then waits for the rest of its output.
    pub(crate) fn drive(
        mut self,
        agent: &mut AgentClient,
        mut vmm: Option<&mut Vmm>,
        options: AttachOptions<'_>,
    ) -> Result<ExitStatus> {
        let mut asked_to_end = 0;
        let exit = loop {
            match agent.take(&self.wait) {
                Ok(Some(exit)) => break exit,
                Ok(None) => {}
                Err(error) => return Err(explain(error, vmm)),
            }
            let never = options.signals.as_fd();
            let (exited, stopped, said) = match vmm.as_ref() {
                Some(vmm) => (vmm.as_fd(), vmm.control_fd(), vmm.stderr_fd()),
                None => (never, never, never),
            };
            let ready = wait::any_readable(
                [agent.as_fd(), options.signals.as_fd(), exited, stopped, said],
                None,
            );
            let [answered, signalled, exited, stopped, said] =
                ready.map_err(SandboxError::system("waiting for the container"))?;
            if answered && let Err(error) = agent.receive(Some(Instant::now() + CALL_TIMEOUT)) {
                return Err(explain(error, vmm));
            }
            if signalled {
                asked_to_end += self.hand_on_signals(agent, options)?;
                if asked_to_end >= PATIENCE_WITH_SIGNALS {
                    return Err(SandboxError::Interrupted { signal: 9 });
                }
            }
            if let Some(vmm) = vmm.as_mut() {
                if said {
                    vmm.drain_stderr();
                }
                if (exited || stopped) && !answered {
                    return Err(vmm.stopped());
                }
            }
        };
        // A container's output ends with it; an exec's may be held open by what it left running.
        let patience = if self.process.exec_id.is_empty() {
            None
        } else {
            Some(EXEC_OUTPUT_PATIENCE)
        };
        self.pumps.finish(patience);
        Ok(exit.into())
    }

    /// Returns how many of the signals asked the process to end.
    fn hand_on_signals(&self, agent: &mut AgentClient, options: AttachOptions<'_>) -> Result<u32> {
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

/// The agent's connection ends with the microVM: then say why that ended.
fn explain(error: SandboxError, vmm: Option<&mut Vmm>) -> SandboxError {
    match (error, vmm) {
        (SandboxError::AgentConnection { .. }, Some(vmm)) => vmm.stopped(),
        (error, _) => error,
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
    /// Runs a further process in a running container, attached, until it has exited.
    ///
    /// # Errors
    ///
    /// The container isn't running, or the process can't be started.
    pub fn exec(
        &self,
        record: &SandboxRecord,
        process: &ProcessSpec,
        options: AttachOptions<'_>,
    ) -> Result<ExitStatus> {
        if record.status != Status::Running {
            return Err(SandboxError::NotRunning {
                name: record.name.clone(),
            });
        }
        let exec_id = format!("{:016x}", u64::from_le_bytes(random_bytes()?));
        let ids = (record.id.as_str(), exec_id.as_str());
        let connect = || self.run.connect_vsock(&record.id);
        let (rpc, streams) = ProcessStreams::open_with(connect, RPC_PORT, ids, process).map_err(|error| {
            tracing::debug!(%error, "connecting to the agent");
            SandboxError::NotRunning {
                name: record.name.clone(),
            }
        })?;
        let mut agent = AgentClient::new(rpc);
        let hello = agent.send_connect(false)?;
        let create = agent.send::<CreateExec>(&CreateExecRequest {
            container_id: record.id.as_str().to_owned(),
            exec_id: exec_id.clone(),
            process: Some(process.for_agent()).into(),
            ..CreateExecRequest::default()
        })?;
        agent.finish_connect(&hello)?;
        agent.wait(&create, Some(CALL_TIMEOUT))?;
        let started = Attached::start(&mut agent, process_ref(ids.0, ids.1), streams, process)?;
        started.drive(&mut agent, None, options)
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
