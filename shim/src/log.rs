//! Messages for people, by way of containerd: it reads a FIFO named `log` in the bundle and prints what comes.
//!
//! Never waits: where nobody reads, what the FIFO can't hold is dropped.

use std::{
    fs::{File, OpenOptions},
    io,
    os::unix::fs::OpenOptionsExt as _,
    sync::Mutex,
};

use rustix::fs::OFlags;
use tracing_subscriber::EnvFilter;

const FIFO: &str = "log";
/// Overrides what containerd wants to know.
const VARIABLE: &str = "HULL_LOG";

/// Sends messages to containerd from now on.
pub fn to_containerd(debug: bool) {
    let flags = OFlags::NONBLOCK.bits();
    let Ok(flags) = i32::try_from(flags) else { return };
    // Both ways, so that it is open although nobody reads yet, or any more.
    let fifo: io::Result<File> = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(flags)
        .open(FIFO);
    let Ok(fifo) = fifo else { return };
    let filter = EnvFilter::try_from_env(VARIABLE)
        .unwrap_or_else(|_| EnvFilter::new(if debug { "debug,ttrpc=info" } else { "warn" }));
    let subscriber = tracing_subscriber::fmt()
        .with_ansi(false)
        .with_writer(Mutex::new(fifo))
        .with_env_filter(filter);
    // Only a second call could fail.
    drop(subscriber.try_init());
}
