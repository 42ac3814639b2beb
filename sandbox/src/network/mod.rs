//! The interfaces of a microVM, and what they are connected to on the host.
//!
//! ```text
//!  a namespace that others made (CNI, Podman, Docker)           a network of ours
//!    eth0 ── tc, all frames both ways ── tap ── VMM               bridge hull0 ── tap ── VMM
//!    scanned when the container starts                            lease on disk, NAT in our own table
//! ```
//!
//! In both cases the tap belongs to its open descriptors, which are the VMM's once it has them: whatever kills monitor and
//! VMM removes it. What else there is (a lease, elements of sets, a qdisc) is taken back when [`Wiring`] is dropped, and by
//! the next command where nobody could ([`clean_up`]). `docs/adr/0011-network.md` has the reasons.
//!
//! Owner: the monitor, as part of its microVM. Thread: the monitor's only one; another network namespace is entered by a
//! thread that ends before the call does.
//!
//! Invariant: no table, rule, route or address is changed that isn't ours. The one exception, forwarding between interfaces,
//! is switched on where a network of ours is made.

mod bridge;
mod error;
mod files;
mod firewall;
mod namespace;
mod netlink;
mod ports;
mod redirect;
mod scan;
mod store;
mod subnet;
mod tap;
mod wiring;

pub use error::NetworkError;
pub(crate) use files::{hosts, resolv_conf};
pub use ports::{PublishedPort, Transport};
pub use store::{Lease, NetworkRecord, Networks};
pub use subnet::Subnet;
pub use wiring::{Endpoint, NetworkMode, NetworkSpec};
pub(crate) use wiring::{Identity, Wiring, clean_up, interfaces_here};

/// The address a device of a microVM has from boot, by which the agent finds it. The one its interface shows is another.
pub(crate) fn device_mac(index: usize) -> [u8; 6] {
    let [high, low] = u16::try_from(index).unwrap_or(u16::MAX).to_be_bytes();
    [0x02, b'h', b'u', b'l', high, low]
}

/// The name of a device of a microVM in the VMM's messages and metrics.
pub(crate) fn device_id(index: usize) -> String {
    format!("net{index}")
}

/// A MAC address as people write it.
pub(crate) fn format_mac(mac: &[u8]) -> String {
    let pairs: Vec<String> = mac.iter().map(|byte| format!("{byte:02x}")).collect();
    pairs.join(":")
}

/// Six pairs of hexadecimal digits.
#[must_use]
pub fn parse_mac(text: &str) -> Option<[u8; 6]> {
    let mut mac = [0; 6];
    let mut pairs = text.split(':');
    for byte in &mut mac {
        let pair = pairs.next()?;
        let is_hex = pair.len() == 2 && pair.bytes().all(|digit| digit.is_ascii_hexdigit());
        *byte = is_hex.then(|| u8::from_str_radix(pair, 16).ok()).flatten()?;
    }
    let unicast = mac[0] & 1 == 0 && mac != [0; 6];
    (pairs.next().is_none() && unicast).then_some(mac)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_of_interfaces_are_unicast() {
        assert_eq!(parse_mac("02:00:00:00:00:0f"), Some([2, 0, 0, 0, 0, 15]));
        for bad in [
            "01:00:00:00:00:01",
            "00:00:00:00:00:00",
            "2:0:0:0:0:1",
            "02:00:00:00:00",
            "x",
        ] {
            assert_eq!(parse_mac(bad), None, "{bad}");
        }
        assert_eq!(parse_mac(&format_mac(&device_mac(3))), Some(device_mac(3)));
    }
}
