//! The way in: makes, starts, stops and removes containers.
//!
//! Every operation takes a record as it was found; what has changed meanwhile is looked at again under the home's lock.

use std::{
    io,
    os::unix::net::UnixStream,
    path::PathBuf,
    thread,
    time::{Duration, Instant},
};

use agent_protocol::{ContainerRef, GetStats, RPC_PORT, StatsResponse};

use crate::{
    Components, ContainerRecord, ContainerSpec, Directories, Result, SandboxError, SandboxId, Signals,
    Status,
    agent_client::AgentClient,
    container_record::RunInfo,
    container_store::{ContainerStore, Home},
    monitor::{Launcher, MonitorClient, Request},
    recovery::end_vmm,
    run_dir::RunDir,
    session::{Attachment, ContainerExit, Session, Targets},
    stdio::connect_ports,
};

/// How long a killed process may take to go; its memory is being freed.
const KILL_PATIENCE: Duration = Duration::from_secs(10);
/// How long another command may hold a container's lock for what it does.
const LOCK_PATIENCE: Duration = Duration::from_secs(10);
/// How often a container that is just ending is looked at.
const ENDING_INTERVAL: Duration = Duration::from_millis(5);
const SIGTERM: i32 = 15;
const SIGKILL: i32 = 9;

/// All containers of this host and user.
#[derive(Debug)]
pub struct Runtime {
    pub(crate) root: PathBuf,
    pub(crate) store: ContainerStore,
    pub(crate) run: RunDir,
}

/// What a start is given.
#[derive(Debug)]
pub struct StartOptions<'a> {
    /// The monitor, started already.
    pub launcher: Launcher,
    /// The parts of the installation.
    pub components: &'a Components,
    /// The streams this front-end wants.
    pub attachment: Option<Attachment>,
    /// Gives up when one of these asks for it.
    pub signals: Option<&'a Signals>,
    /// How long the front-end has been busy before, for [`crate::Timing`].
    pub client_time: Duration,
}

impl Runtime {
    /// Opens the directories; nothing is looked for yet.
    ///
    /// # Errors
    ///
    /// The run directory can't be made.
    pub fn open(directories: &Directories) -> Result<Self> {
        Ok(Self {
            root: directories.root.clone(),
            store: ContainerStore::new(directories),
            run: RunDir::open(&directories.run)?,
        })
    }

    /// Where a container is kept.
    #[must_use]
    pub fn home(&self, id: &SandboxId) -> PathBuf {
        self.store.home_path(id)
    }

    /// The newest log file of a container; older ones have a number added, the highest being the oldest.
    #[must_use]
    pub fn log_path(&self, id: &SandboxId) -> PathBuf {
        self.store.log_path(id)
    }

    pub(crate) fn make(&self, spec: &ContainerSpec, run: Option<RunInfo>) -> Result<(Home, ContainerRecord)> {
        spec.check()?;
        let (home, record) = {
            let lock = self.run.lock()?;
            self.store.create(&lock, spec, run)?
        };
        if let Some(bytes) = spec.storage_bytes
            && let Err(error) = crate::rootfs::create_writable(&self.root, &home.writable_path(), bytes)
        {
            home.remove(&record.name)?;
            return Err(error);
        }
        Ok((home, record))
    }

    /// Makes a container, to be started later.
    ///
    /// # Errors
    ///
    /// Its name is in use, or it can't be kept.
    pub fn create(&self, spec: &ContainerSpec) -> Result<ContainerRecord> {
        self.make(spec, None).map(|(_, record)| record)
    }

    /// Makes a container and starts it.
    ///
    /// # Errors
    ///
    /// Whatever stands in the way. A container that can't be started is kept, unless it removes itself.
    pub fn run(&self, spec: &ContainerSpec, options: StartOptions<'_>) -> Result<(ContainerRecord, Session)> {
        // The record tells from the beginning that there is a process behind it.
        let (home, record) = self.make(spec, Some(RunInfo::of_this_process()?))?;
        let session = self.launch(home, options)?;
        Ok((record, session))
    }

    /// Starts a container that doesn't run. `None`: it runs already.
    ///
    /// # Errors
    ///
    /// It is paused, or whatever stands in the way.
    pub fn start(&self, record: &ContainerRecord, options: StartOptions<'_>) -> Result<Option<Session>> {
        let deadline = Instant::now() + LOCK_PATIENCE;
        let name = || record.name.clone();
        loop {
            let now = self
                .current(&record.id)?
                .ok_or_else(|| SandboxError::NotFound { name: name() })?;
            match now.status {
                Status::Running => return Ok(None),
                Status::Paused => return Err(SandboxError::Paused { name: name() }),
                _ => {}
            }
            // Another command may be starting or removing it.
            if let Some(home) = self.store.lock(&record.id, Duration::from_millis(100))? {
                return self.launch(home, options).map(Some);
            }
            if Instant::now() >= deadline {
                return Err(SandboxError::Busy { name: name() });
            }
        }
    }

    fn launch(&self, home: Home, options: StartOptions<'_>) -> Result<Session> {
        let (attach, pumps) = match options.attachment {
            None => (None, Vec::new()),
            Some(attachment) => {
                let (request, fds, pumps) = Targets::of(attachment)?.into_request(attachment);
                (Some((request, fds)), pumps)
            }
        };
        let client_us = u64::try_from(options.client_time.as_micros()).unwrap_or(u64::MAX);
        let running = options.launcher.launch(
            home,
            &self.run,
            options.components,
            attach,
            (client_us, options.signals),
        )?;
        Ok(Session::new(
            running,
            options.attachment.unwrap_or_default(),
            pumps,
        ))
    }

    /// Attaches to a container that runs.
    ///
    /// # Errors
    ///
    /// It doesn't run, or is paused.
    pub fn attach(&self, record: &ContainerRecord, attachment: Attachment) -> Result<Session> {
        let not_running = || SandboxError::NotRunning {
            name: record.name.clone(),
        };
        if record.status == Status::Paused {
            return Err(SandboxError::Paused {
                name: record.name.clone(),
            });
        }
        let (request, fds, pumps) = Targets::of(attachment)?.into_request(attachment);
        let monitor = self.monitor(record)?.ok_or_else(not_running)?;
        let running = monitor.attach(request, fds)?.ok_or_else(not_running)?;
        Ok(Session::new(running, attachment, pumps))
    }

    fn monitor(&self, record: &ContainerRecord) -> Result<Option<MonitorClient>> {
        MonitorClient::connect(&self.run, &record.id)
    }

    /// Asks a running container's monitor.
    fn ask(&self, record: &ContainerRecord, request: &Request) -> Result<()> {
        let done = match self.monitor(record)? {
            Some(mut monitor) => monitor.ask(request)?,
            None => None,
        };
        done.ok_or_else(|| SandboxError::NotRunning {
            name: record.name.clone(),
        })
    }

    /// Stops the vCPUs of a container.
    ///
    /// # Errors
    ///
    /// It doesn't run, or is paused already.
    pub fn pause(&self, record: &ContainerRecord) -> Result<()> {
        self.ask(record, &Request::Pause)
    }

    /// Lets a paused container run again.
    ///
    /// # Errors
    ///
    /// It isn't paused.
    pub fn resume(&self, record: &ContainerRecord) -> Result<()> {
        self.ask(record, &Request::Resume)
    }

    /// Sends a signal to a container's first process, or to all of them. SIGKILL is waited for.
    ///
    /// # Errors
    ///
    /// The container isn't running.
    pub fn signal(&self, record: &ContainerRecord, signal: i32, all: bool) -> Result<()> {
        if signal == SIGKILL {
            return self.end(record, signal, KILL_PATIENCE).map(drop);
        }
        self.ask(record, &Request::Signal { signal, all })
    }

    /// Sends a signal and waits for the end; false if it didn't come in time.
    fn end(&self, record: &ContainerRecord, signal: i32, patience: Duration) -> Result<bool> {
        let not_running = || SandboxError::NotRunning {
            name: record.name.clone(),
        };
        let mut monitor = self.monitor(record)?.ok_or_else(not_running)?;
        monitor.end(signal, signal == SIGKILL, patience)
    }

    /// Stops a container: asks, waits, then forces. One that doesn't run is stopped already.
    ///
    /// # Errors
    ///
    /// It can't be asked.
    pub fn stop(&self, record: &ContainerRecord, patience: Duration) -> Result<()> {
        let ended = |result: Result<bool>| match result {
            Err(SandboxError::NotRunning { .. }) => Ok(true),
            result => result,
        };
        let signal = record.spec.stop_signal.unwrap_or(SIGTERM);
        if patience > Duration::ZERO && ended(self.end(record, signal, patience))? {
            return Ok(());
        }
        if ended(self.end(record, SIGKILL, KILL_PATIENCE))? {
            return Ok(());
        }
        self.destroy(record)
    }

    /// Kills a container's processes on the host, whatever they do, and waits until they are gone.
    fn destroy(&self, record: &ContainerRecord) -> Result<()> {
        let now = self.current(&record.id)?;
        if let Some(run) = now.and_then(|now| now.run) {
            if let Some(vmm) = run.living_vmm() {
                end_vmm(&record.id, vmm);
            }
            if let Some(monitor) = run.monitor.open()
                && !monitor.wait_exited(KILL_PATIENCE)
            {
                let _ = monitor.kill();
                monitor.wait_exited(KILL_PATIENCE);
            }
        }
        self.current(&record.id).map(drop)
    }

    /// Waits until a container has exited.
    ///
    /// # Errors
    ///
    /// Its record can't be read.
    pub fn wait(&self, record: &ContainerRecord) -> Result<ContainerExit> {
        loop {
            if let Some(mut monitor) = self.monitor(record)?
                && monitor.send(&Request::Wait, &[])
                && let Some(report) = monitor.wait_exit()?
            {
                return Ok(report.into());
            }
            let now = self.current(&record.id)?;
            if !now.is_some_and(|now| now.status.is_live()) {
                return self.last_exit(&record.id);
            }
            // Its monitor takes no more clients, and has not recorded the end yet.
            thread::sleep(ENDING_INTERVAL);
        }
    }

    /// Removes a container.
    ///
    /// # Errors
    ///
    /// It runs and `force` is not given, or somebody else holds it.
    pub fn remove(&self, record: &ContainerRecord, force: bool) -> Result<()> {
        let deadline = Instant::now() + LOCK_PATIENCE;
        while let Some(now) = self.current(&record.id)? {
            if now.status.is_live() {
                if !force {
                    return Err(SandboxError::StillRunning {
                        name: now.name,
                        status: now.status,
                    });
                }
                self.stop(&now, Duration::ZERO)?;
            }
            // Another command may be starting it, which ends in a container that runs.
            if let Some(home) = self.store.lock(&record.id, Duration::from_millis(100))? {
                self.run.remove(&record.id);
                return home.remove(&now.name);
            }
            if Instant::now() >= deadline {
                return Err(SandboxError::Busy { name: now.name });
            }
        }
        Ok(())
    }

    /// Removes what is kept under an id, readable or not.
    fn remove_home(&self, id: &SandboxId, name: &str) -> Result<()> {
        let Some(home) = self.store.lock(id, LOCK_PATIENCE)? else {
            // Gone is as good as removed.
            return if self.store.home_path(id).exists() {
                Err(SandboxError::Busy {
                    name: name.to_owned(),
                })
            } else {
                Ok(())
            };
        };
        self.run.remove(id);
        home.remove(name)
    }

    /// Removes a container whose record can't be read.
    ///
    /// # Errors
    ///
    /// No such container, or somebody holds it.
    pub fn remove_damaged(&self, wanted: &str) -> Result<()> {
        let id = self.store.resolve(wanted)?;
        self.remove_home(&id, wanted)
    }

    /// Gives a container another name.
    ///
    /// # Errors
    ///
    /// The name is in use.
    pub fn rename(&self, record: &ContainerRecord, name: &str) -> Result<()> {
        // Held until it is done, so that nobody else gets the name meanwhile.
        let lock = self.run.lock()?;
        if !record.status.is_live() {
            return self.store.rename(&lock, record, name);
        }
        let name = self.store.choose_name(&lock, Some(name))?;
        self.ask(record, &Request::Rename { name })
    }

    /// Connects to ports of a running container's microVM, all at once.
    ///
    /// # Errors
    ///
    /// The container isn't running.
    pub fn connect_ports(&self, record: &ContainerRecord, ports: &[u32]) -> Result<Vec<UnixStream>> {
        let name = || record.name.clone();
        match record.status {
            Status::Running => {}
            Status::Paused => return Err(SandboxError::Paused { name: name() }),
            _ => return Err(SandboxError::NotRunning { name: name() }),
        }
        connect_ports(|| self.run.connect_vsock(&record.id), ports).map_err(|error: io::Error| {
            tracing::debug!(%error, "connecting to the agent");
            SandboxError::NotRunning { name: name() }
        })
    }

    /// Connects to the agent of a running container.
    ///
    /// # Errors
    ///
    /// The container isn't running.
    pub fn connect_agent(&self, record: &ContainerRecord) -> Result<AgentClient> {
        let rpc = self.connect_ports(record, &[RPC_PORT])?.pop();
        let rpc = rpc.ok_or_else(|| SandboxError::NotRunning {
            name: record.name.clone(),
        })?;
        let mut agent = AgentClient::new(rpc);
        let connect = agent.send_connect(false)?;
        agent.finish_connect(&connect)?;
        Ok(agent)
    }

    /// A container's statistics, as its guest counts them.
    ///
    /// # Errors
    ///
    /// The container isn't running.
    pub fn stats(&self, record: &ContainerRecord) -> Result<StatsResponse> {
        let container_id = record.id.as_str().to_owned();
        self.connect_agent(record)?.call::<GetStats>(&ContainerRef {
            container_id,
            ..ContainerRef::default()
        })
    }
}
