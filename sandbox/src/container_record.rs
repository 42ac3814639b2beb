//! What is kept of a container, and where it is in its life.
//!
//! States of a record; a monitor that dies in any of them leaves what its lock says, see `recovery`. The record goes first
//! when a container is removed, so there is no state for that:
//!
//! ```text
//!            start                       pause
//!  Created ────────► Running ◄─────────────────────► Paused
//!                      │ ▲            resume           │
//!                      ▼ │ start                       │
//!                    Exited ◄──────────────────────────┘
//! ```

use std::{
    fmt,
    io::{self, ErrorKind},
};

use serde::{Deserialize, Serialize};

use crate::{
    ContainerSpec, Result, SandboxError, SandboxId, network::Endpoint, process_handle::ProcessIdentity,
    run_dir::boot_id,
};

/// Version of [`ContainerRecord`].
const RECORD_VERSION: u32 = 1;
/// User ids of jailed VMMs: this and the first [`JAIL_UID_DIGITS`] digits of the container's id. Far from the ids that
/// people and packages have; ids of containers are chosen so that no two share one.
const JAIL_UID_BASE: u32 = 0x6800_0000;
const JAIL_UID_DIGITS: usize = 6;

/// Where a container is in its life; docker's names.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Status {
    /// Never started, or being started.
    Created,
    /// Its first process runs.
    Running,
    /// Its microVM stands still.
    Paused,
    /// Its first process has ended, its microVM is gone.
    Exited,
}

impl Status {
    /// The word people see.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Created => "created",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Exited => "exited",
        }
    }

    /// Whether there is a microVM.
    #[must_use]
    pub fn is_live(self) -> bool {
        matches!(self, Self::Running | Self::Paused)
    }
}

impl fmt::Display for Status {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(self.as_str())
    }
}

/// The processes of a container that runs, or is being started.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RunInfo {
    /// Which boot of the host the process ids belong to.
    pub boot_id: String,
    /// Its monitor.
    pub monitor: ProcessIdentity,
    /// Its VMM, once there is one.
    pub vmm: Option<ProcessIdentity>,
}

impl RunInfo {
    pub(crate) fn of_this_process() -> Result<Self> {
        let pid = i32::try_from(std::process::id()).unwrap_or(0);
        let monitor = ProcessIdentity::of(pid).ok_or_else(|| {
            SandboxError::system("reading /proc/self/stat")(io::Error::from(ErrorKind::NotFound))
        })?;
        Ok(Self {
            boot_id: boot_id(),
            monitor,
            vmm: None,
        })
    }

    /// The VMM, if it can still be there.
    pub(crate) fn living_vmm(&self) -> Option<ProcessIdentity> {
        self.vmm.filter(|_| self.boot_id == boot_id())
    }
}

/// What is kept of a container.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ContainerRecord {
    /// Version of this structure.
    pub version: u32,
    /// Its id.
    pub id: SandboxId,
    /// Its name, unique.
    pub name: String,
    /// Where it is, in a network of ours, while it runs.
    #[serde(default)]
    pub endpoint: Option<Endpoint>,
    /// Everything it was made of.
    pub spec: ContainerSpec,
    /// When it was created, since the epoch.
    pub created_ms: u64,
    /// Where it is in its life.
    pub status: Status,
    /// When its first process was last started, since the epoch.
    #[serde(default)]
    pub started_ms: Option<u64>,
    /// When that ended.
    #[serde(default)]
    pub finished_ms: Option<u64>,
    /// How that ended: its exit code, or 128 + the signal.
    #[serde(default)]
    pub exit_code: Option<u8>,
    /// Whether the kernel ended it for want of memory.
    #[serde(default)]
    pub oom_killed: bool,
    /// Why it could not be started, or why its microVM stopped.
    #[serde(default)]
    pub error: Option<String>,
    /// Its processes, while it has a monitor.
    #[serde(default)]
    pub run: Option<RunInfo>,
}

impl ContainerRecord {
    /// A container that has just been made.
    pub(crate) fn new(id: SandboxId, name: String, spec: &ContainerSpec, run: Option<RunInfo>) -> Self {
        Self {
            version: RECORD_VERSION,
            id,
            name,
            spec: spec.clone(),
            created_ms: now_ms(),
            status: Status::Created,
            started_ms: None,
            finished_ms: None,
            exit_code: None,
            oom_killed: false,
            error: None,
            endpoint: None,
            run,
        }
    }

    /// The user id its VMM is jailed under.
    #[must_use]
    pub fn jail_uid(&self) -> u32 {
        jail_uid(&self.id)
    }
}

/// The user id a container's VMM is jailed under.
pub(crate) fn jail_uid(id: &SandboxId) -> u32 {
    JAIL_UID_BASE | u32::from_str_radix(&id.as_str()[..JAIL_UID_DIGITS], 16).unwrap_or(0)
}

/// Milliseconds since the epoch.
pub(crate) fn now_ms() -> u64 {
    let now = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .unwrap_or_default();
    u64::try_from(now.as_millis()).unwrap_or(0)
}
