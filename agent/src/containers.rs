//! The agent's state: containers and their processes.
//!
//! ```text
//!             create                    start                     exit
//!  (nothing) ────────► Creating ─► Created ────────► Running ────────────► Exited
//!                          │           └──────── exit before start ──────────▲
//!                          └─► (nothing, when the setup fails)
//! ```
//!
//! Owner: one [`Containers`], shared by the connections' threads and the reaper. Its one lock is never held
//! across anything a container can delay, with one exception: from a fork until the new process's id is known,
//! which needs only code of the agent to run.
//!
//! Invariants: a process id in the table is of a process not yet reaped, because the reaper removes it under
//! the same lock; a signal therefore never meets a stranger.

use std::{
    collections::HashMap,
    fmt,
    fs::{self, File},
    os::fd::AsFd as _,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
};

use agent_protocol::{
    CreateContainerRequest, CreateExecRequest, Process, ProcessRef, StatsResponse, WaitProcessResponse,
    WindowSize, wait_process_response::Outcome,
};
use nix::{
    errno::Errno,
    sys::{
        signal::{Signal, kill},
        wait::{Id, WaitPidFlag, WaitStatus, waitid},
    },
    unistd::Pid,
};

use crate::{
    cgroup::Cgroup,
    error::AgentError,
    init,
    log::log,
    process::{self, Place, Plan, Setup},
    rootfs::MountedRootfs,
    stdio::{self, AgentEnds, StdinCloser, Streams},
    sys, user,
};

/// Execs of one container that are remembered; beyond it the exited ones are forgotten.
const MAX_EXECS: usize = 1024;

/// Told once when a process has exited.
pub type Waiter = Box<dyn FnOnce(WaitProcessResponse) + Send>;

enum State {
    Creating,
    Created { setup: Setup, ends: AgentEnds },
    Running,
    Exited(WaitProcessResponse),
}

impl State {
    fn name(&self) -> &'static str {
        match self {
            Self::Creating => "being created",
            Self::Created { .. } => "created",
            Self::Running => "running",
            Self::Exited(_) => "stopped",
        }
    }
}

struct Entry {
    pid: i32,
    state: State,
    waiters: Vec<Waiter>,
    terminal: Option<Arc<File>>,
    stdin: Option<StdinCloser>,
}

struct Container {
    rootfs: MountedRootfs,
    cgroup: Cgroup,
    /// By exec id, the first process's being empty.
    processes: HashMap<String, Entry>,
    oom_kills_seen: u64,
}

#[derive(Default)]
struct Table {
    containers: HashMap<String, Container>,
}

/// All containers of this microVM.
#[derive(Default)]
pub struct Containers {
    table: Mutex<Table>,
    /// Rung after each fork, for the reaper, which has nothing to wait for before.
    spawned: Condvar,
    /// Streams that wait for their process.
    pub streams: Arc<Streams>,
}

impl fmt::Debug for Containers {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Containers").finish_non_exhaustive()
    }
}

impl Table {
    fn container(&mut self, id: &str) -> Result<&mut Container, AgentError> {
        self.containers
            .get_mut(id)
            .ok_or_else(|| AgentError::NoContainer { id: id.to_owned() })
    }

    fn entry(&mut self, container_id: &str, exec_id: &str) -> Result<&mut Entry, AgentError> {
        let missing = || AgentError::NoProcess {
            container_id: container_id.to_owned(),
            exec_id: exec_id.to_owned(),
        };
        self.container(container_id)?
            .processes
            .get_mut(exec_id)
            .ok_or_else(missing)
    }
}

impl Containers {
    fn lock(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Builds a container up to its first process, which waits to be started.
    pub fn create(&self, mut request: CreateContainerRequest) -> Result<(), AgentError> {
        let id = request.container_id.clone();
        if self.lock().containers.contains_key(&id) {
            return Err(AgentError::Exists { id });
        }
        let mut rootfs = MountedRootfs::mount(&id, &request.rootfs)?;
        rootfs.write_files(&request.files)?;
        let cgroup = Cgroup::create(&id, &request.resources)?;
        let process = request.process.take().unwrap_or_default();
        let place = Place::New {
            root: rootfs.root.clone(),
            files: rootfs.files.clone(),
            request: Box::new(request),
        };
        let (plan, ends) = plan(place, process, &rootfs, &cgroup)?;

        let mut table = self.lock();
        if table.containers.contains_key(&id) {
            return Err(AgentError::Exists { id });
        }
        let (pid, setup) = self.spawn(&plan)?;
        let container = Container {
            rootfs,
            cgroup,
            processes: HashMap::new(),
            oom_kills_seen: 0,
        };
        table.containers.insert(id.clone(), container);
        let result = self.settle(table, (&id, ""), pid, setup, ends);
        if result.is_err() {
            let removed = self.lock().containers.remove(&id);
            drop(removed);
        }
        result
    }

    /// Prepares a further process of a running container.
    pub fn create_exec(&self, request: CreateExecRequest) -> Result<(), AgentError> {
        let (container_id, exec_id) = (request.container_id.clone(), request.exec_id.clone());
        let result = self.prepare_exec(request);
        if matches!(result, Err(ref error) if !matches!(error, AgentError::Exists { .. })) {
            self.streams.forget(&container_id, &exec_id);
        }
        result
    }

    fn prepare_exec(&self, mut request: CreateExecRequest) -> Result<(), AgentError> {
        let process = request.process.take().unwrap_or_default();
        let mut table = self.lock();
        let container = table.container(&request.container_id)?;
        if container.processes.contains_key(&request.exec_id) {
            return Err(AgentError::Exists { id: request.exec_id });
        }
        let pid = match container.processes.get("") {
            Some(Entry {
                pid,
                state: State::Running,
                ..
            }) => *pid,
            Some(entry) => {
                return Err(AgentError::WrongState {
                    id: request.container_id,
                    state: entry.state.name(),
                });
            }
            None => {
                return Err(AgentError::NoContainer {
                    id: request.container_id,
                });
            }
        };
        if container.processes.len() >= MAX_EXECS {
            container
                .processes
                .retain(|id, entry| id.is_empty() || !matches!(entry.state, State::Exited(_)));
        }
        let pidfd =
            sys::pidfd_open(pid).map_err(AgentError::setup("opening the container's first process"))?;
        let (plan, ends) = plan(
            Place::Join { pidfd },
            process,
            &container.rootfs,
            &container.cgroup,
        )?;
        let (pid, setup) = self.spawn(&plan)?;
        let ids = (request.container_id.as_str(), request.exec_id.as_str());
        let result = self.settle(table, ids, pid, setup, ends);
        if result.is_err()
            && let Ok(container) = self.lock().container(&request.container_id)
        {
            container.processes.remove(&request.exec_id);
        }
        result
    }

    fn spawn(&self, plan: &Plan) -> Result<(i32, Setup), AgentError> {
        let spawned = process::spawn(plan);
        self.spawned.notify_all();
        spawned
    }

    /// Enters a fresh process into the table and, without the lock, waits until it is set up.
    fn settle(
        &self,
        mut table: MutexGuard<'_, Table>,
        (container_id, exec_id): (&str, &str),
        pid: i32,
        mut setup: Setup,
        mut ends: AgentEnds,
    ) -> Result<(), AgentError> {
        let entry = Entry {
            pid,
            state: State::Creating,
            waiters: Vec::new(),
            terminal: None,
            stdin: None,
        };
        table
            .container(container_id)?
            .processes
            .insert(exec_id.to_owned(), entry);
        drop(table);
        let terminal = setup.finish()?.map(|fd| Arc::new(File::from(fd)));
        ends.terminal.clone_from(&terminal);
        let mut table = self.lock();
        let entry = table.entry(container_id, exec_id)?;
        if matches!(entry.state, State::Exited(_)) {
            return Err(AgentError::SetupDied);
        }
        entry.terminal = terminal;
        entry.state = State::Created { setup, ends };
        Ok(())
    }

    /// Lets a created process execute its program.
    pub fn start(&self, process: &ProcessRef) -> Result<u32, AgentError> {
        let (container_id, exec_id) = (process.container_id.as_str(), process.exec_id.as_str());
        let (pid, setup, ends) = {
            let mut table = self.lock();
            let entry = table.entry(container_id, exec_id)?;
            match std::mem::replace(&mut entry.state, State::Running) {
                State::Created { setup, ends } => (entry.pid, setup, ends),
                other => {
                    let state = other.name();
                    entry.state = other;
                    return Err(AgentError::WrongState {
                        id: container_id.to_owned(),
                        state,
                    });
                }
            }
        };
        let stdin = ends.connect(&self.streams, container_id, exec_id)?;
        if let Ok(entry) = self.lock().entry(container_id, exec_id) {
            entry.stdin = stdin;
        }
        setup.start()?;
        Ok(pid.unsigned_abs())
    }

    /// Sends a signal to one process or all of a container.
    pub fn signal(&self, process: &ProcessRef, signal: u32, all: bool) -> Result<(), AgentError> {
        let signal = match signal {
            0 => None,
            number => Some(
                i32::try_from(number)
                    .map_err(|_| Errno::EINVAL)
                    .and_then(Signal::try_from)
                    .map_err(AgentError::setup(format!("signal {number}")))?,
            ),
        };
        let mut table = self.lock();
        let entry = table.entry(&process.container_id, &process.exec_id)?;
        if let State::Exited(_) = entry.state {
            return Err(AgentError::WrongState {
                id: process.container_id.clone(),
                state: "stopped",
            });
        }
        let pid = entry.pid;
        if !all {
            return kill(Pid::from_raw(pid), signal).map_err(AgentError::setup("sending the signal"));
        }
        let cgroup = &table.container(&process.container_id)?.cgroup;
        if signal == Some(Signal::SIGKILL) {
            return cgroup
                .kill()
                .map_err(AgentError::setup("killing the control group"));
        }
        for pid in cgroup
            .pids()
            .into_iter()
            .filter_map(|pid| i32::try_from(pid).ok())
        {
            match kill(Pid::from_raw(pid), signal) {
                Ok(()) | Err(Errno::ESRCH) => {}
                Err(errno) => return Err(AgentError::setup("sending the signal")(errno)),
            }
        }
        Ok(())
    }

    /// Has `waiter` told when the process has exited, now if it has.
    pub fn wait(&self, process: &ProcessRef, waiter: Waiter) -> Result<(), AgentError> {
        let mut table = self.lock();
        let entry = table.entry(&process.container_id, &process.exec_id)?;
        let State::Exited(exit) = &entry.state else {
            entry.waiters.push(waiter);
            return Ok(());
        };
        let exit = exit.clone();
        drop(table);
        waiter(exit);
        Ok(())
    }

    /// Sets the size of a process's terminal.
    pub fn resize(&self, process: &ProcessRef, size: &WindowSize) -> Result<(), AgentError> {
        let mut table = self.lock();
        let entry = table.entry(&process.container_id, &process.exec_id)?;
        let terminal = entry.terminal.as_ref().ok_or_else(|| AgentError::WrongState {
            id: process.container_id.clone(),
            state: "without a terminal",
        })?;
        let clamp = |value: u32| u16::try_from(value).unwrap_or(u16::MAX);
        sys::set_window_size(terminal.as_fd(), clamp(size.rows), clamp(size.columns))
            .map_err(AgentError::setup("setting the terminal's size"))
    }

    /// Ends a process's stdin.
    pub fn close_stdin(&self, process: &ProcessRef) -> Result<(), AgentError> {
        let stdin = self
            .lock()
            .entry(&process.container_id, &process.exec_id)?
            .stdin
            .take();
        if let Some(stdin) = stdin {
            stdin.close();
        }
        Ok(())
    }

    /// The processes of a container, as the microVM numbers them.
    pub fn pids(&self, container_id: &str) -> Result<Vec<u32>, AgentError> {
        Ok(self.lock().container(container_id)?.cgroup.pids())
    }

    /// The statistics of a container.
    pub fn stats(&self, container_id: &str) -> Result<StatsResponse, AgentError> {
        Ok(self.lock().container(container_id)?.cgroup.stats())
    }

    /// Kills everything, for the microVM's end.
    pub fn kill_all(&self) {
        for container in self.lock().containers.values() {
            let _ = container.cgroup.kill();
        }
    }

    /// Reaps children for ever: the container's processes and, as PID 1, every orphan.
    pub fn reap(&self) {
        loop {
            // Look first, take under the lock: see the module's invariant.
            let seen = waitid(Id::All, WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT);
            let mut table = self.lock();
            let pid = match seen.map(|status| status.pid()) {
                Ok(Some(pid)) => pid,
                Ok(None) | Err(Errno::EINTR) => continue,
                Err(Errno::ECHILD) => {
                    // A child forked since then has rung the bell under the lock, which we hold now.
                    if waitid(
                        Id::All,
                        WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT | WaitPidFlag::WNOHANG,
                    ) == Err(Errno::ECHILD)
                    {
                        drop(self.spawned.wait(table));
                    }
                    continue;
                }
                Err(errno) => {
                    log!("waiting for children: {errno}");
                    continue;
                }
            };
            let told = match waitid(Id::Pid(pid), WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG) {
                Ok(status) => table.record_exit(pid.as_raw(), status),
                Err(_) => None,
            };
            drop(table);
            if let Some((waiters, exit)) = told {
                for waiter in waiters {
                    waiter(exit.clone());
                }
            }
        }
    }
}

impl Table {
    fn record_exit(&mut self, pid: i32, status: WaitStatus) -> Option<(Vec<Waiter>, WaitProcessResponse)> {
        let (container, exec_id) = self.containers.values_mut().find_map(|container| {
            let found = container
                .processes
                .iter()
                .find(|(_, entry)| entry.pid == pid && !matches!(entry.state, State::Exited(_)));
            let exec_id = found.map(|(exec_id, _)| exec_id.clone())?;
            Some((container, exec_id))
        })?;
        let (outcome, core_dumped) = match status {
            WaitStatus::Signaled(_, signal, core) => (Outcome::Signal(signal as u32), core),
            WaitStatus::Exited(_, code) => (Outcome::ExitCode(code.unsigned_abs() & 0xff), false),
            _ => return None,
        };
        let oom_kills = container.cgroup.oom_kills();
        let exit = WaitProcessResponse {
            oom_killed: outcome == Outcome::Signal(Signal::SIGKILL as u32)
                && oom_kills > container.oom_kills_seen,
            outcome: Some(outcome),
            core_dumped,
            exited_at_ns: init::boot_time_ns(),
            ..WaitProcessResponse::default()
        };
        container.oom_kills_seen = oom_kills;
        let entry = container.processes.get_mut(&exec_id)?;
        entry.state = State::Exited(exit.clone());
        entry.stdin = None;
        let waiters = std::mem::take(&mut entry.waiters);
        Some((waiters, exit))
    }
}

fn plan(
    place: Place,
    process: Process,
    rootfs: &MountedRootfs,
    cgroup: &Cgroup,
) -> Result<(Plan, AgentEnds), AgentError> {
    let root = fs::File::open(&rootfs.root).map_err(|error| {
        AgentError::rootfs("opening the root")(error.raw_os_error().map_or(Errno::EIO, Errno::from_raw))
    })?;
    let identity = user::resolve(&root, &process)?;
    let (stdio, ends) = stdio::prepare(&process)?;
    let plan = Plan {
        place,
        process,
        identity,
        cgroup_procs: cgroup.open_procs()?,
        stdio,
    };
    Ok((plan, ends))
}
