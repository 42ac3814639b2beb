//! Frames: a bounded length, a version, a JSON payload, file descriptors beside it.
//!
//! [`FrameReader`] works on blocking and non-blocking sockets alike and never reads past the end of a frame, so that descriptors
//! always belong to the frame being read.

use crate::PROTOCOL_VERSION;
use rustix::{
    io::Errno,
    net::{
        RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
        SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
    },
};
use std::{
    io::{IoSlice, IoSliceMut},
    mem::MaybeUninit,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

/// Bytes of the frame header.
pub const HEADER_BYTES: usize = 8;
/// Most bytes a payload may have.
pub const MAX_PAYLOAD_BYTES: usize = 1 << 20;
/// Most file descriptors a frame may carry.
pub const MAX_FDS: usize = 64;
/// What one `recvmsg` reads at most: memory grows with what has arrived, not with what was announced.
const READ_STEP_BYTES: usize = 64 << 10;

/// One frame as it arrived.
#[derive(Debug)]
pub struct Frame {
    /// The JSON text.
    pub payload: Vec<u8>,
    /// The file descriptors that came along.
    pub fds: Vec<OwnedFd>,
}

/// Outcome of one attempt to read.
#[derive(Debug)]
pub enum Received {
    /// A whole frame.
    Frame(Frame),
    /// The socket has no more bytes for now (non-blocking socket or time-out).
    WouldBlock,
    /// The peer has closed between two frames.
    Closed,
}

/// Why a frame can't be read or written. The connection can't be used any further, except after `UnsupportedVersion` has been
/// reported to the peer.
#[derive(Debug, thiserror::Error)]
pub enum FrameError {
    /// The announced length is out of bounds.
    #[error("frame of {length_bytes} bytes; a payload has 1 to {MAX_PAYLOAD_BYTES}")]
    Length {
        /// As announced.
        length_bytes: usize,
    },
    /// Another protocol version.
    #[error("protocol version {version}; this side speaks {PROTOCOL_VERSION}")]
    Version {
        /// As announced.
        version: u16,
    },
    /// Flags are reserved.
    #[error("reserved frame flags {flags:#x} are set")]
    Flags {
        /// As announced.
        flags: u16,
    },
    /// Too many descriptors.
    #[error("more than {MAX_FDS} file descriptors in one frame")]
    TooManyFds,
    /// The peer closed in the middle of a frame.
    #[error("connection closed in the middle of a frame")]
    Truncated,
    /// The peer does not read.
    #[error("the peer does not read its messages")]
    Stalled,
    /// The system call failed.
    #[error("control socket")]
    Io(#[source] std::io::Error),
}

impl From<Errno> for FrameError {
    fn from(errno: Errno) -> Self {
        FrameError::Io(errno.into())
    }
}

/// Assembles frames from a stream.
#[derive(Debug, Default)]
pub struct FrameReader {
    header: [u8; HEADER_BYTES],
    header_filled: usize,
    payload_bytes: usize,
    payload: Vec<u8>,
    fds: Vec<OwnedFd>,
}

impl FrameReader {
    /// An empty reader.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Reads until a frame is whole or the socket has nothing more.
    ///
    /// # Errors
    /// [`FrameError`]; the reader must then not be used again.
    pub fn read(&mut self, socket: impl AsFd) -> Result<Received, FrameError> {
        let socket = socket.as_fd();
        while self.header_filled < HEADER_BYTES {
            let mut header = self.header;
            let count = self.receive(socket, &mut header[self.header_filled..])?;
            match count {
                None => return Ok(Received::WouldBlock),
                Some(0) if self.header_filled == 0 => return Ok(Received::Closed),
                Some(0) => return Err(FrameError::Truncated),
                Some(count) => {
                    self.header = header;
                    self.header_filled += count;
                }
            }
            if self.header_filled == HEADER_BYTES {
                self.payload_bytes = parse_header(self.header)?;
            }
        }
        while self.payload.len() < self.payload_bytes {
            let start = self.payload.len();
            let end = self.payload_bytes.min(start + READ_STEP_BYTES);
            let mut payload = std::mem::take(&mut self.payload);
            payload.resize(end, 0);
            let count = self.receive(socket, &mut payload[start..])?;
            payload.truncate(start + count.unwrap_or(0));
            self.payload = payload;
            match count {
                None => return Ok(Received::WouldBlock),
                Some(0) => return Err(FrameError::Truncated),
                Some(_) => {}
            }
        }
        self.header_filled = 0;
        self.payload_bytes = 0;
        Ok(Received::Frame(Frame {
            payload: std::mem::take(&mut self.payload),
            fds: std::mem::take(&mut self.fds),
        }))
    }

    /// One `recvmsg`; `None` if it would block.
    fn receive(&mut self, socket: BorrowedFd<'_>, buffer: &mut [u8]) -> Result<Option<usize>, FrameError> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let received = loop {
            match recvmsg(
                socket,
                &mut [IoSliceMut::new(buffer)],
                &mut ancillary,
                RecvFlags::CMSG_CLOEXEC,
            ) {
                Ok(received) => break received,
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Ok(None),
                Err(errno) => return Err(errno.into()),
            }
        };
        for message in ancillary.drain() {
            if let RecvAncillaryMessage::ScmRights(fds) = message {
                self.fds.extend(fds);
            }
        }
        if received.flags.contains(ReturnFlags::CTRUNC) || self.fds.len() > MAX_FDS {
            return Err(FrameError::TooManyFds);
        }
        Ok(Some(received.bytes))
    }
}

/// Checks a header and returns the payload's length.
fn parse_header(header: [u8; HEADER_BYTES]) -> Result<usize, FrameError> {
    let [l0, l1, l2, l3, v0, v1, f0, f1] = header;
    let length_bytes = usize::try_from(u32::from_le_bytes([l0, l1, l2, l3])).unwrap_or(usize::MAX);
    let version = u16::from_le_bytes([v0, v1]);
    let flags = u16::from_le_bytes([f0, f1]);
    // The version comes first: what another version means by the other fields isn't known.
    if version != PROTOCOL_VERSION {
        return Err(FrameError::Version { version });
    }
    if length_bytes == 0 || length_bytes > MAX_PAYLOAD_BYTES {
        return Err(FrameError::Length { length_bytes });
    }
    if flags != 0 {
        return Err(FrameError::Flags { flags });
    }
    Ok(length_bytes)
}

/// Writes one frame. On a non-blocking socket a peer that does not read makes it fail with [`FrameError::Stalled`].
///
/// # Errors
/// [`FrameError`]; part of the frame may then have been written.
pub fn write_frame(socket: impl AsFd, payload: &[u8], fds: &[BorrowedFd<'_>]) -> Result<(), FrameError> {
    if payload.is_empty() || payload.len() > MAX_PAYLOAD_BYTES {
        return Err(FrameError::Length {
            length_bytes: payload.len(),
        });
    }
    if fds.len() > MAX_FDS {
        return Err(FrameError::TooManyFds);
    }
    let length = u32::try_from(payload.len()).map_err(|_| FrameError::Length {
        length_bytes: payload.len(),
    })?;
    let mut frame = Vec::with_capacity(HEADER_BYTES + payload.len());
    frame.extend_from_slice(&length.to_le_bytes());
    frame.extend_from_slice(&PROTOCOL_VERSION.to_le_bytes());
    frame.extend_from_slice(&0u16.to_le_bytes());
    frame.extend_from_slice(payload);

    let mut sent = 0;
    while sent < frame.len() {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        if sent == 0 && !fds.is_empty() {
            ancillary.push(SendAncillaryMessage::ScmRights(fds));
        }
        match sendmsg(
            &socket,
            &[IoSlice::new(&frame[sent..])],
            &mut ancillary,
            SendFlags::NOSIGNAL,
        ) {
            Ok(count) => sent += count,
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => return Err(FrameError::Stalled),
            Err(errno) => return Err(errno.into()),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::{io::Write, os::unix::net::UnixStream};

    fn frame(received: Received) -> Frame {
        match received {
            Received::Frame(frame) => frame,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn frame_arrives_with_its_descriptors_and_not_with_those_of_the_next() {
        let (a, b) = UnixStream::pair().unwrap();
        let file = tempfile::tempfile().unwrap();
        write_frame(&a, b"1", &[]).unwrap();
        write_frame(&a, b"22", &[file.as_fd(), file.as_fd()]).unwrap();
        write_frame(&a, b"333", &[]).unwrap();
        let mut reader = FrameReader::new();
        let sizes: Vec<_> = (0..3)
            .map(|_| frame(reader.read(&b).unwrap()))
            .map(|f| (f.payload.len(), f.fds.len()))
            .collect();
        assert_eq!(sizes, [(1, 0), (2, 2), (3, 0)]);
        drop(a);
        assert!(matches!(reader.read(&b).unwrap(), Received::Closed));
    }

    #[test]
    fn header_errors_are_told_apart() {
        let header = |length: u32, version: u16, flags: u16| {
            let mut bytes = [0; 8];
            bytes[..4].copy_from_slice(&length.to_le_bytes());
            bytes[4..6].copy_from_slice(&version.to_le_bytes());
            bytes[6..].copy_from_slice(&flags.to_le_bytes());
            parse_header(bytes)
        };
        assert!(matches!(header(0, 1, 0), Err(FrameError::Length { .. })));
        assert!(matches!(
            header((1 << 20) + 1, 1, 0),
            Err(FrameError::Length { .. })
        ));
        assert!(matches!(header(u32::MAX, 1, 0), Err(FrameError::Length { .. })));
        assert!(matches!(header(2, 2, 0), Err(FrameError::Version { version: 2 })));
        assert!(matches!(header(2, 1, 4), Err(FrameError::Flags { flags: 4 })));
        assert_eq!(header(1 << 20, 1, 0).unwrap(), 1 << 20);
    }

    #[test]
    fn closing_inside_a_frame_is_an_error() {
        let (mut a, b) = UnixStream::pair().unwrap();
        a.write_all(&[9, 0, 0, 0, 1, 0, 0, 0, b'{']).unwrap();
        drop(a);
        assert!(matches!(FrameReader::new().read(&b), Err(FrameError::Truncated)));
    }

    #[test]
    fn peer_that_does_not_read_stalls_the_writer_instead_of_blocking_it() {
        let (a, _b) = UnixStream::pair().unwrap();
        a.set_nonblocking(true).unwrap();
        assert!(matches!(
            write_frame(&a, &vec![b' '; MAX_PAYLOAD_BYTES], &[]),
            Err(FrameError::Stalled)
        ));
    }

    #[test]
    fn oversized_payload_and_descriptor_lists_are_refused_before_sending() {
        let (a, _b) = UnixStream::pair().unwrap();
        assert!(matches!(
            write_frame(&a, &vec![0; MAX_PAYLOAD_BYTES + 1], &[]),
            Err(FrameError::Length { .. })
        ));
        assert!(matches!(
            write_frame(&a, b"x", &vec![a.as_fd(); MAX_FDS + 1]),
            Err(FrameError::TooManyFds)
        ));
    }

    proptest! {
        #[test]
        fn frames_survive_any_fragmentation(payload in proptest::collection::vec(any::<u8>(), 1..3000), cuts in proptest::collection::vec(1usize..700, 1..8)) {
            let (mut a, b) = UnixStream::pair().unwrap();
            b.set_nonblocking(true).unwrap();
            let mut bytes = Vec::from(u32::try_from(payload.len()).unwrap().to_le_bytes());
            bytes.extend([1, 0, 0, 0]);
            bytes.extend(&payload);
            let mut reader = FrameReader::new();
            let mut rest = &bytes[..];
            let mut cuts = cuts.iter().cycle();
            let mut result = None;
            while !rest.is_empty() {
                let (now, later) = rest.split_at(rest.len().min(*cuts.next().unwrap()));
                a.write_all(now).unwrap();
                rest = later;
                match reader.read(&b).unwrap() {
                    Received::Frame(frame) => result = Some(frame.payload),
                    Received::WouldBlock => prop_assert!(!rest.is_empty()),
                    Received::Closed => prop_assert!(false),
                }
            }
            prop_assert_eq!(result, Some(payload));
        }

        #[test]
        fn arbitrary_bytes_never_panic_the_reader(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let (mut a, b) = UnixStream::pair().unwrap();
            a.write_all(&bytes).unwrap();
            drop(a);
            let mut reader = FrameReader::new();
            while let Ok(Received::Frame(_)) = reader.read(&b) {}
        }
    }
}
