//! The container's `/etc/hosts` and `/etc/resolv.conf`.

use std::{fmt::Write as _, fs, net::IpAddr};

use super::{Endpoint, NetworkSpec};

/// Names of this host, for containers that ask for it.
const RESOLV_CONF: &str = "/etc/resolv.conf";
/// What the C library looks at.
const MAX_SERVERS: usize = 3;

/// `/etc/hosts`: itself, and what the user adds.
pub(crate) fn hosts(hostname: &str, name: &str, spec: &NetworkSpec, endpoint: Option<&Endpoint>) -> String {
    let mut text = String::new();
    match endpoint {
        None => {
            let _ = writeln!(text, "127.0.0.1\tlocalhost {hostname}");
        }
        Some(endpoint) => {
            text.push_str("127.0.0.1\tlocalhost\n");
            let names = if name == hostname || name.is_empty() {
                hostname.to_owned()
            } else {
                format!("{hostname} {name}")
            };
            let _ = writeln!(text, "{}\t{names}", endpoint.address);
            for (address, names) in &endpoint.peers {
                let _ = writeln!(text, "{address}\t{}", names.join(" "));
            }
        }
    }
    text.push_str("::1\tlocalhost ip6-localhost ip6-loopback\n");
    for (name, address) in &spec.hosts {
        let address = address.or_else(|| endpoint.map(|endpoint| IpAddr::V4(endpoint.gateway)));
        if let Some(address) = address {
            let _ = writeln!(text, "{address}\t{name}");
        }
    }
    text
}

/// `/etc/resolv.conf` of a container in a network of ours; `None` where there is nobody to ask.
pub(crate) fn resolv_conf(spec: &NetworkSpec) -> Option<String> {
    let host = fs::read_to_string(RESOLV_CONF).unwrap_or_default();
    compose(spec, &host)
}

fn compose(spec: &NetworkSpec, host: &str) -> Option<String> {
    let mut servers = name_servers(spec, host);
    servers.truncate(MAX_SERVERS);
    if servers.is_empty() && spec.dns_search.is_empty() {
        return None;
    }
    let mut text = String::new();
    for server in &servers {
        let _ = writeln!(text, "nameserver {server}");
    }
    if spec.dns_search.is_empty() {
        for line in host.lines().filter(|line| line.starts_with("search ")) {
            let _ = writeln!(text, "{line}");
        }
    } else if spec.dns_search != ["."] {
        let _ = writeln!(text, "search {}", spec.dns_search.join(" "));
    }
    Some(text)
}

/// Who knows names that aren't the network's: the user's choice, or the host's. One on the host's loopback can't be reached.
pub(crate) fn name_servers(spec: &NetworkSpec, host: &str) -> Vec<IpAddr> {
    if !spec.dns.is_empty() {
        return spec.dns.clone();
    }
    let addresses = host.lines().filter_map(|line| {
        let address: IpAddr = line.strip_prefix("nameserver")?.trim().parse().ok()?;
        (address.is_ipv4() && !address.is_loopback()).then_some(address)
    });
    addresses.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn endpoint() -> Endpoint {
        Endpoint {
            network: "net".into(),
            address: "10.5.0.2".parse().unwrap(),
            prefix_length: 16,
            gateway: "10.5.0.1".parse().unwrap(),
            mac: String::new(),
            ports: Vec::new(),
            peers: vec![("10.5.0.9".parse().unwrap(), vec!["db".into(), "store".into()])],
        }
    }

    #[test]
    fn hosts_knows_the_container_and_what_was_added() {
        let spec = NetworkSpec {
            hosts: vec![
                ("db".into(), Some("10.9.9.9".parse().unwrap())),
                ("host.internal".into(), None),
            ],
            ..NetworkSpec::default()
        };
        let text = hosts("box", "web", &spec, Some(&endpoint()));
        assert!(text.contains("10.5.0.2\tbox web\n10.5.0.9\tdb store\n"), "{text}");
        assert!(
            text.contains("10.9.9.9\tdb\n") && text.contains("10.5.0.1\thost.internal\n"),
            "{text}"
        );
        let alone = hosts("box", "web", &spec, None);
        assert!(
            alone.starts_with("127.0.0.1\tlocalhost box\n") && !alone.contains("host.internal"),
            "{alone}"
        );
    }

    #[test]
    fn name_servers_of_the_host_are_used_unless_they_loop_back() {
        let host = "search a.example\nnameserver 127.0.0.53\nnameserver 192.0.2.1\nnameserver fe80::1\n";
        let spec = NetworkSpec::default();
        let text = compose(&spec, host).unwrap();
        assert_eq!(text, "nameserver 192.0.2.1\nsearch a.example\n");
        let spec = NetworkSpec {
            dns: vec!["192.0.2.9".parse().unwrap()],
            dns_search: vec![".".into()],
            ..spec
        };
        let text = compose(&spec, host).unwrap();
        assert_eq!(text, "nameserver 192.0.2.9\n");
    }
}
