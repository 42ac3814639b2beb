//! As much of rtnetlink as setting interfaces up takes: one request, one answer.
//!
//! Own code, because what there is for this brings a message type for all of the kernel's network into PID 1.

use std::os::fd::{AsRawFd as _, OwnedFd};

use nix::{
    errno::Errno,
    sys::socket::{AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, send, socket},
};

/// Kinds of messages.
pub mod kind {
    /// RTM_GETLINK.
    pub const GET_LINK: u16 = 18;
    /// RTM_SETLINK.
    pub const SET_LINK: u16 = 19;
    /// RTM_NEWADDR.
    pub const NEW_ADDRESS: u16 = 20;
    /// RTM_NEWROUTE.
    pub const NEW_ROUTE: u16 = 24;
    /// RTM_NEWNEIGH.
    pub const NEW_NEIGHBOUR: u16 = 28;
}

const REQUEST: u16 = 1;
const ACKNOWLEDGE: u16 = 4;
const DUMP: u16 = 0x300;
/// Make it where it isn't there.
pub const CREATE: u16 = 0x400;
/// Replace it where it is.
pub const REPLACE: u16 = 0x100;

const ERROR: u16 = 2;
const DONE: u16 = 3;
const NEW_LINK: u16 = 16;

const HEADER_BYTES: usize = 16;
const LINK_HEADER_BYTES: usize = 16;
const ATTRIBUTE_HEADER_BYTES: usize = 4;
const IFLA_ADDRESS: u16 = 1;
const IFLA_PERM_ADDRESS: u16 = 54;
/// More than the kernel puts into one answer.
const BUFFER_BYTES: usize = 64 * 1024;

/// A message's body: the fixed part and attributes.
#[derive(Debug)]
pub struct Message(Vec<u8>);

impl Message {
    /// A body that begins with `header`.
    pub fn new(header: &[u8]) -> Self {
        Self(header.to_vec())
    }

    /// Changes `flags` of a link to what `mask` selects.
    pub fn link(index: u32, flags: u32, mask: u32) -> Self {
        let mut header = vec![0; 4];
        header.extend(index.to_ne_bytes());
        header.extend(flags.to_ne_bytes());
        header.extend(mask.to_ne_bytes());
        Self(header)
    }

    /// Appends an attribute.
    pub fn attribute(&mut self, kind: u16, value: &[u8]) {
        let length = u16::try_from(ATTRIBUTE_HEADER_BYTES + value.len()).unwrap_or(u16::MAX);
        self.0.extend(length.to_ne_bytes());
        self.0.extend(kind.to_ne_bytes());
        self.0.extend(value);
        self.0.resize(self.0.len().next_multiple_of(4), 0);
    }

    #[cfg(test)]
    pub fn body(&self) -> &[u8] {
        &self.0
    }
}

/// A socket to the kernel's network.
#[derive(Debug)]
pub struct Netlink {
    socket: OwnedFd,
    sequence: u32,
    buffer: Vec<u8>,
}

impl Netlink {
    /// Opens one.
    pub fn open() -> Result<Self, Errno> {
        Ok(Self {
            socket: socket(
                AddressFamily::Netlink,
                SockType::Raw,
                SockFlag::SOCK_CLOEXEC,
                SockProtocol::NetlinkRoute,
            )?,
            sequence: 0,
            buffer: vec![0; BUFFER_BYTES],
        })
    }

    /// Makes a request and waits until it is carried out.
    pub fn request(&mut self, kind: u16, flags: u16, message: &Message) -> Result<(), Errno> {
        self.send(kind, flags | ACKNOWLEDGE, message)?;
        self.receive(|_, _| {})
    }

    /// The index of the link whose device has this address, whatever address it was given since.
    pub fn link_with_address(&mut self, address: &[u8]) -> Result<Option<u32>, Errno> {
        self.send(kind::GET_LINK, DUMP, &Message::link(0, 0, 0))?;
        let mut found = None;
        self.receive(|kind, body| {
            if kind == NEW_LINK && found.is_none() && has_address(body, address) {
                found = body.get(4..8).and_then(to_u32);
            }
        })?;
        Ok(found)
    }

    fn send(&mut self, kind: u16, flags: u16, message: &Message) -> Result<(), Errno> {
        self.sequence += 1;
        let length = u32::try_from(HEADER_BYTES + message.0.len()).map_err(|_| Errno::EMSGSIZE)?;
        let mut bytes = Vec::with_capacity(HEADER_BYTES + message.0.len());
        bytes.extend(length.to_ne_bytes());
        bytes.extend(kind.to_ne_bytes());
        bytes.extend((flags | REQUEST).to_ne_bytes());
        bytes.extend(self.sequence.to_ne_bytes());
        bytes.extend([0; 4]);
        bytes.extend(&message.0);
        send(self.socket.as_raw_fd(), &bytes, MsgFlags::empty()).map(drop)
    }

    /// Reads the answer to its end, and passes its messages' kinds and bodies to `each`.
    fn receive(&mut self, mut each: impl FnMut(u16, &[u8])) -> Result<(), Errno> {
        loop {
            let length = match recv(self.socket.as_raw_fd(), &mut self.buffer, MsgFlags::empty()) {
                Err(Errno::EINTR) => continue,
                received => received?,
            };
            let mut rest = self.buffer.get(..length).unwrap_or_default();
            while let Some((kind, body, next)) = split_message(rest) {
                rest = next;
                match kind {
                    DONE => return Ok(()),
                    ERROR => {
                        let code = body.get(..4).and_then(to_u32).unwrap_or(0).cast_signed();
                        return if code == 0 {
                            Ok(())
                        } else {
                            Err(Errno::from_raw(code.wrapping_neg()))
                        };
                    }
                    _ => each(kind, body),
                }
            }
        }
    }
}

fn to_u32(bytes: &[u8]) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.try_into().ok()?))
}

fn to_u16(bytes: &[u8]) -> Option<u16> {
    Some(u16::from_ne_bytes(bytes.try_into().ok()?))
}

/// The kind and the body of the first message, and what follows it.
fn split_message(bytes: &[u8]) -> Option<(u16, &[u8], &[u8])> {
    let length = usize::try_from(to_u32(bytes.get(..4)?)?).ok()?;
    let kind = to_u16(bytes.get(4..6)?)?;
    let body = bytes.get(HEADER_BYTES..length)?;
    Some((
        kind,
        body,
        bytes.get(length.next_multiple_of(4)..).unwrap_or_default(),
    ))
}

/// Whether a link's message has the address, as the device's own or as its present one.
fn has_address(body: &[u8], address: &[u8]) -> bool {
    let mut rest = body.get(LINK_HEADER_BYTES..).unwrap_or_default();
    while let Some(header) = rest.get(..ATTRIBUTE_HEADER_BYTES) {
        let (Some(length), Some(kind)) = (to_u16(&header[..2]), to_u16(&header[2..])) else {
            return false;
        };
        let length = usize::from(length);
        let Some(value) = rest.get(ATTRIBUTE_HEADER_BYTES..length) else {
            return false;
        };
        if matches!(kind, IFLA_ADDRESS | IFLA_PERM_ADDRESS) && value == address {
            return true;
        }
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loopback_is_found_by_its_address() {
        let mut netlink = Netlink::open().unwrap();
        assert_eq!(netlink.link_with_address(&[0; 6]).unwrap(), Some(1));
        assert_eq!(netlink.link_with_address(&[9; 6]).unwrap(), None);
    }

    #[test]
    fn refusal_is_the_kernels_error() {
        let mut netlink = Netlink::open().unwrap();
        let nowhere = Message::link(u32::MAX >> 1, 0, 0);
        let refused = netlink.request(kind::SET_LINK, 0, &nowhere).unwrap_err();
        assert!(matches!(refused, Errno::ENODEV | Errno::EPERM), "{refused}");
    }

    #[test]
    fn broken_answers_are_the_end_of_them() {
        assert!(split_message(&[]).is_none());
        assert!(split_message(&[0; 15]).is_none());
        assert!(split_message(&[0xff; 32]).is_none());
        let mut body = vec![0; 16];
        body.extend([3, 0, 1, 0]);
        assert!(!has_address(&body, &[]));
        body.truncate(16);
        body.extend([200, 0, 1, 0, 1]);
        assert!(!has_address(&body, &[1]));
    }
}
