//! The host's orders about shares, which come while the guest runs: one more, or one less.
//!
//! Owner: the shares' thread. Nobody but the host has the other end of the socket, and the thread's filter lets it receive from
//! nothing else: what gets into its descriptor table is a mount that the host made to be shared.

use std::io::{self, ErrorKind, IoSliceMut};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use vmm_api::{SHARE_MESSAGE_BYTES, ShareOrder, ShareReply};

use super::passthrough::{Passthrough, Share};

/// The socket orders come from.
#[derive(Debug)]
pub struct Orders {
    socket: OwnedFd,
    /// Whether the thread is as it serves; before, what came would not be kept.
    begun: bool,
    /// Whether it is received from by the number of standard input.
    is_stdin: bool,
}

impl Orders {
    pub fn new(socket: OwnedFd) -> Self {
        Self {
            socket,
            begun: false,
            is_stdin: false,
        }
    }

    /// Orders are taken from now on.
    pub fn begin(&mut self, is_stdin: bool) {
        self.begun = true;
        self.is_stdin = is_stdin;
    }

    pub fn has_begun(&self) -> bool {
        self.begun
    }

    /// Does what one order says, and answers it. An error is the end of orders.
    pub fn obey(&self, shares: &Passthrough) -> io::Result<()> {
        let Some((order, root)) = self.receive()? else {
            return Ok(());
        };
        let (index, done) = match order {
            ShareOrder::Add { index, exclusive } => {
                let added = root
                    .ok_or_else(|| io::Error::from(ErrorKind::InvalidInput))
                    .and_then(|root| {
                        shares.add(
                            index,
                            Share {
                                root,
                                exclusive,
                                marks: None,
                            },
                        )
                    });
                (index, added)
            }
            ShareOrder::Remove { index } => (index, shares.remove(index)),
        };
        let errno = match done {
            Ok(()) => 0,
            Err(error) => error.raw_os_error().unwrap_or(libc::EINVAL),
        };
        let reply = ShareReply { index, errno }.to_bytes();
        // The host waits for each answer, so there is room for it.
        rustix::io::write(&self.socket, &reply)?;
        Ok(())
    }

    /// The next order, and what came with it; nothing if there is none after all.
    fn receive(&self) -> io::Result<Option<(ShareOrder, Option<OwnedFd>)>> {
        let mut bytes = [0; SHARE_MESSAGE_BYTES + 1];
        let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let socket = if self.is_stdin {
            rustix::stdio::stdin()
        } else {
            self.socket.as_fd()
        };
        let received = recvmsg(
            socket,
            &mut [IoSliceMut::new(&mut bytes)],
            &mut ancillary,
            RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC,
        );
        let length = match received {
            Ok(message) => message.bytes,
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => return Ok(None),
            Err(errno) => return Err(errno.into()),
        };
        let root = ancillary.drain().find_map(|message| match message {
            RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
            _ => None,
        });
        let order = bytes.get(..length).and_then(ShareOrder::from_bytes);
        // An empty message is the end.
        order
            .map(|order| Some((order, root)))
            .ok_or_else(|| ErrorKind::UnexpectedEof.into())
    }
}

impl AsFd for Orders {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}
