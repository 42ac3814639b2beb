//! The way in: makes, finds, starts, stops and removes containers, and puts right what killed processes left.
//!
//! Recovery: a record that says "there are processes" in a home without an owner was left by a monitor, or by a client
//! that was killed. Whoever finds it takes the lock, ends the VMM if it is still there, removes the sockets and records
//! the exit; a container that wanted to be removed is removed. No command needs another to have ended well.

use std::{
    io,
    os::unix::net::UnixStream,
    path::PathBuf,
    time::{Duration, Instant},
};

use agent_protocol::{ContainerRef, GetStats, RPC_PORT, StatsResponse};

use crate::{
    Components, ContainerRecord, ContainerSpec, Directories, Result, SandboxError, SandboxId, Signals,
    Status,
    agent_client::AgentClient,
    container_store::{ContainerStore, Home, RunInfo, now_ms},
    monitor::{Launcher, MonitorClient, Request},
    process_handle::ProcessIdentity,
    run_dir::{RunDir, boot_id},
    session::{Attachment, ContainerExit, Session, Targets},
    stdio::connect_ports,
};

/// How long a killed process may take to go; its memory is being freed.
const KILL_PATIENCE: Duration = Duration::from_secs(10);
/// How long another command may hold a container's lock for what it does.
const LOCK_PATIENCE: Duration = Duration::from_secs(10);
/// How long others may look whether a home has an owner, for which they hold its lock.
const PROBE_PATIENCE: Duration = Duration::from_millis(20);
const SIGTERM: i32 = 15;
const SIGKILL: i32 = 9;
/// What a container that was killed with its monitor exits with.
const KILLED: u8 = 137;
/// What one exits with that ended with its host: docker's number for what can't be known.
const UNKNOWN: u8 = 255;

/// All containers of this host and user.
#[derive(Debug)]
pub struct Runtime {
    root: PathBuf,
    store: ContainerStore,
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

    /// Puts right what killed processes left of containers that ran.
    ///
    /// # Errors
    ///
    /// The run directory can't be read.
    pub fn recover(&self) -> Result<()> {
        for id in self.run.ids()? {
            if !self.store.is_owned(&id) {
                self.current(&id)?;
            }
        }
        Ok(())
    }

    /// A container's record as it is now; `None` if there is no such container any more.
    ///
    /// # Errors
    ///
    /// Its record can't be read.
    pub fn current(&self, id: &SandboxId) -> Result<Option<ContainerRecord>> {
        let record = self.store.read(id)?;
        let has_processes = record.as_ref().is_none_or(|record| record.run.is_some());
        if !has_processes || self.store.is_owned(id) {
            return Ok(record);
        }
        let lock = self.run.lock()?;
        let Some(home) = self.store.lock(id, PROBE_PATIENCE)? else {
            // Somebody was faster; or there is nothing but sockets.
            if record.is_none() && !self.store.home_path(id).exists() {
                self.run.remove(id);
            }
            return self.store.read(id);
        };
        self.store
            .remove_unfinished(&lock, id, home)
            .map_or(Ok(None), |home| {
                drop(lock);
                self.recover_home(home)
            })
    }

    /// Records the end of a container whose owner is gone.
    fn recover_home(&self, home: Home) -> Result<Option<ContainerRecord>> {
        let Some(mut record) = home.read()? else {
            return Ok(None);
        };
        let Some(run) = record.run.take() else {
            return Ok(Some(record));
        };
        if let Some(vmm) = run.living_vmm() {
            end_vmm(&record.id, vmm);
        }
        self.run.remove(&record.id);
        tracing::info!(id = %record.id, "recovered a container whose monitor is gone");
        if record.spec.auto_remove {
            home.remove(&record.name)?;
            return Ok(None);
        }
        if record.status.is_live() {
            let same_boot = run.boot_id == boot_id();
            record.status = Status::Exited;
            record.finished_ms = Some(now_ms());
            record.exit_code = Some(if same_boot { KILLED } else { UNKNOWN });
            record.error = Some(if same_boot {
                "its monitor was killed".to_owned()
            } else {
                "the host went down while it ran".to_owned()
            });
        }
        home.write(&record)?;
        Ok(Some(record))
    }

    /// All containers, the newest first. One whose record is damaged is left out, with a warning.
    ///
    /// # Errors
    ///
    /// The directory can't be read.
    pub fn list(&self) -> Result<Vec<ContainerRecord>> {
        self.recover()?;
        let mut records = Vec::new();
        for id in self.store.ids()? {
            match self.current(&id) {
                Ok(record) => records.extend(record),
                Err(error) => tracing::warn!(%id, %error, "left out; `hull rm --force` removes it"),
            }
        }
        records.sort_by_key(|record| std::cmp::Reverse(record.created_ms));
        Ok(records)
    }

    /// Finds a container by its name, its id, or a unique beginning of its id.
    ///
    /// # Errors
    ///
    /// None or several match.
    pub fn find(&self, wanted: &str) -> Result<ContainerRecord> {
        let id = self.store.resolve(wanted)?;
        self.current(&id)?.ok_or_else(|| SandboxError::NotFound {
            name: wanted.to_owned(),
        })
    }

    fn make(&self, spec: &ContainerSpec, run: Option<RunInfo>) -> Result<(Home, ContainerRecord)> {
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
        if let Some(mut monitor) = self.monitor(record)?
            && monitor.send(&Request::Wait, &[])
            && let Some(report) = monitor.wait_exit()?
        {
            return Ok(report.into());
        }
        self.last_exit(&record.id)
    }

    /// How a container ended whose monitor is gone.
    ///
    /// # Errors
    ///
    /// Its record can't be read.
    pub fn last_exit(&self, id: &SandboxId) -> Result<ContainerExit> {
        let record = self.current(id)?;
        Ok(match record {
            Some(record) => ContainerExit {
                code: record.exit_code.unwrap_or(0),
                oom_killed: record.oom_killed,
                error: record.error,
                timing: crate::Timing::default(),
            },
            None => ContainerExit {
                // One that removed itself took its exit code along.
                code: KILLED,
                oom_killed: false,
                error: Some("its monitor was killed".to_owned()),
                timing: crate::Timing::default(),
            },
        })
    }

    /// Removes a container.
    ///
    /// # Errors
    ///
    /// It runs and `force` is not given, or somebody else holds it.
    pub fn remove(&self, record: &ContainerRecord, force: bool) -> Result<()> {
        if record.status.is_live() {
            if !force {
                return Err(SandboxError::StillRunning {
                    name: record.name.clone(),
                    status: record.status,
                });
            }
            self.stop(record, Duration::ZERO)?;
        }
        self.remove_home(&record.id, &record.name)
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

fn end_vmm(id: &SandboxId, vmm: ProcessIdentity) {
    let Some(process) = vmm.open() else { return };
    if let Err(error) = process.kill() {
        tracing::warn!(%id, pid = vmm.pid, %error, "can't kill a VMM");
    } else if !process.wait_exited(KILL_PATIENCE) {
        tracing::warn!(%id, pid = vmm.pid, "a killed VMM is still there");
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::container_store::tests::spec;

    struct World {
        dir: tempfile::TempDir,
        runtime: Runtime,
    }

    fn world() -> World {
        let dir = tempfile::tempdir().unwrap();
        let directories = Directories {
            root: dir.path().join("root"),
            run: dir.path().join("run"),
        };
        World {
            runtime: Runtime::open(&directories).unwrap(),
            dir,
        }
    }

    /// As a monitor that was killed leaves it: a record that says it runs, sockets, and no owner.
    fn abandoned(world: &World, spec: &ContainerSpec, boot: Option<&str>) -> ContainerRecord {
        let mut info = RunInfo::of_this_process().unwrap();
        if let Some(boot) = boot {
            info.boot_id = boot.to_owned();
        }
        let (home, mut record) = world.runtime.make(spec, Some(info)).unwrap();
        record.status = Status::Running;
        home.write(&record).unwrap();
        std::mem::forget(world.runtime.run.create(&record.id).unwrap());
        record
    }

    #[test]
    fn container_whose_monitor_was_killed_is_recorded_as_killed() {
        let world = world();
        abandoned(&world, &spec("web"), None);
        let found = world.runtime.find("web").unwrap();
        assert_eq!((found.status, found.exit_code), (Status::Exited, Some(137)));
        assert!(found.finished_ms.is_some() && found.run.is_none());
        assert!(world.runtime.run.ids().unwrap().is_empty());
    }

    #[test]
    fn container_that_ran_when_the_host_went_down_is_kept_as_exited() {
        let world = world();
        abandoned(&world, &spec("web"), Some("another boot"));
        let listed = world.runtime.list().unwrap();
        assert_eq!(
            (listed[0].status, listed[0].exit_code),
            (Status::Exited, Some(255))
        );
    }

    #[test]
    fn abandoned_container_that_removes_itself_is_removed_by_any_command() {
        let world = world();
        let spec = ContainerSpec {
            auto_remove: true,
            ..spec("web")
        };
        let record = abandoned(&world, &spec, None);
        world.runtime.recover().unwrap();
        assert!(!world.runtime.home(&record.id).exists());
        assert!(matches!(
            world.runtime.find("web"),
            Err(SandboxError::NotFound { .. })
        ));
    }

    #[test]
    fn created_container_is_no_leftover() {
        let world = world();
        let record = world.runtime.create(&spec("web")).unwrap();
        assert_eq!(world.runtime.list().unwrap(), [record.clone()]);
        assert_eq!(world.runtime.find("web").unwrap().status, Status::Created);
        world.runtime.remove(&record, false).unwrap();
        assert!(world.runtime.list().unwrap().is_empty());
    }

    #[test]
    fn home_without_a_record_and_sockets_without_a_home_are_removed() {
        let world = world();
        let record = world.runtime.create(&spec("web")).unwrap();
        fs::remove_file(world.runtime.home(&record.id).join("container.json")).unwrap();
        let id = SandboxId::random().unwrap();
        std::mem::forget(world.runtime.run.create(&id).unwrap());
        assert!(world.runtime.list().unwrap().is_empty());
        assert!(!world.runtime.home(&record.id).exists());
        assert!(world.runtime.run.ids().unwrap().is_empty());
    }

    #[test]
    fn damaged_record_hides_one_container_and_can_be_removed() {
        let world = world();
        let damaged = world.runtime.create(&spec("damaged")).unwrap();
        let whole = world.runtime.create(&spec("whole")).unwrap();
        fs::write(world.runtime.home(&damaged.id).join("container.json"), "{ half").unwrap();
        assert_eq!(world.runtime.list().unwrap(), [whole]);
        assert!(matches!(
            world.runtime.find("damaged"),
            Err(SandboxError::DamagedState { .. })
        ));
        world.runtime.remove_damaged("damaged").unwrap();
        assert!(!world.runtime.home(&damaged.id).exists());
        assert!(world.dir.path().exists());
    }

    #[test]
    fn running_container_is_not_removed_without_force() {
        let world = world();
        let (home, mut record) = world
            .runtime
            .make(&spec("web"), Some(RunInfo::of_this_process().unwrap()))
            .unwrap();
        record.status = Status::Running;
        home.write(&record).unwrap();
        let found = world.runtime.find("web").unwrap();
        assert_eq!(found.status, Status::Running);
        let error = world.runtime.remove(&found, false).unwrap_err();
        assert!(matches!(error, SandboxError::StillRunning { .. }));
    }

    #[test]
    fn other_name_is_found_and_the_old_one_free() {
        let world = world();
        let record = world.runtime.create(&spec("old")).unwrap();
        world.runtime.create(&spec("taken")).unwrap();
        assert!(matches!(
            world.runtime.rename(&record, "taken"),
            Err(SandboxError::NameInUse { .. })
        ));
        world.runtime.rename(&record, "new").unwrap();
        assert_eq!(world.runtime.find("new").unwrap().name, "new");
        assert!(matches!(
            world.runtime.find("old"),
            Err(SandboxError::NotFound { .. })
        ));
    }
}
