//! One container, one microVM: makes, finds, recovers and removes them.
//!
//! Every front-end is thin on this library, and only this library starts a VMM.
//!
//! ```text
//!  front-end ──► Runtime ──► Sandbox ──┬─ state_store   one locked directory per sandbox
//!                   │                  ├─ vmm_client    hull-vmm, by its control socket
//!                recovery              └─ agent_client  hull-agent, by ttRPC over vsock
//! ```
//!
//! Invariants:
//! - A sandbox lives as long as its owner holds the lock of its directory; who finds a directory without an
//!   owner removes it and what belongs to it. No command needs another to have ended well.
//! - Nothing here touches KVM, and nothing links the VMM or the agent.

pub mod agent_client;
pub mod attach;
pub mod confinement;
mod defaults;
mod error;
mod identity;
mod lifecycle;
mod locate;
pub mod log_driver;
mod process_handle;
mod recovery;
pub mod rootfs;
mod signals;
mod spec;
mod state_store;
mod stdio;
mod timing;
mod vmm_client;
mod wait;

pub use agent_protocol::PROTOCOL_VERSION as AGENT_PROTOCOL_VERSION;
pub use error::{Result, SandboxError};
pub use identity::{SandboxId, generate_name};
pub use lifecycle::{Sandbox, StartOptions, check_host};
pub use locate::{Components, Directories};
pub use recovery::Runtime;
pub use signals::{SignalEvent, Signals};
pub use spec::{ContainerSpec, ImageDefaults, ProcessSpec};
pub use state_store::{SandboxRecord, Status};
pub use timing::Timing;
