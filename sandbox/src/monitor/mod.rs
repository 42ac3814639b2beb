//! The monitor: one small process per running container, between its microVM and whoever wants something of it.
//!
//! ```text
//!  hull run ──┐ launch, attach          ┌── control ── hull-vmm
//!  hull attach┼─────────────────► monitor ─┼── vsock ──── hull-agent: exit, signals, output
//!  hull stop ─┘ monitor.sock            └── log, container.json
//! ```
//!
//! A client starts it from its own program, `/proc/self/exe monitor`, with a socket as its standard input, and passes it
//! the locked home of a container. From then on the container's life is the monitor's: a client may go at any moment. The
//! microVM ends with the monitor, and the next command finds a home without an owner (`docs/adr/0006-a-monitor-per-container.md`).
//!
//! Containers made from bundles have monitors, too; those are `crate::bundle`'s.
//!
//! Output goes from the monitor straight to the descriptors a client passed, input from a client straight into the
//! container's stream: no byte takes a detour.

mod client;
mod ending;
mod failure;
mod output;
mod protocol;
mod requests;
mod server;
mod sink;

use std::{
    io,
    os::{
        fd::{AsFd as _, AsRawFd as _, RawFd},
        unix::net::UnixStream,
    },
    path::Path,
    process::ExitCode,
};

use rustix::{
    fs::{Mode, OFlags, open},
    io::fcntl_dupfd_cloexec,
};

use crate::{
    Components, ContainerRecord, Result, SandboxError, Status, bundle,
    container_store::Home,
    lifecycle::{Launch, MicroVm},
    log_driver::{LogConfig, LogWriter},
    run_dir::RunDir,
};

use self::server::Server;

pub use client::Launcher;
pub(crate) use client::{MonitorClient, Running};
pub(crate) use output::Outputs;
pub(crate) use protocol::{AttachRequest, Connection, ExitReport, Incoming, Reply, Request};
pub(crate) use sink::Sink;

/// The hidden verb.
pub const VERB: &str = "monitor";

/// Runs the monitor; the whole process is its own.
#[must_use]
pub fn main() -> ExitCode {
    match launch_connection().map(serve) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("hull: `hull {VERB}` is started by other commands: {error}");
            ExitCode::from(125)
        }
    }
}

/// Leaves the client's session, folder and descriptors, and takes over the socket that is standard input.
fn launch_connection() -> io::Result<Connection> {
    let socket = fcntl_dupfd_cloexec(rustix::stdio::stdin(), 3)?;
    rustix::net::sockopt::socket_type(&socket)?;
    let null = open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())?;
    rustix::stdio::dup2_stdin(&null)?;
    close_inherited(&[socket.as_raw_fd(), null.as_raw_fd()])?;
    rustix::process::setsid()?;
    rustix::process::umask(Mode::RWXG | Mode::RWXO);
    rustix::process::chdir("/")?;
    Connection::new(UnixStream::from(socket))
}

/// Closes what a careless parent of the client left open: it may be a pipe that somebody waits for the end of.
fn close_inherited(keep: &[RawFd]) -> io::Result<()> {
    let open: Vec<RawFd> = std::fs::read_dir("/proc/self/fd")?
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .filter(|fd| *fd > 2 && !keep.contains(fd))
        .collect();
    for fd in open {
        // The one that was used for reading the list is closed already.
        let _ = nix::unistd::close(fd);
    }
    Ok(())
}

/// Serves one launch; its failure is told to the client.
fn serve(mut connection: Connection) {
    let Ok(Some((request, fds))) = connection.wait::<Request>(None) else {
        return;
    };
    let mut fds = fds.into_iter();
    let request = match request {
        Request::LaunchBundle(request) => return bundle::serve_launch(connection, request, fds),
        Request::ExecBundle(request) => return bundle::serve_exec(connection, request, fds),
        request => request,
    };
    let (
        Request::Launch {
            home,
            run,
            components,
            attach,
            client_us,
        },
        Some(dir),
    ) = (request, fds.next())
    else {
        return;
    };
    let home = Home::inherited(home, dir);
    match start(home, &run, &components, &connection, client_us) {
        Ok(mut server) => {
            server.welcome(connection, attach, fds.collect());
            server.run();
        }
        Err(error) => drop(connection.send(&failure::reply(&error), &[])),
    }
}

/// Boots the container. Where that fails its home is left as it should be, and unlocked.
fn start(
    home: Home,
    run: &Path,
    components: &Components,
    client: &Connection,
    client_us: u64,
) -> Result<Server> {
    let mut record = home.read()?.ok_or_else(|| SandboxError::NotFound {
        name: home.path().display().to_string(),
    })?;
    let log = LogWriter::open(&record, &home.log_path());
    let launched = RunDir::open(run).and_then(|run| {
        let launch = Launch {
            home: &home,
            run: &run,
            components,
            cancel: client.as_fd(),
            client_us,
        };
        // A journal that isn't there is the user's mistake; a file that can't be written (full disk) stops nothing.
        match (&log, &record.spec.log) {
            (Err(_), LogConfig::Journald { .. }) => Err(SandboxError::InvalidOption {
                option: "--log-driver",
                problem: "journald: the journal doesn't listen at /run/systemd/journal/socket".into(),
            }),
            _ => MicroVm::launch(&mut record, launch),
        }
    });
    match launched {
        Ok(vm) => Server::new(home, record, vm, log),
        Err(error) => {
            not_started(home, record, &error)?;
            Err(error)
        }
    }
}

fn not_started(home: Home, mut record: ContainerRecord, error: &SandboxError) -> Result<()> {
    if record.spec.auto_remove {
        return home.remove(&record.name);
    }
    record.run = None;
    record.endpoint = None;
    record.exit_code = Some(error.exit_code());
    record.error = Some(failure::chain(error));
    if record.status.is_live() {
        record.status = Status::Exited;
    }
    home.write(&record)
}
