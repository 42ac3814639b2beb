//! Several containers in one microVM: what they share, and how one of them stops or goes while the others go on.
//!
//! Invariant: while a process is being made that others could kill or look into before it runs its own program, nothing that
//! could do so runs: it has the agent's memory until then. In a PID namespace of several containers, that is all of them.

use std::{
    os::fd::OwnedFd,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use agent_protocol::{
    CreateContainerRequest, JoinedNamespaces, ProcessRef, WaitProcessResponse, wait_process_response::Outcome,
};
use nix::errno::Errno;

use super::{Container, Containers, Entry, State, Table, tell};
use crate::{
    cgroup::{Staging, Standstill},
    error::AgentError,
    process::{self, Joined, Place, Plan},
    sys,
};

/// Containers at once; the host has a smaller bound.
const MAX_CONTAINERS: usize = 128;
/// How long the killed processes of a container may take to go.
const GOING_PATIENCE: Duration = Duration::from_secs(5);
const POLL_INTERVAL: Duration = Duration::from_millis(1);

/// The containers of one PID namespace, which are made to stand still together.
#[derive(Debug, Clone)]
pub(super) struct Group {
    /// The container whose namespace it is.
    pub(super) owner: String,
    /// Held by who stops them.
    pub(super) stopping: Arc<Mutex<()>>,
}

impl Containers {
    /// Finds what a new container joins, and the group it will belong to.
    pub(super) fn join(&self, request: &CreateContainerRequest) -> Result<(Joined, Group), AgentError> {
        let mut table = self.lock();
        if table.containers.len() >= MAX_CONTAINERS {
            return Err(AgentError::setup("creating one more container")(Errno::ENOSPC));
        }
        let own = Group {
            owner: request.container_id.clone(),
            stopping: Arc::default(),
        };
        let Some(JoinedNamespaces { ipc, uts, pid, .. }) = request.joined.as_ref() else {
            return Ok((Joined::default(), own));
        };
        if request.user_namespace.is_some() {
            let what = "joining another container's namespaces from a user namespace of its own";
            return Err(AgentError::setup(what)(Errno::EINVAL));
        }
        let joined = Joined {
            ipc: table.first_process(ipc)?,
            uts: table.first_process(uts)?,
            pid: table.first_process(pid)?,
        };
        let group = match joined.pid {
            Some(_) => table.container(pid)?.surroundings.group.clone(),
            None => own,
        };
        Ok((joined, group))
    }

    /// Makes a process; where others could reach it before it runs its program, while they stand still.
    pub(super) fn launch(&self, plan: &mut Plan, process: &ProcessRef) -> Result<i32, AgentError> {
        let group = {
            let mut table = self.lock();
            let container = table.container(&process.container_id)?;
            if container.paused {
                return Err(AgentError::WrongState {
                    id: process.container_id.clone(),
                    state: "paused",
                });
            }
            container.surroundings.group.clone()
        };
        let is_exec = matches!(plan.place, Place::Join { .. });
        let is_reached = {
            let table = self.lock();
            if is_exec {
                table
                    .members(&group)
                    .any(|(_, member)| member.surroundings.traces)
            } else {
                group.owner != process.container_id
            }
        };
        if !is_reached {
            return process::launch(plan);
        }
        // One at a time, so that none lets them go on while another still needs them to stand.
        let alone = group.stopping.lock().unwrap_or_else(PoisonError::into_inner);
        let (standstill, staging) = {
            let mut table = self.lock();
            // Those that are paused stand still already, and go on so. A first process is born in its container's own group.
            let born = process.container_id.as_str();
            let running = table
                .members(&group)
                .filter(|(id, member)| !member.paused && (is_exec || *id != born))
                .map(|(_, member)| member);
            let standstill = Standstill::begin(running.map(|member| &member.cgroup))?;
            let own = &table.container(&process.container_id)?.cgroup;
            let staging = is_exec
                .then(|| Staging::begin(own, &process.exec_id))
                .transpose()?;
            (standstill, staging)
        };
        if let Some(staging) = &staging {
            plan.cgroup = staging.open()?;
        }
        let launched = standstill.wait().and_then(|()| process::launch(plan));
        drop(staging);
        drop(standstill);
        drop(alone);
        launched
    }

    /// Stops all processes of a container, or lets them go on.
    pub fn freeze(&self, container_id: &str, frozen: bool) -> Result<(), AgentError> {
        let stopping = {
            let mut table = self.lock();
            let container = table.container(container_id)?;
            Arc::clone(&container.surroundings.group.stopping)
        };
        let _alone = stopping.lock().unwrap_or_else(PoisonError::into_inner);
        let standstill = {
            let mut table = self.lock();
            let container = table.container(container_id)?;
            if !frozen {
                container.paused = false;
                return container.cgroup.thaw();
            }
            container.running_pid(container_id)?;
            Standstill::begin(std::iter::once(&container.cgroup))?
        };
        standstill.wait()?;
        standstill.keep();
        self.lock().container(container_id)?.paused = true;
        Ok(())
    }

    /// Ends a container and removes everything of it. One that isn't there is no error.
    pub fn remove(&self, container_id: &str) -> Result<(), AgentError> {
        let deadline = Instant::now() + GOING_PATIENCE;
        loop {
            let mut table = self.lock();
            let Some(container) = table.containers.get(container_id) else {
                return Ok(());
            };
            container
                .cgroup
                .kill()
                .map_err(AgentError::setup("killing the container"))?;
            if container.has_ended() {
                let gone = table.containers.remove(container_id);
                drop(table);
                let waiters = gone
                    .into_iter()
                    .flat_map(|mut container| std::mem::take(&mut container.processes).into_values())
                    .flat_map(|entry: Entry| entry.waiters)
                    .collect();
                tell(Some((waiters, killed())));
                return Ok(());
            }
            drop(table);
            if Instant::now() >= deadline {
                return Err(AgentError::setup("waiting for the container's processes to end")(
                    Errno::EBUSY,
                ));
            }
            std::thread::sleep(POLL_INTERVAL);
        }
    }
}

/// How a process ended that never ran.
fn killed() -> WaitProcessResponse {
    WaitProcessResponse {
        outcome: Some(Outcome::Signal(9)),
        ..WaitProcessResponse::default()
    }
}

impl Table {
    /// A hold on the first process of the container with this id; nothing for no id.
    fn first_process(&mut self, id: &str) -> Result<Option<OwnedFd>, AgentError> {
        if id.is_empty() {
            return Ok(None);
        }
        let pid = self.container(id)?.running_pid(id)?;
        sys::pidfd_open(pid)
            .map(Some)
            .map_err(AgentError::setup("opening the container to be joined"))
    }

    fn members<'a>(&'a self, group: &'a Group) -> impl Iterator<Item = (&'a str, &'a Container)> {
        self.containers
            .iter()
            .filter(|(_, container)| container.surroundings.group.owner == group.owner)
            .map(|(id, container)| (id.as_str(), container))
    }
}

impl Container {
    /// Whether nothing of it runs any more, and everybody was told so.
    fn has_ended(&self) -> bool {
        let is_done = |entry: &Entry| matches!(entry.state, State::Created { .. } | State::Exited(_));
        self.processes.values().all(is_done) && self.cgroup.is_empty()
    }
}
