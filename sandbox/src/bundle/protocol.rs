//! What the monitor of a bundle's container and its clients say to each other, in the frames of `monitor::protocol`.
//!
//! ```text
//!  creator                        monitor
//!     │ Launch + descriptors ──────► │  joins the control groups and the network namespace
//!     │ ◄─────────────────  Prepared │  only where hooks are to run
//!     │ Go ────────────────────────► │  boots, has the agent make the container
//!     │ ◄───────── Created or Failed │
//! ```
//!
//! From then on that connection is one like those to `monitor.sock`: a request at a time, each answered by `Done` or
//! `Failed`, and `Exited` where `Wait` was asked for.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::{error::Refusal, pod_shares::WantedShare, record::BundleExit};
use crate::{Components, SandboxId, layers::LayeredRootfs};

/// Which descriptors come along with a message, in this order, behind those the message says itself.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct StdioPlan {
    pub(super) stdin: bool,
    pub(super) stdout: bool,
    pub(super) stderr: bool,
    /// A connected socket that wants the master of a terminal.
    pub(super) console: bool,
}

/// Make the container whose locked home comes along as the first descriptor.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct LaunchRequest {
    pub(super) home: PathBuf,
    pub(super) components: Components,
    pub(super) stdio: StdioPlan,
    /// Whether the client has hooks to run before anything is booted.
    pub(super) hooks: bool,
    /// How `linux.cgroupsPath` is meant.
    pub(super) systemd_cgroup: bool,
    /// What its root filesystem is made of, if it isn't the directory the configuration says.
    pub(super) layers: Option<LayeredRootfs>,
}

/// Run a further process; what it is comes along as the first descriptor, a file with the agent's request.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct ExecRequest {
    pub(super) root: PathBuf,
    pub(super) id: String,
    pub(super) stdio: StdioPlan,
}

/// What a client asks for.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub(super) enum Request {
    /// The hooks have run.
    Go,
    /// Let the process execute its program.
    Start,
    /// Send a signal to the process, or to all.
    Signal { signal: i32, all: bool },
    /// Stop the vCPUs.
    Pause,
    /// Let them run again.
    Resume,
    /// The terminal has this size.
    Resize { rows: u16, columns: u16 },
    /// The process's input ends.
    CloseStdin,
    /// Say when the container has ended.
    Wait,
    /// Share this with the pod's microVM, whose container of this name the sender will make; the descriptors come along. What is
    /// shared, and the container, go with the connection.
    Join {
        container: SandboxId,
        shares: Vec<WantedShare>,
    },
    /// Remove that container, and give up what it shares.
    Leave,
}

/// What a monitor says.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub(super) enum Reply {
    /// It is where the container will be; the hooks may run.
    Prepared,
    /// The container is there.
    Created,
    /// The further process runs.
    Started { guest_pid: u32 },
    /// It is shared, by these indices.
    Joined { indices: Vec<u32>, memory_mib: u64 },
    /// It is done.
    Done,
    /// It isn't done.
    Failed(Refusal),
    /// The container has ended. The last message.
    Exited(BundleExit),
}
