//! The resident shim: serves containerd until it has no container any more and is told to end.

use std::{
    io,
    os::{
        fd::{IntoRawFd as _, OwnedFd},
        unix::net::UnixListener,
    },
    path::PathBuf,
    sync::mpsc::{Receiver, SyncSender, sync_channel},
};

use containerd_shim_protos::ttrpc::Server;
use rustix::{
    fs::{Mode, OFlags, open},
    io::fcntl_dupfd_cloexec,
};

use crate::{
    arguments::Arguments,
    error::{Result, ShimError},
    grouping::SocketLock,
    log,
    microvm::MicroVms,
    orphans,
    publisher::Publisher,
    service::{Service, Shutdown},
    start::TTRPC_ADDRESS,
};

/// Says that the shim is to end.
#[derive(Debug)]
struct Ending(SyncSender<()>);

impl Shutdown for Ending {
    fn shut_down(&self) {
        // Said already is as good.
        let _ = self.0.try_send(());
    }
}

/// Serves; the whole process is its own.
pub fn run(arguments: &Arguments) -> Result<()> {
    let listener =
        inherited_listener().map_err(ShimError::system("taking over the socket that is standard input"))?;
    let socket: Option<PathBuf> = listener
        .local_addr()
        .ok()
        .and_then(|address| address.as_pathname().map(PathBuf::from));
    log::to_containerd(arguments.debug);
    let events = std::env::var(TTRPC_ADDRESS).unwrap_or_default();
    let (sender, ending): (SyncSender<()>, Receiver<()>) = sync_channel(1);
    let service = Service::new(
        &arguments.namespace,
        MicroVms::open(arguments)?,
        Publisher::start(&events, &arguments.namespace)?,
        Box::new(Ending(sender)),
    );
    let serve = |problem: String| ShimError::Serve {
        path: socket.clone().unwrap_or_default(),
        problem,
    };
    let mut server = Server::new()
        .add_listener(listener.into_raw_fd())
        .map_err(|error| serve(error.to_string()))?
        .register_service(service.methods());
    server.start().map_err(|error| serve(error.to_string()))?;
    tracing::debug!(id = arguments.id, "serving");
    orphans::remove_in_background(MicroVms::open(arguments)?)?;
    // An error means that nobody can say it any more.
    let _ = ending.recv();
    if let Some(socket) = &socket {
        SocketLock::take(socket)?.remove(socket)?;
    }
    server.shutdown();
    Ok(())
}

/// Takes the socket over and leaves standard input empty.
fn inherited_listener() -> io::Result<UnixListener> {
    let socket: OwnedFd = fcntl_dupfd_cloexec(rustix::stdio::stdin(), 3)?;
    rustix::net::sockopt::socket_type(&socket)?;
    let null = open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())?;
    rustix::stdio::dup2_stdin(&null)?;
    Ok(UnixListener::from(socket))
}
