//! The way in: opens the run directory, removes what dead owners left, finds sandboxes.

use std::time::Duration;

use crate::{
    Directories, Result, SandboxError, SandboxId, SandboxRecord,
    identity::check_name,
    process_handle::ProcessIdentity,
    state_store::{OwnedDir, RunDir},
};

/// How long a killed VMM may take to go; its memory is being freed.
const KILL_PATIENCE: Duration = Duration::from_secs(10);
/// First user id given to a jailed VMM, far from those people and packages have.
const JAIL_UID_BASE: u32 = 0x6855_0000;
/// How many there are.
const JAIL_UIDS: u32 = 0x1_0000;

/// All sandboxes of this host and user.
#[derive(Debug)]
pub struct Runtime {
    pub(crate) run: RunDir,
}

/// A fresh sandbox's place: its directory and what was chosen for it.
#[derive(Debug)]
pub(crate) struct Reservation {
    pub(crate) id: SandboxId,
    pub(crate) name: String,
    pub(crate) dir: OwnedDir,
    pub(crate) jail_uid: u32,
}

impl Runtime {
    /// Opens the run directory and removes what killed processes left in it.
    ///
    /// # Errors
    ///
    /// The directory can't be made or read.
    pub fn open(directories: &Directories) -> Result<Self> {
        let this = Self {
            run: RunDir::open(&directories.run)?,
        };
        this.recover()?;
        Ok(this)
    }

    /// Removes every sandbox without an owner.
    fn recover(&self) -> Result<()> {
        if self.run.ids()?.is_empty() {
            return Ok(());
        }
        let lock = self.run.lock()?;
        for id in self.run.ids()? {
            let Some(dir) = self.run.take_over(&lock, &id)? else {
                continue;
            };
            let record = dir.read().unwrap_or_else(|error| {
                tracing::warn!(%id, %error, "a dead sandbox's state is damaged");
                None
            });
            if let Some(vmm) = record.and_then(|record| record.living_vmm()) {
                end_vmm(&id, vmm);
            }
            tracing::info!(%id, "removed a sandbox whose owner is gone");
        }
        Ok(())
    }

    /// The records of all sandboxes.
    ///
    /// # Errors
    ///
    /// The directory can't be read.
    pub fn list(&self) -> Result<Vec<SandboxRecord>> {
        let mut records = Vec::new();
        for id in self.run.ids()? {
            // One that is just being made or removed has none.
            records.extend(self.run.read(&id).unwrap_or_default());
        }
        records.sort_by_key(|record| std::cmp::Reverse(record.created_ms));
        Ok(records)
    }

    /// Finds a sandbox by its name, its id, or a unique beginning of its id.
    ///
    /// # Errors
    ///
    /// None or several match.
    pub fn find(&self, wanted: &str) -> Result<SandboxRecord> {
        let records = self.list()?;
        let missing = || SandboxError::NotFound {
            name: wanted.to_owned(),
        };
        if wanted.is_empty() {
            return Err(missing());
        }
        let exact = records
            .iter()
            .find(|record| record.name == wanted || record.id.as_str() == wanted);
        if let Some(record) = exact {
            return Ok(record.clone());
        }
        let mut matching = records
            .into_iter()
            .filter(|record| record.id.as_str().starts_with(wanted));
        let first = matching.next().ok_or_else(missing)?;
        match matching.next() {
            None => Ok(first),
            Some(_) => Err(SandboxError::Ambiguous {
                name: wanted.to_owned(),
            }),
        }
    }

    /// Reserves an id, a name, a user id and a directory for a new sandbox.
    pub(crate) fn reserve(&self, name: Option<&str>) -> Result<Reservation> {
        if let Some(name) = name {
            check_name(name)?;
        }
        let lock = self.run.lock()?;
        let records = self.list()?;
        let taken = |name: &str| records.iter().find(|record| record.name == name);
        let name = match name {
            Some(name) => {
                if let Some(holder) = taken(name) {
                    return Err(SandboxError::NameInUse {
                        name: name.to_owned(),
                        id: holder.id.short().to_owned(),
                    });
                }
                name.to_owned()
            }
            None => loop {
                let name = crate::generate_name()?;
                if taken(&name).is_none() {
                    break name;
                }
            },
        };
        let uid_free = |uid: &u32| records.iter().all(|record| record.jail_uid != *uid);
        let jail_uid = (JAIL_UID_BASE..JAIL_UID_BASE + JAIL_UIDS)
            .find(uid_free)
            .unwrap_or(JAIL_UID_BASE);
        let id = SandboxId::random()?;
        let dir = self.run.create(&lock, &id)?;
        Ok(Reservation {
            id,
            name,
            dir,
            jail_uid,
        })
    }

    /// Kills a sandbox's VMM and waits until its owner has removed it.
    ///
    /// # Errors
    ///
    /// It is still there after a while.
    pub fn destroy(&self, record: &SandboxRecord) -> Result<()> {
        if let Some(vmm) = record.living_vmm() {
            end_vmm(&record.id, vmm);
        }
        if let Some(owner) = record.owner.open() {
            owner.wait_exited(KILL_PATIENCE);
        }
        self.recover()
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
    use super::*;
    use crate::state_store::tests::record;

    fn runtime() -> (tempfile::TempDir, Runtime) {
        let dir = tempfile::tempdir().unwrap();
        let directories = Directories {
            root: dir.path().join("root"),
            run: dir.path().join("run"),
        };
        let runtime = Runtime::open(&directories).unwrap();
        (dir, runtime)
    }

    fn reserve(runtime: &Runtime, name: &str) -> Reservation {
        let reservation = runtime.reserve(Some(name)).unwrap();
        let mut record = record(&reservation.id, &reservation.name);
        record.jail_uid = reservation.jail_uid;
        reservation.dir.write(&record).unwrap();
        reservation
    }

    #[test]
    fn name_in_use_is_refused_and_names_its_holder() {
        let (_dir, runtime) = runtime();
        let first = reserve(&runtime, "web");
        let error = runtime.reserve(Some("web")).unwrap_err();
        assert!(matches!(error, SandboxError::NameInUse { id, .. } if id == first.id.short()));
    }

    #[test]
    fn every_sandbox_has_a_user_id_of_its_own() {
        let (_dir, runtime) = runtime();
        let (first, second) = (reserve(&runtime, "a"), reserve(&runtime, "b"));
        assert_ne!(first.jail_uid, second.jail_uid);
    }

    #[test]
    fn sandbox_is_found_by_name_and_by_the_beginning_of_its_id() {
        let (_dir, runtime) = runtime();
        let reservation = reserve(&runtime, "web");
        assert_eq!(runtime.find("web").unwrap().id, reservation.id);
        assert_eq!(
            runtime.find(&reservation.id.as_str()[..6]).unwrap().id,
            reservation.id
        );
        assert!(matches!(runtime.find("nope"), Err(SandboxError::NotFound { .. })));
        assert!(matches!(runtime.find(""), Err(SandboxError::NotFound { .. })));
    }

    #[test]
    fn sandbox_whose_owner_is_gone_is_removed_by_the_next_command() {
        let (dir, runtime) = runtime();
        let run = dir.path().join("run");
        let left = run.join("sandboxes").join(SandboxId::random().unwrap().as_str());
        std::fs::create_dir(&left).unwrap();
        std::fs::write(left.join("state.json"), "{ half").unwrap();
        let living = reserve(&runtime, "living");
        let again = Runtime::open(&Directories {
            root: run.clone(),
            run,
        })
        .unwrap();
        assert!(!left.exists());
        assert_eq!(again.list().unwrap()[0].id, living.id);
    }
}
