//! What front-ends ask for. Everything here works from any process, whoever made the container.

use std::{
    io::ErrorKind,
    os::fd::{AsFd as _, BorrowedFd},
    path::{Path, PathBuf},
    process::Child,
    time::{Duration, Instant},
};

use agent_protocol::{
    CloseStdin, ContainerRef, GetStats, ListProcesses, ProcessInfo, RPC_PORT, ResizeTty, ResizeTtyRequest,
    SignalProcess, SignalProcessRequest, StatsResponse, WindowSize,
};
use oci_spec::runtime::{Hook, Spec};

use super::{
    cgroup,
    error::{BundleError, Result},
    home::{Home, Homes, check_id, sandbox_id},
    hooks,
    protocol::{LaunchRequest, Reply, Request},
    record::{BundleExit, BundleRecord, BundleState, BundleStatus, PodRole, RECORD_VERSION},
    relay::BundleStdio,
    server::is_exited,
};
use crate::{
    Components, SandboxError,
    agent_client::AgentClient,
    attach::process_ref,
    container_record::{RunInfo, now_ms},
    layers::LayeredRootfs,
    monitor::{Connection, Launcher, Request as MonitorRequest},
    stdio::connect_ports,
};

/// How long a monitor may take to answer; a start waits for the guest, a pause for the VMM.
const ANSWER_PATIENCE: Duration = Duration::from_secs(60);
/// How long a monitor that was told to give up may take to clean up.
const GIVING_UP_PATIENCE: Duration = Duration::from_secs(15);

/// All containers beneath one root directory.
#[derive(Debug, Clone)]
pub struct Bundles {
    pub(super) homes: Homes,
}

/// What a container is made of.
#[derive(Debug)]
pub struct CreateBundle<'a> {
    /// What it is to be called; unique beneath the root.
    pub id: &'a str,
    /// The bundle's directory.
    pub bundle: &'a Path,
    /// Its configuration. What it says is kept; the file in the bundle isn't looked at again.
    pub spec: &'a Spec,
    /// What its process is connected to.
    pub stdio: BundleStdio,
    /// Whether `linux.cgroupsPath` is `slice:prefix:name`, as systemd names scopes.
    pub systemd_cgroup: bool,
    /// Whether its microVM is a pod's.
    pub pod: PodRole,
    /// What its root filesystem is made of, instead of the directory the configuration says: that one is what others see of
    /// it on the host, and nothing can be written to it.
    pub layers: Option<LayeredRootfs>,
    /// The parts of the installation.
    pub components: &'a Components,
}

/// Hooks of a kind.
fn hooks_of<'a>(spec: &'a Spec, kind: &str) -> Option<&'a Vec<Hook>> {
    let hooks = spec.hooks().as_ref()?;
    let hooks = match kind {
        "prestart" => hooks.prestart(),
        "createRuntime" => hooks.create_runtime(),
        "createContainer" => hooks.create_container(),
        "poststart" => hooks.poststart(),
        _ => hooks.poststop(),
    };
    hooks.as_ref().filter(|hooks| !hooks.is_empty())
}

/// Those that run before the microVM is booted, in their order.
const BEFORE_BOOT: [&str; 3] = ["prestart", "createRuntime", "createContainer"];

impl Bundles {
    /// Opens a root directory, which needn't be there yet.
    ///
    /// # Errors
    ///
    /// The path can't be made absolute.
    pub fn open(root: &Path) -> Result<Self> {
        Ok(Self {
            homes: Homes::open(root)?,
        })
    }

    /// Makes a container. Its process waits to be started.
    ///
    /// The process that stands for it is a child of the caller.
    ///
    /// # Errors
    ///
    /// Its id is taken, or whatever stands in the way; then nothing is left of it.
    pub fn create(&self, request: CreateBundle<'_>) -> Result<BundleState> {
        check_id(request.id)?;
        self.current(request.id)?;
        let home = self.homes.create(request.id)?;
        let prepared = self.prepare(&home, &request);
        let launched = prepared.and_then(|record| Ok((Launcher::spawn()?, record)));
        let (launcher, record) = match launched {
            Ok(launched) => launched,
            Err(error) => {
                home.remove()?;
                return Err(error);
            }
        };
        let (connection, child) = launcher.into_parts();
        let created = self.launch(connection, home, &request, &record);
        match created {
            Ok(()) => {
                let record = self.homes.read(request.id)?.ok_or(BundleError::NotExist)?;
                Ok(record.into())
            }
            Err(error) => {
                self.undo(request.id, child, request.spec);
                Err(error)
            }
        }
    }

    /// Writes down what the monitor has to know.
    fn prepare(&self, home: &Home, request: &CreateBundle<'_>) -> Result<BundleRecord> {
        let spec = request.spec;
        let config = serde_json::to_vec(spec).map_err(|source| SandboxError::DamagedState {
            path: home.config_path(),
            source,
        })?;
        let bundle =
            std::path::absolute(request.bundle).map_err(SandboxError::io("finding", request.bundle))?;
        let root = spec.root().as_ref();
        let record = BundleRecord {
            version: RECORD_VERSION,
            id: request.id.to_owned(),
            sandbox_id: sandbox_id(request.id),
            oci_version: spec.version().clone(),
            rootfs: root.map_or_else(PathBuf::new, |root| bundle.join(root.path())),
            bundle,
            annotations: spec
                .annotations()
                .iter()
                .flatten()
                .map(|(name, value)| (name.clone(), value.clone()))
                .collect(),
            terminal: spec
                .process()
                .as_ref()
                .and_then(|process| process.terminal())
                .unwrap_or(false),
            owner: rustix::process::geteuid().as_raw(),
            jail_uid: self.homes.take_jail_uid(request.id)?,
            memory_mib: 0,
            created_ms: now_ms(),
            status: BundleStatus::Creating,
            run: Some(RunInfo::of_this_process()?),
            exit: None,
            cgroups: Vec::new(),
            network: crate::network::NetworkMode::None,
            pod: request.pod.clone(),
            poststop_done: false,
        };
        home.write_config(&config)?;
        home.write(&record)?;
        Ok(record)
    }

    /// Hands the home over to the monitor and waits until the container is created.
    fn launch(
        &self,
        mut connection: Connection,
        home: Home,
        request: &CreateBundle<'_>,
        record: &BundleRecord,
    ) -> Result<()> {
        let (stdio, streams) = request.stdio.plan();
        let has_hooks = BEFORE_BOOT
            .iter()
            .any(|kind| hooks_of(request.spec, kind).is_some());
        let message = MonitorRequest::LaunchBundle(LaunchRequest {
            home: home.path().to_owned(),
            components: request.components.clone(),
            stdio,
            hooks: has_hooks,
            systemd_cgroup: request.systemd_cgroup,
            layers: request.layers.clone(),
        });
        let fds: Vec<BorrowedFd<'_>> = std::iter::once(home.as_fd()).chain(streams).collect();
        let sent = connection.send(&message, &fds);
        drop(fds);
        // The lock is the monitor's from here on.
        drop(home);
        sent.map_err(|_| SandboxError::MonitorGone)?;
        loop {
            match connection.wait::<Reply>(None)? {
                Some((Reply::Prepared, _)) => {
                    self.run_first_hooks(request, record)?;
                    connection
                        .send(&Request::Go, &[])
                        .map_err(|_| SandboxError::MonitorGone)?;
                }
                Some((Reply::Created, _)) => return Ok(()),
                Some((Reply::Failed(refusal), _)) => return Err(refusal.into()),
                Some(_) => {}
                None => return Err(SandboxError::MonitorGone.into()),
            }
        }
    }

    fn run_first_hooks(&self, request: &CreateBundle<'_>, record: &BundleRecord) -> Result<()> {
        let now = self.homes.read(request.id)?.unwrap_or_else(|| record.clone());
        let state = BundleState::from(now);
        for kind in BEFORE_BOOT {
            let hooks = hooks_of(request.spec, kind);
            let network = match (kind, hooks) {
                ("createContainer", Some(_)) => Some(hooks::network_of(state.pid)?),
                _ => None,
            };
            hooks::run(kind, hooks, &state, BundleStatus::Creating, network.as_ref())?;
        }
        Ok(())
    }

    /// Removes what there is of a container that could not be created.
    fn undo(&self, id: &str, mut child: Child, spec: &Spec) {
        // It ends by itself, as its client's connection is closed.
        let deadline = Instant::now() + GIVING_UP_PATIENCE;
        while matches!(child.try_wait(), Ok(None)) {
            if Instant::now() >= deadline {
                drop(child.kill());
                drop(child.wait());
                break;
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        let state = self.homes.read(id).ok().flatten().map(BundleState::from);
        if let Err(error) = self.current(id) {
            tracing::warn!(id, %error, "can't remove a container that was not created");
        }
        if let Some(state) = state
            && BEFORE_BOOT.iter().any(|kind| hooks_of(spec, kind).is_some())
        {
            run_poststop(spec, &state);
        }
    }

    pub(super) fn connect(&self, id: &str) -> Result<Option<Connection>> {
        let stream = match self.homes.connect_monitor(id) {
            Ok(stream) => stream,
            Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::ConnectionRefused) => {
                return Ok(None);
            }
            Err(error) => {
                return Err(SandboxError::system("connecting to the container's monitor")(error).into());
            }
        };
        let connection =
            Connection::new(stream).map_err(SandboxError::system("preparing the monitor's socket"))?;
        Ok(Some(connection))
    }

    fn ask(&self, id: &str, request: &Request) -> Result<()> {
        self.require(id)?;
        let Some(mut connection) = self.connect(id)? else {
            return Err(self.gone(id, request));
        };
        if connection.send(request, &[]).is_err() {
            return Err(self.gone(id, request));
        }
        let deadline = Instant::now() + ANSWER_PATIENCE;
        loop {
            match connection.wait::<Reply>(Some(ANSWER_PATIENCE))? {
                Some((Reply::Done, _)) => return Ok(()),
                Some((Reply::Failed(refusal), _)) => return Err(refusal.into()),
                Some(_) => {}
                None if Instant::now() >= deadline => return Err(SandboxError::Silent.into()),
                None => return Err(self.gone(id, request)),
            }
        }
    }

    /// Why a container without a monitor doesn't do what it is asked for.
    fn gone(&self, id: &str, request: &Request) -> BundleError {
        match (self.require(id), request) {
            (Err(error), _) => error,
            (Ok(_), Request::Start) => BundleError::HasStopped,
            (Ok(_), Request::Resume) => BundleError::NotPaused,
            (Ok(_), _) => BundleError::NotRunning,
        }
    }

    /// Lets the process of a created container execute its program.
    ///
    /// # Errors
    ///
    /// It is not created but something else, or its program can't be executed.
    pub fn start(&self, id: &str) -> Result<()> {
        self.ask(id, &Request::Start)?;
        let spec = self.spec(id)?;
        let hooks = hooks_of(&spec, "poststart");
        if hooks.is_none() {
            return Ok(());
        }
        let state = self.state(id)?;
        let ran = hooks::run("poststart", hooks, &state, BundleStatus::Running, None);
        if ran.is_err() {
            // The specification has a container whose poststart hook failed stopped.
            drop(self.signal(id, 9, true));
        }
        ran
    }

    /// The configuration a container was made of.
    ///
    /// # Errors
    ///
    /// There is no such container.
    pub fn spec(&self, id: &str) -> Result<Spec> {
        self.homes.spec(id)
    }

    /// A container as it is now.
    ///
    /// # Errors
    ///
    /// There is none of this id.
    pub fn state(&self, id: &str) -> Result<BundleState> {
        self.require(id).map(Into::into)
    }

    pub(super) fn require(&self, id: &str) -> Result<BundleRecord> {
        self.current(id)?.ok_or(BundleError::NotExist)
    }

    /// The ids of all containers, and of what killed commands left of some. Nothing of them is looked at.
    ///
    /// # Errors
    ///
    /// The directory can't be read.
    pub fn ids(&self) -> Result<Vec<String>> {
        self.homes.ids()
    }

    /// All containers, by id. One whose record can't be read is left out, with a warning; what killed commands left without a
    /// record is removed.
    ///
    /// # Errors
    ///
    /// The directory can't be read.
    pub fn list(&self) -> Result<Vec<BundleState>> {
        let mut states = Vec::new();
        for id in self.homes.ids()? {
            match self.current(&id) {
                Ok(Some(record)) => states.push(BundleState::from(record)),
                Ok(None) => {
                    if let Err(error) = self.homes.remove_unfinished(&id) {
                        tracing::warn!(id, %error, "what is left of a container can't be removed");
                    }
                }
                Err(error) => tracing::warn!(id, %error, "left out; `delete --force` removes it"),
            }
        }
        Ok(states)
    }

    /// Sends a signal to a container's process, or to all.
    ///
    /// # Errors
    ///
    /// It has stopped.
    pub fn signal(&self, id: &str, signal: i32, all: bool) -> Result<()> {
        self.ask(id, &Request::Signal { signal, all })
    }

    /// Stops the vCPUs.
    ///
    /// # Errors
    ///
    /// It doesn't run.
    pub fn pause(&self, id: &str) -> Result<()> {
        self.ask(id, &Request::Pause)
    }

    /// Lets them run again.
    ///
    /// # Errors
    ///
    /// It isn't paused.
    pub fn resume(&self, id: &str) -> Result<()> {
        self.ask(id, &Request::Resume)
    }

    /// Waits until a container has stopped.
    ///
    /// # Errors
    ///
    /// There is none of this id, or it is removed meanwhile.
    pub fn wait(&self, id: &str) -> Result<BundleExit> {
        loop {
            let record = self.require(id)?;
            if let Some(exit) = record.exit {
                return Ok(exit);
            }
            let Some(mut connection) = self.connect(id)? else {
                std::thread::sleep(Duration::from_millis(5));
                continue;
            };
            if connection.send(&Request::Wait, &[]).is_err() {
                continue;
            }
            while let Some((reply, _)) = connection.wait::<Reply>(None)? {
                if let Reply::Exited(exit) = reply {
                    return Ok(exit);
                }
            }
        }
    }

    /// Tells a process the size of its terminal: the container's own, or one of an exec.
    ///
    /// # Errors
    ///
    /// It doesn't run, or has no terminal.
    pub fn resize(&self, id: &str, exec_id: Option<&str>, (rows, columns): (u16, u16)) -> Result<()> {
        let Some(exec_id) = exec_id else {
            return self.ask(id, &Request::Resize { rows, columns });
        };
        let (record, mut agent) = self.agent(id)?;
        let window_size = WindowSize {
            rows: rows.into(),
            columns: columns.into(),
            ..WindowSize::default()
        };
        agent
            .call::<ResizeTty>(&ResizeTtyRequest {
                container_id: record.sandbox_id.as_str().to_owned(),
                exec_id: super::exec::agent_id(exec_id),
                window_size: Some(window_size).into(),
                ..ResizeTtyRequest::default()
            })
            .map_err(BundleError::from_agent)?;
        Ok(())
    }

    /// Ends the input of a process: the container's own, or one of an exec.
    ///
    /// # Errors
    ///
    /// It doesn't run.
    pub fn close_stdin(&self, id: &str, exec_id: Option<&str>) -> Result<()> {
        let Some(exec_id) = exec_id else {
            return self.ask(id, &Request::CloseStdin);
        };
        let (record, mut agent) = self.agent(id)?;
        let process = process_ref(record.sandbox_id.as_str(), &super::exec::agent_id(exec_id));
        agent
            .call::<CloseStdin>(&process)
            .map_err(BundleError::from_agent)?;
        Ok(())
    }

    /// Sends a signal to a process of an exec.
    ///
    /// # Errors
    ///
    /// It has ended.
    pub fn signal_exec(&self, id: &str, exec_id: &str, signal: i32) -> Result<()> {
        let (record, mut agent) = self.agent(id)?;
        agent
            .call::<SignalProcess>(&SignalProcessRequest {
                container_id: record.sandbox_id.as_str().to_owned(),
                exec_id: super::exec::agent_id(exec_id),
                signal: signal.unsigned_abs(),
                ..SignalProcessRequest::default()
            })
            .map_err(|error| match is_exited(&error) {
                true => BundleError::Finished,
                false => BundleError::from_agent(error),
            })?;
        Ok(())
    }

    /// The way to the agent of a container that has one.
    pub(super) fn agent(&self, id: &str) -> Result<(BundleRecord, AgentClient)> {
        let record = self.require(id)?;
        match record.status {
            BundleStatus::Created | BundleStatus::Running => {}
            BundleStatus::Paused => return Err(BundleError::Paused),
            _ => return Err(BundleError::NotRunning),
        }
        let streams = connect_ports(|| self.homes.connect_vsock(id), &[RPC_PORT]);
        let rpc = streams.ok().and_then(|mut streams| streams.pop());
        let mut agent = AgentClient::new(rpc.ok_or(BundleError::NotRunning)?);
        let connect = agent.send_connect(false)?;
        agent.finish_connect(&connect)?;
        Ok((record, agent))
    }

    /// The processes in a container, as its guest numbers them.
    ///
    /// # Errors
    ///
    /// It has none.
    pub fn processes(&self, id: &str) -> Result<Vec<ProcessInfo>> {
        let (record, mut agent) = self.agent(id)?;
        let listed = agent.call::<ListProcesses>(&container_ref(&record))?;
        Ok(listed.processes)
    }

    /// A container's statistics, as its guest counts them.
    ///
    /// # Errors
    ///
    /// It doesn't run.
    pub fn stats(&self, id: &str) -> Result<StatsResponse> {
        let (record, mut agent) = self.agent(id)?;
        Ok(agent.call::<GetStats>(&container_ref(&record))?)
    }
}

fn container_ref(record: &BundleRecord) -> ContainerRef {
    ContainerRef {
        container_id: record.sandbox_id.as_str().to_owned(),
        ..ContainerRef::default()
    }
}

/// Runs what goes with a container's end; a failure is told and changes nothing.
pub(super) fn run_poststop(spec: &Spec, state: &BundleState) {
    let mut state = state.clone();
    state.pid = 0;
    for hook in hooks_of(spec, "poststop").into_iter().flatten() {
        let hooks = vec![hook.clone()];
        if let Err(error) = hooks::run("poststop", Some(&hooks), &state, BundleStatus::Stopped, None) {
            tracing::warn!(id = state.id, %error, "a hook failed");
        }
    }
}

/// Removes a container's control groups.
pub(super) fn remove_cgroups(record: &BundleRecord) {
    cgroup::remove(&record.cgroups);
}
