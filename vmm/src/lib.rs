//! The virtual machine monitor: one jailed process is one microVM.
//!
//! ```text
//!   main ── jail ──► control::driver (event-loop thread) ◄── control::queue ◄── control::server (its own thread) ◄── clients
//!                        │ builder
//!                        ▼
//!                    vstate::{vm, memory, vcpu}      devices on buses      device_manager: irqfd, ioeventfd
//!                        one thread a vCPU ──exits──► devices::bus
//! ```
//!
//! Invariants:
//! - Nothing a guest does makes this code panic, spin or allocate without bound.
//! - No dependency on OCI, containerd, the agent or an async runtime: the VMM knows file descriptors and a configuration.
//! - All code that depends on the kind of KVM backend is in [`arch::x86_64::backend`].

pub mod allocator;
pub mod arch;
pub mod boot_timer;
pub mod builder;
pub mod cli;
pub mod config;
pub mod control;
pub mod device_manager;
pub mod devices;
pub mod jail;
pub mod log;
pub mod report;
pub mod stop;
pub mod vstate;
