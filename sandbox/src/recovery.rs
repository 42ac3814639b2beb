//! Finds containers, and puts right what killed processes left.
//!
//! A record that says "there are processes" in a home without an owner was left by a monitor, or by a client that was
//! killed. Whoever finds it takes the lock, ends the VMM if it is still there, removes the sockets and records the exit; a
//! container that wanted to be removed is removed. No command needs another to have ended well.

use std::time::Duration;

use crate::{
    ContainerExit, ContainerRecord, Result, Runtime, SandboxError, SandboxId, Status, Timing,
    container_record::now_ms, container_store::Home, network, process_handle::ProcessIdentity,
    run_dir::boot_id,
};

/// How long a killed process may take to go; its memory is being freed.
const KILL_PATIENCE: Duration = Duration::from_secs(10);
/// How long others may look whether a home has an owner, for which they hold its lock.
const PROBE_PATIENCE: Duration = Duration::from_millis(20);
/// What a container that was killed with its monitor exits with.
const KILLED: u8 = 137;
/// What one exits with that ended with its host: docker's number for what can't be known.
const UNKNOWN: u8 = 255;

impl Runtime {
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
        record.endpoint = None;
        if let Err(error) = network::clean_up(&record.spec.network, &record.id) {
            tracing::warn!(id = %record.id, %error, "can't take a container's network back");
        }
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
        // What can't be written down (full disk) is worked out again by the next command.
        if let Err(error) = home.write(&record) {
            tracing::warn!(id = %record.id, %error, "can't record a container's end");
        }
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
                timing: Timing::default(),
            },
            None => ContainerExit {
                // One that removed itself took its exit code along.
                code: KILLED,
                oom_killed: false,
                error: Some("its monitor was killed".to_owned()),
                timing: Timing::default(),
            },
        })
    }
}

/// Kills a VMM and waits until it is gone.
pub(crate) fn end_vmm(id: &SandboxId, vmm: ProcessIdentity) {
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
    use crate::{ContainerSpec, Directories, RunInfo, container_store::tests::spec};

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
        assert_eq!(world.runtime.list().unwrap(), std::slice::from_ref(&record));
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
