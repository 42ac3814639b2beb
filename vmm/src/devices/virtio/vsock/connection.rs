//! One stream between a port of the guest and a Unix socket of the host.
//!
//! ```text
//!   host asks:  Greeting ──CONNECT line──► Requested ──RESPONSE──► Established
//!   guest asks:                            REQUEST ───RESPONSE──►  Established
//!   Established ── both ways shut, or RST ──► Draining (only while its reader owes us room) ──► closed
//! ```
//!
//! Invariants:
//! - At most [`BUF_ALLOC`] bytes from the guest wait for the host's reader: that is the credit the guest gets, and a
//!   guest that overdraws it loses the connection.
//! - No more is read from the host than the guest has credit for; the socket's own buffer is the only other one.

use std::io;
use std::os::unix::net::UnixStream;
use std::time::Instant;

use rustix::net::{RecvFlags, SendFlags, recv, send};

use super::packet::{HOST_CID, Header, Op, SHUTDOWN_BOTH, SHUTDOWN_RECEIVE, SHUTDOWN_SEND, TYPE_STREAM};
use super::queues::{MAX_BATCH, Payload};

/// Credit given to the guest on each connection, in bytes.
pub const BUF_ALLOC: u32 = 256 * 1024;

/// Progress after which the guest is told at once.
const UPDATE_STEP: u32 = BUF_ALLOC / 2;

/// Where the connection stands with the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// The guest has been asked and hasn't answered.
    Requested,
    /// Data flows.
    Established,
    /// Over for the guest; the host has yet to read what came before.
    Draining,
}

/// Packets that are due to the guest.
#[derive(Clone, Copy, Debug, Default)]
pub struct Due {
    /// The question that opens a connection.
    pub request: bool,
    /// The answer to the guest's.
    pub response: bool,
    /// An answer to a credit request.
    pub credit_update: bool,
    /// Ask the guest for its credit: sent once per time it runs out.
    pub credit_request: bool,
}

/// How the guest broke the protocol, or the payload vanished.
#[derive(Debug, PartialEq, Eq)]
pub enum DeliveryError {
    /// More than the credit.
    Overdrawn,
    /// Not in guest memory.
    Unreadable,
}

/// A connection. Fields that only matter to the credit arithmetic count bytes since its beginning, modulo 2³².
#[derive(Debug)]
pub struct Connection {
    pub stream: UnixStream,
    pub host_port: u32,
    pub guest_port: u32,
    pub state: State,
    pub due: Due,
    pub deadline: Option<Instant>,
    /// The socket may have data, or an end, to be read.
    pub readable: bool,
    /// The host has closed its socket altogether.
    pub hung_up: bool,
    /// In the list of connections with work to do for the guest.
    pub queued: bool,
    /// Being watched for room to write.
    pub watches_writable: bool,
    /// Guest buffers to prepare for the next read.
    pub batch: usize,
    /// What we won't do any more, and what the guest has been told of it (`SHUTDOWN_…`).
    own_shutdown: u32,
    told_shutdown: u32,
    /// What the guest won't do any more.
    pub guest_shutdown: u32,
    /// How much of that the host's socket shows.
    passed_shutdown: u32,
    backlog: Vec<u8>,
    backlog_start: usize,
    received: u32,
    forwarded: u32,
    announced: u32,
    sent: u32,
    peer_buf_alloc: u32,
    peer_forwarded: u32,
    credit_requested: bool,
}

impl Connection {
    /// A connection in `state` over `stream`.
    pub fn new(stream: UnixStream, host_port: u32, guest_port: u32, state: State) -> Self {
        Self {
            stream,
            host_port,
            guest_port,
            state,
            due: Due::default(),
            deadline: None,
            readable: false,
            hung_up: false,
            queued: false,
            watches_writable: false,
            batch: 1,
            own_shutdown: 0,
            told_shutdown: 0,
            guest_shutdown: 0,
            passed_shutdown: 0,
            backlog: Vec::new(),
            backlog_start: 0,
            received: 0,
            forwarded: 0,
            announced: 0,
            sent: 0,
            peer_buf_alloc: 0,
            peer_forwarded: 0,
            credit_requested: false,
        }
    }

    /// A packet of this connection for the guest.
    pub fn header(&self, guest_cid: u64, op: Op) -> Header {
        Header {
            src_cid: HOST_CID,
            dst_cid: guest_cid,
            src_port: self.host_port,
            dst_port: self.guest_port,
            len: 0,
            kind: TYPE_STREAM,
            op: op as u16,
            flags: 0,
            buf_alloc: BUF_ALLOC,
            fwd_cnt: self.forwarded,
        }
    }

    /// To be called when a packet with a header made just now has gone out.
    pub fn announced(&mut self) {
        self.announced = self.forwarded;
        self.due.credit_update = false;
    }

    /// Takes what any packet says about the guest's buffer.
    pub fn update_credit(&mut self, header: &Header) {
        self.peer_buf_alloc = header.buf_alloc;
        self.peer_forwarded = header.fwd_cnt;
        if self.credit() > 0 {
            self.credit_requested = false;
        }
    }

    /// Bytes the guest has room for.
    pub fn credit(&self) -> u32 {
        self.peer_buf_alloc
            .saturating_sub(self.sent.wrapping_sub(self.peer_forwarded))
    }

    /// Whether the guest has taken everything it was sent.
    pub fn guest_has_consumed(&self) -> bool {
        self.sent == self.peer_forwarded
    }

    /// Takes note that the guest has no room, which it is asked about once.
    pub fn run_out_of_credit(&mut self) {
        if !std::mem::replace(&mut self.credit_requested, true) {
            self.due.credit_request = true;
        }
    }

    /// Takes note of data given to the guest, and of how many buffers the next read may need.
    pub fn sent(&mut self, bytes: u32, filled: bool) {
        self.sent = self.sent.wrapping_add(bytes);
        self.batch = if filled {
            (self.batch * 4).min(MAX_BATCH)
        } else {
            (self.batch / 2).max(1)
        };
    }

    /// Whether data for the guest may be read from the socket.
    pub fn wants_data(&self) -> bool {
        self.state == State::Established
            && self.readable
            && (self.own_shutdown & SHUTDOWN_SEND) | (self.guest_shutdown & SHUTDOWN_RECEIVE) == 0
    }

    /// Whether the guest should hear how far its data has got, though nothing else is due.
    pub fn credit_update_due(&self) -> bool {
        self.state == State::Established
            && (self.due.credit_update || self.forwarded.wrapping_sub(self.announced) >= UPDATE_STEP)
    }

    /// Makes any progress due to be told. A guest may stop long before its credit is used up, as Linux does when its own
    /// buffer is the smaller one, so that no amount of progress is too little in the long run.
    pub fn tell_progress(&mut self) -> bool {
        self.due.credit_update |= self.forwarded != self.announced;
        self.credit_update_due()
    }

    /// The socket has come to its end: nothing more will be sent.
    pub fn host_stopped_sending(&mut self) {
        self.own_shutdown |= if self.hung_up {
            SHUTDOWN_BOTH
        } else {
            SHUTDOWN_SEND
        };
        self.readable = false;
    }

    /// Nobody reads the socket any more: what is left is thrown away, what comes is refused.
    pub fn host_stopped_receiving(&mut self) {
        self.own_shutdown |= SHUTDOWN_RECEIVE;
        self.forwarded = self.received;
        self.backlog = Vec::new();
        self.backlog_start = 0;
    }

    /// The flags of the shutdown the guest has yet to be told of.
    pub fn shutdown_due(&self) -> Option<u32> {
        (self.state == State::Established && self.own_shutdown != self.told_shutdown)
            .then_some(self.own_shutdown)
    }

    /// To be called when the guest has been told.
    pub fn shutdown_told(&mut self, flags: u32) {
        self.told_shutdown = flags;
    }

    /// Whether the guest knows that the host is done both ways; only its reset is missing.
    pub fn is_shut(&self) -> bool {
        self.told_shutdown == SHUTDOWN_BOTH
    }

    /// Bytes waiting for the host's reader.
    pub fn backlog_len(&self) -> usize {
        self.backlog.len() - self.backlog_start
    }

    /// Takes data from the guest: to the socket as far as it goes, the rest into the backlog. How much was kept.
    pub fn deliver(&mut self, payload: &mut Payload<'_>) -> Result<u32, DeliveryError> {
        let len = payload.left_bytes();
        let waiting = self.received.wrapping_sub(self.forwarded);
        if waiting.saturating_add(len) > BUF_ALLOC {
            return Err(DeliveryError::Overdrawn);
        }
        self.received = self.received.wrapping_add(len);
        while payload.left_bytes() > 0 && self.backlog_len() == 0 && self.own_shutdown & SHUTDOWN_RECEIVE == 0
        {
            match payload.send(&self.stream) {
                Ok(sent) => self.forwarded = self.forwarded.wrapping_add(sent),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(_) => self.host_stopped_receiving(),
            }
        }
        if self.own_shutdown & SHUTDOWN_RECEIVE != 0 {
            self.forwarded = self.received;
            return Ok(0);
        }
        let kept = payload.left_bytes();
        if kept > 0 && !payload.copy_rest(&mut self.backlog) {
            return Err(DeliveryError::Unreadable);
        }
        Ok(kept)
    }

    /// Writes from the backlog as far as the socket goes.
    pub fn flush(&mut self) {
        while self.backlog_len() > 0 {
            let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
            match send(&self.stream, &self.backlog[self.backlog_start..], flags) {
                Ok(sent) => {
                    self.backlog_start += sent;
                    self.forwarded = self.forwarded.wrapping_add(u32::try_from(sent).unwrap_or(0));
                }
                Err(rustix::io::Errno::INTR) => {}
                Err(rustix::io::Errno::AGAIN) => break,
                Err(_) => self.host_stopped_receiving(),
            }
        }
        if self.backlog_len() == 0 {
            self.backlog = Vec::new();
            self.backlog_start = 0;
            self.tell_progress();
        } else if self.backlog_start > self.backlog.len() / 2 {
            self.backlog.drain(..self.backlog_start);
            self.backlog_start = 0;
        }
    }

    /// Passes the guest's end of stream on, once everything before it has been.
    pub fn pass_shutdown_on(&mut self) {
        let mut due = self.guest_shutdown & !self.passed_shutdown;
        if self.backlog_len() > 0 {
            due &= !SHUTDOWN_SEND;
        }
        let how = match due {
            SHUTDOWN_RECEIVE => std::net::Shutdown::Read,
            SHUTDOWN_SEND => std::net::Shutdown::Write,
            SHUTDOWN_BOTH => std::net::Shutdown::Both,
            _ => return,
        };
        self.passed_shutdown |= due;
        // Fails only if the host is gone, which is noticed anyway.
        let _ = self.stream.shutdown(how);
    }

    /// Throws away what the host wrote and nobody will read, since closing a socket with unread data makes the host's
    /// reader see an error where it should see the end.
    pub fn discard_unread(&mut self) {
        const MOST_READS: usize = 64;
        let mut sink = [0; 8192];
        for _ in 0..MOST_READS {
            match recv(&self.stream, &mut sink[..], RecvFlags::DONTWAIT) {
                Ok((_, 1..)) => {}
                _ => return,
            }
        }
    }
}
