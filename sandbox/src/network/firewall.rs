//! Our own tables of nftables: translation of addresses, published ports, and what a guest may claim to be.
//!
//! All rules are the same for all networks and containers; what differs is in sets. So a container that starts or ends
//! changes elements alone, and a set-up that is missing (the first container, a flushed ruleset) is made anew from the
//! records in one transaction. The tables' name has a tag of the state directory in it; no other table is touched.

use std::{
    fmt::Write as _,
    io::Write as _,
    process::{Command, Stdio},
};

use super::{Lease, NetworkError, NetworkRecord};

/// Where clouds hand out credentials to whoever asks.
const METADATA: [&str; 2] = ["169.254.169.254", "169.254.170.2"];

/// The tables of one state directory.
#[derive(Debug)]
pub(crate) struct Firewall {
    table: String,
}

impl Firewall {
    /// Those with this tag.
    pub(crate) fn new(tag: &str) -> Self {
        Self {
            table: format!("hull_{tag}"),
        }
    }

    /// Makes the tables anew, from everything there is; without a network there are none.
    pub(crate) fn rebuild(&self, networks: &[(NetworkRecord, Vec<Lease>)]) -> Result<(), NetworkError> {
        run(&self.ruleset(networks))
    }

    /// Lets a container in. False if there is no set-up to add to.
    pub(crate) fn admit(&self, lease: &Lease) -> Result<bool, NetworkError> {
        let mut script = String::new();
        self.elements("add", lease, &mut script);
        match run(&script) {
            Ok(()) => Ok(true),
            Err(NetworkError::Firewall { message }) if message.contains("No such file") => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Forgets a container, whether it is known or not.
    pub(crate) fn expel(&self, lease: &Lease) -> Result<(), NetworkError> {
        let mut script = String::new();
        // What isn't there can't be deleted, in one transaction that would fail as a whole.
        self.elements("add", lease, &mut script);
        self.elements("delete", lease, &mut script);
        match run(&script) {
            Err(NetworkError::Firewall { message }) if message.contains("No such file") => Ok(()),
            result => result,
        }
    }

    fn elements(&self, verb: &str, lease: &Lease, script: &mut String) {
        let Lease {
            tap, mac, address, ..
        } = lease;
        let table = &self.table;
        // Writing to a String can't fail.
        let _ = writeln!(script, "{verb} element bridge {table} taps {{ \"{tap}\" }}");
        let _ = writeln!(
            script,
            "{verb} element bridge {table} macs {{ \"{tap}\" . {mac} }}"
        );
        let _ = writeln!(
            script,
            "{verb} element bridge {table} addresses {{ \"{tap}\" . {address} }}"
        );
        for port in &lease.ports {
            let (host, container, transport) = (port.host_port, port.container_port, port.transport);
            let to = format!("{address} . {container}");
            let _ = match port.host_address {
                None => writeln!(
                    script,
                    "{verb} element inet {table} ports {{ {transport} . {host} : {to} }}"
                ),
                Some(at) => writeln!(
                    script,
                    "{verb} element inet {table} ports_at {{ {at} . {transport} . {host} : {to} }}"
                ),
            };
        }
    }

    fn ruleset(&self, networks: &[(NetworkRecord, Vec<Lease>)]) -> String {
        let table = &self.table;
        let mut script = String::new();
        for family in ["inet", "bridge"] {
            // Deleting what may not be there.
            let _ = writeln!(
                script,
                "table {family} {table} {{ }}\ndelete table {family} {table}"
            );
        }
        if networks.is_empty() {
            return script;
        }
        script.push_str(&self.rules());
        for (network, leases) in networks {
            let NetworkRecord { bridge, subnet, .. } = network;
            let _ = writeln!(script, "add element inet {table} bridges {{ \"{bridge}\" }}");
            let _ = writeln!(
                script,
                "add element inet {table} within {{ \"{bridge}\" . \"{bridge}\" }}"
            );
            let _ = writeln!(script, "add element inet {table} subnets {{ {subnet} }}");
            for lease in leases {
                self.elements("add", lease, &mut script);
            }
        }
        script
    }

    fn rules(&self) -> String {
        let table = &self.table;
        let metadata = METADATA.join(", ");
        format!(
            r#"
table inet {table} {{
  set bridges {{ type ifname; }}
  set within {{ type ifname . ifname; }}
  set subnets {{ type ipv4_addr; flags interval; }}
  map ports {{ type inet_proto . inet_service : ipv4_addr . inet_service; }}
  map ports_at {{ type ipv4_addr . inet_proto . inet_service : ipv4_addr . inet_service; }}

  chain early {{
    type filter hook prerouting priority raw; policy accept;
    iifname @bridges ip daddr {{ 127.0.0.0/8, {metadata} }} drop
    iifname @bridges ip saddr 127.0.0.0/8 drop
  }}
  chain prerouting {{
    type nat hook prerouting priority dstnat; policy accept;
    dnat ip to ip daddr . meta l4proto . th dport map @ports_at
    fib daddr type local dnat ip to meta l4proto . th dport map @ports
  }}
  chain output {{
    type nat hook output priority -100; policy accept;
    dnat ip to ip daddr . meta l4proto . th dport map @ports_at
    fib daddr type local dnat ip to meta l4proto . th dport map @ports
  }}
  chain postrouting {{
    type nat hook postrouting priority srcnat; policy accept;
    ip saddr @subnets oifname != @bridges masquerade
    ip saddr @subnets oifname @bridges ct status dnat masquerade
    ip saddr 127.0.0.0/8 oifname @bridges masquerade
  }}
  chain forward {{
    type filter hook forward priority filter; policy accept;
    oifname != @bridges accept
    ct state established,related accept
    ct status dnat accept
    iifname . oifname @within accept
    drop
  }}
}}

table bridge {table} {{
  set taps {{ type ifname; }}
  set macs {{ type ifname . ether_addr; }}
  set addresses {{ type ifname . ipv4_addr; }}

  chain prerouting {{
    type filter hook prerouting priority -300; policy accept;
    iifname @taps jump guest
  }}
  chain guest {{
    iifname . ether saddr != @macs drop
    ether type arp arp htype 1 iifname . arp saddr ether != @macs drop
    ether type arp arp htype 1 iifname . arp saddr ip @addresses accept
    ether type ip iifname . ip saddr != @addresses drop
    ether type ip ip daddr {{ {metadata} }} drop
    ether type ip accept
    drop
  }}
}}
"#
        )
    }
}

/// Has a script carried out, as one transaction.
fn run(script: &str) -> Result<(), NetworkError> {
    let path = std::env::var("PATH").unwrap_or_default();
    let mut child = Command::new("nft")
        .args(["-f", "-"])
        .env("PATH", format!("{path}:/usr/sbin:/sbin"))
        .env("LC_ALL", "C")
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|source| NetworkError::NoFirewall { source })?;
    let written = child
        .stdin
        .take()
        .map_or(Ok(()), |mut stdin| stdin.write_all(script.as_bytes()));
    let output = child.wait_with_output();
    let output = written
        .and(output)
        .map_err(|source| NetworkError::NoFirewall { source })?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    let mut lines = said.lines().filter(|line| line.contains("Error")).take(3);
    let message = lines.next().map_or_else(|| said.trim().to_owned(), str::to_owned);
    Err(NetworkError::Firewall { message })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::network::PublishedPort;

    fn state() -> (NetworkRecord, Vec<Lease>) {
        let record = NetworkRecord {
            version: 1,
            name: "net".into(),
            bridge: "hull7".into(),
            subnet: "10.5.0.0/16".parse().unwrap(),
            mtu: None,
            created_ms: 0,
        };
        let lease = Lease {
            container_id: "c".into(),
            names: vec!["web".into()],
            address: "10.5.0.2".parse().unwrap(),
            mac: "02:68:0a:05:00:02".into(),
            tap: "hv0".into(),
            ports: ["8080:80", "127.0.0.1:53:53/udp"]
                .iter()
                .flat_map(|text| PublishedPort::parse(text).unwrap())
                .collect(),
        };
        (record, vec![lease])
    }

    #[test]
    fn only_our_own_tables_are_named() {
        let script = Firewall::new("0badcafe").ruleset(&[state()]);
        let tables = script.lines().filter(|line| line.contains("table "));
        for line in tables {
            assert!(line.contains("hull_0badcafe"), "{line}");
        }
        assert!(!script.contains("flush"));
        let gone = Firewall::new("0badcafe").ruleset(&[]);
        assert!(gone.contains("delete table inet hull_0badcafe") && !gone.contains("chain"));
    }

    #[test]
    fn elements_tell_where_ports_lead() {
        let firewall = Firewall::new("0badcafe");
        let mut script = String::new();
        firewall.elements("add", &state().1[0], &mut script);
        assert!(
            script.contains("ports { tcp . 8080 : 10.5.0.2 . 80 }"),
            "{script}"
        );
        assert!(
            script.contains("ports_at { 127.0.0.1 . udp . 53 : 10.5.0.2 . 53 }"),
            "{script}"
        );
    }
}
