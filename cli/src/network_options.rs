//! What `run` and `create` say about a container's network.

use std::{
    net::{IpAddr, Ipv4Addr},
    path::PathBuf,
};

use anyhow::bail;
use clap::Args;
use sandbox::{
    Directories, SandboxError,
    network::{NetworkMode, NetworkSpec, PublishedPort, parse_mac},
};

/// Interfaces that a namespace may have: each device costs the microVM's boot something.
const NAMESPACE_DEVICES: usize = 2;

/// The options of a container's network.
#[derive(Debug, Args)]
#[command(next_help_heading = "Network options")]
pub struct NetworkOptions {
    /// Network to connect to: none, the name of a network (`hull network ls`), or ns:PATH of a network namespace
    /// [default: none, and with --publish hull0]
    #[arg(long, visible_alias = "net", value_name = "NETWORK")]
    network: Option<String>,
    /// Publish a port of the container on the host: [[ADDRESS:]HOST-PORT:]CONTAINER-PORT[/tcp|udp]
    #[arg(short, long, value_name = "PORT")]
    publish: Vec<String>,
    /// Address in the network
    #[arg(long, value_name = "ADDRESS")]
    ip: Option<Ipv4Addr>,
    /// MAC address of the interface
    #[arg(long, value_name = "ADDRESS")]
    mac_address: Option<String>,
    /// Name server to ask in place of the host's
    #[arg(long, value_name = "ADDRESS")]
    dns: Vec<IpAddr>,
    /// Domain that names are looked up in; "." for none
    #[arg(long, value_name = "DOMAIN")]
    dns_search: Vec<String>,
    /// Name the container shall know: NAME:ADDRESS, or NAME:host-gateway for the host
    #[arg(long, value_name = "NAME:ADDRESS")]
    add_host: Vec<String>,
    /// Further name by which others in the network find the container
    #[arg(long, value_name = "NAME")]
    network_alias: Vec<String>,
}

fn invalid(option: &'static str, problem: impl Into<String>) -> SandboxError {
    SandboxError::InvalidOption {
        option,
        problem: problem.into(),
    }
}

/// A name that can stand in a file of names.
fn check_name(option: &'static str, name: &str) -> Result<(), SandboxError> {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
    if !name.is_empty() && name.len() <= 253 && name.bytes().all(allowed) {
        return Ok(());
    }
    Err(invalid(option, format!("{name:?} is no host name")))
}

fn parse_host(text: &str) -> Result<(String, Option<IpAddr>), SandboxError> {
    let wrong = || invalid("--add-host", format!("{text:?}: expected NAME:ADDRESS"));
    let (name, address) = text.split_once(':').ok_or_else(wrong)?;
    check_name("--add-host", name)?;
    let address = match address {
        "host-gateway" => None,
        address => Some(address.parse().map_err(|_| wrong())?),
    };
    Ok((name.to_owned(), address))
}

impl NetworkOptions {
    fn mode(&self) -> anyhow::Result<NetworkMode> {
        Ok(match self.network.as_deref() {
            None | Some("none") => NetworkMode::None,
            Some("host") => bail!(
                "--network host: a microVM has a network stack of its own and can't use the host's; publish ports with \
                 --publish, or reach the host by the name that --add-host NAME:host-gateway gives it"
            ),
            Some(name) => match name.strip_prefix("ns:") {
                Some(path) => NetworkMode::Namespace {
                    path: PathBuf::from(path),
                    devices: NAMESPACE_DEVICES,
                },
                None if name.starts_with("container:") => {
                    bail!(
                        "--network {name}: each microVM has an interface of its own; put both on one network"
                    )
                }
                None => NetworkMode::Network {
                    name: name.to_owned(),
                },
            },
        })
    }

    /// The network asked for.
    pub fn spec(&self, directories: &Directories) -> anyhow::Result<NetworkSpec> {
        let ports = self
            .publish
            .iter()
            .map(|text| PublishedPort::parse(text).map_err(|problem| invalid("--publish", problem)));
        let ports = ports.collect::<Result<Vec<_>, _>>()?.concat();
        let hosts = self.add_host.iter().map(|text| parse_host(text));
        if let Some(mac) = &self.mac_address
            && parse_mac(mac).is_none()
        {
            return Err(invalid("--mac-address", format!("{mac:?} is no unicast MAC address")).into());
        }
        for name in &self.network_alias {
            check_name("--network-alias", name)?;
        }
        for domain in self.dns_search.iter().filter(|domain| *domain != ".") {
            check_name("--dns-search", domain)?;
        }
        if self.network.as_deref() == Some("none") && !ports.is_empty() {
            bail!("--publish needs a network, and --network none is none");
        }
        let spec = NetworkSpec {
            mode: self.mode()?,
            state: directories.root.clone(),
            ports,
            address: self.ip,
            mac: self.mac_address.clone(),
            dns: self.dns.clone(),
            dns_search: self.dns_search.clone(),
            hosts: hosts.collect::<Result<_, _>>()?,
            aliases: self.network_alias.clone(),
        }
        .with_default_network();
        let in_ours = matches!(spec.mode, NetworkMode::Network { .. });
        for (option, given) in [
            ("--publish", !spec.ports.is_empty()),
            ("--ip", spec.address.is_some()),
            ("--mac-address", spec.mac.is_some()),
            ("--dns", !spec.dns.is_empty()),
            ("--network-alias", !spec.aliases.is_empty()),
        ] {
            if given && !in_ours {
                return Err(invalid(
                    option,
                    "only in a network of `hull network ls`; name one by --network",
                )
                .into());
            }
        }
        Ok(spec)
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Debug, Parser)]
    struct Line {
        #[command(flatten)]
        options: NetworkOptions,
    }

    fn spec(line: &str) -> anyhow::Result<NetworkSpec> {
        let words = std::iter::once("x").chain(line.split_whitespace());
        let directories = Directories {
            root: "/root".into(),
            run: "/run".into(),
        };
        Line::try_parse_from(words)?.options.spec(&directories)
    }

    #[test]
    fn published_port_brings_the_default_network() {
        assert_eq!(spec("").unwrap().mode, NetworkMode::None);
        let network = |name: &str| NetworkMode::Network { name: name.into() };
        assert_eq!(spec("-p 80:80").unwrap().mode, network("hull0"));
        assert_eq!(spec("-p 80:80 --network other").unwrap().mode, network("other"));
        assert!(matches!(
            spec("--network ns:/run/netns/x").unwrap().mode,
            NetworkMode::Namespace { .. }
        ));
    }

    #[test]
    fn what_a_microvm_cannot_do_is_refused_with_the_reason() {
        for (line, word) in [
            ("--network host", "--publish"),
            ("--network container:x", "one network"),
            ("--network none -p 80:80", "none"),
            ("--ip 10.0.0.2", "--network"),
            ("--network x --mac-address 01:00:00:00:00:00", "unicast"),
            ("--network x --add-host a", "NAME:ADDRESS"),
            ("--network x --add-host a\\tb:1.2.3.4", "host name"),
            ("--network x -p 1:2:3:4", "--publish"),
        ] {
            let error = spec(line).unwrap_err().to_string();
            assert!(error.contains(word), "{line}: {error}");
        }
    }
}
