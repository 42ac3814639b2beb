//! How the VMM has the marks of an overlay's upper layer read and written, which takes a right the VMM doesn't have.
//!
//! overlayfs marks directories by extended attributes of the host that only CAP_SYS_ADMIN may see or set. The shares' thread
//! passes an open directory and asks; whoever holds the other end of the socket checks that the directory is of the share, and
//! does it. One request a packet, one answer a packet, in order.

/// Longest value of a mark.
pub const MAX_VALUE_BYTES: usize = 16;
/// Longest request.
pub const MAX_REQUEST_BYTES: usize = 1 + MAX_VALUE_BYTES;
/// Longest answer.
pub const MAX_ANSWER_BYTES: usize = 4 + MAX_VALUE_BYTES;

/// The one mark that is dealt with: nothing of the layers below shows in the directory.
pub const OPAQUE: &str = "trusted.overlay.opaque";
/// The values overlayfs gives it; the middle one when it tries whether it can.
pub const OPAQUE_VALUES: [&[u8]; 3] = [b"y", b"0", b"x"];

/// What is asked of a directory that comes along with the request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum MarkRequest {
    /// What the mark is.
    Get,
    /// Be it this.
    Set(Vec<u8>),
    /// Be there none.
    Remove,
}

/// What is answered: the mark, or the number of an error.
pub type MarkAnswer = Result<Vec<u8>, i32>;

const GET: u8 = 1;
const SET: u8 = 2;
const REMOVE: u8 = 3;

impl MarkRequest {
    /// As a packet.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        match self {
            Self::Get => vec![GET],
            Self::Set(value) => [&[SET], value.as_slice()].concat(),
            Self::Remove => vec![REMOVE],
        }
    }

    /// Of a packet, which may be anything; only values that overlayfs gives are let through.
    #[must_use]
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        match bytes {
            [GET] => Some(Self::Get),
            [REMOVE] => Some(Self::Remove),
            [SET, value @ ..] if OPAQUE_VALUES.contains(&value) => Some(Self::Set(value.to_vec())),
            _ => None,
        }
    }
}

/// An answer as a packet.
#[must_use]
pub fn answer_to_bytes(answer: &MarkAnswer) -> Vec<u8> {
    match answer {
        Ok(value) => [&0_i32.to_le_bytes(), value.as_slice()].concat(),
        Err(number) => number.to_le_bytes().to_vec(),
    }
}

/// An answer of a packet.
#[must_use]
pub fn answer_from_bytes(bytes: &[u8]) -> Option<MarkAnswer> {
    let (number, value) = bytes.split_first_chunk()?;
    Some(match i32::from_le_bytes(*number) {
        0 => Ok(value.to_vec()),
        number => Err(number),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packets_say_what_was_meant_and_nothing_else_is_one() {
        for request in [
            MarkRequest::Get,
            MarkRequest::Set(b"y".to_vec()),
            MarkRequest::Remove,
        ] {
            assert_eq!(MarkRequest::from_bytes(&request.to_bytes()), Some(request));
        }
        for answer in [Ok(b"y".to_vec()), Ok(Vec::new()), Err(61)] {
            assert_eq!(answer_from_bytes(&answer_to_bytes(&answer)), Some(answer));
        }
        for bytes in [
            &b""[..],
            b"\x00",
            b"\x01x",
            b"\x02",
            b"\x02/etc",
            b"\x02yy",
            b"\x03y",
            b"\x04",
        ] {
            assert_eq!(MarkRequest::from_bytes(bytes), None, "{bytes:?}");
        }
        assert_eq!(answer_from_bytes(b"\x00"), None);
    }
}
