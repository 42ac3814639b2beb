//! What is in a network namespace: its Ethernet interfaces with their addresses, routes and static neighbours, as the guest
//! shall have them.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use agent_protocol::{IpPrefix, NetworkInterface, NetworkNeighbour, NetworkRoute};
use netlink_packet_route::{
    AddressFamily, RouteNetlinkMessage,
    address::{AddressAttribute, AddressMessage, AddressScope},
    neighbour::{NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState},
    route::{RouteAddress, RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteProtocol, RouteType},
};

use super::{
    device_mac,
    netlink::{Link, Netlink},
};

/// What was found.
#[derive(Debug, Default)]
pub(crate) struct Scanned {
    /// The interfaces, in the order of the devices that carry them.
    pub(crate) links: Vec<Link>,
    pub(crate) interfaces: Vec<NetworkInterface>,
    pub(crate) routes: Vec<NetworkRoute>,
    pub(crate) neighbours: Vec<NetworkNeighbour>,
}

/// Scans the calling thread's namespace. Interfaces that are down, and taps of ours, are left out.
pub(crate) fn scan(netlink: &mut Netlink) -> io::Result<Scanned> {
    let mut links: Vec<Link> = netlink.links()?;
    links.retain(|link| link.ethernet && link.up && !link.name.starts_with(super::wiring::TAP_PREFIX));
    links.sort_by_key(|link| link.index);
    let mut interfaces: Vec<NetworkInterface> = links
        .iter()
        .enumerate()
        .map(|(index, link)| NetworkInterface {
            device_mac: device_mac(index).to_vec(),
            name: link.name.clone(),
            mac: link.mac.clone(),
            mtu: link.mtu,
            ..NetworkInterface::default()
        })
        .collect();
    let position = |index: u32| links.iter().position(|link| link.index == index);
    for object in netlink.dump(RouteNetlinkMessage::GetAddress(AddressMessage::default()))? {
        let RouteNetlinkMessage::NewAddress(message) = object else {
            continue;
        };
        if let (Some(position), Some(prefix)) = (position(message.header.index), read_address(&message)) {
            interfaces[position].addresses.push(prefix);
        }
    }
    let name_of = |index: u32| position(index).map(|position| links[position].name.clone());
    Ok(Scanned {
        routes: routes(netlink, &name_of)?,
        neighbours: neighbours(netlink, &name_of)?,
        interfaces,
        links,
    })
}

/// Link-local addresses are left out: the guest makes its own.
fn read_address(message: &AddressMessage) -> Option<IpPrefix> {
    if message.header.scope != AddressScope::Universe && message.header.scope != AddressScope::Site {
        return None;
    }
    let find = |wanted: fn(&AddressAttribute) -> Option<IpAddr>| message.attributes.iter().find_map(wanted);
    // On a point-to-point link the other one is the peer's.
    let local = find(|attribute| match attribute {
        AddressAttribute::Local(address) => Some(*address),
        _ => None,
    });
    let address = local.or_else(|| {
        find(|attribute| match attribute {
            AddressAttribute::Address(address) => Some(*address),
            _ => None,
        })
    })?;
    Some(prefix(address, message.header.prefix_len))
}

fn routes(netlink: &mut Netlink, name_of: &dyn Fn(u32) -> Option<String>) -> io::Result<Vec<NetworkRoute>> {
    let mut routes = Vec::new();
    for family in [AddressFamily::Inet, AddressFamily::Inet6] {
        let mut request = RouteMessage::default();
        request.header.address_family = family;
        for object in netlink.dump(RouteNetlinkMessage::GetRoute(request))? {
            if let RouteNetlinkMessage::NewRoute(message) = object {
                routes.extend(read_route(&message, name_of));
            }
        }
    }
    Ok(routes)
}

/// Those that come with an address are left out: the guest's addresses bring theirs.
fn read_route(message: &RouteMessage, name_of: &dyn Fn(u32) -> Option<String>) -> Option<NetworkRoute> {
    let header = &message.header;
    let v6 = header.address_family == AddressFamily::Inet6;
    if header.table != RouteHeader::RT_TABLE_MAIN
        || header.kind != RouteType::Unicast
        || matches!(header.protocol, RouteProtocol::Kernel | RouteProtocol::Ra)
    {
        return None;
    }
    let any = if v6 {
        IpAddr::V6(Ipv6Addr::UNSPECIFIED)
    } else {
        IpAddr::V4(Ipv4Addr::UNSPECIFIED)
    };
    let mut route = NetworkRoute {
        destination: Some(prefix(any, header.destination_prefix_length)).into(),
        onlink: header.flags.contains(RouteFlags::Onlink),
        ..NetworkRoute::default()
    };
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Destination(address) => {
                route.destination.mut_or_insert_default().address = bytes(address)?;
            }
            RouteAttribute::Gateway(address) => route.gateway = bytes(address)?,
            RouteAttribute::PrefSource(address) => route.source = bytes(address)?,
            // The kernel's own, where none was given.
            RouteAttribute::Priority(metric) if !(v6 && *metric == 1024) => route.metric = *metric,
            RouteAttribute::Oif(index) => route.interface = name_of(*index)?,
            _ => {}
        }
    }
    (!route.interface.is_empty()).then_some(route)
}

fn neighbours(
    netlink: &mut Netlink,
    name_of: &dyn Fn(u32) -> Option<String>,
) -> io::Result<Vec<NetworkNeighbour>> {
    let objects = netlink.dump(RouteNetlinkMessage::GetNeighbour(NeighbourMessage::default()))?;
    let read = |object| {
        let RouteNetlinkMessage::NewNeighbour(message) = object else {
            return None;
        };
        if message.header.state != NeighbourState::Permanent {
            return None;
        }
        let mut neighbour = NetworkNeighbour {
            interface: name_of(message.header.ifindex)?,
            ..NetworkNeighbour::default()
        };
        for attribute in message.attributes {
            match attribute {
                NeighbourAttribute::Destination(NeighbourAddress::Inet(address)) => {
                    neighbour.address = address.octets().to_vec();
                }
                NeighbourAttribute::Destination(NeighbourAddress::Inet6(address)) => {
                    neighbour.address = address.octets().to_vec();
                }
                NeighbourAttribute::LinkLayerAddress(mac) => neighbour.mac = mac,
                _ => {}
            }
        }
        (!neighbour.address.is_empty() && neighbour.mac.len() == 6).then_some(neighbour)
    };
    Ok(objects.into_iter().filter_map(read).collect())
}

fn bytes(address: &RouteAddress) -> Option<Vec<u8>> {
    match address {
        RouteAddress::Inet(address) => Some(address.octets().to_vec()),
        RouteAddress::Inet6(address) => Some(address.octets().to_vec()),
        _ => None,
    }
}

/// An address as the agent's messages have it.
pub(crate) fn prefix(address: IpAddr, length: u8) -> IpPrefix {
    IpPrefix {
        address: match address {
            IpAddr::V4(address) => address.octets().to_vec(),
            IpAddr::V6(address) => address.octets().to_vec(),
        },
        prefix_length: length.into(),
        ..IpPrefix::default()
    }
}
