//! Live KVM objects: the host handle, one VM, its memory, its vCPUs.
//!
//! Owner: assembled by [`crate::builder`], then held by [`crate::control`]'s driver on the event-loop thread; each vCPU lives on
//! its own thread.

pub mod kvm;
pub mod memory;
pub mod vcpu;
pub mod vm;
