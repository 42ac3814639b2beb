//! Networks of ours and the leases of their addresses, on disk.
//!
//! ```text
//! <state>/networks/lock                       exclusive: networks and leases change; shared: a lease's elements do
//! <state>/networks/tag                        distinguishes our tables from those of another state directory
//! <state>/networks/<name>/network.json
//! <state>/networks/<name>/leases/<address>@<container>
//! ```
//!
//! A lease is written before the address is used and removed after it no longer is, by the container's monitor or by
//! whoever finds that the monitor has gone.

use std::{
    fs::{self, DirBuilder, File},
    io::{ErrorKind, Write as _},
    net::Ipv4Addr,
    os::unix::fs::DirBuilderExt as _,
    path::{Path, PathBuf},
};

use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize, de::DeserializeOwned};

use super::{
    NetworkError, PublishedPort, bridge,
    firewall::Firewall,
    netlink::Netlink,
    subnet::{self, Subnet},
};
use crate::{SandboxId, container_record::now_ms};

/// The network a container gets that wants one and names none.
pub(crate) const DEFAULT_NETWORK: &str = "hull0";
/// Names that mean it too.
const DEFAULT_ALIASES: [&str; 2] = ["default", "bridge"];
const VERSION: u32 = 1;
const MAX_NAME_BYTES: usize = 64;
/// The most ports the kernel lets a bridge have.
const MAX_PORTS: usize = 1023;
const RECORD_FILE: &str = "network.json";
const LEASES: &str = "leases";

/// What is kept of a network.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetworkRecord {
    /// Version of this structure.
    pub version: u32,
    /// Its name.
    pub name: String,
    /// Its bridge.
    pub bridge: String,
    /// Its addresses.
    pub subnet: Subnet,
    /// The MTU of its interfaces; Ethernet's where there is none.
    #[serde(default)]
    pub mtu: Option<u16>,
    /// When it was made.
    pub created_ms: u64,
}

/// A container's address in a network.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lease {
    /// The container.
    pub container_id: String,
    /// What others may call it.
    pub names: Vec<String>,
    /// Its address.
    pub address: Ipv4Addr,
    /// Its interface's.
    pub mac: String,
    /// Its tap on the host.
    pub tap: String,
    /// What leads to it.
    pub ports: Vec<PublishedPort>,
}

/// All networks of a state directory.
#[derive(Debug, Clone)]
pub struct Networks {
    root: PathBuf,
}

/// A lock of all networks.
#[derive(Debug)]
pub(crate) struct Lock {
    _file: File,
}

impl Networks {
    /// Those kept in `state`; nothing is read yet.
    #[must_use]
    pub fn open(state: &Path) -> Self {
        Self {
            root: state.join("networks"),
        }
    }

    fn lock(&self, operation: FlockOperation) -> Result<Lock, NetworkError> {
        make_directory(&self.root)?;
        let path = self.root.join("lock");
        let mut options = File::options();
        let file = options
            .create(true)
            .truncate(false)
            .write(true)
            .open(&path)
            .map_err(NetworkError::io("opening the lock", &path))?;
        flock(&file, operation).map_err(NetworkError::io("locking", &path))?;
        Ok(Lock { _file: file })
    }

    /// Nobody else changes anything meanwhile.
    pub(crate) fn exclusive(&self) -> Result<Lock, NetworkError> {
        self.lock(FlockOperation::LockExclusive)
    }

    /// Others may change elements of their own.
    pub(crate) fn shared(&self) -> Result<Lock, NetworkError> {
        self.lock(FlockOperation::LockShared)
    }

    /// The firewall of these networks.
    pub(crate) fn firewall(&self, _lock: &Lock) -> Result<Firewall, NetworkError> {
        let path = self.root.join("tag");
        let read = || fs::read_to_string(&path).ok().filter(|tag| is_tag(tag));
        if let Some(tag) = read() {
            return Ok(Firewall::new(&tag));
        }
        // Whoever comes first decides, even where two hold the lock together.
        let mut bytes = [0; 4];
        File::open("/dev/urandom")
            .and_then(|mut random| std::io::Read::read_exact(&mut random, &mut bytes))
            .map_err(NetworkError::io("reading", "/dev/urandom"))?;
        let tag: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
        let staging = self.root.join(format!(".tag-{tag}"));
        let written = fs::write(&staging, &tag).and_then(|()| match fs::hard_link(&staging, &path) {
            Err(error) if error.kind() == ErrorKind::AlreadyExists => Ok(()),
            result => result,
        });
        drop(fs::remove_file(&staging));
        written.map_err(NetworkError::io("writing", &path))?;
        Ok(Firewall::new(&read().unwrap_or(tag)))
    }

    fn directory(&self, name: &str) -> PathBuf {
        self.root.join(name)
    }

    /// All networks, by name.
    ///
    /// # Errors
    ///
    /// The directory can't be read, or a record is damaged.
    pub fn list(&self) -> Result<Vec<NetworkRecord>, NetworkError> {
        let mut records = Vec::new();
        for name in names_in(&self.root)? {
            if let Some(record) = read_json(&self.directory(&name).join(RECORD_FILE))? {
                records.push(record);
            }
        }
        records.sort_by(|a: &NetworkRecord, b| a.name.cmp(&b.name));
        Ok(records)
    }

    /// A network by its name.
    ///
    /// # Errors
    ///
    /// There is none.
    pub fn find(&self, name: &str) -> Result<NetworkRecord, NetworkError> {
        let name = canonical(name);
        let missing = || NetworkError::NotFound {
            name: name.to_owned(),
        };
        check_name(name).map_err(|_| missing())?;
        read_json(&self.directory(name).join(RECORD_FILE))?.ok_or_else(missing)
    }

    /// The same; the default network is made where it is missing.
    pub(crate) fn find_or_make(&self, lock: &Lock, name: &str) -> Result<NetworkRecord, NetworkError> {
        match self.find(name) {
            Err(NetworkError::NotFound { name }) if name == DEFAULT_NETWORK => {
                self.make(lock, &name, None, None)
            }
            found => found,
        }
    }

    /// Makes a network; its range of addresses is chosen where none is given.
    ///
    /// # Errors
    ///
    /// The name is taken, or the range in use.
    pub fn create(
        &self,
        name: &str,
        subnet: Option<Subnet>,
        mtu: Option<u16>,
    ) -> Result<NetworkRecord, NetworkError> {
        check_name(name)?;
        let lock = self.exclusive()?;
        if DEFAULT_ALIASES.contains(&name) || matches!(name, "none" | "host") {
            return Err(NetworkError::Exists {
                name: name.to_owned(),
            });
        }
        match self.find(name) {
            Ok(_) => Err(NetworkError::Exists {
                name: name.to_owned(),
            }),
            Err(NetworkError::NotFound { .. }) => self.make(&lock, name, subnet, mtu),
            Err(error) => Err(error),
        }
    }

    fn make(
        &self,
        lock: &Lock,
        name: &str,
        subnet: Option<Subnet>,
        mtu: Option<u16>,
    ) -> Result<NetworkRecord, NetworkError> {
        let mut netlink = Netlink::open().map_err(NetworkError::kernel("opening a netlink socket"))?;
        let others = self.list()?;
        let mut used =
            subnet::used_on_host(&mut netlink).map_err(NetworkError::kernel("reading the host's routes"))?;
        used.extend(others.iter().map(|other| other.subnet));
        let subnet = match subnet {
            Some(subnet) => subnet.check(&used)?,
            None => Subnet::choose(&used)?,
        };
        let links = netlink
            .links()
            .map_err(NetworkError::kernel("reading the host's links"))?;
        let is_free = |bridge: &String| {
            !links.iter().any(|link| link.name == *bridge)
                && !others.iter().any(|other| other.bridge == *bridge)
        };
        let mut candidates = (0..=u16::MAX).map(|number| format!("hull{number}"));
        let bridge = candidates.find(is_free).ok_or(NetworkError::NoSubnet)?;
        let record = NetworkRecord {
            version: VERSION,
            name: name.to_owned(),
            bridge,
            subnet,
            mtu,
            created_ms: now_ms(),
        };
        make_directory(&self.directory(name).join(LEASES))?;
        write_json(&self.directory(name).join(RECORD_FILE), &record)?;
        self.rebuild_firewall(lock)?;
        Ok(record)
    }

    /// Removes a network that no container uses, with its bridge.
    ///
    /// # Errors
    ///
    /// Containers use it.
    pub fn remove(&self, name: &str) -> Result<(), NetworkError> {
        let lock = self.exclusive()?;
        let record = self.find(name)?;
        let containers = self.leases(&record.name)?.len();
        if containers > 0 {
            return Err(NetworkError::InUse {
                name: record.name,
                containers,
            });
        }
        bridge::remove(&record, &self.alias())?;
        let directory = self.directory(&record.name);
        // The record goes first: without it there is no network.
        let path = directory.join(RECORD_FILE);
        fs::remove_file(&path).map_err(NetworkError::io("removing", &path))?;
        drop(fs::remove_dir_all(&directory));
        self.rebuild_firewall(&lock)
    }

    /// What marks a bridge as ours.
    pub(crate) fn alias(&self) -> String {
        format!("hull {}", self.root.display())
            .chars()
            .take(250)
            .collect()
    }

    /// Sets the firewall to what networks and leases say.
    pub(crate) fn rebuild_firewall(&self, lock: &Lock) -> Result<(), NetworkError> {
        let firewall = self.firewall(lock)?;
        let mut state = Vec::new();
        for record in self.list()? {
            let leases = self.leases(&record.name)?;
            state.push((record, leases));
        }
        firewall.rebuild(&state)
    }

    /// The leases of a network.
    ///
    /// # Errors
    ///
    /// They can't be read.
    pub fn leases(&self, name: &str) -> Result<Vec<Lease>, NetworkError> {
        let directory = self.directory(canonical(name)).join(LEASES);
        let mut leases = Vec::new();
        for file in names_in(&directory)? {
            // One that is given back meanwhile is none.
            leases.extend(read_json(&directory.join(file))?);
        }
        leases.sort_by_key(|lease: &Lease| lease.address);
        Ok(leases)
    }

    /// Chooses an address and writes the lease that `make` makes of it.
    pub(crate) fn lease(
        &self,
        _lock: &Lock,
        network: &NetworkRecord,
        wanted: Option<Ipv4Addr>,
        make: impl FnOnce(Ipv4Addr) -> Lease,
    ) -> Result<Lease, NetworkError> {
        let directory = self.directory(&network.name).join(LEASES);
        let taken: Vec<Ipv4Addr> = names_in(&directory)?
            .iter()
            .filter_map(|file| file.split('@').next()?.parse().ok())
            .collect();
        let full = || NetworkError::Full {
            name: network.name.clone(),
            subnet: network.subnet.to_string(),
        };
        if taken.len() >= MAX_PORTS {
            return Err(full());
        }
        let address = match wanted {
            None => {
                // After the highest in use, so that an address isn't another's the moment it is free.
                let after = taken.iter().max().copied().unwrap_or(network.subnet.gateway());
                let is_taken = |address| taken.contains(&address);
                network.subnet.next_free(after, is_taken).ok_or_else(full)?
            }
            Some(address) => {
                let refused = |problem: String| Err(NetworkError::Address { address, problem });
                if !network.subnet.is_assignable(address) {
                    return refused(format!(
                        "no address for a container in {} of network {}",
                        network.subnet, network.name
                    ));
                }
                if taken.contains(&address) {
                    return refused(format!("another container of network {} has it", network.name));
                }
                address
            }
        };
        let lease = make(address);
        write_json(
            &directory.join(format!("{address}@{}", lease.container_id)),
            &lease,
        )?;
        Ok(lease)
    }

    /// Writes a lease anew.
    pub(crate) fn update(&self, network: &str, lease: &Lease) -> Result<(), NetworkError> {
        let file = format!("{}@{}", lease.address, lease.container_id);
        write_json(&self.directory(network).join(LEASES).join(file), lease)
    }

    /// Gives a lease back.
    pub(crate) fn give_back(&self, network: &str, lease: &Lease) {
        let file = format!("{}@{}", lease.address, lease.container_id);
        drop(fs::remove_file(self.directory(network).join(LEASES).join(file)));
    }

    /// Takes everything back that a container had, whose monitor could not.
    ///
    /// # Errors
    ///
    /// The leases can't be read, or the firewall not be changed.
    pub(crate) fn release(&self, id: &SandboxId) -> Result<(), NetworkError> {
        if !self.root.is_dir() {
            return Ok(());
        }
        let suffix = format!("@{id}");
        for name in names_in(&self.root)? {
            let directory = self.directory(&name).join(LEASES);
            for file in names_in(&directory)?
                .iter()
                .filter(|file| file.ends_with(&suffix))
            {
                let path = directory.join(file);
                let lease = read_json::<Lease>(&path);
                let lock = self.shared()?;
                drop(fs::remove_file(&path));
                if let Ok(Some(lease)) = lease {
                    self.firewall(&lock)?.expel(&lease)?;
                }
            }
        }
        Ok(())
    }
}

fn canonical(name: &str) -> &str {
    if DEFAULT_ALIASES.contains(&name) {
        DEFAULT_NETWORK
    } else {
        name
    }
}

fn is_tag(tag: &str) -> bool {
    tag.len() == 8 && tag.bytes().all(|byte| byte.is_ascii_hexdigit())
}

fn check_name(name: &str) -> Result<(), NetworkError> {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
    let first = name
        .bytes()
        .next()
        .is_some_and(|byte| byte.is_ascii_alphanumeric());
    if first && name.len() <= MAX_NAME_BYTES && name.bytes().all(allowed) && name != "lock" && name != "tag" {
        return Ok(());
    }
    Err(NetworkError::Name {
        name: name.to_owned(),
    })
}

fn make_directory(path: &Path) -> Result<(), NetworkError> {
    if path.is_dir() {
        return Ok(());
    }
    let mut builder = DirBuilder::new();
    builder
        .recursive(true)
        .mode(0o700)
        .create(path)
        .map_err(NetworkError::io("creating the directory", path))
}

/// The names in a directory; none where there is no such directory. Those that begin with a dot are being written.
fn names_in(directory: &Path) -> Result<Vec<String>, NetworkError> {
    let entries = match fs::read_dir(directory) {
        Ok(entries) => entries,
        Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => {
            return Ok(Vec::new());
        }
        Err(error) => return Err(NetworkError::io("reading", directory)(error)),
    };
    let names = entries
        .flatten()
        .filter_map(|entry| entry.file_name().into_string().ok());
    Ok(names.filter(|name| !name.starts_with('.')).collect())
}

fn read_json<T: DeserializeOwned>(path: &Path) -> Result<Option<T>, NetworkError> {
    let text = match fs::read(path) {
        Ok(text) => text,
        Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => {
            return Ok(None);
        }
        Err(error) => return Err(NetworkError::io("reading", path)(error)),
    };
    serde_json::from_slice(&text)
        .map(Some)
        .map_err(|source| NetworkError::Damaged {
            path: path.to_owned(),
            source,
        })
}

/// Writes a file so that it is there as a whole or not at all.
fn write_json<T: Serialize>(path: &Path, value: &T) -> Result<(), NetworkError> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let staging = path.with_file_name(format!(".{name}-{}", std::process::id()));
    let bytes = serde_json::to_vec(value).map_err(|source| NetworkError::Damaged {
        path: path.to_owned(),
        source,
    })?;
    let written = File::create(&staging)
        .and_then(|mut file| file.write_all(&bytes).and_then(|()| file.sync_data()))
        .and_then(|()| fs::rename(&staging, path));
    if written.is_err() {
        drop(fs::remove_file(&staging));
    }
    written.map_err(NetworkError::io("writing", path))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn networks() -> (tempfile::TempDir, Networks, NetworkRecord) {
        let state = tempfile::tempdir().unwrap();
        let networks = Networks::open(state.path());
        let record = NetworkRecord {
            version: VERSION,
            name: "net".into(),
            bridge: "hull7".into(),
            subnet: "10.5.0.0/29".parse().unwrap(),
            mtu: None,
            created_ms: 0,
        };
        make_directory(&networks.directory("net").join(LEASES)).unwrap();
        write_json(&networks.directory("net").join(RECORD_FILE), &record).unwrap();
        (state, networks, record)
    }

    fn lease(
        networks: &Networks,
        record: &NetworkRecord,
        wanted: Option<&str>,
    ) -> Result<Lease, NetworkError> {
        let lock = networks.exclusive().unwrap();
        let wanted = wanted.map(|address| address.parse().unwrap());
        networks.lease(&lock, record, wanted, |address| Lease {
            container_id: SandboxId::random().unwrap().to_string(),
            names: vec!["web".into()],
            address,
            mac: String::new(),
            tap: String::new(),
            ports: Vec::new(),
        })
    }

    #[test]
    fn addresses_are_leased_once_until_given_back() {
        let (_state, networks, record) = networks();
        let first = lease(&networks, &record, None).unwrap();
        assert_eq!(first.address.to_string(), "10.5.0.2");
        assert!(matches!(
            lease(&networks, &record, Some("10.5.0.2")),
            Err(NetworkError::Address { .. })
        ));
        for _ in 0..4 {
            lease(&networks, &record, None).unwrap();
        }
        assert!(matches!(
            lease(&networks, &record, None),
            Err(NetworkError::Full { .. })
        ));
        networks.give_back("net", &first);
        assert_eq!(lease(&networks, &record, None).unwrap().address, first.address);
        assert_eq!(networks.leases("net").unwrap().len(), 5);
        for outside in ["10.5.0.1", "10.5.0.7", "10.6.0.2"] {
            assert!(lease(&networks, &record, Some(outside)).is_err());
        }
    }

    #[test]
    fn unfinished_files_are_no_leases_and_damaged_ones_are_named() {
        let (_state, networks, record) = networks();
        let leases = networks.directory("net").join(LEASES);
        fs::write(leases.join(".10.5.0.2@x-1"), "{").unwrap();
        assert!(networks.leases("net").unwrap().is_empty());
        fs::write(leases.join("10.5.0.2@x"), "{").unwrap();
        assert!(
            networks
                .leases("net")
                .unwrap_err()
                .to_string()
                .contains("10.5.0.2@x")
        );
        assert_eq!(
            lease(&networks, &record, None).unwrap().address.to_string(),
            "10.5.0.3"
        );
    }

    #[test]
    fn names_of_networks_are_names_of_directories() {
        let (_state, networks, record) = networks();
        assert_eq!(networks.find("net").unwrap(), record);
        for bad in ["", "..", "a/b", "-x", "lock"] {
            assert!(
                matches!(networks.find(bad), Err(NetworkError::NotFound { .. })),
                "{bad}"
            );
            assert!(
                matches!(networks.create(bad, None, None), Err(NetworkError::Name { .. })),
                "{bad}"
            );
        }
        for taken in ["net", "none", "host", "default"] {
            assert!(matches!(
                networks.create(taken, None, None),
                Err(NetworkError::Exists { .. })
            ));
        }
        assert_eq!(networks.list().unwrap(), [record]);
    }

    #[test]
    fn tag_stays_what_it_was_first() {
        let (state, networks, _) = networks();
        let lock = networks.shared().unwrap();
        networks.firewall(&lock).unwrap();
        let tag = fs::read_to_string(state.path().join("networks/tag")).unwrap();
        networks.firewall(&lock).unwrap();
        assert!(is_tag(&tag));
        assert_eq!(
            fs::read_to_string(state.path().join("networks/tag")).unwrap(),
            tag
        );
    }
}
