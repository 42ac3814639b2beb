//! Containers made from bundles, as the OCI runtime specification has them: created, then started, each with one process
//! on the host that stands for it.
//!
//! ```text
//!  hull-oci, shim ──► Bundles ─── launch ───► monitor, its pid is the container's ── control ─► hull-vmm
//!     │  hooks          │  └── monitor.sock ──►  │  │  │                                          │
//!     │                 └───── vsock.sock ────────┼──┼──┼──────────────────────────────────────► hull-agent
//!     └── stdio, pid file             host cgroup ┘  │  └ signals, exit code
//!                                   network namespace┘
//! ```
//!
//! The monitor gets the caller's standard streams, or makes a terminal whose master goes to the console socket; it is in
//! the container's control groups and its network namespace; a signal it gets is the container's; it ends with the
//! container's exit code, or by the signal that ended the container. Who kills it ends the microVM.
//!
//! A pod can be one microVM ([`PodRole`]): then the monitor of its sandbox container has it, and each other container has a
//! monitor without one, which is connected to that one as long as it lives.
//!
//! Everything blocks, nothing needs a thread of the caller. Both kinds of front-end serve the verb
//! [`crate::monitor::VERB`] by [`crate::monitor::main`].
//!
//! Invariants:
//! - A container is alive as long as its monitor holds the lock of its home. Any command finds a home that says otherwise
//!   and puts it right: a container whose creation never ended is removed, another one is `stopped`.
//! - What a command was doing when it was killed is done again, or undone, by `delete`.

mod attended;
mod cgroup;
mod control;
mod deletion;
mod error;
mod exec;
mod exit;
mod home;
mod hooks;
mod launch;
mod machine;
mod member;
mod mount_view;
mod pod;
mod pod_shares;
mod protocol;
mod record;
mod relay;
mod requests;
mod server;
mod terminal;
mod update;

pub use control::{Bundles, CreateBundle};
pub use error::{BundleError, Result};
pub(crate) use exec::serve as serve_exec;
pub use exec::{ExecBundle, OpenedExec};
pub use hooks::state_json;
pub(crate) use launch::serve as serve_launch;
pub(crate) use protocol::{ExecRequest, LaunchRequest};
pub use record::{BundleExit, BundleState, BundleStatus, PodRole, ProcessExit};
pub use relay::BundleStdio;
