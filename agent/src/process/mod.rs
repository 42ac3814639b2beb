//! Makes processes: everything from a request to a running program. `child` has the part after the fork.

mod channel;
mod child;
mod credentials;
mod mounts;

use std::os::fd::{AsFd as _, OwnedFd};

use nix::sys::socket::{MsgFlags, send};

pub use child::{Place, Plan};

use crate::{
    error::AgentError,
    sys::{self, Fork},
};
use channel::Message;

/// A process that is being set up, or waits to be started.
#[derive(Debug)]
pub struct Setup {
    channel: OwnedFd,
    terminal: Option<OwnedFd>,
    ready: bool,
}

/// Forks the planned process and returns as soon as its process id is known.
///
/// The caller holds the lock that the reaper takes, so that the process can't be reaped before it is known.
pub fn spawn(plan: &Plan) -> Result<(i32, Setup), AgentError> {
    let (ours, theirs) = channel::pair().map_err(AgentError::setup("creating the setup channel"))?;
    match sys::fork().map_err(AgentError::setup("fork"))? {
        Fork::Child => child::run(plan, &theirs),
        Fork::Parent { .. } => drop(theirs),
    }
    let mut setup = Setup {
        channel: ours,
        terminal: None,
        ready: false,
    };
    loop {
        match setup.receive()? {
            Some(Message::Pid(pid)) => return Ok((pid, setup)),
            // The process may be quicker than the intermediate, which tells its id.
            Some(message) => setup.note(message)?,
            None => return Err(AgentError::SetupDied),
        }
    }
}

impl Setup {
    fn receive(&self) -> Result<Option<Message>, AgentError> {
        channel::receive(self.channel.as_fd()).map_err(AgentError::setup("reading the setup channel"))
    }

    fn note(&mut self, message: Message) -> Result<(), AgentError> {
        match message {
            Message::Failure(failure) => return Err(failure.into()),
            Message::Terminal(terminal) => self.terminal = Some(terminal),
            Message::Ready => self.ready = true,
            Message::Pid(_) => {}
        }
        Ok(())
    }

    /// Waits until the process is set up, and takes its terminal if it has one.
    pub fn finish(&mut self) -> Result<Option<OwnedFd>, AgentError> {
        while !self.ready {
            match self.receive()? {
                Some(message) => self.note(message)?,
                None => return Err(AgentError::SetupDied),
            }
        }
        Ok(self.terminal.take())
    }

    /// Lets the process execute its program; returns when it does, or why it doesn't.
    pub fn start(self) -> Result<(), AgentError> {
        use std::os::fd::AsRawFd as _;
        send(self.channel.as_raw_fd(), channel::START, MsgFlags::MSG_NOSIGNAL)
            .map_err(|_| AgentError::SetupDied)?;
        match self.receive()? {
            None => Ok(()),
            Some(Message::Failure(failure)) => Err(failure.into()),
            Some(_) => Err(AgentError::SetupDied),
        }
    }
}
