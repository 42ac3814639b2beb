//! What can go wrong between a microVM and a network.

use std::{io, net::Ipv4Addr, path::PathBuf};

/// Why a container can't have its network.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum NetworkError {
    /// The kernel refuses a change of the network.
    #[error("{action}{}", hint(source))]
    Kernel {
        /// What was tried.
        action: String,
        /// What it said.
        source: io::Error,
    },
    /// A namespace that isn't there or isn't one.
    #[error("the network namespace {} can't be entered", path.display())]
    Namespace {
        /// Its file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// More interfaces than the microVM has devices for.
    #[error(
        "the network namespace has {found} interfaces, and the microVM devices for {devices}; a microVM gets its devices \
         when the container is created"
    )]
    TooManyInterfaces {
        /// Interfaces.
        found: usize,
        /// Devices.
        devices: usize,
    },
    /// Another microVM has the interface.
    #[error("interface {interface} of the network namespace is another microVM's already")]
    InterfaceTaken {
        /// Its name.
        interface: String,
    },
    /// No such network.
    #[error("no such network: {name}; `hull network ls` lists what there is")]
    NotFound {
        /// What was asked for.
        name: String,
    },
    /// There is one of that name.
    #[error("a network named {name} exists already")]
    Exists {
        /// The name.
        name: String,
    },
    /// A name that can't be one.
    #[error(
        "network name {name:?}: 1 to 64 letters, digits, '-', '_' and '.' are needed, beginning with a letter or digit"
    )]
    Name {
        /// As given.
        name: String,
    },
    /// Containers are on it.
    #[error("network {name} is used by {containers} containers; stop them first")]
    InUse {
        /// The network.
        name: String,
        /// How many.
        containers: usize,
    },
    /// No room.
    #[error("no address is free in {subnet} of network {name}")]
    Full {
        /// The network.
        name: String,
        /// Its addresses.
        subnet: String,
    },
    /// An address that isn't the network's or is taken.
    #[error("--ip {address}: {problem}")]
    Address {
        /// As asked for.
        address: Ipv4Addr,
        /// What is wrong, and what would be right.
        problem: String,
    },
    /// A range that can't be used.
    #[error("--subnet {subnet}: {problem}")]
    Subnet {
        /// As given.
        subnet: String,
        /// What is wrong.
        problem: String,
    },
    /// No free range.
    #[error("no range of 10.0.0.0/8 is free on this host; name one by --subnet")]
    NoSubnet,
    /// A port of the host that something else has.
    #[error("port {port} of the host can't be published: {source}")]
    Port {
        /// As asked for.
        port: String,
        /// What the system said.
        source: io::Error,
    },
    /// The bridge's name belongs to something else.
    #[error("an interface named {bridge} exists and is not the bridge of network {network}")]
    BridgeTaken {
        /// The name.
        bridge: String,
        /// The network.
        network: String,
    },
    /// The firewall's program.
    #[error("nft: {message}")]
    Firewall {
        /// What it said.
        message: String,
    },
    /// The firewall's program isn't there.
    #[error("the program nft can't be run; install nftables (`hull doctor` says what else is missing)")]
    NoFirewall {
        /// What the system said.
        source: io::Error,
    },
    /// A file of ours.
    #[error("{action} {}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// With what.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A file of ours can't be understood.
    #[error("{} is damaged; `hull network rm` removes the network", path.display())]
    Damaged {
        /// Which.
        path: PathBuf,
        /// Why.
        source: serde_json::Error,
    },
}

/// The way out of what is most likely.
fn hint(source: &io::Error) -> &'static str {
    match source.kind() {
        io::ErrorKind::PermissionDenied => " (networks need root, or CAP_NET_ADMIN)",
        _ => "",
    }
}

impl NetworkError {
    /// For `map_err`: a request to the kernel.
    pub(crate) fn kernel<E: Into<io::Error>>(action: impl Into<String>) -> impl FnOnce(E) -> Self {
        let action = action.into();
        move |source| Self::Kernel {
            action,
            source: source.into(),
        }
    }

    /// For `map_err`: an operation on a file.
    pub(crate) fn io<E: Into<io::Error>>(
        action: &'static str,
        path: impl Into<PathBuf>,
    ) -> impl FnOnce(E) -> Self {
        let path = path.into();
        move |source| Self::Io {
            action,
            path,
            source: source.into(),
        }
    }
}
