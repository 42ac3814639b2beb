//! What clients of a running container ask for.

use std::{
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    time::{Duration, Instant},
};

use agent_protocol::{ResizeTty, ResizeTtyRequest, SignalProcess, SignalProcessRequest, WindowSize};

use crate::{Result, SandboxError, Status};

use super::{
    output::Token,
    protocol::{AttachRequest, Reply, Request},
    server::Server,
    sink::Sink,
};

/// How long a killed process may take to end; then its microVM is.
const KILL_PATIENCE: Duration = Duration::from_secs(5);
const SIGKILL: i32 = 9;

impl Server {
    pub(super) fn handle(&mut self, token: Token, request: Request, fds: Vec<OwnedFd>) {
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
            Request::Launch { .. } | Request::LaunchBundle(_) | Request::ExecBundle(_) => self.forget(token),
        }
    }

    pub(super) fn attach(&mut self, token: Token, attach: AttachRequest, fds: Vec<OwnedFd>, reply: &Reply) {
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
}
