//! The microVM's interfaces, as the host describes them. The container shares them: nobody else is here.
//!
//! Everything is "create or replace", so that a description may be given again when the host's side has changed.

mod netlink;

use agent_protocol::{ConfigureNetworkRequest, IpPrefix, NetworkInterface, NetworkNeighbour, NetworkRoute};
use nix::errno::Errno;

use self::netlink::{Message, Netlink, kind};
use crate::error::AgentError;

// Of `linux/if_link.h`, `if_addr.h`, `rtnetlink.h` and `neighbour.h`.
const IFLA_ADDRESS: u16 = 1;
const IFLA_IFNAME: u16 = 3;
const IFLA_MTU: u16 = 4;
const IFA_ADDRESS: u16 = 1;
const IFA_LOCAL: u16 = 2;
const IFA_BROADCAST: u16 = 4;
/// An address that is unique by construction needs no probe, which would keep it from being used for a second.
const IFA_F_NODAD: u8 = 2;
const RTA_DST: u16 = 1;
const RTA_OIF: u16 = 4;
const RTA_GATEWAY: u16 = 5;
const RTA_PRIORITY: u16 = 6;
const RTA_PREFSRC: u16 = 7;
const RT_TABLE_MAIN: u8 = 254;
const RTPROT_STATIC: u8 = 4;
const RT_SCOPE_UNIVERSE: u8 = 0;
const RT_SCOPE_LINK: u8 = 253;
const RTN_UNICAST: u8 = 1;
const RTNH_F_ONLINK: u32 = 4;
const NDA_DST: u16 = 1;
const NDA_LLADDR: u16 = 2;
const NUD_PERMANENT: u16 = 0x80;
const IFF_UP: u32 = 1;

/// Sets up all of `request`.
pub fn configure(request: &ConfigureNetworkRequest) -> Result<(), AgentError> {
    let mut netlink = Netlink::open().map_err(failed("opening a netlink socket"))?;
    let mut names = Vec::with_capacity(request.interfaces.len());
    for interface in &request.interfaces {
        let index = set_link(&mut netlink, interface)?;
        names.push((interface.name.as_str(), index));
    }
    let index_of = |name: &str| {
        let found = names.iter().find(|(known, _)| *known == name);
        found.map(|(_, index)| *index).ok_or_else(|| AgentError::Network {
            subject: format!("interface {name}"),
            errno: Errno::ENODEV,
        })
    };
    // A gateway must be reachable when its route is made, so routes to what is on the link come first.
    let (direct, indirect): (Vec<_>, Vec<_>) =
        request.routes.iter().partition(|route| route.gateway.is_empty());
    for route in direct.into_iter().chain(indirect) {
        add_route(&mut netlink, route, index_of(&route.interface)?)?;
    }
    for neighbour in &request.neighbours {
        add_neighbour(&mut netlink, neighbour, index_of(&neighbour.interface)?)?;
    }
    Ok(())
}

fn failed(subject: impl Into<String>) -> impl FnOnce(Errno) -> AgentError {
    move |errno| AgentError::Network {
        subject: subject.into(),
        errno,
    }
}

/// Names an interface and brings it up with its addresses; its index.
fn set_link(netlink: &mut Netlink, interface: &NetworkInterface) -> Result<u32, AgentError> {
    let subject = format!("interface {}", interface.name);
    let index = netlink
        .link_with_address(&interface.device_mac)
        .and_then(|found| found.ok_or(Errno::ENODEV))
        .map_err(failed(&subject))?;
    let mut link = Message::link(index, 0, 0);
    if !interface.mac.is_empty() {
        link.attribute(IFLA_ADDRESS, &interface.mac);
    }
    if interface.mtu != 0 {
        link.attribute(IFLA_MTU, &interface.mtu.to_ne_bytes());
    }
    let mut name = interface.name.clone().into_bytes();
    name.push(0);
    link.attribute(IFLA_IFNAME, &name);
    netlink
        .request(kind::SET_LINK, 0, &link)
        .map_err(failed(&subject))?;
    let up = Message::link(index, IFF_UP, IFF_UP);
    netlink
        .request(kind::SET_LINK, 0, &up)
        .map_err(failed(&subject))?;
    for address in &interface.addresses {
        let message = address_message(index, address);
        netlink
            .request(kind::NEW_ADDRESS, netlink::CREATE | netlink::REPLACE, &message)
            .map_err(failed(format!("{subject}: address {}", text(address))))?;
    }
    Ok(index)
}

fn address_message(index: u32, prefix: &IpPrefix) -> Message {
    let length = length_of(prefix);
    let family = family_of(&prefix.address);
    let mut header = vec![family, length, IFA_F_NODAD, RT_SCOPE_UNIVERSE];
    header.extend(index.to_ne_bytes());
    let mut message = Message::new(&header);
    message.attribute(IFA_LOCAL, &prefix.address);
    message.attribute(IFA_ADDRESS, &prefix.address);
    if let Ok(octets) = <[u8; 4]>::try_from(prefix.address.as_slice())
        && length < 31
    {
        let hosts = u32::MAX.checked_shr(length.into()).unwrap_or(0);
        let broadcast = u32::from_be_bytes(octets) | hosts;
        message.attribute(IFA_BROADCAST, &broadcast.to_be_bytes());
    }
    message
}

fn add_route(netlink: &mut Netlink, route: &NetworkRoute, index: u32) -> Result<(), AgentError> {
    let length = length_of(&route.destination);
    let scope = if route.gateway.is_empty() && route.destination.address.len() == 4 {
        RT_SCOPE_LINK
    } else {
        RT_SCOPE_UNIVERSE
    };
    let family = family_of(&route.destination.address);
    let flags = if route.onlink { RTNH_F_ONLINK } else { 0 };
    let mut header = vec![
        family,
        length,
        0,
        0,
        RT_TABLE_MAIN,
        RTPROT_STATIC,
        scope,
        RTN_UNICAST,
    ];
    header.extend(flags.to_ne_bytes());
    let mut message = Message::new(&header);
    if length > 0 {
        message.attribute(RTA_DST, &route.destination.address);
    }
    for (kind, address) in [(RTA_GATEWAY, &route.gateway), (RTA_PREFSRC, &route.source)] {
        if !address.is_empty() {
            message.attribute(kind, address);
        }
    }
    if route.metric != 0 {
        message.attribute(RTA_PRIORITY, &route.metric.to_ne_bytes());
    }
    message.attribute(RTA_OIF, &index.to_ne_bytes());
    netlink
        .request(kind::NEW_ROUTE, netlink::CREATE | netlink::REPLACE, &message)
        .map_err(failed(format!(
            "route to {} through {}",
            text(&route.destination),
            route.interface
        )))
}

fn add_neighbour(netlink: &mut Netlink, neighbour: &NetworkNeighbour, index: u32) -> Result<(), AgentError> {
    let mut header = vec![family_of(&neighbour.address), 0, 0, 0];
    header.extend(index.to_ne_bytes());
    header.extend(NUD_PERMANENT.to_ne_bytes());
    header.extend([0, RTN_UNICAST]);
    let mut message = Message::new(&header);
    message.attribute(NDA_DST, &neighbour.address);
    message.attribute(NDA_LLADDR, &neighbour.mac);
    netlink
        .request(kind::NEW_NEIGHBOUR, netlink::CREATE | netlink::REPLACE, &message)
        .map_err(failed(format!("a neighbour on {}", neighbour.interface)))
}

fn family_of(address: &[u8]) -> u8 {
    let family = if address.len() == 4 {
        libc::AF_INET
    } else {
        libc::AF_INET6
    };
    u8::try_from(family).unwrap_or(0)
}

fn length_of(prefix: &IpPrefix) -> u8 {
    // At most 128, as its bounds say.
    u8::try_from(prefix.prefix_length).unwrap_or(128)
}

fn text(prefix: &IpPrefix) -> String {
    use std::net::{Ipv4Addr, Ipv6Addr};
    let address = prefix.address.as_slice();
    let text = match (<[u8; 4]>::try_from(address), <[u8; 16]>::try_from(address)) {
        (Ok(octets), _) => Ipv4Addr::from(octets).to_string(),
        (_, Ok(octets)) => Ipv6Addr::from(octets).to_string(),
        _ => "?".to_owned(),
    };
    format!("{text}/{}", prefix.prefix_length)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn prefix(address: &[u8], prefix_length: u32) -> IpPrefix {
        IpPrefix {
            address: address.to_vec(),
            prefix_length,
            ..IpPrefix::default()
        }
    }

    #[test]
    fn broadcast_addresses_are_those_of_the_prefix() {
        let ends_with = |message: &Message, bytes: &[u8]| message.body().ends_with(bytes);
        assert!(ends_with(
            &address_message(2, &prefix(&[10, 1, 2, 3], 20)),
            &[10, 1, 15, 255]
        ));
        // Two addresses, or one, have none.
        for length in [31, 32] {
            let message = address_message(2, &prefix(&[10, 1, 2, 3], length));
            assert!(ends_with(&message, &[10, 1, 2, 3]));
        }
        assert!(ends_with(
            &address_message(2, &prefix(&[10, 1, 2, 3], 0)),
            &[255; 4]
        ));
    }

    #[test]
    fn prefixes_are_told_as_people_write_them() {
        assert_eq!(text(&prefix(&[0; 4], 0)), "0.0.0.0/0");
        assert_eq!(text(&prefix(&[0; 16], 64)), "::/64");
    }
}
