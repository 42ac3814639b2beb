//! Which containers share a resident shim, and where it listens.
//!
//! Containers of one pod, or those an annotation puts together, have one shim, which saves its memory for each further container.
//! The socket's name follows the field's convention, a hash of daemon, containerd namespace and group, so that any `start` of the
//! group finds the shim, and whoever cleans up after containerd knows it. The folder is that of other shims, too: a link among
//! Hull's own files says which sockets are ours, from before they are made until they are gone.

use std::{
    collections::HashSet,
    fmt::Write as _,
    fs::{self, File},
    io::{self, ErrorKind},
    os::unix::{
        fs::{DirBuilderExt as _, symlink},
        net::{UnixListener, UnixStream},
    },
    path::{Path, PathBuf},
};

use sandbox::Directories;
use serde::Deserialize;
use sha2::{Digest as _, Sha256};

use crate::{
    arguments::Arguments,
    error::{Result, ShimError},
};

/// Beneath Hull's run directory: links to the sockets of its shims.
const LINKS_FOLDER: &str = "shim-sockets";
/// All Unix sockets of this network namespace, their paths last.
const OPEN_SOCKETS: &str = "/proc/net/unix";
/// Where shims have their sockets, unless containerd says something else.
const SOCKET_DIR: &str = "/run/containerd/s";
/// Annotations that name a group, the first that is there counts.
const GROUP_ANNOTATIONS: [&str; 3] = [
    "io.containerd.hull.v2.group",
    "io.containerd.runc.v2.group",
    "io.kubernetes.cri.sandbox-id",
];

/// As much of a configuration as is needed here.
#[derive(Debug, Deserialize)]
struct Annotated {
    #[serde(default)]
    annotations: std::collections::BTreeMap<String, String>,
}

/// The group of the container in a bundle: its own id where nothing says otherwise.
pub fn group_of(bundle: &Path, id: &str) -> Result<String> {
    let path = bundle.join("config.json");
    let text = fs::read(&path).map_err(ShimError::io("reading", &path))?;
    let config: Annotated = serde_json::from_slice(&text).map_err(|source| ShimError::Config {
        path: path.clone(),
        source,
    })?;
    let named = GROUP_ANNOTATIONS
        .iter()
        .find_map(|name| config.annotations.get(*name).filter(|value| !value.is_empty()));
    Ok(named.map_or_else(|| id.to_owned(), Clone::clone))
}

/// Where the shim of a group listens.
pub fn socket_path(folder: Option<&str>, arguments: &Arguments, group: &str) -> PathBuf {
    let name = Path::new(&arguments.address)
        .join(&arguments.namespace)
        .join(group);
    let mut hexadecimal = String::with_capacity(64);
    for byte in Sha256::digest(name.as_os_str().as_encoded_bytes()) {
        // Writing to a string can't fail.
        let _ = write!(hexadecimal, "{byte:02x}");
    }
    Path::new(folder.unwrap_or(SOCKET_DIR)).join(hexadecimal)
}

/// What a `start` found at a socket's path.
#[derive(Debug)]
pub enum Found {
    /// A shim serves the group already.
    Serving,
    /// Nobody did; this listens there now.
    Listening(UnixListener),
}

/// Held while a shim is looked for, started, or takes its socket away, so that no two do it at once.
#[derive(Debug)]
pub struct SocketLock {
    _folder: File,
}

impl SocketLock {
    /// Waits for the others.
    pub fn take(socket: &Path) -> Result<Self> {
        let folder = socket.parent().unwrap_or(Path::new("/"));
        fs::create_dir_all(folder).map_err(ShimError::io("creating", folder))?;
        let file = File::open(folder).map_err(ShimError::io("opening", folder))?;
        file.lock().map_err(ShimError::io("locking", folder))?;
        Ok(Self { _folder: file })
    }

    /// Finds the shim that listens at a path, or listens there.
    pub fn find_or_listen(&self, socket: &Path) -> Result<Found> {
        match UnixStream::connect(socket) {
            Ok(_) => return Ok(Found::Serving),
            // A shim that was killed leaves its socket.
            Err(error) if error.kind() == ErrorKind::ConnectionRefused => self.remove(socket)?,
            Err(error) if error.kind() == ErrorKind::NotFound => self.remove(socket)?,
            Err(error) => return Err(ShimError::io("connecting to", socket)(error)),
        }
        if let Some(link) = link_of(socket) {
            let folder = link.parent().unwrap_or(Path::new("/"));
            let made = fs::DirBuilder::new().recursive(true).mode(0o700).create(folder);
            made.and_then(|()| symlink(socket, &link))
                .map_err(ShimError::io("creating", &link))?;
        }
        UnixListener::bind(socket)
            .map(Found::Listening)
            .map_err(ShimError::io("listening at", socket))
    }

    /// Takes a socket away.
    pub fn remove(&self, socket: &Path) -> Result<()> {
        for path in [Some(socket.to_owned()), link_of(socket)].into_iter().flatten() {
            match fs::remove_file(&path) {
                Err(error) if error.kind() != ErrorKind::NotFound => {
                    return Err(ShimError::io("removing", path)(error));
                }
                _ => {}
            }
        }
        Ok(())
    }
}

/// Removes a socket nobody listens at any more.
pub fn remove_stale(socket: &Path) -> Result<()> {
    let lock = SocketLock::take(socket)?;
    let stale = UnixStream::connect(socket).is_err_and(|error: io::Error| {
        matches!(error.kind(), ErrorKind::ConnectionRefused | ErrorKind::NotFound)
    });
    if stale { lock.remove(socket) } else { Ok(()) }
}

fn link_of(socket: &Path) -> Option<PathBuf> {
    let folder = Directories::from_environment().run.join(LINKS_FOLDER);
    Some(folder.join(socket.file_name()?))
}

/// Removes the sockets of all shims of ours that were killed. Those that live are told by the kernel's list, and not bothered.
pub fn remove_all_stale() -> Result<()> {
    let folder = Directories::from_environment().run.join(LINKS_FOLDER);
    let links = fs::read_dir(folder).into_iter().flatten().flatten();
    let sockets: Vec<PathBuf> = links.filter_map(|link| fs::read_link(link.path()).ok()).collect();
    let list = fs::read_to_string(OPEN_SOCKETS).map_err(ShimError::io("reading", OPEN_SOCKETS))?;
    let open: HashSet<&str> = list
        .lines()
        .filter_map(|line| line.split(' ').next_back())
        .collect();
    let is_open = |socket: &Path| socket.to_str().is_some_and(|path| open.contains(path));
    sockets
        .iter()
        .filter(|socket| !is_open(socket))
        .try_for_each(|socket| remove_stale(socket))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn arguments(address: &str, namespace: &str) -> Arguments {
        let words = ["-address", address, "-namespace", namespace, "-id", "x", "start"];
        Arguments::parse(words.map(str::to_owned)).unwrap()
    }

    #[test]
    fn socket_is_named_as_other_shims_name_theirs() {
        let path = socket_path(
            None,
            &arguments("/run/containerd/containerd.sock", "default"),
            "123",
        );
        // sha256 of `/run/containerd/containerd.sock/default/123`
        assert_eq!(
            path,
            Path::new("/run/containerd/s/0ddfbd72d02b3551e75f3a0ed90b9965b533401be618f43a568bc522764e0ad0")
        );
    }

    #[test]
    fn pod_and_annotation_make_a_group() {
        let bundle = tempfile::tempdir().unwrap();
        let write = |text: &str| fs::write(bundle.path().join("config.json"), text).unwrap();
        write("{}");
        assert_eq!(group_of(bundle.path(), "c1").unwrap(), "c1");
        write(r#"{"annotations":{"io.kubernetes.cri.sandbox-id":"pod1"}}"#);
        assert_eq!(group_of(bundle.path(), "c1").unwrap(), "pod1");
        write(r#"{"annotations":{"io.kubernetes.cri.sandbox-id":"pod1","io.containerd.runc.v2.group":"g"}}"#);
        assert_eq!(group_of(bundle.path(), "c1").unwrap(), "g");
        write("nonsense");
        assert!(
            group_of(bundle.path(), "c1")
                .unwrap_err()
                .to_string()
                .contains("config.json")
        );
    }

    #[test]
    fn second_of_a_group_finds_the_first_and_a_stale_socket_is_replaced() {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("s");
        let lock = SocketLock::take(&socket).unwrap();
        let Found::Listening(first) = lock.find_or_listen(&socket).unwrap() else {
            panic!("nobody listens yet");
        };
        assert!(matches!(lock.find_or_listen(&socket).unwrap(), Found::Serving));
        drop(first);
        assert!(matches!(
            lock.find_or_listen(&socket).unwrap(),
            Found::Listening(_)
        ));
    }
}
