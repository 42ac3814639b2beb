//! The `start` action: make sure that a resident shim serves the container's group, and say where.
//!
//! containerd before 2.3 reads a bare address, which means version 2 of the Task service; since 2.3 it sends a message on standard
//! input and expects one back. The socket listens before the resident shim runs, so there is nothing to wait for.

use std::{
    ffi::OsString,
    fs,
    io::{IsTerminal as _, Read as _, Write as _},
    os::{
        fd::OwnedFd,
        unix::{net::UnixListener, process::CommandExt as _},
    },
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use containerd_shim_protos::{
    TASK_API_VERSION,
    bootstrap_api::{BootstrapParams, BootstrapResult},
    protobuf::Message as _,
};

use crate::{
    arguments::Arguments,
    error::{Result, ShimError},
    grouping::{Found, SocketLock, group_of, socket_path},
};

/// containerd's address for events, in a shim's environment.
pub const TTRPC_ADDRESS: &str = "TTRPC_ADDRESS";
/// Written into the bundle for a containerd that comes back.
const ADDRESS_FILE: &str = "address";
/// The longest message on standard input, as in containerd.
const MAX_INPUT_BYTES: u64 = 10 << 20;
/// Threads come and go; memory pools of their own would stay.
const ONE_POOL: (&str, &str) = ("MALLOC_ARENA_MAX", "1");

/// How containerd speaks to a shim that is started.
#[derive(Debug, PartialEq)]
enum Protocol {
    Bare,
    Message(Box<BootstrapParams>),
}

impl Protocol {
    /// Older ones send nothing, or the runtime's options, which look like such a message for somebody else.
    fn of(input: &[u8], arguments: &Arguments) -> Self {
        match BootstrapParams::parse_from_bytes(input) {
            Ok(params) if params.instance_id == arguments.id && params.namespace == arguments.namespace => {
                Self::Message(Box::new(params))
            }
            _ => Self::Bare,
        }
    }

    fn answer(&self, address: &str) -> Result<Vec<u8>> {
        if *self == Self::Bare {
            return Ok(address.as_bytes().to_vec());
        }
        let result = BootstrapResult {
            version: TASK_API_VERSION,
            address: address.to_owned(),
            protocol: "ttrpc".to_owned(),
            ..BootstrapResult::default()
        };
        result.write_to_bytes().map_err(|error| ShimError::Message {
            what: "the answer",
            problem: error.to_string(),
        })
    }
}

/// Does it, in the bundle's folder.
pub fn run(arguments: &Arguments) -> Result<()> {
    let bundle = match &arguments.bundle {
        Some(bundle) => bundle.clone(),
        None => std::env::current_dir().map_err(ShimError::system("finding the working directory"))?,
    };
    let protocol = Protocol::of(&read_input()?, arguments);
    let (mut socket_dir, mut events) = (None, std::env::var_os(TTRPC_ADDRESS).unwrap_or_default());
    if let Protocol::Message(params) = &protocol {
        socket_dir = params.socket_dir.as_deref().filter(|folder| !folder.is_empty());
        if !params.containerd_ttrpc_address.is_empty() {
            events = OsString::from(&params.containerd_ttrpc_address);
        }
    }
    let group = group_of(&bundle, &arguments.id)?;
    let socket = socket_path(socket_dir, arguments, &group);
    let lock = SocketLock::take(&socket)?;
    if let Found::Listening(listener) = lock.find_or_listen(&socket)?
        && let Err(error) = spawn_resident(arguments, &bundle, listener, &socket, &events)
    {
        lock.remove(&socket)?;
        return Err(error);
    }
    let address = format!("unix://{}", socket.display());
    let file = bundle.join(ADDRESS_FILE);
    fs::write(&file, &address).map_err(ShimError::io("writing", &file))?;
    let answer = protocol.answer(&address)?;
    let mut stdout = std::io::stdout().lock();
    stdout
        .write_all(&answer)
        .and_then(|()| stdout.flush())
        .map_err(ShimError::system("printing the address"))
}

fn read_input() -> Result<Vec<u8>> {
    let stdin = std::io::stdin();
    let mut input = Vec::new();
    if !stdin.is_terminal() {
        stdin
            .lock()
            .take(MAX_INPUT_BYTES)
            .read_to_end(&mut input)
            .map_err(ShimError::system("reading standard input"))?;
    }
    Ok(input)
}

/// The resident shim is this program, with the socket as its standard input.
fn spawn_resident(
    arguments: &Arguments,
    bundle: &Path,
    listener: UnixListener,
    socket: &Path,
    events: &OsString,
) -> Result<()> {
    let program: PathBuf = std::env::current_exe().map_err(ShimError::system("finding this program"))?;
    let mut command = Command::new(&program);
    command
        .args(["-namespace", &arguments.namespace, "-id", &arguments.id])
        .args(["-address", &arguments.address, "-socket"])
        .arg(socket)
        .args(arguments.debug.then_some("-debug"))
        .env(TTRPC_ADDRESS, events)
        .env(ONE_POOL.0, ONE_POOL.1)
        .current_dir(bundle)
        .stdin(Stdio::from(OwnedFd::from(listener)))
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .process_group(0);
    // It outlives us; whoever adopts it waits for it.
    command
        .spawn()
        .map(drop)
        .map_err(ShimError::io("starting", &program))
}

#[cfg(test)]
mod tests {
    use containerd_shim_protos::{protobuf::well_known_types::any::Any, shim::oci::Options};

    use super::*;

    fn arguments() -> Arguments {
        Arguments::parse(["-namespace", "ns", "-id", "c1", "start"].map(str::to_owned)).unwrap()
    }

    #[test]
    fn older_containerd_reads_a_bare_address() {
        let options = Any {
            type_url: "containerd.runc.v1.Options".into(),
            value: Options::default().write_to_bytes().unwrap(),
            ..Any::default()
        };
        for input in [
            Vec::new(),
            options.write_to_bytes().unwrap(),
            b"\xff\xff".to_vec(),
        ] {
            let protocol = Protocol::of(&input, &arguments());
            assert_eq!(protocol, Protocol::Bare);
            assert_eq!(protocol.answer("unix:///s").unwrap(), b"unix:///s");
        }
    }

    #[test]
    fn newer_containerd_reads_a_message() {
        let params = BootstrapParams {
            instance_id: "c1".into(),
            namespace: "ns".into(),
            socket_dir: Some("/run/x".into()),
            ..BootstrapParams::default()
        };
        let protocol = Protocol::of(&params.write_to_bytes().unwrap(), &arguments());
        let answer = BootstrapResult::parse_from_bytes(&protocol.answer("unix:///s").unwrap()).unwrap();
        assert_eq!((answer.version, answer.address.as_str()), (3, "unix:///s"));
    }
}
