//! Containers and sockets that containerd has forgotten: whoever was to remove them has been killed as well.
//!
//! Owner: each resident shim, by a thread of its own as it begins, for which nobody waits.
//!
//! Invariant: containerd makes a task's bundle before anything else and removes it last, when its shim has removed the container
//! or was asked to and failed. So a container without a bundle is nobody's, whatever state it is in.

use std::{
    collections::HashSet,
    ffi::{OsStr, OsString},
    fs,
    io::{self, ErrorKind},
    path::Path,
    thread,
};

use crate::{
    error::{Result, ShimError},
    grouping::remove_all_stale,
    microvm::MicroVms,
};

/// Begins to remove all there are. Tasks' bundles are in one folder, which this process's working directory is in.
pub fn remove_in_background(microvms: MicroVms) -> Result<()> {
    let remove = move || {
        if let Err(error) = remove_all(&microvms).and_then(|()| remove_all_stale()) {
            tracing::warn!(
                error = error.chain(),
                "what containerd has forgotten can't be removed"
            );
        }
    };
    thread::Builder::new()
        .name("orphans".into())
        .spawn(remove)
        .map(drop)
        .map_err(ShimError::system("starting a thread"))
}

fn remove_all(microvms: &MicroVms) -> Result<()> {
    // Homes first: whoever makes one has its bundle already.
    let ids = microvms.ids()?;
    let tasks = tasks().map_err(ShimError::system("reading the folder of all tasks"))?;
    for id in ids.iter().filter(|id| !tasks.contains(OsStr::new(id))) {
        // It says itself where its bundle was.
        if microvms.bundle(id).is_none_or(|bundle| is_gone(&bundle)) {
            tracing::info!(id, "removing a container that containerd has forgotten");
            microvms.remove(id)?;
        }
    }
    Ok(())
}

fn tasks() -> io::Result<HashSet<OsString>> {
    let bundle = std::env::current_dir()?;
    let entries = fs::read_dir(bundle.parent().unwrap_or(Path::new("/")))?;
    entries.map(|entry| Ok(entry?.file_name())).collect()
}

/// What can't be looked at may be there.
fn is_gone(bundle: &Path) -> bool {
    fs::symlink_metadata(bundle).is_err_and(|error| error.kind() == ErrorKind::NotFound)
}
