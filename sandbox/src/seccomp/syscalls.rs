//! Names and numbers of the system calls of the guest kernel (Linux 6.12), sorted by name, from its own tables
//! (`arch/x86/entry/syscalls`). Data, not code: long, and nothing to be read from top to bottom.

mod i386;
mod x86_64;

pub(super) use i386::I386;
pub(super) use x86_64::X86_64;
