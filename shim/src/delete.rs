//! The `delete` action: what containerd calls when a shim has gone without taking its container along.
//!
//! Everything that may be left is ended and removed, in whatever state it is; what isn't there is no error.

use std::{
    io::Write as _,
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use containerd_shim_protos::{
    Client, TaskClient, api,
    protobuf::{Message as _, MessageField},
    ttrpc::context,
};

use crate::{
    arguments::Arguments,
    error::{Result, ShimError},
    grouping::{group_of, remove_stale, socket_path},
    microvm::MicroVms,
    pause,
    process::Exit,
    publisher::timestamp,
    rootfs,
    task::KILLED,
};

/// A shim that lives answers at once.
const SHUTDOWN_TIMEOUT: Duration = Duration::from_secs(2);

/// Does it, and prints how the container ended.
pub fn run(arguments: &Arguments) -> Result<()> {
    let bundle: PathBuf = match &arguments.bundle {
        Some(bundle) => bundle.clone(),
        None => std::env::current_dir().map_err(ShimError::system("finding the working directory"))?,
    };
    let removed = MicroVms::open(arguments)?.remove(&arguments.id)?;
    let pod = pause::end_remembered(&bundle);
    rootfs::unmount_all(&bundle);
    release_shim(arguments, &bundle);
    let killed = Exit {
        status: KILLED,
        at: SystemTime::now(),
    };
    let (pid, exit) = removed.map_or((0, None), |(pid, exit)| (pid, exit));
    let pid = if pid == 0 {
        pod.and_then(|pid| u32::try_from(pid).ok()).unwrap_or(0)
    } else {
        pid
    };
    let exit = exit.unwrap_or(killed);
    let response = api::DeleteResponse {
        pid,
        exit_status: exit.status,
        exited_at: MessageField::some(timestamp(exit.at)),
        ..api::DeleteResponse::default()
    };
    let bytes = response.write_to_bytes().map_err(|error| ShimError::Message {
        what: "the answer",
        problem: error.to_string(),
    })?;
    let mut stdout = std::io::stdout().lock();
    stdout
        .write_all(&bytes)
        .and_then(|()| stdout.flush())
        .map_err(ShimError::system("printing the answer"))
}

/// The shim that served the container: one that has no other ends; of one that was killed the socket is taken away.
fn release_shim(arguments: &Arguments, bundle: &Path) {
    // A bundle without a configuration is one of a container by itself.
    let group = group_of(bundle, &arguments.id).unwrap_or_else(|_| arguments.id.clone());
    let remembered = std::fs::read_to_string(bundle.join("address")).ok();
    let socket = remembered
        .as_deref()
        .and_then(|address| address.trim().strip_prefix("unix://"))
        .map_or_else(|| socket_path(None, arguments, &group), PathBuf::from);
    if let Ok(client) = Client::connect(&format!("unix://{}", socket.display())) {
        let request = api::ShutdownRequest {
            id: arguments.id.clone(),
            ..api::ShutdownRequest::default()
        };
        drop(TaskClient::new(client).shutdown(context::with_duration(SHUTDOWN_TIMEOUT), &request));
    }
    if let Err(error) = remove_stale(&socket) {
        tracing::warn!(error = error.chain(), "a socket can't be removed");
    }
}
