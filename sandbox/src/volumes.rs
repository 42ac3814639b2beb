//! Named volumes: directories that outlive their containers.
//!
//! ```text
//! HULL_ROOT/volumes/NAME/volume.json    what it is, written before it has its name
//! HULL_ROOT/volumes/NAME/_data/         what containers see
//! HULL_ROOT/volumes/.new-*  .old-*      one that is being made or removed; left by a killed command, taken away by the next
//! ```
//!
//! Invariants: a volume is there whole or not at all, since it gets its name, and loses it, by a rename; whoever changes
//! something holds the lock of the run directory, under which containers are made, too. A volume that a container has is not
//! removed.

use std::{
    collections::BTreeMap,
    fs::{self, DirBuilder},
    io::{self, ErrorKind},
    os::unix::fs::{DirBuilderExt as _, MetadataExt as _},
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

use crate::{Result, Runtime, SandboxError, SandboxId, container_record::now_ms, run_dir::WholeLock};

const RECORD_FILE: &str = "volume.json";
const DATA_DIR: &str = "_data";
const MAX_NAME_BYTES: usize = 128;

/// One volume.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct VolumeRecord {
    /// Its name.
    pub name: String,
    /// When it was made.
    pub created_ms: u64,
    /// What the user wants to find it by.
    pub labels: BTreeMap<String, String>,
    /// It was given no name by the user.
    pub anonymous: bool,
}

/// A volume, where it is and who has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Volume {
    /// What is kept of it.
    pub record: VolumeRecord,
    /// The directory that containers see.
    pub data: PathBuf,
    /// Names of the containers that have it.
    pub used_by: Vec<String>,
}

/// Whether a name can be a volume's, as docker has it.
///
/// # Errors
/// [`SandboxError::InvalidOption`], with docker's words.
pub fn check_volume_name(name: &str) -> Result<()> {
    let mut bytes = name.bytes();
    let begins = bytes.next().is_some_and(|byte| byte.is_ascii_alphanumeric());
    let goes_on = bytes.all(|byte| byte.is_ascii_alphanumeric() || b"_.-".contains(&byte));
    if begins && goes_on && (2..=MAX_NAME_BYTES).contains(&name.len()) {
        return Ok(());
    }
    Err(SandboxError::InvalidOption {
        option: "volume",
        problem: format!(
            "{name:?} includes invalid characters for a local volume name, only \"[a-zA-Z0-9][a-zA-Z0-9_.-]\" are allowed; \
             if you intended to pass a host directory, use an absolute path"
        ),
    })
}

fn make_private(path: &Path) -> Result<()> {
    DirBuilder::new()
        .recursive(true)
        .mode(0o711)
        .create(path)
        .map_err(SandboxError::io("creating the directory", path))
}

/// Space that a folder's files take.
fn allocated(folder: &Path) -> u64 {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    entries
        .filter_map(|entry| Some((entry.path(), fs::symlink_metadata(entry.path()).ok()?)))
        .map(|(path, metadata)| {
            let own = metadata.blocks().saturating_mul(512);
            own.saturating_add(if metadata.is_dir() { allocated(&path) } else { 0 })
        })
        .sum()
}

impl Runtime {
    fn volumes_dir(&self) -> PathBuf {
        self.root.join("volumes")
    }

    fn read_volume(&self, name: &str) -> Result<Option<VolumeRecord>> {
        let path = self.volumes_dir().join(name).join(RECORD_FILE);
        let text = match fs::read(&path) {
            Ok(text) => text,
            Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => {
                return Ok(None);
            }
            Err(error) => return Err(SandboxError::io("reading", &path)(error)),
        };
        serde_json::from_slice(&text).map(Some).map_err(|error| {
            SandboxError::io("reading", &path)(io::Error::new(ErrorKind::InvalidData, error))
        })
    }

    fn users(&self, name: &str) -> Result<Vec<String>> {
        let records = self.list()?;
        let uses = |record: &&crate::ContainerRecord| {
            let mut mounts = record.spec.share_mounts.iter();
            mounts.any(|mount| mount.volume.as_deref() == Some(name))
        };
        Ok(records
            .iter()
            .filter(uses)
            .map(|record| record.name.clone())
            .collect())
    }

    fn volume_of(&self, record: VolumeRecord) -> Result<Volume> {
        Ok(Volume {
            data: self.volumes_dir().join(&record.name).join(DATA_DIR),
            used_by: self.users(&record.name)?,
            record,
        })
    }

    /// Takes away what killed commands left half made or half removed.
    fn tidy_volumes(&self, _lock: &WholeLock) {
        for entry in fs::read_dir(self.volumes_dir()).into_iter().flatten().flatten() {
            if entry.file_name().as_encoded_bytes().starts_with(b".")
                && let Err(error) = fs::remove_dir_all(entry.path())
            {
                tracing::warn!(path = %entry.path().display(), %error, "can't remove what is left of a volume");
            }
        }
    }

    /// Makes a volume, or finds the one of this name, as it is. Without a name it gets one that nobody has.
    ///
    /// # Errors
    /// The name can't be a volume's, or it can't be kept.
    pub fn create_volume(&self, name: Option<&str>, labels: BTreeMap<String, String>) -> Result<Volume> {
        let anonymous = name.is_none();
        let random = || SandboxId::random().map(|id| id.as_str().to_owned());
        let name = name.map_or_else(random, |name| Ok(name.to_owned()))?;
        check_volume_name(&name)?;
        let lock = self.run.lock()?;
        self.tidy_volumes(&lock);
        if let Some(record) = self.read_volume(&name)? {
            return self.volume_of(record);
        }
        let record = VolumeRecord {
            anonymous,
            created_ms: now_ms(),
            labels,
            name,
        };
        let directory = self.volumes_dir();
        make_private(&directory)?;
        let fresh = directory.join(format!(".new-{}", record.name));
        let data = fresh.join(DATA_DIR);
        DirBuilder::new()
            .recursive(true)
            .mode(0o755)
            .create(&data)
            .map_err(SandboxError::io("creating the directory", &data))?;
        let path = fresh.join(RECORD_FILE);
        let text = serde_json::to_vec_pretty(&record)
            .map_err(|error| SandboxError::io("writing", &path)(io::Error::other(error)))?;
        fs::write(&path, text).map_err(SandboxError::io("writing", &path))?;
        let named = directory.join(&record.name);
        fs::rename(&fresh, &named).map_err(SandboxError::io("naming", &named))?;
        self.volume_of(record)
    }

    /// All volumes by name.
    ///
    /// # Errors
    /// One can't be read.
    pub fn volumes(&self) -> Result<Vec<Volume>> {
        let mut names: Vec<String> = fs::read_dir(self.volumes_dir())
            .into_iter()
            .flatten()
            .flatten()
            .filter_map(|entry| entry.file_name().into_string().ok())
            .filter(|name| check_volume_name(name).is_ok())
            .collect();
        names.sort();
        let mut volumes = Vec::with_capacity(names.len());
        for name in names {
            // One may be removed meanwhile.
            if let Some(record) = self.read_volume(&name)? {
                volumes.push(self.volume_of(record)?);
            }
        }
        Ok(volumes)
    }

    /// The volume of a name.
    ///
    /// # Errors
    /// There is none.
    pub fn volume(&self, name: &str) -> Result<Volume> {
        let found = match check_volume_name(name) {
            Ok(()) => self.read_volume(name)?,
            Err(_) => None,
        };
        let record = found.ok_or_else(|| SandboxError::NoVolume {
            name: name.to_owned(),
        })?;
        self.volume_of(record)
    }

    /// Removes a volume and what is in it.
    ///
    /// # Errors
    /// There is none, or a container has it.
    pub fn remove_volume(&self, name: &str) -> Result<()> {
        let lock = self.run.lock()?;
        self.remove_volume_under(&lock, name)
    }

    fn remove_volume_under(&self, lock: &WholeLock, name: &str) -> Result<()> {
        let volume = self.volume(name)?;
        if !volume.used_by.is_empty() {
            return Err(SandboxError::VolumeInUse {
                name: name.to_owned(),
                containers: volume.used_by.join(", "),
            });
        }
        let named = self.volumes_dir().join(name);
        let dying = self.volumes_dir().join(format!(".old-{name}"));
        self.tidy_volumes(lock);
        fs::rename(&named, &dying).map_err(SandboxError::io("removing", &named))?;
        fs::remove_dir_all(&dying).map_err(SandboxError::io("removing", &dying))
    }

    /// Removes the volumes no container has. Which, and the space they took.
    ///
    /// # Errors
    /// One can't be removed.
    pub fn prune_volumes(&self) -> Result<(Vec<String>, u64)> {
        let lock = self.run.lock()?;
        let (mut names, mut bytes) = (Vec::new(), 0_u64);
        for volume in self.volumes()? {
            if volume.used_by.is_empty() {
                bytes = bytes.saturating_add(allocated(&volume.data));
                self.remove_volume_under(&lock, &volume.record.name)?;
                names.push(volume.record.name);
            }
        }
        Ok((names, bytes))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Directories;

    fn runtime(root: &Path) -> Runtime {
        Runtime::open(&Directories {
            root: root.join("root"),
            run: root.join("run"),
        })
        .unwrap()
    }

    #[test]
    fn volumes_are_made_found_and_removed_once() {
        let dir = tempfile::tempdir().unwrap();
        let runtime = runtime(dir.path());
        let labels = BTreeMap::from([("a".to_owned(), "b".to_owned())]);
        let made = runtime.create_volume(Some("data"), labels).unwrap();
        fs::write(made.data.join("file"), "x").unwrap();
        let again = runtime.create_volume(Some("data"), BTreeMap::new()).unwrap();
        assert_eq!(again, made);
        let unnamed = runtime.create_volume(None, BTreeMap::new()).unwrap();
        assert_eq!(unnamed.record.name.len(), 64);
        assert_eq!(runtime.volumes().unwrap().len(), 2);
        runtime.remove_volume("data").unwrap();
        assert!(matches!(
            runtime.remove_volume("data"),
            Err(SandboxError::NoVolume { .. })
        ));
        assert!(matches!(
            runtime.volume("../run"),
            Err(SandboxError::NoVolume { .. })
        ));
        let (pruned, _) = runtime.prune_volumes().unwrap();
        assert_eq!(pruned, [unnamed.record.name]);
        assert_eq!(fs::read_dir(dir.path().join("root/volumes")).unwrap().count(), 0);
    }

    #[test]
    fn what_killed_commands_left_is_taken_away() {
        let dir = tempfile::tempdir().unwrap();
        let runtime = runtime(dir.path());
        let volumes = dir.path().join("root/volumes");
        for left in [".new-half/_data", ".old-gone/_data/deep"] {
            fs::create_dir_all(volumes.join(left)).unwrap();
        }
        assert!(runtime.volumes().unwrap().is_empty());
        runtime.create_volume(Some("half"), BTreeMap::new()).unwrap();
        assert_eq!(fs::read_dir(&volumes).unwrap().count(), 1);
    }

    #[test]
    fn names_are_those_docker_takes() {
        for name in ["ab", "a.b-c_d", "0x"] {
            check_volume_name(name).unwrap();
        }
        for name in ["", "a", ".a", "-a", "a/b", "a b", "ä", "../x", &"x".repeat(129)] {
            let error = check_volume_name(name).unwrap_err().to_string();
            assert!(error.contains("includes invalid characters"), "{error}");
        }
    }
}
