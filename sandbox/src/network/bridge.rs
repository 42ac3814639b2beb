//! The bridge of a network, made when it is first needed, also after the host has been down.

use std::{
    fs, io,
    net::{IpAddr, Ipv4Addr},
    os::fd::OwnedFd,
};

use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL};
use netlink_packet_route::{
    AddressFamily, RouteNetlinkMessage,
    address::{AddressAttribute, AddressMessage},
    link::{InfoKind, LinkAttribute, LinkInfo, LinkMessage},
};

use super::{NetworkError, NetworkRecord, netlink::Netlink, tap};

/// Ethernet's.
pub(crate) const DEFAULT_MTU: u16 = 1500;

/// The address of the interface that has an IPv4 address in a network of ours.
pub(crate) fn mac_of(address: Ipv4Addr) -> [u8; 6] {
    let [a, b, c, d] = address.octets();
    [0x02, b'h', a, b, c, d]
}

/// The bridge's link, made and set up where it is missing.
pub(crate) fn ensure(
    netlink: &mut Netlink,
    record: &NetworkRecord,
    alias: &str,
) -> Result<u32, NetworkError> {
    let action = || format!("making the bridge {}", record.bridge);
    let found = netlink
        .link(&record.bridge)
        .map_err(NetworkError::kernel(action()))?;
    if let Some(link) = found {
        if link.kind != Some(InfoKind::Bridge) || link.alias.as_deref() != Some(alias) {
            return Err(NetworkError::BridgeTaken {
                bridge: record.bridge.clone(),
                network: record.name.clone(),
            });
        }
        if link.up {
            return Ok(link.index);
        }
        set_up(netlink, record, link.index, alias)?;
        return Ok(link.index);
    }
    let mut link = LinkMessage::default();
    link.attributes = vec![
        LinkAttribute::IfName(record.bridge.clone()),
        LinkAttribute::Mtu(record.mtu.unwrap_or(DEFAULT_MTU).into()),
        LinkAttribute::Address(mac_of(record.subnet.gateway()).to_vec()),
        LinkAttribute::LinkInfo(vec![LinkInfo::Kind(InfoKind::Bridge)]),
    ];
    netlink
        .request(RouteNetlinkMessage::NewLink(link), NLM_F_CREATE | NLM_F_EXCL)
        .map_err(NetworkError::kernel(action()))?;
    let made = netlink
        .link(&record.bridge)
        .map_err(NetworkError::kernel(action()))?;
    let made =
        made.ok_or_else(|| NetworkError::kernel(action())(io::Error::from(io::ErrorKind::NotFound)))?;
    set_up(netlink, record, made.index, alias)?;
    Ok(made.index)
}

/// Gives the bridge its address and switches on what it needs; up, and so whole, only at the end.
fn set_up(
    netlink: &mut Netlink,
    record: &NetworkRecord,
    index: u32,
    alias: &str,
) -> Result<(), NetworkError> {
    let action = || format!("setting up the bridge {}", record.bridge);
    let named = vec![LinkAttribute::IfAlias(alias.to_owned())];
    netlink
        .set_link(index, false, named)
        .map_err(NetworkError::kernel(action()))?;
    let bridge = &record.bridge;
    // Addresses that loop back are let through to ports that are published there; the firewall drops those from outside.
    set_sysctl(&format!("net/ipv4/conf/{bridge}/route_localnet"), "1")?;
    set_sysctl(&format!("net/ipv4/conf/{bridge}/send_redirects"), "0")?;
    disable_ipv6(bridge);
    let mut address = AddressMessage::default();
    address.header.family = AddressFamily::Inet;
    address.header.prefix_len = record.subnet.length();
    address.header.index = index;
    address.attributes = vec![
        AddressAttribute::Local(IpAddr::V4(record.subnet.gateway())),
        AddressAttribute::Address(IpAddr::V4(record.subnet.gateway())),
    ];
    match netlink.request(
        RouteNetlinkMessage::NewAddress(address),
        NLM_F_CREATE | NLM_F_EXCL,
    ) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
        result => result.map_err(NetworkError::kernel(action()))?,
    }
    if read_sysctl("net/ipv4/ip_forward") == "0" {
        set_sysctl("net/ipv4/ip_forward", "1")?;
    }
    netlink
        .set_link(index, true, Vec::new())
        .map_err(NetworkError::kernel(action()))
}

/// Removes the bridge, if it is there and ours.
pub(crate) fn remove(record: &NetworkRecord, alias: &str) -> Result<(), NetworkError> {
    let action = || format!("removing the bridge {}", record.bridge);
    let mut netlink = Netlink::open().map_err(NetworkError::kernel(action()))?;
    let found = netlink
        .link(&record.bridge)
        .map_err(NetworkError::kernel(action()))?;
    let Some(link) = found.filter(|link| link.alias.as_deref() == Some(alias)) else {
        return Ok(());
    };
    let mut message = LinkMessage::default();
    message.header.index = link.index;
    netlink
        .request(RouteNetlinkMessage::DelLink(message), 0)
        .map_err(NetworkError::kernel(action()))
}

/// A tap on the bridge.
pub(crate) fn plug(
    netlink: &mut Netlink,
    record: &NetworkRecord,
    bridge: u32,
    name: &str,
) -> Result<OwnedFd, NetworkError> {
    let action = || format!("putting a tap on the bridge {}", record.bridge);
    let tap = tap::open(name).map_err(NetworkError::kernel(action()))?;
    let link = netlink.link(name).map_err(NetworkError::kernel(action()))?;
    let link =
        link.ok_or_else(|| NetworkError::kernel(action())(io::Error::from(io::ErrorKind::NotFound)))?;
    disable_ipv6(name);
    let attributes = vec![
        LinkAttribute::Mtu(record.mtu.unwrap_or(DEFAULT_MTU).into()),
        LinkAttribute::Controller(bridge),
    ];
    netlink
        .set_link(link.index, true, attributes)
        .map_err(NetworkError::kernel(action()))?;
    Ok(tap)
}

/// The host itself has no IPv6 there: nothing would filter it.
fn disable_ipv6(interface: &str) {
    // A host without IPv6 has nothing to switch off.
    drop(set_sysctl(
        &format!("net/ipv6/conf/{interface}/disable_ipv6"),
        "1",
    ));
}

fn read_sysctl(name: &str) -> String {
    let text = fs::read_to_string(format!("/proc/sys/{name}")).unwrap_or_default();
    text.trim().to_owned()
}

fn set_sysctl(name: &str, value: &str) -> Result<(), NetworkError> {
    let path = format!("/proc/sys/{name}");
    fs::write(&path, value).map_err(NetworkError::io("writing", path))
}
