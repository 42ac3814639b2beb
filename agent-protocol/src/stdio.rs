//! The header that opens a stdio stream, on a connection of its own.
//!
//! The host connects to [`crate::STDIO_PORT`], writes the header and then owns one ordered byte stream:
//! stdin flows to the guest, stdout and stderr flow to the host, a terminal flows both ways. The end of
//! a stream is the half-close of its direction.
//!
//! ```text
//! | "HIO1" | stream u8 | container id length u8 | exec id length u8 | 0 | container id | exec id |
//! ```

use crate::limits::{self, InvalidMessage};

/// Length of the fixed part of the header.
pub const FIXED_BYTES: usize = 8;

const MAGIC: [u8; 4] = *b"HIO1";

/// Which of a process's streams.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Stream {
    /// Host to process.
    Stdin = 0,
    /// Process to host.
    Stdout = 1,
    /// Process to host.
    Stderr = 2,
    /// Both ways, in place of the other three.
    Terminal = 3,
}

/// What a stream belongs to.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct StreamHeader {
    /// The container.
    pub container_id: String,
    /// Empty for the container's first process.
    pub exec_id: String,
    /// The stream.
    pub stream: Stream,
}

/// The fixed part, checked.
#[derive(Debug, Clone, Copy)]
pub struct FixedPart {
    stream: Stream,
    container_id_bytes: usize,
    exec_id_bytes: usize,
}

impl FixedPart {
    /// Checks the first bytes of a stream.
    ///
    /// # Errors
    ///
    /// Another magic number, stream or impossible lengths.
    pub fn parse(bytes: [u8; FIXED_BYTES]) -> Result<Self, InvalidMessage> {
        let [m0, m1, m2, m3, stream, container, exec, zero] = bytes;
        if [m0, m1, m2, m3] != MAGIC || zero != 0 {
            return Err(InvalidMessage::new("stdio header", "has the wrong magic number"));
        }
        let stream = match stream {
            0 => Stream::Stdin,
            1 => Stream::Stdout,
            2 => Stream::Stderr,
            3 => Stream::Terminal,
            _ => return Err(InvalidMessage::new("stdio stream", "is none of the four")),
        };
        let (container_id_bytes, exec_id_bytes) = (usize::from(container), usize::from(exec));
        if container_id_bytes > limits::MAX_ID_BYTES || exec_id_bytes > limits::MAX_ID_BYTES {
            return Err(InvalidMessage::new("stdio header", "has an id that is too long"));
        }
        Ok(Self {
            stream,
            container_id_bytes,
            exec_id_bytes,
        })
    }

    /// How many bytes of ids follow.
    #[must_use]
    pub fn remaining_bytes(self) -> usize {
        self.container_id_bytes + self.exec_id_bytes
    }

    /// Puts the ids in.
    ///
    /// # Errors
    ///
    /// The ids are of the wrong length or have characters that ids don't have.
    pub fn complete(self, ids: &[u8]) -> Result<StreamHeader, InvalidMessage> {
        let (Some((container, exec)), true) = (
            ids.split_at_checked(self.container_id_bytes),
            ids.len() == self.remaining_bytes(),
        ) else {
            return Err(InvalidMessage::new("stdio header", "is of the wrong length"));
        };
        let text = |bytes: &[u8]| {
            String::from_utf8(bytes.to_vec()).map_err(|_| InvalidMessage::new("id", "is not UTF-8"))
        };
        let header = StreamHeader {
            container_id: text(container)?,
            exec_id: text(exec)?,
            stream: self.stream,
        };
        limits::check_id("container_id", &header.container_id)?;
        limits::check_optional_id("exec_id", &header.exec_id)?;
        Ok(header)
    }
}

impl StreamHeader {
    /// The bytes to write first on a stream.
    ///
    /// # Errors
    ///
    /// An id breaks the rules for ids.
    pub fn encode(&self) -> Result<Vec<u8>, InvalidMessage> {
        limits::check_id("container_id", &self.container_id)?;
        limits::check_optional_id("exec_id", &self.exec_id)?;
        let length = |id: &str| {
            u8::try_from(id.len()).map_err(|_| InvalidMessage::new("id", "is longer than 128 bytes"))
        };
        let mut bytes = MAGIC.to_vec();
        bytes.extend([
            self.stream as u8,
            length(&self.container_id)?,
            length(&self.exec_id)?,
            0,
        ]);
        bytes.extend(self.container_id.as_bytes());
        bytes.extend(self.exec_id.as_bytes());
        Ok(bytes)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn header_survives_a_round_trip() {
        let header = StreamHeader {
            container_id: "c1".into(),
            exec_id: "e-2".into(),
            stream: Stream::Stderr,
        };
        let bytes = header.encode().unwrap();
        let fixed = FixedPart::parse(bytes[..FIXED_BYTES].try_into().unwrap()).unwrap();
        assert_eq!(fixed.remaining_bytes(), bytes.len() - FIXED_BYTES);
        assert_eq!(fixed.complete(&bytes[FIXED_BYTES..]).unwrap(), header);
    }

    #[test]
    fn id_with_a_path_in_it_is_refused() {
        let header = StreamHeader {
            container_id: "../x".into(),
            exec_id: String::new(),
            stream: Stream::Stdin,
        };
        assert!(header.encode().is_err());
    }

    proptest! {
        #[test]
        fn no_header_makes_the_parser_panic(
            fixed in any::<[u8; FIXED_BYTES]>(),
            ids in proptest::collection::vec(any::<u8>(), 0..300),
        ) {
            if let Ok(fixed) = FixedPart::parse(fixed) {
                let _ = fixed.complete(&ids);
            }
        }
    }
}
