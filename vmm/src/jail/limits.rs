//! Resource limits: a compromised VMM must not exhaust the host with what it still may do.

use crate::devices::virtio::fs;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use std::io;

/// Devices, queues and vCPUs take some tens; the rest is for vsock connections.
const MAX_DESCRIPTORS: u64 = 2048;
/// For files of shares, where there are any.
const MAX_SHARE_DESCRIPTORS: u64 = (fs::MAX_DESCRIPTORS + vmm_api::MAX_LIVE_SHARES) as u64;
/// vCPUs, the control thread, and the kernel's I/O workers, which count as threads.
const MAX_THREADS: u64 = 512;
/// What a log or console file may grow to.
const MAX_LOG_BYTES: u64 = 64 << 20;

/// Lowers a limit, soft and hard, never raising it.
fn lower(resource: Resource, bound: u64) -> io::Result<()> {
    let now = getrlimit(resource);
    let limit = now.maximum.map_or(bound, |maximum| maximum.min(bound));
    Ok(setrlimit(
        resource,
        Rlimit {
            current: Some(limit),
            maximum: Some(limit),
        },
    )?)
}

/// The limits that hold from the start. `own_user`: no other process runs as this user, so its threads can be bounded.
pub(super) fn apply(own_user: bool, shares: bool) -> io::Result<()> {
    lower(Resource::Core, 0)?;
    let further = if shares { MAX_SHARE_DESCRIPTORS } else { 0 };
    lower(Resource::Nofile, MAX_DESCRIPTORS + further)?;
    lower(Resource::Msgqueue, 0)?;
    lower(Resource::Locks, 0)?;
    if own_user {
        lower(Resource::Nproc, MAX_THREADS)?;
    }
    Ok(())
}

/// Bounds the size any file can be made to have, once the largest disk is known. Log lines and a debugging console may be
/// files too. A write beyond fails with EFBIG; `main` has the signal that goes with it ignored.
///
/// # Errors
/// If the kernel refuses.
pub fn bound_file_size(largest_disk_bytes: u64) -> io::Result<()> {
    lower(Resource::Fsize, largest_disk_bytes.max(MAX_LOG_BYTES))
}
