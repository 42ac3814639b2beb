//! What confines the process.

pub mod seccomp;
