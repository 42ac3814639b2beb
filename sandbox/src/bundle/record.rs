//! What is kept of a container made from a bundle.
//!
//! ```text
//!            create               start                  exit
//!  Creating ───────► Created ───────────────► Running ─────────► Stopped
//!      │                │        pause, resume │   ▲                 ▲
//!      │                │                      ▼   │                 │
//!      │                │                      Paused ───────────────┤
//!      └── failure: nothing is kept            └── killed, monitor gone
//! ```

use std::{collections::BTreeMap, fmt, path::PathBuf};

use serde::{Deserialize, Serialize};

use crate::{SandboxId, container_record::RunInfo, network::NetworkMode};

/// Version of [`BundleRecord`].
pub(super) const RECORD_VERSION: u32 = 1;

/// Where a container is in its life; the specification's names, and `paused` as all runtimes have it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BundleStatus {
    /// Being made.
    Creating,
    /// There, and its process waits to be started.
    Created,
    /// Its process runs.
    Running,
    /// Its microVM stands still.
    Paused,
    /// Its process has ended; its microVM is gone.
    Stopped,
}

impl BundleStatus {
    /// The specification's word.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Creating => "creating",
            Self::Created => "created",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Stopped => "stopped",
        }
    }

    /// Whether there is a microVM.
    #[must_use]
    pub fn is_live(self) -> bool {
        self != Self::Stopped
    }
}

impl fmt::Display for BundleStatus {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(self.as_str())
    }
}

/// What a container is to a pod that is one microVM.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PodRole {
    /// It has a microVM of its own.
    #[default]
    Alone,
    /// Its microVM is that of a pod.
    Sandbox,
    /// It is in the microVM of a pod.
    Member {
        /// The id of the container whose microVM it is.
        sandbox: String,
    },
}

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ProcessExit {
    /// By itself, with this code.
    Code(u8),
    /// By this signal.
    Signal(u8),
}

impl ProcessExit {
    /// The code a shell gives: 128 and the signal.
    #[must_use]
    pub fn code(self) -> u8 {
        match self {
            Self::Code(code) => code,
            Self::Signal(signal) => signal.saturating_add(128),
        }
    }
}

/// How a container ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BundleExit {
    /// How its process ended.
    pub status: ProcessExit,
    /// When, since the epoch.
    pub at_ns: u64,
    /// Whether it was the kernel, for want of memory.
    pub oom_killed: bool,
    /// Why its microVM stopped, if that is what ended it.
    pub error: Option<String>,
}

/// Everything kept of a container, beside its configuration.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct BundleRecord {
    pub(super) version: u32,
    /// What its owner calls it.
    pub(super) id: String,
    /// What the VMM and the agent call it.
    pub(super) sandbox_id: SandboxId,
    /// The specification it was written for.
    pub(super) oci_version: String,
    pub(super) bundle: PathBuf,
    pub(super) rootfs: PathBuf,
    pub(super) annotations: BTreeMap<String, String>,
    pub(super) terminal: bool,
    pub(super) owner: u32,
    pub(super) jail_uid: u32,
    /// Memory of its microVM, once that is known.
    #[serde(default)]
    pub(super) memory_mib: u64,
    pub(super) created_ms: u64,
    pub(super) status: BundleStatus,
    /// Its processes on the host, while it has any.
    pub(super) run: Option<RunInfo>,
    pub(super) exit: Option<BundleExit>,
    /// Directories of control groups that were made for it, to be removed with it.
    pub(super) cgroups: Vec<PathBuf>,
    /// The network namespace it was given, whose interfaces are its microVM's while it runs.
    #[serde(default)]
    pub(super) network: NetworkMode,
    /// What it is to a pod that is one microVM.
    #[serde(default)]
    pub(super) pod: PodRole,
    /// Whether the hooks that go with its end have run.
    #[serde(default)]
    pub(super) poststop_done: bool,
}

/// A container, as anybody may see it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BundleState {
    /// What its owner calls it.
    pub id: String,
    /// What its VMM, its agent and its hostname call it.
    pub sandbox_id: SandboxId,
    /// The specification it was written for.
    pub oci_version: String,
    /// Where it is in its life.
    pub status: BundleStatus,
    /// The process that stands for it on the host; zero where there is none.
    pub pid: i32,
    /// Its VMM.
    pub vmm_pid: Option<i32>,
    /// Its bundle's directory.
    pub bundle: PathBuf,
    /// Its root filesystem.
    pub rootfs: PathBuf,
    /// Its annotations.
    pub annotations: BTreeMap<String, String>,
    /// Whether its process has a terminal.
    pub terminal: bool,
    /// The user who made it.
    pub owner: u32,
    /// When it was created, since the epoch.
    pub created_ms: u64,
    /// How it ended.
    pub exit: Option<BundleExit>,
    /// Its control groups on the host.
    pub cgroups: Vec<PathBuf>,
    /// What it is to a pod that is one microVM.
    pub pod: PodRole,
}

impl From<BundleRecord> for BundleState {
    fn from(record: BundleRecord) -> Self {
        let run = record.run.filter(|_| record.status.is_live());
        Self {
            id: record.id,
            sandbox_id: record.sandbox_id,
            oci_version: record.oci_version,
            status: record.status,
            pid: run.as_ref().map_or(0, |run| run.monitor.pid),
            vmm_pid: run.and_then(|run| run.vmm).map(|vmm| vmm.pid),
            bundle: record.bundle,
            rootfs: record.rootfs,
            annotations: record.annotations,
            terminal: record.terminal,
            owner: record.owner,
            created_ms: record.created_ms,
            exit: record.exit,
            cgroups: record.cgroups,
            pod: record.pod,
        }
    }
}
