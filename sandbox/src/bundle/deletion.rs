//! Puts right what killed processes left, and removes containers.

use std::time::{Duration, Instant};

use super::{
    control::{Bundles, remove_cgroups, run_poststop},
    error::{BundleError, Result},
    exit::KILLED,
    home::Home,
    protocol::{Reply, Request},
    record::{BundleExit, BundleRecord, BundleState, BundleStatus},
};
use crate::{
    container_record::RunInfo,
    network::{NetworkSpec, clean_up},
    recovery::end_vmm,
};

/// How long a killed process may take to go; its memory is being freed.
const KILL_PATIENCE: Duration = Duration::from_secs(10);
/// How long others may look whether a home has an owner, for which they hold its lock.
const PROBE_PATIENCE: Duration = Duration::from_millis(20);
/// How long a monitor may go on writing what its container has printed.
const OUTPUT_PATIENCE: Duration = Duration::from_secs(2);
const SIGKILL: i32 = 9;

impl Bundles {
    /// A container's record as it is now, after what killed processes left has been put right; `None` if there is no
    /// such container, or no more.
    pub(super) fn current(&self, id: &str) -> Result<Option<BundleRecord>> {
        let record = self.homes.read(id)?;
        let has_processes = record.as_ref().is_some_and(|record| record.run.is_some());
        if !has_processes || self.homes.is_owned(id) {
            return Ok(record);
        }
        match self.homes.lock(id, PROBE_PATIENCE)? {
            Some(home) => self.recover(home),
            // Somebody was faster.
            None => self.homes.read(id),
        }
    }

    /// Records the end of a container whose monitor is gone. One that was never finished is removed.
    fn recover(&self, home: Home) -> Result<Option<BundleRecord>> {
        let Some(mut record) = home.read()? else {
            return Ok(None);
        };
        let Some(run) = record.run.take() else {
            return Ok(Some(record));
        };
        tracing::debug!(id = record.id, "recovering a container whose monitor is gone");
        end_run(&record, &run);
        home.remove_sockets();
        let spec = NetworkSpec {
            mode: record.network.clone(),
            ..NetworkSpec::default()
        };
        if let Err(error) = clean_up(&spec, &record.sandbox_id) {
            tracing::warn!(id = record.id, %error, "can't give a container's network namespace back");
        }
        if record.status == BundleStatus::Creating {
            remove_cgroups(&record);
            self.homes.free_jail_uid(record.jail_uid);
            home.remove()?;
            return Ok(None);
        }
        record.status = BundleStatus::Stopped;
        record.exit = Some(BundleExit::now(
            KILLED,
            false,
            Some("its monitor was killed".to_owned()),
        ));
        home.write(&record)?;
        Ok(Some(record))
    }

    /// Removes a container. One that was created and never started is killed, as with runc; one that runs only by
    /// `force`.
    ///
    /// # Errors
    ///
    /// There is none, which is no error with `force`; it is not stopped; or somebody else holds it.
    pub fn delete(&self, id: &str, force: bool) -> Result<()> {
        let record = match self.current(id) {
            Ok(Some(record)) => record,
            // What a killed command left before it had a record; or a record that can't be read.
            Ok(None) => return self.delete_unfinished(id, force),
            Err(BundleError::Sandbox(error)) if force => {
                tracing::warn!(id, %error, "removing a container whose record can't be read");
                return self.delete_unfinished(id, force);
            }
            Err(error) => return Err(error),
        };
        match record.status {
            BundleStatus::Stopped => {}
            BundleStatus::Created => self.kill(&record)?,
            _ if force => self.kill(&record)?,
            status => {
                return Err(BundleError::NotStopped {
                    id: id.to_owned(),
                    status,
                });
            }
        }
        let Some(home) = self.lock_stopped(&record)? else {
            // Another command has removed it.
            return if force { Ok(()) } else { Err(BundleError::NotExist) };
        };
        let Some(mut record) = home.read()? else {
            return home.remove();
        };
        remove_cgroups(&record);
        if !record.poststop_done {
            record.poststop_done = true;
            home.write(&record)?;
            if let Ok(spec) = self.spec(id) {
                run_poststop(&spec, &BundleState::from(record.clone()));
            }
        }
        self.homes.free_jail_uid(record.jail_uid);
        home.remove()
    }

    fn delete_unfinished(&self, id: &str, force: bool) -> Result<()> {
        let missing = if force { Ok(()) } else { Err(BundleError::NotExist) };
        match self.homes.lock(id, KILL_PATIENCE)? {
            Some(home) => {
                self.homes.free_jail_uids_of(id);
                home.remove().and(missing)
            }
            None if self.homes.path(id).exists() => Err(BundleError::Busy { id: id.to_owned() }),
            None => {
                // Its creator was killed between the two.
                self.homes.free_jail_uids_of(id);
                missing
            }
        }
    }

    /// Ends a container, whatever it does, and waits until its processes are gone.
    fn kill(&self, record: &BundleRecord) -> Result<()> {
        if let Some(mut connection) = self.connect(&record.id)? {
            let signal = Request::Signal {
                signal: SIGKILL,
                all: true,
            };
            let deadline = Instant::now() + KILL_PATIENCE;
            if connection.send(&Request::Wait, &[]).is_ok() && connection.send(&signal, &[]).is_ok() {
                loop {
                    let left = deadline.saturating_duration_since(Instant::now());
                    match connection.wait::<Reply>(Some(left))? {
                        Some((Reply::Exited(_), _)) => return Ok(()),
                        Some(_) => {}
                        None => break,
                    }
                }
            }
        }
        // It doesn't answer, or is just being made.
        let now = self.homes.read(&record.id)?;
        if let Some(run) = now.and_then(|now| now.run) {
            end_run(record, &run);
        }
        Ok(())
    }

    /// Locks the home of a container that has stopped; its monitor may still be writing the last of its output.
    fn lock_stopped(&self, record: &BundleRecord) -> Result<Option<Home>> {
        for patience in [OUTPUT_PATIENCE, KILL_PATIENCE] {
            if let Some(home) = self.homes.lock(&record.id, patience)? {
                return Ok(Some(home));
            }
            if !self.homes.path(&record.id).exists() {
                return Ok(None);
            }
            if let Some(run) = &record.run {
                end_run(record, run);
            }
        }
        Err(BundleError::Busy {
            id: record.id.clone(),
        })
    }
}

/// Kills the processes of a container on the host and waits until they are gone.
fn end_run(record: &BundleRecord, run: &RunInfo) {
    if let Some(vmm) = run.living_vmm() {
        end_vmm(&record.sandbox_id, vmm);
    }
    let own = i32::try_from(std::process::id()).unwrap_or(0);
    let monitor = run.monitor;
    if run.boot_id == crate::run_dir::boot_id()
        && monitor.pid != own
        && let Some(process) = monitor.open()
        && process.kill().is_ok()
    {
        process.wait_exited(KILL_PATIENCE);
    }
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeMap, fs, os::unix::fs::DirBuilderExt as _, path::PathBuf};

    use super::*;
    use crate::bundle::{
        home::sandbox_id,
        record::{PodRole, RECORD_VERSION},
    };

    struct World {
        _dir: tempfile::TempDir,
        bundles: Bundles,
        cgroup: PathBuf,
    }

    fn world() -> World {
        let dir = tempfile::tempdir().unwrap();
        World {
            bundles: Bundles::open(&dir.path().join("root")).unwrap(),
            cgroup: dir.path().join("cgroup"),
            _dir: dir,
        }
    }

    /// As a monitor that was killed leaves it: a record with processes, and no owner.
    fn abandoned(world: &World, id: &str, status: BundleStatus) {
        let home = world.bundles.homes.create(id).unwrap();
        fs::DirBuilder::new()
            .mode(0o755)
            .recursive(true)
            .create(&world.cgroup)
            .unwrap();
        let mut run = RunInfo::of_this_process().unwrap();
        // Nobody's any more.
        run.monitor.start_ticks += 1;
        home.write(&BundleRecord {
            version: RECORD_VERSION,
            id: id.to_owned(),
            sandbox_id: sandbox_id(id),
            oci_version: "1.2.0".into(),
            bundle: "/bundle".into(),
            rootfs: "/bundle/rootfs".into(),
            annotations: BTreeMap::new(),
            terminal: false,
            owner: 0,
            jail_uid: world.bundles.homes.take_jail_uid(id).unwrap(),
            memory_mib: 0,
            created_ms: 0,
            status,
            run: Some(run),
            exit: None,
            cgroups: vec![world.cgroup.clone()],
            network: crate::network::NetworkMode::None,
            pod: PodRole::Alone,
            poststop_done: false,
        })
        .unwrap();
        fs::write(home.path().join("monitor.sock"), "").unwrap();
    }

    #[test]
    fn container_whose_monitor_was_killed_has_stopped_and_can_be_deleted() {
        let world = world();
        abandoned(&world, "web", BundleStatus::Running);
        let state = world.bundles.state("web").unwrap();
        assert_eq!((state.status, state.pid), (BundleStatus::Stopped, 0));
        assert_eq!(state.exit.map(|exit| exit.status), Some(KILLED));
        assert!(matches!(
            world.bundles.signal("web", 15, false),
            Err(BundleError::NotRunning)
        ));
        assert!(matches!(world.bundles.start("web"), Err(BundleError::HasStopped)));
        assert_eq!(world.bundles.wait("web").unwrap().status, KILLED);
        world.bundles.delete("web", false).unwrap();
        assert!(!world.cgroup.exists());
        assert!(matches!(world.bundles.state("web"), Err(BundleError::NotExist)));
        assert!(world.bundles.list().unwrap().is_empty());
    }

    #[test]
    fn container_whose_creation_was_killed_is_gone() {
        let world = world();
        abandoned(&world, "half", BundleStatus::Creating);
        assert!(matches!(world.bundles.state("half"), Err(BundleError::NotExist)));
        assert!(!world.cgroup.exists());
        assert!(!world.bundles.homes.path("half").exists());
    }

    #[test]
    fn forced_delete_removes_everything_and_nothing() {
        let world = world();
        world.bundles.delete("nothing", true).unwrap();
        assert!(matches!(
            world.bundles.delete("nothing", false),
            Err(BundleError::NotExist)
        ));
        drop(world.bundles.homes.create("unfinished").unwrap());
        world.bundles.delete("unfinished", true).unwrap();
        let home = world.bundles.homes.create("damaged").unwrap();
        fs::write(home.path().join("state.json"), "{ half").unwrap();
        drop(home);
        assert!(world.bundles.delete("damaged", false).is_err());
        world.bundles.delete("damaged", true).unwrap();
        assert!(world.bundles.homes.ids().unwrap().is_empty());
    }
}
