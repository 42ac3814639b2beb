//! x86-64: guest memory layout, boot protocols, processor state, and the two kinds of KVM backend.

pub mod apstart;
pub mod backend;
pub mod boot;
pub mod cpuid;
pub mod layout;
pub mod mptable;
pub mod msr;
pub mod regs;
