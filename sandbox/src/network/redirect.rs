//! Two interfaces of a namespace made one wire: every frame that comes in at one leaves through the other.
//!
//! By an ingress qdisc and one filter each, of the kind (`u32` that matches everything, action `mirred`) that all kernels
//! have. An ingress qdisc that was there stays; the filter has a priority and a handle of our own.

use std::io;

use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL};
use netlink_packet_route::{
    RouteNetlinkMessage,
    tc::{
        TcAction, TcActionAttribute, TcActionGeneric, TcActionMirror, TcActionMirrorOption, TcActionOption,
        TcActionType, TcAttribute, TcFilterU32, TcFilterU32Option, TcHandle, TcHeader, TcMessage, TcMirror,
        TcMirrorActionType, TcOption, TcU32Key, TcU32Selector, TcU32SelectorFlags,
    },
};

use super::netlink::Netlink;

/// Nobody else's by accident ("hu"), and behind filters that others have added: they see frames first.
const PRIORITY: u32 = 0x6875;
/// ETH_P_ALL in network byte order.
const ALL_PROTOCOLS: u32 = 0x0300;
const INGRESS: TcHandle = TcHandle {
    major: 0xffff,
    minor: 0,
};

/// Sends everything that comes in at `from` out through `to`. [`io::ErrorKind::AlreadyExists`]: somebody else does.
pub(crate) fn redirect(netlink: &mut Netlink, from: u32, to: u32) -> io::Result<()> {
    match netlink.request(
        RouteNetlinkMessage::NewQueueDiscipline(qdisc(from)),
        NLM_F_CREATE | NLM_F_EXCL,
    ) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
        result => result?,
    }
    netlink.request(
        RouteNetlinkMessage::NewTrafficFilter(filter(from, Some(to))),
        NLM_F_CREATE | NLM_F_EXCL,
    )
}

/// Takes the redirection of `from` back. What isn't there any more is no error.
pub(crate) fn undo(netlink: &mut Netlink, from: u32) -> io::Result<()> {
    let gone = |error: &io::Error| {
        let code = error.raw_os_error().map(rustix::io::Errno::from_raw_os_error);
        matches!(
            code,
            Some(rustix::io::Errno::NOENT | rustix::io::Errno::NODEV | rustix::io::Errno::INVAL)
        )
    };
    let filter = RouteNetlinkMessage::DelTrafficFilter(filter(from, None));
    match netlink.request(filter, 0) {
        Err(error) if gone(&error) => {}
        result => result?,
    }
    if has_filters(netlink, from)? {
        return Ok(());
    }
    match netlink.request(RouteNetlinkMessage::DelQueueDiscipline(qdisc(from)), 0) {
        Err(error) if gone(&error) => Ok(()),
        result => result,
    }
}

/// Whether anything comes in at a link by a filter.
pub(crate) fn has_filters(netlink: &mut Netlink, index: u32) -> io::Result<bool> {
    let mut message = TcMessage::with_index(index.cast_signed());
    message.header.parent = INGRESS;
    match netlink.dump(RouteNetlinkMessage::GetTrafficFilter(message)) {
        Ok(filters) => Ok(!filters.is_empty()),
        // There is no such qdisc.
        Err(_) => Ok(false),
    }
}

fn qdisc(index: u32) -> TcMessage {
    let header = TcHeader {
        index: index.cast_signed(),
        handle: INGRESS,
        parent: TcHandle::INGRESS,
        ..TcHeader::default()
    };
    TcMessage::from_parts(header, vec![TcAttribute::Kind("ingress".to_owned())])
}

fn filter(index: u32, to: Option<u32>) -> TcMessage {
    let header = TcHeader {
        index: index.cast_signed(),
        parent: INGRESS,
        info: PRIORITY << 16 | ALL_PROTOCOLS,
        ..TcHeader::default()
    };
    let mut attributes = vec![TcAttribute::Kind(TcFilterU32::KIND.to_owned())];
    if let Some(to) = to {
        attributes.push(TcAttribute::Options(vec![
            TcOption::U32(TcFilterU32Option::Selector(everything())),
            TcOption::U32(TcFilterU32Option::Action(vec![send_out(to)])),
        ]));
    }
    TcMessage::from_parts(header, attributes)
}

/// One comparison that any frame passes.
fn everything() -> TcU32Selector {
    let mut selector = TcU32Selector::default();
    selector.flags = TcU32SelectorFlags::Terminal;
    selector.nkeys = 1;
    selector.keys = vec![TcU32Key::default()];
    selector
}

fn send_out(to: u32) -> TcAction {
    let mut generic = TcActionGeneric::default();
    generic.action = TcActionType::Stolen;
    let mut mirror = TcMirror::default();
    mirror.generic = generic;
    mirror.eaction = TcMirrorActionType::EgressRedir;
    mirror.ifindex = to;
    let mut action = TcAction::default();
    action.attributes = vec![
        TcActionAttribute::Kind(TcActionMirror::KIND.to_owned()),
        TcActionAttribute::Options(vec![TcActionOption::Mirror(TcActionMirrorOption::Parms(mirror))]),
    ];
    action
}
