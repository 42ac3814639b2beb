//! Ranges of IPv4 addresses, and the choice of one that nothing on the host uses.

use std::{fmt, io, net::Ipv4Addr, str::FromStr};

use netlink_packet_route::{
    AddressFamily, RouteNetlinkMessage,
    route::{RouteAddress, RouteAttribute, RouteMessage},
};
use serde::{Deserialize, Serialize};

use super::{NetworkError, netlink::Netlink};

/// Shortest and longest prefix of a network: some room, and not all there is.
const PREFIX_RANGE: std::ops::RangeInclusive<u8> = 8..=29;
/// Prefix of ranges that are chosen here.
const CHOSEN_PREFIX: u8 = 16;
/// Where the choice begins.
const FIRST_CHOICE: u8 = 88;

/// A range.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub struct Subnet {
    first: Ipv4Addr,
    length: u8,
}

impl Subnet {
    /// A range by its first address and its prefix's length; `None` if the address isn't its first.
    fn new(first: Ipv4Addr, length: u8) -> Option<Self> {
        let subnet = Self { first, length };
        (length <= 32 && first.to_bits() & subnet.host_mask() == 0).then_some(subnet)
    }

    fn host_mask(self) -> u32 {
        u32::MAX.checked_shr(self.length.into()).unwrap_or(0)
    }

    /// Length of the prefix.
    #[must_use]
    pub fn length(self) -> u8 {
        self.length
    }

    /// Whether the address is in the range.
    #[must_use]
    pub fn contains(self, address: Ipv4Addr) -> bool {
        address.to_bits() & !self.host_mask() == self.first.to_bits()
    }

    fn overlaps(self, other: Self) -> bool {
        self.contains(other.first) || other.contains(self.first)
    }

    /// The host's own address on the bridge.
    #[must_use]
    pub fn gateway(self) -> Ipv4Addr {
        Ipv4Addr::from_bits(self.first.to_bits() + 1)
    }

    /// The last address, which reaches all.
    fn broadcast(self) -> Ipv4Addr {
        Ipv4Addr::from_bits(self.first.to_bits() | self.host_mask())
    }

    /// Whether a container can have the address.
    #[must_use]
    pub fn is_assignable(self, address: Ipv4Addr) -> bool {
        self.contains(address)
            && address != self.first
            && address != self.gateway()
            && address != self.broadcast()
    }

    /// The first free address after `after`, around the end.
    pub(crate) fn next_free(self, after: Ipv4Addr, taken: impl Fn(Ipv4Addr) -> bool) -> Option<Ipv4Addr> {
        let size = self.host_mask();
        let start = after.to_bits().wrapping_sub(self.first.to_bits()) & size;
        (1..=size)
            .map(|step| Ipv4Addr::from_bits(self.first.to_bits() + (start.wrapping_add(step) & size)))
            .find(|address| self.is_assignable(*address) && !taken(*address))
    }

    /// Checks a range that the user names.
    pub(crate) fn check(self, used: &[Self]) -> Result<Self, NetworkError> {
        let refuse = |problem: String| NetworkError::Subnet {
            subnet: self.to_string(),
            problem,
        };
        if !PREFIX_RANGE.contains(&self.length) {
            return Err(refuse("a prefix of 8 to 29 bits is needed".into()));
        }
        match used.iter().find(|used| used.overlaps(self)) {
            Some(used) => Err(refuse(format!("{used} is in use on this host"))),
            None => Ok(self),
        }
    }

    /// A range of 10.0.0.0/8 that overlaps none of `used`.
    pub(crate) fn choose(used: &[Self]) -> Result<Self, NetworkError> {
        (0..=u8::MAX)
            .map(|step| FIRST_CHOICE.wrapping_add(step))
            .filter_map(|second| Self::new(Ipv4Addr::new(10, second, 0, 0), CHOSEN_PREFIX))
            .find(|choice| used.iter().all(|used| !used.overlaps(*choice)))
            .ok_or(NetworkError::NoSubnet)
    }
}

impl fmt::Display for Subnet {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}/{}", self.first, self.length)
    }
}

impl FromStr for Subnet {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("{text:?} is no range of IPv4 addresses, as in 10.88.0.0/16");
        let (first, length) = text.split_once('/').ok_or_else(wrong)?;
        let first = first.parse().map_err(|_| wrong())?;
        let length = length.parse().map_err(|_| wrong())?;
        Self::new(first, length).ok_or_else(wrong)
    }
}

impl From<Subnet> for String {
    fn from(subnet: Subnet) -> Self {
        subnet.to_string()
    }
}

impl TryFrom<String> for Subnet {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

/// What the host has routes to, all but the default route.
pub(crate) fn used_on_host(netlink: &mut Netlink) -> io::Result<Vec<Subnet>> {
    let mut request = RouteMessage::default();
    request.header.address_family = AddressFamily::Inet;
    let read = |object| {
        let RouteNetlinkMessage::NewRoute(message) = object else {
            return None;
        };
        let first = message.attributes.iter().find_map(|attribute| match attribute {
            RouteAttribute::Destination(RouteAddress::Inet(address)) => Some(*address),
            _ => None,
        })?;
        Subnet::new(first, message.header.destination_prefix_length)
    };
    let routes = netlink.dump(RouteNetlinkMessage::GetRoute(request))?;
    Ok(routes.into_iter().filter_map(read).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn subnet(text: &str) -> Subnet {
        text.parse().unwrap()
    }

    #[test]
    fn ranges_are_as_people_write_them() {
        assert_eq!(subnet("10.1.0.0/16").to_string(), "10.1.0.0/16");
        for bad in [
            "",
            "10.1.0.0",
            "10.1.0.1/16",
            "10.1.0.0/33",
            "10.1.0.0/x",
            "fd00::/8",
        ] {
            assert!(bad.parse::<Subnet>().is_err(), "{bad}");
        }
    }

    #[test]
    fn choice_avoids_what_is_in_use() {
        assert_eq!(Subnet::choose(&[]).unwrap(), subnet("10.88.0.0/16"));
        let used = [
            subnet("10.88.3.0/24"),
            subnet("10.89.0.1/32"),
            subnet("192.168.0.0/16"),
        ];
        assert_eq!(Subnet::choose(&used).unwrap(), subnet("10.90.0.0/16"));
        assert!(matches!(
            Subnet::choose(&[subnet("10.0.0.0/8")]),
            Err(NetworkError::NoSubnet)
        ));
        assert!(subnet("10.88.0.0/24").check(&used).is_ok());
        assert!(subnet("10.88.0.0/22").check(&used).is_err());
        assert!(subnet("10.88.0.0/30").check(&[]).is_err());
    }

    #[test]
    fn addresses_are_handed_out_in_turn_and_never_the_special_ones() {
        let small = subnet("10.1.0.0/29");
        let mut after = small.gateway();
        let mut given = Vec::new();
        for _ in 0..5 {
            after = small
                .next_free(after, |address| given.contains(&address))
                .unwrap();
            given.push(after);
        }
        assert_eq!(given.first(), Some(&Ipv4Addr::new(10, 1, 0, 2)));
        assert_eq!(given.last(), Some(&Ipv4Addr::new(10, 1, 0, 6)));
        assert_eq!(small.next_free(after, |address| given.contains(&address)), None);
        assert_eq!(
            small.next_free(after, |_| false),
            Some(Ipv4Addr::new(10, 1, 0, 2))
        );
        assert!(!small.is_assignable(Ipv4Addr::new(10, 1, 0, 7)));
    }
}
