//! What clients of a created or running container ask its monitor for, and what a signal to it does.

use std::{
    os::fd::OwnedFd,
    path::Path,
    time::{Duration, Instant},
};

use agent_protocol::{
    ConfigureNetwork, FreezeContainer, FreezeContainerRequest, ResizeTty, ResizeTtyRequest, SignalProcess,
    SignalProcessRequest, StartProcess, WaitProcess, WindowSize,
};

use super::{
    error::{BundleError, Result},
    protocol::Request,
    record::{BundleStatus, ProcessExit},
    server::{Server, Token},
};
use crate::{
    SandboxError,
    agent_client::{CALL_TIMEOUT, Pending},
    attach::process_ref,
    network::Wiring,
    stdio::ProcessStreams,
};

/// How long a killed process may take to end; then its microVM is.
const KILL_PATIENCE: Duration = Duration::from_secs(5);
const SIGKILL: i32 = 9;
/// What ends a process that has not said anything about it: HUP, INT, QUIT, ILL, TRAP, ABRT, KILL, USR1, USR2, ALRM,
/// TERM.
const ENDING: [i32; 11] = [1, 2, 3, 4, 5, 6, 9, 10, 12, 14, 15];
/// What a process ends with that could not be started: the program isn't there, isn't one, or anything else.
const NOT_FOUND: u8 = 127;
const NOT_STARTED: u8 = 126;

impl Server {
    pub(super) fn handle(&mut self, token: Token, request: Request, fds: Vec<OwnedFd>) {
        match request {
            Request::Start => {
                let result = self.start();
                self.answer(token, result);
                // A short command's end may have come with the answer to its start.
                self.take_answers();
            }
            Request::Signal { signal, all } => {
                if let Some(result) = self.signal(Some(token), signal, all) {
                    self.answer(token, result);
                }
            }
            Request::Pause => {
                let result = self.set_paused(true);
                self.answer(token, result);
            }
            Request::Resume => {
                let result = self.set_paused(false);
                self.answer(token, result);
            }
            Request::Resize { rows, columns } => {
                self.resize(rows, columns);
                self.answer(token, Ok(()));
            }
            Request::CloseStdin => {
                if let Some(relay) = &self.relay {
                    relay.close_input();
                }
                self.answer(token, Ok(()));
            }
            Request::Wait => {
                if let Some(client) = self.client(token) {
                    client.waits = true;
                }
            }
            Request::Join { container, shares } => self.join(token, container, shares, fds),
            Request::Leave => self.leave(token, true),
            Request::Go => {}
        }
    }

    /// Lets the container's process execute its program.
    fn start(&mut self) -> Result<()> {
        match self.record.status {
            BundleStatus::Created => {}
            BundleStatus::Stopped => return Err(BundleError::HasStopped),
            _ => return Err(BundleError::AlreadyRunning),
        }
        let Some(ends) = self.ends.take() else {
            return Err(BundleError::AlreadyRunning);
        };
        if let Some((rows, columns)) = ends.terminal.as_ref().and_then(|terminal| terminal.size()) {
            self.resize(rows, columns);
        }
        let id = self.record.sandbox_id.as_str().to_owned();
        let process = process_ref(&id, "");
        let connect = || self.home.connect_vsock();
        let mut streams = ProcessStreams::open(connect, (&id, ""), self.record.terminal, self.input)?;
        let network = self.connect_network()?;
        let start = self.agent.send::<StartProcess>(&process)?;
        let wait = self.agent.send::<WaitProcess>(&process)?;
        streams.confirm([])?;
        if let Some(network) = network {
            self.agent.wait(&network, Some(CALL_TIMEOUT))?;
        }
        if let Err(error) = self.agent.wait(&start, Some(CALL_TIMEOUT)) {
            let error = BundleError::from_agent(error);
            let code = match &error {
                BundleError::Program { missing: true, .. } => NOT_FOUND,
                _ => NOT_STARTED,
            };
            self.ended(ProcessExit::Code(code), false, Some(error.to_string()));
            return Err(error);
        }
        if let Some(view) = &mut self.view {
            view.show_bound();
        }
        self.relay = Some(ends.connect(streams)?);
        self.wait = Some(wait);
        self.record.status = BundleStatus::Running;
        self.home.write(&self.record)
    }

    /// Gives the microVM the interfaces that are there by now.
    fn connect_network(&mut self) -> Result<Option<Pending<ConfigureNetwork>>> {
        // A pod's are those of its sandbox container.
        let Some(own) = self.machine.own() else {
            return Ok(None);
        };
        let wiring = Wiring::join(Path::new("/proc/self/ns/net"), own.devices);
        own.wiring = wiring.map_err(SandboxError::from)?;
        if own.wiring.request.interfaces.is_empty() {
            return Ok(None);
        }
        own.vmm.attach_taps(&mut own.wiring)?;
        Ok(Some(self.agent.send::<ConfigureNetwork>(&own.wiring.request)?))
    }

    /// Sends a signal; what is to be answered later is `None`.
    pub(super) fn signal(&mut self, token: Option<Token>, signal: i32, all: bool) -> Option<Result<()>> {
        match self.record.status {
            BundleStatus::Running => {}
            BundleStatus::Paused => {
                if signal == SIGKILL
                    && let Err(error) = self.set_paused(false)
                {
                    return Some(Err(error));
                }
            }
            BundleStatus::Stopped => return Some(Err(BundleError::NotRunning)),
            // Its process is there, but has no program yet that could listen.
            BundleStatus::Creating | BundleStatus::Created => {
                if ENDING.contains(&signal) {
                    let number = u8::try_from(signal).unwrap_or(9);
                    self.ended(ProcessExit::Signal(number), false, None);
                }
                return Some(Ok(()));
            }
        }
        let sent = self.agent.send::<SignalProcess>(&SignalProcessRequest {
            container_id: self.record.sandbox_id.as_str().to_owned(),
            signal: signal.unsigned_abs(),
            all,
            ..SignalProcessRequest::default()
        });
        if signal == SIGKILL && self.deadline.is_none() {
            self.deadline = Some(Instant::now() + KILL_PATIENCE);
        }
        let paused = self.record.status == BundleStatus::Paused;
        match sent {
            Err(error) => Some(Err(error.into())),
            // It waits for the process to go on.
            Ok(pending) if paused => {
                self.signals.push((None, pending));
                Some(Ok(()))
            }
            Ok(pending) => {
                self.signals.push((token, pending));
                None
            }
        }
    }

    /// The host's terminal has another size.
    pub(super) fn follow_terminal(&mut self) {
        let relayed = self.relay.as_ref().and_then(|relay| relay.terminal.as_ref());
        if let Some((rows, columns)) = relayed.and_then(|terminal| terminal.size()) {
            self.resize(rows, columns);
        }
    }

    fn resize(&mut self, rows: u16, columns: u16) {
        let window_size = WindowSize {
            rows: rows.into(),
            columns: columns.into(),
            ..WindowSize::default()
        };
        let sent = self.agent.send::<ResizeTty>(&ResizeTtyRequest {
            container_id: self.record.sandbox_id.as_str().to_owned(),
            window_size: Some(window_size).into(),
            ..ResizeTtyRequest::default()
        });
        self.resizes.extend(sent);
    }

    /// All of a microVM that is this container's; of a pod's, this container.
    fn stop_or_go_on(&mut self, stopped: bool) -> Result<()> {
        if !self.machine.is_pods() {
            return self.machine.set_paused(stopped);
        }
        let request = FreezeContainerRequest {
            container_id: self.record.sandbox_id.as_str().to_owned(),
            frozen: stopped,
            ..FreezeContainerRequest::default()
        };
        let pending = self.agent.send::<FreezeContainer>(&request)?;
        self.agent.wait(&pending, Some(CALL_TIMEOUT))?;
        Ok(())
    }

    fn set_paused(&mut self, paused: bool) -> Result<()> {
        match (self.record.status, paused) {
            (BundleStatus::Running, true) => {
                self.stop_or_go_on(true)?;
                self.record.status = BundleStatus::Paused;
            }
            (BundleStatus::Paused, false) => {
                self.stop_or_go_on(false)?;
                self.record.status = BundleStatus::Running;
            }
            (_, true) => return Err(BundleError::NotRunning),
            (_, false) => return Err(BundleError::NotPaused),
        }
        self.home.write(&self.record)
    }
}
