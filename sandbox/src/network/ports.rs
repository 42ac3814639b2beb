//! Ports of the host that lead to a container: as the user writes them, and reserved as long as the container runs.
//!
//! A published port is forwarded by the firewall before any socket sees it. The socket held here is for others: nobody
//! else gets the port meanwhile, and a port that somebody has is refused.

use std::{
    fmt,
    net::{Ipv4Addr, SocketAddrV4},
    os::fd::OwnedFd,
    str::FromStr,
};

use rustix::net::{AddressFamily, SocketFlags, SocketType, bind, getsockname, socket_with};
use serde::{Deserialize, Serialize};

use super::NetworkError;

/// What carries a port.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Transport {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
}

impl fmt::Display for Transport {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
        })
    }
}

/// One port of the host and the container's that it leads to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct PublishedPort {
    /// The host's address; any where there is none.
    pub host_address: Option<Ipv4Addr>,
    /// The host's port; zero leaves the choice to the host.
    pub host_port: u16,
    /// The container's port.
    pub container_port: u16,
    /// What carries it.
    pub transport: Transport,
}

/// Most ports of one range.
const MAX_RANGE: usize = 1024;

impl PublishedPort {
    /// Reads `[[ADDRESS:]HOST:]CONTAINER[/tcp|udp]`, each port a number or a range.
    ///
    /// # Errors
    ///
    /// Says what is wrong with it.
    pub fn parse(text: &str) -> Result<Vec<Self>, String> {
        let wrong =
            |what: &str| format!("{text:?}: {what}; expected [[ADDRESS:]HOST-PORT:]CONTAINER-PORT[/tcp|udp]");
        let (ports, transport) = match text.rsplit_once('/') {
            None => (text, Transport::Tcp),
            Some((ports, "tcp")) => (ports, Transport::Tcp),
            Some((ports, "udp")) => (ports, Transport::Udp),
            Some((_, other)) => return Err(wrong(&format!("{other:?} is neither tcp nor udp"))),
        };
        let mut parts = ports.rsplitn(3, ':');
        let container = parts.next().unwrap_or_default();
        let host = parts.next().filter(|host| !host.is_empty());
        let address = parts.next().filter(|address| !address.is_empty());
        let host_address = address
            .map(|address| Ipv4Addr::from_str(address).map_err(|_| wrong("no IPv4 address")))
            .transpose()?
            .filter(|address| !address.is_unspecified());
        let container = range(container).ok_or_else(|| wrong("no port"))?;
        let hosts = match host {
            Some(host) => range(host).ok_or_else(|| wrong("no port of the host"))?,
            None => vec![0; container.len()],
        };
        if hosts.len() != container.len() || container.contains(&0) {
            return Err(wrong("as many ports of the host as of the container are needed"));
        }
        Ok(hosts
            .into_iter()
            .zip(container)
            .map(|(host_port, container_port)| Self {
                host_address,
                host_port,
                container_port,
                transport,
            })
            .collect())
    }

    /// Takes the port for a container; what it is then, and what keeps it.
    pub(crate) fn reserve(mut self) -> Result<(Self, OwnedFd), NetworkError> {
        let refused = |port: Self| {
            move |errno: rustix::io::Errno| NetworkError::Port {
                port: port.to_string(),
                source: errno.into(),
            }
        };
        let kind = match self.transport {
            Transport::Tcp => SocketType::STREAM,
            Transport::Udp => SocketType::DGRAM,
        };
        let socket =
            socket_with(AddressFamily::INET, kind, SocketFlags::CLOEXEC, None).map_err(refused(self))?;
        let address = self.host_address.unwrap_or(Ipv4Addr::UNSPECIFIED);
        bind(&socket, &SocketAddrV4::new(address, self.host_port)).map_err(refused(self))?;
        let bound = getsockname(&socket).map_err(refused(self))?;
        if let Ok(bound) = SocketAddrV4::try_from(bound) {
            self.host_port = bound.port();
        }
        Ok((self, socket))
    }
}

impl fmt::Display for PublishedPort {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let address = self.host_address.unwrap_or(Ipv4Addr::UNSPECIFIED);
        write!(
            formatter,
            "{address}:{}->{}/{}",
            self.host_port, self.container_port, self.transport
        )
    }
}

fn range(text: &str) -> Option<Vec<u16>> {
    let (first, last) = text.split_once('-').unwrap_or((text, text));
    let (first, last): (u16, u16) = (first.parse().ok()?, last.parse().ok()?);
    let fits = first <= last && usize::from(last - first) < MAX_RANGE;
    fits.then(|| (first..=last).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn one(text: &str) -> PublishedPort {
        let mut ports = PublishedPort::parse(text).unwrap();
        assert_eq!(ports.len(), 1);
        ports.remove(0)
    }

    #[test]
    fn ports_are_read_as_docker_reads_them() {
        assert_eq!(one("8080:80").to_string(), "0.0.0.0:8080->80/tcp");
        assert_eq!(one("127.0.0.1:53:5353/udp").to_string(), "127.0.0.1:53->5353/udp");
        assert_eq!(one("0.0.0.0:1:2").host_address, None);
        assert_eq!(one("80").host_port, 0);
        assert_eq!(one("127.0.0.1::80").to_string(), "127.0.0.1:0->80/tcp");
        let ranges = PublishedPort::parse("8000-8002:80-82").unwrap();
        assert_eq!(
            (ranges.len(), ranges[2].to_string().as_str()),
            (3, "0.0.0.0:8002->82/tcp")
        );
        for bad in [
            "",
            "x",
            "1:0",
            "80/sctp",
            "1-3:1-2",
            "fd00::1:1:1",
            "3-1:3-1",
            "70000:1",
            "1:2:3:4",
        ] {
            assert!(PublishedPort::parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn port_that_somebody_has_is_refused_by_its_name() {
        let any = PublishedPort {
            host_address: Some(Ipv4Addr::LOCALHOST),
            ..one("80")
        };
        let (taken, _socket) = any.reserve().unwrap();
        assert_ne!(taken.host_port, 0);
        let error = taken.reserve().unwrap_err().to_string();
        assert!(error.contains(&taken.host_port.to_string()), "{error}");
    }
}
