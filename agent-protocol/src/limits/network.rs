//! Bounds of what the agent sets up as its network.

use super::{Bounded, InvalidMessage, check_list, require};
use crate::{ConfigureNetworkRequest, IpPrefix, NetworkInterface, NetworkNeighbour, NetworkRoute};

/// Most interfaces of a microVM.
pub const MAX_INTERFACES: usize = 16;
/// Most addresses of an interface.
const MAX_ADDRESSES: usize = 64;
/// Most routes and most neighbours.
pub const MAX_ROUTES: usize = 4096;
/// Longest name of an interface, as the kernel has it.
const MAX_NAME_BYTES: usize = 15;
const MAC_BYTES: usize = 6;
/// The least and the most an Ethernet device takes.
const MTU_RANGE: std::ops::RangeInclusive<u32> = 68..=65535;

fn check_name(field: &'static str, name: &str) -> Result<(), InvalidMessage> {
    let fits = !name.is_empty() && name.len() <= MAX_NAME_BYTES && name != "." && name != "..";
    let allowed = |byte: u8| byte.is_ascii_graphic() && !b"/:%".contains(&byte);
    require(fits && name.bytes().all(allowed), field, "is no interface's name")
}

fn check_address(field: &'static str, address: &[u8]) -> Result<(), InvalidMessage> {
    require(matches!(address.len(), 4 | 16), field, "is no IP address")
}

fn check_prefix(field: &'static str, prefix: &IpPrefix) -> Result<(), InvalidMessage> {
    check_address(field, &prefix.address)?;
    let bits = prefix.address.len() * 8;
    let fits = usize::try_from(prefix.prefix_length).is_ok_and(|length| length <= bits);
    require(fits, field, "has a longer prefix than bits")
}

impl Bounded for NetworkInterface {
    fn check(&self) -> Result<(), InvalidMessage> {
        let is_mac = |mac: &[u8]| mac.len() == MAC_BYTES;
        require(
            is_mac(&self.device_mac),
            "interfaces.device_mac",
            "is no MAC address",
        )?;
        check_name("interfaces.name", &self.name)?;
        require(
            self.mac.is_empty() || is_mac(&self.mac),
            "interfaces.mac",
            "is no MAC address",
        )?;
        require(
            self.mtu == 0 || MTU_RANGE.contains(&self.mtu),
            "interfaces.mtu",
            "is no MTU",
        )?;
        check_list("interfaces.addresses", &self.addresses, MAX_ADDRESSES)?;
        self.addresses
            .iter()
            .try_for_each(|address| check_prefix("interfaces.addresses", address))
    }
}

impl Bounded for NetworkRoute {
    fn check(&self) -> Result<(), InvalidMessage> {
        check_name("routes.interface", &self.interface)?;
        let missing = InvalidMessage::new("routes.destination", "is missing");
        let destination = self.destination.as_ref().ok_or(missing)?;
        check_prefix("routes.destination", destination)?;
        let same_family = |address: &[u8]| address.is_empty() || address.len() == destination.address.len();
        require(
            same_family(&self.gateway),
            "routes.gateway",
            "is of another family",
        )?;
        require(same_family(&self.source), "routes.source", "is of another family")
    }
}

impl Bounded for NetworkNeighbour {
    fn check(&self) -> Result<(), InvalidMessage> {
        check_name("neighbours.interface", &self.interface)?;
        check_address("neighbours.address", &self.address)?;
        require(self.mac.len() == MAC_BYTES, "neighbours.mac", "is no MAC address")
    }
}

impl Bounded for ConfigureNetworkRequest {
    fn check(&self) -> Result<(), InvalidMessage> {
        check_list("interfaces", &self.interfaces, MAX_INTERFACES)?;
        check_list("routes", &self.routes, MAX_ROUTES)?;
        check_list("neighbours", &self.neighbours, MAX_ROUTES)?;
        self.interfaces.iter().try_for_each(Bounded::check)?;
        self.routes.iter().try_for_each(Bounded::check)?;
        self.neighbours.iter().try_for_each(Bounded::check)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn interface() -> NetworkInterface {
        NetworkInterface {
            device_mac: vec![2, 0, 0, 0, 0, 1],
            name: "eth0".into(),
            addresses: vec![IpPrefix {
                address: vec![10, 0, 0, 2],
                prefix_length: 24,
                ..IpPrefix::default()
            }],
            ..NetworkInterface::default()
        }
    }

    #[test]
    fn interfaces_are_bounded() {
        interface().check().unwrap();
        type Break = fn(&mut NetworkInterface);
        let ways: [(Break, &str); 6] = [
            (|i| i.device_mac.clear(), "interfaces.device_mac"),
            (|i| i.name = "a/b".into(), "interfaces.name"),
            (|i| i.name = "a".repeat(16), "interfaces.name"),
            (|i| i.mac = vec![1], "interfaces.mac"),
            (|i| i.mtu = 67, "interfaces.mtu"),
            (|i| i.addresses[0].prefix_length = 33, "interfaces.addresses"),
        ];
        for (break_it, field) in ways {
            let mut broken = interface();
            break_it(&mut broken);
            assert_eq!(broken.check().unwrap_err().field, field);
        }
    }

    #[test]
    fn routes_keep_to_one_family() {
        let destination = IpPrefix {
            address: vec![0; 4],
            ..IpPrefix::default()
        };
        let mut route = NetworkRoute {
            interface: "eth0".into(),
            destination: Some(destination).into(),
            gateway: vec![10, 0, 0, 1],
            ..NetworkRoute::default()
        };
        route.check().unwrap();
        route.source = vec![0; 16];
        assert_eq!(route.check().unwrap_err().field, "routes.source");
        route.destination = None.into();
        assert_eq!(route.check().unwrap_err().field, "routes.destination");
    }
}
