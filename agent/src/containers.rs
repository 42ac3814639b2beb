//! The agent's state: containers and their processes.
//!
//! ```text
//!             create            start                           exit
//!  (nothing) ────────► Created ────────► Starting ─► Running ────────────► Exited
//!                                            └─► (nothing, when the setup fails)
//! ```
//!
//! Owner: one [`Containers`], shared by the connections' threads and the reaper. Its one lock is never held
//! across anything a container can delay.
//!
//! Invariants: a process id in the table is of a process not yet reaped, because the reaper removes it under
//! the same lock; a signal therefore never meets a stranger. A process that is reaped before its starter has
//! entered its id is kept as unclaimed until then.

mod pod;

use std::{
    collections::HashMap,
    fmt,
    fs::File,
    os::fd::{AsFd as _, OwnedFd},
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use agent_protocol::{
    CreateContainerRequest, CreateExecRequest, Process, ProcessInfo, ProcessRef, Resources, StatsResponse,
    UserNamespace, WaitProcessResponse, WindowSize, wait_process_response::Outcome,
};
use nix::{errno::Errno, sched::CloneFlags, sys::signal::Signal};

use crate::{
    cgroup::Cgroup,
    device_filter, devices,
    error::AgentError,
    files, init,
    log::log,
    mount_api::{ATTRIBUTE_NODEV, ATTRIBUTE_NOEXEC, ATTRIBUTE_NOSUID, detached_mount},
    process::{self, Credentials, Hooks, NEW_TIME, Place, Plan, Program, Stage},
    process_list,
    rootfs::MountedRootfs,
    shares,
    stdio::{self, AgentEnds, StdinCloser, Streams},
    sys::{self, Ended},
    terminal, user,
};

use pod::Group;

/// Execs of one container that are remembered; beyond it the exited ones are forgotten.
const MAX_EXECS: usize = 1024;

const CAP_SYS_PTRACE: u64 = 1 << 19;

/// The last real-time signal.
const LAST_SIGNAL: i32 = 64;

/// Told once when a process has exited.
pub type Waiter = Box<dyn FnOnce(WaitProcessResponse) + Send>;

enum State {
    Created { plan: Box<Plan>, ends: AgentEnds },
    Starting,
    Running,
    Exited(WaitProcessResponse),
}

impl State {
    fn name(&self) -> &'static str {
        match self {
            Self::Created { .. } => "created",
            Self::Starting => "being started",
            Self::Running => "running",
            Self::Exited(_) => "stopped",
        }
    }
}

struct Entry {
    /// Zero until it runs.
    pid: i32,
    state: State,
    waiters: Vec<Waiter>,
    terminal: Option<Arc<File>>,
    stdin: Option<StdinCloser>,
}

/// What every process of a container is made with.
struct Surroundings {
    /// The root, as it is below all mounts of the container.
    root: File,
    /// Directory of the control group.
    cgroup: OwnedFd,
    /// The container's terminals.
    devpts: OwnedFd,
    /// Whether its processes may look into others.
    traces: bool,
    /// Those it shares a PID namespace with.
    group: Group,
    /// Namespaces beside those that every container has.
    further: CloneFlags,
    /// The ids of its user namespace.
    ids: Option<UserNamespace>,
}

struct Container {
    // The order of fields is the order of destruction.
    cgroup: Cgroup,
    surroundings: Arc<Surroundings>,
    /// Unmounted last.
    rootfs: MountedRootfs,
    /// By exec id, the first process's being empty.
    processes: HashMap<String, Entry>,
    oom_kills_seen: u64,
    paused: bool,
}

#[derive(Default)]
struct Table {
    containers: HashMap<String, Container>,
    /// How many processes are being started, and which have exited before their starters knew their ids.
    starting: usize,
    unclaimed: HashMap<i32, Ended>,
}

/// All containers of this microVM.
#[derive(Default)]
pub struct Containers {
    table: Mutex<Table>,
    /// Rung after each start, for the reaper, which has nothing to wait for before.
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
        let (joined, group) = self.join(&request)?;
        shares::make_ready(&request.mounts)?;
        let mut rootfs = MountedRootfs::mount(&id, &request.rootfs, request.all_devices)?;
        rootfs.write_files(&request.files)?;
        shares::copy_up(&rootfs.open_root()?, &request.mounts)?;
        let cgroup = Cgroup::create(&id, &request.resources)?;
        if request.device_filter {
            device_filter::attach(&cgroup.open()?, &request.resources.device_rules)
                .map_err(AgentError::setup("attaching the device filter"))?;
        }
        let devices = devices::make(&rootfs.mount_devices()?, &request)?;
        let ids = request.user_namespace.as_ref().cloned();
        let devpts = terminal::make_devpts(&request.mounts, ids.as_ref())?;
        let surroundings = Arc::new(Surroundings {
            root: rootfs.open_root()?,
            cgroup: cgroup.open()?,
            devpts,
            traces: request.process.capabilities.bounding & CAP_SYS_PTRACE != 0,
            group,
            further: further_namespaces(&request),
            ids,
        });
        let process = request.process.take().unwrap_or_default();
        let destinations: Vec<String> = request
            .mounts
            .iter()
            .map(|mount| mount.destination.clone())
            .collect();
        let stage = Stage {
            root: rootfs.root.clone(),
            files: rootfs.files.clone(),
            devices,
            devpts: duplicate(&surroundings.devpts)?,
            sysfs: make_sysfs(&request)?,
        };
        let place = Place::New {
            stage: Box::new(stage),
            hooks: Hooks::new(&request).map_err(AgentError::setup("preparing the startContainer hooks"))?,
            joined,
            request: Box::new(request),
        };
        let entry = prepare(place, &process, &surroundings)?;
        if let State::Created { plan, .. } = &entry.state {
            let mounts = destinations.iter().map(String::as_str);
            process::lookup::check(&plan.program, &process.cwd, &surroundings.root, mounts)?;
        }
        let mut table = self.lock();
        if table.containers.contains_key(&id) {
            return Err(AgentError::Exists { id });
        }
        let container = Container {
            cgroup,
            surroundings,
            rootfs,
            processes: HashMap::from([(String::new(), entry)]),
            oom_kills_seen: 0,
            paused: false,
        };
        table.containers.insert(id, container);
        Ok(())
    }

    /// Prepares a further process of a running container.
    pub fn create_exec(&self, request: &CreateExecRequest) -> Result<(), AgentError> {
        let result = self.prepare_exec(request);
        if matches!(result, Err(ref error) if !matches!(error, AgentError::Exists { .. })) {
            self.streams.forget(&request.container_id, &request.exec_id);
        }
        result
    }

    fn prepare_exec(&self, request: &CreateExecRequest) -> Result<(), AgentError> {
        let exists = || AgentError::Exists {
            id: request.exec_id.clone(),
        };
        let (surroundings, pidfd) = {
            let mut table = self.lock();
            let container = table.container(&request.container_id)?;
            if container.processes.contains_key(&request.exec_id) {
                return Err(exists());
            }
            if container.processes.len() >= MAX_EXECS {
                container
                    .processes
                    .retain(|id, entry| id.is_empty() || !matches!(entry.state, State::Exited(_)));
            }
            let pid = container.running_pid(&request.container_id)?;
            let pidfd =
                sys::pidfd_open(pid).map_err(AgentError::setup("opening the container's first process"))?;
            (Arc::clone(&container.surroundings), pidfd)
        };
        let place = Place::Join {
            pidfd,
            further: surroundings.further,
        };
        let entry = prepare(place, &request.process, &surroundings)?;
        let mut table = self.lock();
        let container = table.container(&request.container_id)?;
        if container.processes.contains_key(&request.exec_id) {
            return Err(exists());
        }
        container.processes.insert(request.exec_id.clone(), entry);
        Ok(())
    }

    /// Makes a created process and lets it execute its program.
    pub fn start(&self, process: &ProcessRef) -> Result<u32, AgentError> {
        let (container_id, exec_id) = (process.container_id.as_str(), process.exec_id.as_str());
        let (mut plan, ends) = {
            let mut table = self.lock();
            let entry = table.entry(container_id, exec_id)?;
            match std::mem::replace(&mut entry.state, State::Starting) {
                State::Created { plan, ends } => {
                    table.starting += 1;
                    (plan, ends)
                }
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
        let launched = ends
            .take_streams(&self.streams, container_id, exec_id)
            .and_then(|connected| Ok((self.launch(&mut plan, process)?, connected)));
        // The process's ends of its streams, so that the process is all who holds them.
        drop(plan);
        match launched {
            Ok((pid, connected)) => {
                self.settle(process, pid, connected.closer());
                connected.move_bytes()?;
                Ok(pid.unsigned_abs())
            }
            Err(error) => {
                self.forget(process);
                Err(error)
            }
        }
    }

    /// Enters a started process into the table.
    fn settle(&self, process: &ProcessRef, pid: i32, stdin: Option<StdinCloser>) {
        let mut table = self.lock();
        if let Ok(entry) = table.entry(&process.container_id, &process.exec_id) {
            entry.pid = pid;
            entry.state = State::Running;
            entry.stdin = stdin;
        }
        let told = table
            .unclaimed
            .remove(&pid)
            .and_then(|status| table.record_exit(pid, status));
        table.started();
        self.spawned.notify_all();
        drop(table);
        tell(told);
    }

    /// Removes a process that couldn't be started; with a first process goes its container.
    fn forget(&self, process: &ProcessRef) {
        let mut table = self.lock();
        table.started();
        // A child that failed waits to be reaped.
        self.spawned.notify_all();
        let (container, entry) = if process.exec_id.is_empty() {
            let container = table.containers.remove(&process.container_id);
            (container, None)
        } else {
            let container = table.containers.get_mut(&process.container_id);
            let entry = container.and_then(|container| container.processes.remove(&process.exec_id));
            (None, entry)
        };
        drop(table);
        let waiters = container
            .into_iter()
            .flat_map(|mut container| std::mem::take(&mut container.processes).into_values())
            .chain(entry)
            .flat_map(|entry| entry.waiters)
            .collect();
        let exit = WaitProcessResponse {
            outcome: Some(Outcome::ExitCode(127)),
            ..WaitProcessResponse::default()
        };
        tell(Some((waiters, exit)));
    }

    /// Sends a signal to one process or all of a container.
    pub fn signal(&self, process: &ProcessRef, signal: u32, all: bool) -> Result<(), AgentError> {
        // Real-time signals are numbers beyond those that have names.
        let signal = i32::try_from(signal)
            .ok()
            .filter(|number| (0..=LAST_SIGNAL).contains(number))
            .ok_or(Errno::EINVAL)
            .map_err(AgentError::setup(format!("signal {signal}")))?;
        let mut table = self.lock();
        let entry = table.entry(&process.container_id, &process.exec_id)?;
        if !matches!(entry.state, State::Running) {
            return Err(AgentError::WrongState {
                id: process.container_id.clone(),
                state: entry.state.name(),
            });
        }
        let pid = entry.pid;
        if !all {
            return sys::kill(pid, signal).map_err(AgentError::setup("sending the signal"));
        }
        let cgroup = &table.container(&process.container_id)?.cgroup;
        if signal == Signal::SIGKILL as i32 {
            return cgroup
                .kill()
                .map_err(AgentError::setup("killing the control group"));
        }
        for pid in cgroup
            .pids()
            .into_iter()
            .filter_map(|pid| i32::try_from(pid).ok())
        {
            match sys::kill(pid, signal) {
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

    /// The root of a running container as its processes see it.
    pub fn open_root(&self, container_id: &str) -> Result<File, AgentError> {
        let pid = self.lock().container(container_id)?.running_pid(container_id)?;
        files::open_root(pid)
    }

    /// What is known of the processes of a container.
    pub fn processes(&self, container_id: &str) -> Result<Vec<ProcessInfo>, AgentError> {
        let (pids, surroundings) = {
            let mut table = self.lock();
            let container = table.container(container_id)?;
            (container.cgroup.pids(), Arc::clone(&container.surroundings))
        };
        Ok(process_list::describe(&pids, &surroundings.root))
    }

    /// Changes the limits of a container.
    pub fn update(&self, container_id: &str, resources: &Resources) -> Result<(), AgentError> {
        self.lock().container(container_id)?.cgroup.update(resources)
    }

    /// The statistics of a container.
    pub fn stats(&self, container_id: &str) -> Result<StatsResponse, AgentError> {
        Ok(self.lock().container(container_id)?.cgroup.stats())
    }

    /// Kills everything and makes what is kept safe, for the microVM's end.
    pub fn end_all(&self) {
        const PATIENCE: Duration = Duration::from_millis(200);
        let table = self.lock();
        for container in table.containers.values() {
            let _ = container.cgroup.kill();
            if container.rootfs.is_kept() {
                container.cgroup.wait_empty(PATIENCE);
                container.rootfs.seal();
            }
        }
    }

    /// Reaps children for ever: the container's processes and, as PID 1, every orphan.
    pub fn reap(&self) {
        loop {
            // Look first, take under the lock: see the module's invariant.
            let seen = sys::wait_ended(None, libc::WNOWAIT);
            let mut table = self.lock();
            let pid = match seen {
                Ok(Some((pid, _))) => pid,
                Ok(None) | Err(Errno::EINTR) => continue,
                Err(Errno::ECHILD) => {
                    // Who has started a child since then has rung the bell under the lock, which we hold now.
                    if sys::wait_ended(None, libc::WNOWAIT | libc::WNOHANG) == Err(Errno::ECHILD) {
                        drop(self.spawned.wait(table));
                    }
                    continue;
                }
                Err(errno) => {
                    log!("waiting for children: {errno}");
                    continue;
                }
            };
            let told = match sys::wait_ended(Some(pid), libc::WNOHANG) {
                Ok(Some((pid, ended))) => table.reaped(pid, ended),
                _ => None,
            };
            drop(table);
            tell(told);
        }
    }
}

/// Who is to be told of an exit, and what.
type Told = Option<(Vec<Waiter>, WaitProcessResponse)>;

fn tell(told: Told) {
    if let Some((waiters, exit)) = told {
        for waiter in waiters {
            waiter(exit.clone());
        }
    }
}

impl Table {
    /// A start has ended, well or not.
    fn started(&mut self) {
        self.starting = self.starting.saturating_sub(1);
        if self.starting == 0 {
            self.unclaimed.clear();
        }
    }

    /// Takes note of a reaped process.
    fn reaped(&mut self, pid: i32, status: Ended) -> Told {
        let told = self.record_exit(pid, status);
        if told.is_none() && self.starting > 0 {
            self.unclaimed.insert(pid, status);
        }
        told
    }

    fn record_exit(&mut self, pid: i32, status: Ended) -> Told {
        let (container_id, container, exec_id) = self.containers.iter_mut().find_map(|(id, container)| {
            let found = container
                .processes
                .iter()
                .find(|(_, entry)| entry.pid == pid && matches!(entry.state, State::Running));
            let exec_id = found.map(|(exec_id, _)| exec_id.clone())?;
            Some((id, container, exec_id))
        })?;
        if exec_id.is_empty() && container.surroundings.group.owner != *container_id {
            // In a PID namespace that goes on, nobody else ends what its first process has left.
            let _ = container.cgroup.kill();
        }
        let (outcome, core_dumped) = match status {
            Ended::Signal(signal, core) => (Outcome::Signal(signal.unsigned_abs()), core),
            Ended::Code(code) => (Outcome::ExitCode(code.unsigned_abs() & 0xff), false),
        };
        // Asked only where it decides: looking it up takes longer than everything else here.
        let oom_kills = if outcome == Outcome::Signal(Signal::SIGKILL as u32) {
            container.cgroup.oom_kills()
        } else {
            container.oom_kills_seen
        };
        let exit = WaitProcessResponse {
            oom_killed: oom_kills > container.oom_kills_seen,
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

impl Container {
    fn running_pid(&self, id: &str) -> Result<i32, AgentError> {
        match self.processes.get("") {
            Some(Entry {
                pid,
                state: State::Running,
                ..
            }) => Ok(*pid),
            other => Err(AgentError::WrongState {
                id: id.to_owned(),
                state: other.map_or("stopped", |entry| entry.state.name()),
            }),
        }
    }
}

fn further_namespaces(request: &CreateContainerRequest) -> CloneFlags {
    let mut further = CloneFlags::empty();
    further.set(CloneFlags::CLONE_NEWUSER, request.user_namespace.is_some());
    further.set(NEW_TIME, request.time_namespace.is_some());
    further
}

/// For a container whose user namespace doesn't own its network, which the kernel lets mount no sysfs.
fn make_sysfs(request: &CreateContainerRequest) -> Result<Option<OwnedFd>, AgentError> {
    if request.user_namespace.is_none() || !request.mounts.iter().any(|mount| mount.type_ == "sysfs") {
        return Ok(None);
    }
    detached_mount(
        c"sysfs",
        &[],
        ATTRIBUTE_NOSUID | ATTRIBUTE_NODEV | ATTRIBUTE_NOEXEC,
    )
    .map(Some)
    .map_err(AgentError::setup("making the container's sysfs"))
}

fn duplicate(fd: &OwnedFd) -> Result<OwnedFd, AgentError> {
    fd.try_clone().map_err(|error| {
        AgentError::setup("duplicating a descriptor")(
            error.raw_os_error().map_or(Errno::EMFILE, Errno::from_raw),
        )
    })
}

/// Everything about a process that can be settled before it is made.
fn prepare(place: Place, process: &Process, surroundings: &Surroundings) -> Result<Entry, AgentError> {
    let identity = user::resolve(&surroundings.root, process)?;
    let terminal = if process.terminal {
        let owner = match &surroundings.ids {
            Some(ids) => process::outside(&ids.uid_mappings, identity.uid).unwrap_or(0),
            None => identity.uid,
        };
        Some(terminal::open(&surroundings.devpts, process, owner)?)
    } else {
        None
    };
    let number = terminal.as_ref().map(|terminal| terminal.number);
    let (stdio, ends) = stdio::prepare(process, terminal)?;
    let encoding = AgentError::setup("encoding the command, its environment or its directory");
    let plan = Program::new(process, &identity)
        .and_then(|program| Ok((program, Credentials::new(process, &identity)?)))
        .map_err(encoding);
    let (program, credentials) = plan?;
    let plan = Plan {
        place,
        program,
        credentials,
        cgroup: duplicate(&surroundings.cgroup)?,
        stdio,
        terminal: number,
    };
    Ok(Entry {
        pid: 0,
        waiters: Vec::new(),
        terminal: ends.terminal.clone(),
        stdin: None,
        state: State::Created {
            plan: Box::new(plan),
            ends,
        },
    })
}
