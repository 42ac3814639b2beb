//! `hull-vmm`: one process, one microVM.
//!
//! Order: everything that needs the file system or privileges is opened first, then the process jails itself for good, and
//! only then reads what a client or a guest has to say.

use std::{
    fmt::Display,
    io::{self, Write},
    os::{
        fd::RawFd,
        unix::net::{UnixListener, UnixStream},
    },
    process::ExitCode,
    time::Instant,
};
use vmm::{
    allocator,
    cli::{self, Command, Identity, Mode},
    config::{Resources, VmSpec},
    control::{
        driver::{Driver, chain},
        queue, server,
    },
    devices::virtio::fs::{ShareThread, ShareUser},
    jail::{
        self, fds,
        seccomp::{Filters, Role},
        signals,
    },
    log,
    report::standalone_report,
    vstate::kvm::KvmHost,
};
use vmm_api::{StopReason, VmConfig};

const EXIT_VMM_ERROR: u8 = 1;
const EXIT_USAGE: u8 = 2;

/// Why the process ends: its status and what to tell.
struct Failure {
    status: u8,
    message: String,
}

fn failed(error: &dyn std::error::Error) -> Failure {
    Failure {
        status: EXIT_VMM_ERROR,
        message: chain(error),
    }
}

fn bad_input(context: impl Display, error: &dyn std::error::Error) -> Failure {
    Failure {
        status: EXIT_USAGE,
        message: format!("{context}{}", chain(error)),
    }
}

fn main() -> ExitCode {
    let process_start = Instant::now();
    let result = match cli::parse(std::env::args_os().skip(1)) {
        Ok(Command::Help) => {
            print!("{}", cli::HELP);
            return ExitCode::SUCCESS;
        }
        Ok(Command::Version) => {
            println!("hull-vmm {}", env!("CARGO_PKG_VERSION"));
            return ExitCode::SUCCESS;
        }
        Ok(Command::Run {
            mode,
            identity,
            jail,
            shares,
        }) => run(mode, (identity, jail, shares), process_start),
        Err(error) => Err(Failure {
            status: EXIT_USAGE,
            message: error.to_string(),
        }),
    };
    match result {
        Ok(StopReason::GuestShutdown | StopReason::Requested) => ExitCode::SUCCESS,
        Ok(StopReason::VcpuFailed { message } | StopReason::VmmFailed { message }) => {
            log::complain(&format!("the microVM failed: {message}"));
            ExitCode::from(EXIT_VMM_ERROR)
        }
        Err(Failure { status, message }) => {
            log::complain(&message);
            ExitCode::from(status)
        }
    }
}

/// What was opened before the jail.
enum Source {
    Control(server::Endpoint),
    Standalone(Box<VmSpec>),
}

fn run(
    mode: Mode,
    (identity, jailed, shares): (Identity, bool, bool),
    process_start: Instant,
) -> Result<StopReason, Failure> {
    allocator::use_one_arena();
    let keep = match mode {
        Mode::ControlFd(fd) => Some(fd),
        _ => None,
    };
    fds::close_all_but(keep).map_err(|error| failed(&error))?;
    signals::ignore_write_signals().map_err(|error| failed(&error))?;
    signals::block_none().map_err(|error| failed(&error))?;
    log::init();
    let source = open(mode)?;
    let host = KvmHost::open().map_err(|error| failed(&error))?;
    let (filters, share_thread) = if jailed {
        let spec = jail::JailSpec::new(identity.uid, identity.gid).with_shares(shares);
        let share_thread = jail::enter_beside(&spec, |identity| start_shares(shares, identity))
            .map_err(|error| failed(&error))?;
        (Filters::compile().map_err(|error| failed(&error))?, share_thread)
    } else {
        tracing::warn!(
            "--no-jail: this process is not confined; never run a guest you don't trust like this"
        );
        let share_thread = shares.then(ShareThread::start_unconfined).transpose();
        (Filters::none(), share_thread.map_err(|error| failed(&error))?)
    };
    let confined = (filters, share_thread);
    match source {
        Source::Control(endpoint) => serve(endpoint, host, confined, process_start),
        Source::Standalone(spec) => run_standalone(*spec, host, confined, process_start),
    }
}

/// The thread that serves shares, if there will be any.
fn start_shares(shares: bool, identity: jail::Identity) -> Result<Option<ShareThread>, jail::JailError> {
    let user = if identity.is_root {
        ShareUser::Reduced {
            uid: identity.uid,
            gid: identity.gid,
        }
    } else {
        ShareUser::Own
    };
    Ok(shares.then(|| ShareThread::start(user)).transpose()?)
}

fn open(mode: Mode) -> Result<Source, Failure> {
    match mode {
        Mode::ControlFd(fd) => control_fd(fd),
        Mode::ControlSocket(path) => {
            let listener = UnixListener::bind(&path)
                .map_err(|error| bad_input(format_args!("--control-socket {}: ", path.display()), &error))?;
            Ok(Source::Control(server::Endpoint::Listener(listener)))
        }
        Mode::Config(path) => {
            let context = || format!("--config {}: ", path.display());
            let text = std::fs::read(&path).map_err(|error| bad_input(context(), &error))?;
            let config: VmConfig =
                serde_json::from_slice(&text).map_err(|error| bad_input(context(), &error))?;
            let spec = VmSpec::open(config, &mut Resources::from_paths())
                .map_err(|error| bad_input(context(), &error))?;
            Ok(Source::Standalone(Box::new(spec)))
        }
    }
}

fn control_fd(fd: RawFd) -> Result<Source, Failure> {
    let context = format!("--control-fd {fd}: ");
    let socket = fds::inherited_socket(fd).map_err(|error| bad_input(&context, &error))?;
    let endpoint = match socket {
        fds::InheritedSocket::Listening(fd) => server::Endpoint::Listener(UnixListener::from(fd)),
        fds::InheritedSocket::Connected(fd) => server::Endpoint::Connected(UnixStream::from(fd)),
    };
    Ok(Source::Control(endpoint))
}

/// Runs under the control socket.
fn serve(
    endpoint: server::Endpoint,
    host: KvmHost,
    (filters, share_thread): (Filters, Option<ShareThread>),
    process_start: Instant,
) -> Result<StopReason, Failure> {
    let (server_end, driver_end) = queue::queue().map_err(|error| failed(&error))?;
    let filter = filters.of(Role::Control);
    let control = server::spawn(endpoint, server_end, move || {
        filter.apply().map_err(|error| chain(&error))
    })
    .map_err(|error| failed(&error))?;
    let mut driver = Driver::new(
        host,
        filters.clone(),
        share_thread,
        Some(driver_end),
        process_start,
    )
    .map_err(|error| failed(&error))?;
    filters.of(Role::Setup).apply().map_err(|error| failed(&error))?;
    let reason = driver.run().map_err(|error| failed(&error))?;
    drop(driver);
    // It ends once it has told its clients, which can't block.
    let _ = control.join();
    Ok(reason)
}

/// Runs what `--config` describes.
fn run_standalone(
    spec: VmSpec,
    host: KvmHost,
    (filters, share_thread): (Filters, Option<ShareThread>),
    process_start: Instant,
) -> Result<StopReason, Failure> {
    let boot_timer = spec.boot_timer();
    let mut driver = Driver::new(host, filters.clone(), share_thread, None, process_start)
        .map_err(|error| failed(&error))?;
    filters.of(Role::Setup).apply().map_err(|error| failed(&error))?;
    driver.configure(spec).map_err(|error| failed(&error))?;
    driver.start().map_err(|error| failed(&error))?;
    let reason = driver.run().map_err(|error| failed(&error))?;
    if boot_timer {
        // One write, so that the line stays whole among others.
        let line = format!("{}\n", standalone_report(&driver.metrics()));
        let _ = io::stderr().write_all(line.as_bytes());
    }
    Ok(reason)
}
