//! One container, one microVM: makes, finds, starts, recovers and removes them.
//!
//! Every front-end is thin on this library, and only this library starts a monitor or a VMM.
//!
//! ```text
//!  front-end ──► Runtime ──► container_store   what is kept: one locked home per container
//!                   │   └──► run_dir           what runs: its sockets
//!                   ├─ Launcher ──► monitor ──► lifecycle ──┬─ vmm_client    hull-vmm, by its control socket
//!                   │   (another process)                   └─ agent_client  hull-agent, by ttRPC over vsock
//!                   ├─ Session       attached: terminal, signals, keys
//!                   └─ attach        exec: straight to the agent
//! ```
//!
//! Invariants:
//! - A container runs as long as its monitor holds the lock of its home; who finds a home that says otherwise puts it
//!   right. No command needs another to have ended well.
//! - Nothing here touches KVM, and nothing links the VMM or the agent.

pub mod agent_client;
pub mod archive;
pub mod attach;
pub mod bundle;
mod capabilities;
pub mod confinement;
mod container_record;
mod container_store;
mod defaults;
mod detach_keys;
mod error;
mod identity;
pub mod layers;
mod lifecycle;
mod locate;
pub mod log_driver;
pub mod monitor;
pub mod network;
pub mod oci_spec;
mod process_handle;
mod recovery;
pub mod rootfs;
mod run_dir;
mod runtime;
mod seccomp;
mod session;
pub mod shares;
mod signals;
mod spec;
mod stdio;
mod timing;
mod vmm_client;
mod volumes;
mod wait;

pub use agent_protocol::{PROTOCOL_VERSION as AGENT_PROTOCOL_VERSION, PathStat, ProcessInfo, StatsResponse};
pub use archive::ArchiveReader;
pub use container_record::{ContainerRecord, RunInfo, Status};
pub use detach_keys::DetachKeys;
pub use error::{Result, SandboxError};
pub use identity::{SandboxId, generate_name};
pub use lifecycle::check_host;
pub use locate::{Components, Directories};
pub use process_handle::ProcessIdentity;
pub use runtime::{Runtime, StartOptions};
pub use session::{Attachment, ContainerExit, Ended, Session, SessionOptions, Window};
pub use shares::{ShareMount, ShareSpec};
pub use signals::{SignalEvent, Signals};
pub use spec::{ContainerSpec, ImageDefaults, ProcessSpec};
pub use timing::Timing;
pub use volumes::{Volume, VolumeRecord, check_volume_name};
