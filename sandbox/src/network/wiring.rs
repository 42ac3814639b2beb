//! One microVM's connections to the host's network, from made to taken back.

use std::{
    net::{IpAddr, Ipv4Addr},
    os::fd::OwnedFd,
    path::{Path, PathBuf},
};

use agent_protocol::{ConfigureNetworkRequest, NetworkInterface, NetworkRoute};
use serde::{Deserialize, Serialize};

use super::{
    Lease, NetworkError, NetworkRecord, Networks, PublishedPort,
    bridge::{self, DEFAULT_MTU},
    device_mac, format_mac,
    namespace::Namespace,
    netlink::Netlink,
    parse_mac, redirect,
    scan::{self, Scanned, prefix},
    store::DEFAULT_NETWORK,
    tap,
};
use crate::SandboxId;

/// What the names of taps in a namespace that others made begin with; the index of the interface follows.
pub(super) const TAP_PREFIX: &str = "hulltap";

/// What a container is connected to.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum NetworkMode {
    /// To nothing.
    #[default]
    None,
    /// To whatever a network namespace is connected to.
    Namespace {
        /// Its file.
        path: PathBuf,
        /// Interfaces it may have: the microVM gets as many devices.
        devices: usize,
    },
    /// To a network of ours.
    Network {
        /// Its name.
        name: String,
    },
}

/// The network a container asks for. Kept with it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct NetworkSpec {
    /// What it is connected to.
    pub mode: NetworkMode,
    /// Where networks of ours are kept.
    pub state: PathBuf,
    /// Ports of the host that lead to it.
    pub ports: Vec<PublishedPort>,
    /// The address it wants.
    pub address: Option<Ipv4Addr>,
    /// The MAC address it wants.
    pub mac: Option<String>,
    /// Name servers in place of the host's.
    pub dns: Vec<IpAddr>,
    /// Domains that names are looked up in.
    pub dns_search: Vec<String>,
    /// Further names it knows; without an address, the host's on the network.
    pub hosts: Vec<(String, Option<IpAddr>)>,
    /// Further names others may call it.
    pub aliases: Vec<String>,
}

/// An interface of a container in a network of ours.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Endpoint {
    /// The network.
    pub network: String,
    /// The container's address.
    pub address: Ipv4Addr,
    /// Length of the network's prefix.
    pub prefix_length: u8,
    /// The host's address on the network.
    pub gateway: Ipv4Addr,
    /// The interface's.
    pub mac: String,
    /// Published ports, all numbers settled.
    pub ports: Vec<PublishedPort>,
    /// Who else was there when it started, and by what names.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub peers: Vec<(Ipv4Addr, Vec<String>)>,
}

impl NetworkSpec {
    /// How many devices the microVM gets.
    pub(crate) fn devices(&self) -> usize {
        match &self.mode {
            NetworkMode::None => 0,
            NetworkMode::Network { .. } => 1,
            NetworkMode::Namespace { devices, .. } => (*devices).min(agent_protocol::limits::MAX_INTERFACES),
        }
    }

    /// The same with a network where one is needed and none is named.
    #[must_use]
    pub fn with_default_network(mut self) -> Self {
        if self.mode == NetworkMode::None && !self.ports.is_empty() {
            self.mode = NetworkMode::Network {
                name: DEFAULT_NETWORK.to_owned(),
            };
        }
        self
    }
}

/// Whose wiring it is.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Identity<'a> {
    pub(crate) id: &'a SandboxId,
    pub(crate) name: &'a str,
    pub(crate) hostname: &'a str,
}

/// What a microVM is connected by. Dropping it takes everything back.
#[derive(Debug, Default)]
pub(crate) struct Wiring {
    /// For the VMM's devices, in order; its own from then on.
    pub(crate) taps: Vec<OwnedFd>,
    /// For the agent.
    pub(crate) request: ConfigureNetworkRequest,
    /// In a network of ours.
    pub(crate) endpoint: Option<Endpoint>,
    undo: Undo,
}

/// What has to be taken back by hand; dropping it does.
#[derive(Debug, Default)]
enum Undo {
    #[default]
    Nothing,
    Namespace {
        namespace: Namespace,
        links: Vec<u32>,
    },
    Lease {
        networks: Networks,
        network: String,
        lease: Lease,
        /// Nobody else gets the ports.
        _reserved: Vec<OwnedFd>,
    },
}

impl Wiring {
    /// Connects a container as it asks for.
    pub(crate) fn connect(spec: &NetworkSpec, identity: Identity<'_>) -> Result<Self, NetworkError> {
        match &spec.mode {
            NetworkMode::None => Ok(Self::default()),
            NetworkMode::Namespace { path, devices } => Self::join(path, *devices),
            NetworkMode::Network { name } => Self::attach(spec, name, identity),
        }
    }

    /// Takes the interfaces of a namespace over.
    pub(crate) fn join(path: &Path, devices: usize) -> Result<Self, NetworkError> {
        let mut wiring = Self {
            undo: Undo::Namespace {
                namespace: Namespace::open(path)?,
                links: Vec::new(),
            },
            ..Self::default()
        };
        let Undo::Namespace { namespace, links } = &mut wiring.undo else {
            return Ok(wiring);
        };
        let (taps, scanned) = namespace.enter(|| take_over(devices, links))?;
        wiring.taps = taps;
        wiring.request = ConfigureNetworkRequest {
            interfaces: scanned.interfaces,
            routes: scanned.routes,
            neighbours: scanned.neighbours,
            ..ConfigureNetworkRequest::default()
        };
        Ok(wiring)
    }

    /// Plugs a container into a network of ours.
    fn attach(spec: &NetworkSpec, name: &str, identity: Identity<'_>) -> Result<Self, NetworkError> {
        let networks = Networks::open(&spec.state);
        let mut netlink = Netlink::open().map_err(NetworkError::kernel("opening a netlink socket"))?;
        let lock = networks.exclusive()?;
        let record = networks.find_or_make(&lock, name)?;
        let bridge = bridge::ensure(&mut netlink, &record, &networks.alias())?;
        let lease = networks.lease(&lock, &record, spec.address, |address| {
            new_lease(spec, identity, address)
        })?;
        drop(lock);
        let mut wiring = Self {
            undo: Undo::Lease {
                networks: networks.clone(),
                network: record.name.clone(),
                lease,
                _reserved: Vec::new(),
            },
            ..Self::default()
        };
        let Undo::Lease { lease, _reserved, .. } = &mut wiring.undo else {
            return Ok(wiring);
        };
        for port in &spec.ports {
            let (port, socket) = port.reserve()?;
            lease.ports.push(port);
            _reserved.push(socket);
        }
        let tap = bridge::plug(&mut netlink, &record, bridge, &lease.tap)?;
        wiring.taps.push(tap);
        admit(&networks, &record, lease)?;
        wiring.request = describe(&record, lease);
        let mut peers = networks.leases(&record.name)?;
        peers.retain(|peer| peer.address != lease.address);
        wiring.endpoint = Some(Endpoint {
            network: record.name.clone(),
            address: lease.address,
            prefix_length: record.subnet.length(),
            gateway: record.subnet.gateway(),
            mac: lease.mac.clone(),
            ports: lease.ports.clone(),
            peers: peers.into_iter().map(|peer| (peer.address, peer.names)).collect(),
        });
        Ok(wiring)
    }
}

impl Drop for Undo {
    fn drop(&mut self) {
        let result = match self {
            Self::Nothing => Ok(()),
            Self::Namespace { namespace, links } => namespace.enter(|| give_back(links)),
            Self::Lease {
                networks,
                network,
                lease,
                ..
            } => {
                networks.give_back(network, lease);
                let lock = networks.shared();
                lock.and_then(|lock| networks.firewall(&lock)?.expel(lease))
            }
        };
        if let Err(error) = result {
            tracing::warn!(%error, "a container's network is left as it was");
        }
    }
}

/// Connects each interface of the calling thread's namespace with a tap.
fn take_over(devices: usize, links: &mut Vec<u32>) -> Result<(Vec<OwnedFd>, Scanned), NetworkError> {
    let action = "taking over the interfaces of the network namespace";
    let mut netlink = Netlink::open().map_err(NetworkError::kernel(action))?;
    let scanned = scan::scan(&mut netlink).map_err(NetworkError::kernel(action))?;
    if scanned.links.len() > devices {
        return Err(NetworkError::TooManyInterfaces {
            found: scanned.links.len(),
            devices,
        });
    }
    let mut taps = Vec::with_capacity(scanned.links.len());
    for link in &scanned.links {
        let name = format!("{TAP_PREFIX}{}", link.index);
        // It exists as long as a VMM has it: whoever else wants the interface finds that out here.
        let tap = tap::open(&name).map_err(|source| match source.raw_os_error() {
            Some(code) if code == rustix::io::Errno::BUSY.raw_os_error() => NetworkError::InterfaceTaken {
                interface: link.name.clone(),
            },
            _ => NetworkError::kernel(format!("making a tap for {}", link.name))(source),
        })?;
        let action = || format!("connecting {} with its tap", link.name);
        let found = netlink.link(&name).map_err(NetworkError::kernel(action()))?;
        let tap_index = found.map_or(0, |tap| tap.index);
        let mtu = vec![netlink_packet_route::link::LinkAttribute::Mtu(link.mtu)];
        netlink
            .set_link(tap_index, true, mtu)
            .map_err(NetworkError::kernel(action()))?;
        // One that was killed has left its filter.
        redirect::undo(&mut netlink, link.index).map_err(NetworkError::kernel(action()))?;
        links.push(link.index);
        redirect::redirect(&mut netlink, link.index, tap_index).map_err(NetworkError::kernel(action()))?;
        redirect::redirect(&mut netlink, tap_index, link.index).map_err(NetworkError::kernel(action()))?;
        taps.push(tap);
    }
    Ok((taps, scanned))
}

/// Removes the redirections of these interfaces from the calling thread's namespace.
fn give_back(links: &[u32]) -> Result<(), NetworkError> {
    let action = "giving back the interfaces of the network namespace";
    let mut netlink = Netlink::open().map_err(NetworkError::kernel(action))?;
    for link in links {
        redirect::undo(&mut netlink, *link).map_err(NetworkError::kernel(action))?;
    }
    Ok(())
}

/// How many interfaces the process's own namespace has.
pub(crate) fn interfaces_here() -> Result<usize, NetworkError> {
    let action = "reading the links of the network namespace";
    let mut netlink = Netlink::open().map_err(NetworkError::kernel(action))?;
    let scanned = scan::scan(&mut netlink).map_err(NetworkError::kernel(action))?;
    Ok(scanned.links.len())
}

/// Takes back what a container had whose monitor could not.
pub(crate) fn clean_up(spec: &NetworkSpec, id: &SandboxId) -> Result<(), NetworkError> {
    match &spec.mode {
        NetworkMode::None => Ok(()),
        NetworkMode::Network { .. } => Networks::open(&spec.state).release(id),
        NetworkMode::Namespace { path, .. } => {
            // One that is gone has taken everything along.
            let Ok(namespace) = Namespace::open(path) else {
                return Ok(());
            };
            namespace.enter(|| {
                let action = "reading the links of the network namespace";
                let mut netlink = Netlink::open().map_err(NetworkError::kernel(action))?;
                let links = netlink.links().map_err(NetworkError::kernel(action))?;
                let has_tap = |index: u32| {
                    let name = format!("{TAP_PREFIX}{index}");
                    links.iter().any(|link| link.name == name)
                };
                let abandoned = links.iter().filter(|link| link.ethernet && !has_tap(link.index));
                let abandoned: Vec<u32> = abandoned.map(|link| link.index).collect();
                give_back(&abandoned)
            })
        }
    }
}

fn new_lease(spec: &NetworkSpec, identity: Identity<'_>, address: Ipv4Addr) -> Lease {
    let given = spec.mac.as_deref().and_then(parse_mac);
    let mac = given.unwrap_or_else(|| bridge::mac_of(address));
    let id = identity.id.as_str();
    let mut names = vec![identity.name.to_owned()];
    for name in spec.aliases.iter().map(String::as_str).chain([identity.hostname]) {
        if !names.iter().any(|known| known == name) {
            names.push(name.to_owned());
        }
    }
    Lease {
        container_id: id.to_owned(),
        names,
        address,
        mac: format_mac(&mac),
        tap: format!("hv{}", id.get(..12).unwrap_or(id)),
        ports: Vec::new(),
    }
}

/// Lets the firewall know of a container.
fn admit(networks: &Networks, record: &NetworkRecord, lease: &Lease) -> Result<(), NetworkError> {
    let lock = networks.shared()?;
    // First on disk, so that whoever makes the tables anew finds it.
    networks.update(&record.name, lease)?;
    if networks.firewall(&lock)?.admit(lease)? {
        return Ok(());
    }
    drop(lock);
    let lock = networks.exclusive()?;
    networks.rebuild_firewall(&lock)
}

fn describe(record: &NetworkRecord, lease: &Lease) -> ConfigureNetworkRequest {
    let name = "eth0";
    let any = prefix(IpAddr::V4(Ipv4Addr::UNSPECIFIED), 0);
    ConfigureNetworkRequest {
        interfaces: vec![NetworkInterface {
            device_mac: device_mac(0).to_vec(),
            name: name.to_owned(),
            mac: parse_mac(&lease.mac).map(Vec::from).unwrap_or_default(),
            mtu: record.mtu.unwrap_or(DEFAULT_MTU).into(),
            addresses: vec![prefix(IpAddr::V4(lease.address), record.subnet.length())],
            ..NetworkInterface::default()
        }],
        routes: vec![NetworkRoute {
            interface: name.to_owned(),
            destination: Some(any).into(),
            gateway: record.subnet.gateway().octets().to_vec(),
            ..NetworkRoute::default()
        }],
        ..ConfigureNetworkRequest::default()
    }
}
