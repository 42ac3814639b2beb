//! `hull-agent`: PID 1 of a microVM. It mounts, serves the host over vsock, runs the container's processes
//! and reaps.
//!
//! Threads: the main thread accepts RPC connections; one accepts streams; one reaps; one per connection of the
//! host; one per stream of a process, and of these a few that wait for the next. None of them wakes up without cause.
//!
//! Invariants:
//! - It never ends: a panic aborts, which the kernel turns into a stop of the microVM that the host reports.
//! - A container reaches neither its binary (another mount namespace, on a disk the host opened read-only),
//!   nor its memory (another PID namespace), nor its sockets (only the host's context id is accepted, and a
//!   container is left no descriptor).

mod block;
mod cgroup;
mod containers;
mod copy_up;
mod device_filter;
mod devices;
mod error;
mod files;
mod init;
mod log;
mod mount_api;
mod network;
mod process;
mod process_list;
mod pump;
mod rootfs;
mod rpc;
mod shares;
mod stdio;
mod sys;
mod terminal;
mod user;
mod vsock;
mod workers;

use std::{io::Write as _, process::ExitCode, sync::Arc, thread};

use agent_protocol::{READY_PORT, RPC_PORT, STDIO_PORT};

use crate::{containers::Containers, log::log, rpc::BootTimes};

fn main() -> ExitCode {
    let agent_ns = init::boot_time_ns();
    if std::process::id() != 1 {
        eprintln!("hull-agent is the first process of a microVM and does nothing elsewhere");
        return ExitCode::from(2);
    }
    init::prepare();
    match serve(agent_ns) {
        Ok(never) => match never {},
        Err(error) => {
            // The kernel's panic message and this line are what the host shows.
            log!("fatal: {error}");
            ExitCode::FAILURE
        }
    }
}

fn serve(agent_ns: u64) -> Result<std::convert::Infallible, Box<dyn std::error::Error>> {
    let rpc = vsock::listen_on(RPC_PORT)?;
    let stdio = vsock::listen_on(STDIO_PORT)?;
    let containers = Arc::new(Containers::default());
    let reaper = Arc::clone(&containers);
    thread::Builder::new()
        .name("reaper".into())
        .stack_size(256 * 1024)
        .spawn(move || reaper.reap())?;
    let streams = Arc::clone(&containers.streams);
    thread::Builder::new()
        .name("streams".into())
        .stack_size(128 * 1024)
        .spawn(move || streams.serve(&stdio))?;
    let ready_ns = init::boot_time_ns();
    announce();
    rpc::serve(&rpc, &containers, BootTimes { agent_ns, ready_ns })
}

/// Tells the host that the servers listen. A host that doesn't wait for it hasn't opened the port.
fn announce() {
    let announced = vsock::connect_host(READY_PORT)
        .map_err(std::io::Error::from)
        .and_then(|mut stream| stream.write_all(agent_protocol::ready_line().as_bytes()));
    if let Err(error) = announced {
        log!("announcing readiness: {error}");
    }
}
