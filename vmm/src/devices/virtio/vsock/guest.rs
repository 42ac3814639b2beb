//! The guest's side of the socket device: what its packets do, and what it is sent.
//!
//! Invariants:
//! - Every packet from the guest is consumed at once; whatever it says, it changes one connection or none.
//! - What is due to the guest is a state of its connection, not a queue of packets: memory doesn't grow with the number
//!   of packets. The resets for connections that don't exist are queued, up to [`MAX_RESETS`].

use tracing::debug;

use super::backend::Backend;
use super::connection::{BUF_ALLOC, Connection, DeliveryError, State};
use super::packet::{HOST_CID, Header, Op, SHUTDOWN_BOTH, SHUTDOWN_RECEIVE, SHUTDOWN_SEND, TYPE_STREAM};
use super::queues::{Payload, Received, RxQueue};
use super::table::Handle;
use crate::devices::virtio::queue::QueueError;

/// Resets that wait for a guest buffer; more are dropped, and the guest's own timeouts serve.
const MAX_RESETS: usize = 1024;

/// Most connections served in one turn on the event loop.
const TURN: usize = 64;

/// How far serving the guest went.
#[derive(Debug, PartialEq, Eq)]
pub enum Progress {
    /// There is nothing left to do.
    Done,
    /// The guest has to provide buffers first.
    Starved,
    /// There is more, after others had their turn.
    TurnOver,
}

/// How far serving one connection went.
enum Served {
    Idle,
    More,
    Starved,
}

impl Backend {
    /// Acts on a packet from the guest.
    pub fn receive(&mut self, header: &Header, payload: Option<Payload<'_>>) {
        self.metrics.tx_packets.inc();
        if header.src_cid != self.guest_cid || header.dst_cid != HOST_CID {
            self.metrics.dropped_packets.inc();
            return;
        }
        let op = Op::new(header.op);
        let found = self.table.find(header.dst_port, header.src_port);
        let (Some(op), TYPE_STREAM) = (op, header.kind) else {
            debug!(
                op = header.op,
                kind = header.kind,
                "vsock packet that makes no sense"
            );
            self.metrics.dropped_packets.inc();
            match found {
                Some(handle) => self.reset(handle),
                None if op != Some(Op::Reset) => self.queue_reset(header.dst_port, header.src_port),
                None => {}
            }
            return;
        };
        match (found, op) {
            (Some(handle), _) => self.receive_on(handle, op, header, payload),
            (None, Op::Request) => self.accept_request(header),
            (None, Op::Reset) => {}
            (None, _) => self.queue_reset(header.dst_port, header.src_port),
        }
    }

    fn receive_on(&mut self, handle: Handle, op: Op, header: &Header, payload: Option<Payload<'_>>) {
        let Some(connection) = self.table.connection(handle) else {
            return;
        };
        connection.update_credit(header);
        let established = connection.state == State::Established;
        match op {
            Op::Reset => self.drain(handle),
            Op::Response if connection.state == State::Requested => {
                connection.state = State::Established;
                connection.deadline = None;
                if self.confirm(handle) {
                    self.make_ready(handle);
                } else {
                    self.reset(handle);
                }
            }
            Op::ReadWrite if established => match payload {
                Some(payload) => self.receive_data(handle, payload),
                None => {
                    self.metrics.dropped_packets.inc();
                    self.reset(handle);
                }
            },
            Op::Shutdown if established => self.receive_shutdown(handle, header.flags),
            Op::CreditUpdate if established => {
                if connection.is_shut() && connection.guest_has_consumed() {
                    self.expect_reset(handle);
                }
                self.make_ready(handle);
            }
            Op::CreditRequest if established => {
                connection.due.credit_update = true;
                self.make_ready(handle);
            }
            Op::Request
            | Op::Response
            | Op::ReadWrite
            | Op::Shutdown
            | Op::CreditUpdate
            | Op::CreditRequest => {
                self.metrics.dropped_packets.inc();
                self.reset(handle);
            }
        }
    }

    fn receive_data(&mut self, handle: Handle, mut payload: Payload<'_>) {
        let Some(connection) = self.table.connection(handle) else {
            return;
        };
        if connection.guest_shutdown & SHUTDOWN_SEND != 0 {
            self.reset(handle);
            return;
        }
        self.metrics.tx_bytes.add(payload.left_bytes().into());
        match connection.deliver(&mut payload) {
            Ok(kept) => {
                if kept > 0 {
                    self.metrics.tx_buffered_bytes.add(kept.into());
                }
                // The common case, everything written and nothing to say, needs no look at the connection.
                let watched = connection.watches_writable == (connection.backlog_len() > 0);
                let silent = !connection.credit_update_due() && connection.shutdown_due().is_none();
                if !(watched && silent) {
                    self.after_flush(handle);
                }
            }
            Err(error) => {
                if error == DeliveryError::Overdrawn {
                    self.metrics.credit_violations.inc();
                }
                self.reset(handle);
            }
        }
    }

    fn receive_shutdown(&mut self, handle: Handle, flags: u32) {
        let Some(connection) = self.table.connection(handle) else {
            return;
        };
        connection.guest_shutdown |= flags & SHUTDOWN_BOTH;
        if connection.guest_shutdown == SHUTDOWN_BOTH {
            let ports = (connection.host_port, connection.guest_port);
            self.drain(handle);
            self.queue_reset(ports.0, ports.1);
        } else {
            self.after_flush(handle);
        }
    }

    /// The guest is done with a connection; what it sent before still reaches the host.
    pub(super) fn drain(&mut self, handle: Handle) {
        self.table.unbind(handle);
        let Some(connection) = self.table.connection(handle) else {
            return;
        };
        if connection.state == State::Requested {
            self.metrics.refused_connections.inc();
        }
        connection.state = State::Draining;
        connection.deadline = None;
        connection.guest_shutdown |= SHUTDOWN_RECEIVE | SHUTDOWN_SEND;
        self.after_flush(handle);
    }

    /// The guest asks for a port of the host.
    fn accept_request(&mut self, header: &Header) {
        let (host_port, guest_port) = (header.dst_port, header.src_port);
        let room = !self.table.is_full();
        let Some(stream) = room.then(|| self.take_guest_port(host_port)).flatten() else {
            self.metrics.refused_connections.inc();
            self.queue_reset(host_port, guest_port);
            return;
        };
        let mut connection = Connection::new(stream, host_port, guest_port, State::Established);
        connection.due.response = true;
        connection.update_credit(header);
        match self.add_connection(connection) {
            Some(handle) => {
                self.metrics.guest_connections.inc();
                self.make_ready(handle);
            }
            None => self.queue_reset(host_port, guest_port),
        }
    }

    /// Ends a connection for both sides at once.
    pub(super) fn reset(&mut self, handle: Handle) {
        if let Some(connection) = self.table.connection(handle)
            && connection.state != State::Draining
        {
            let ports = (connection.host_port, connection.guest_port);
            self.queue_reset(ports.0, ports.1);
        }
        self.remove(handle);
    }

    fn queue_reset(&mut self, host_port: u32, guest_port: u32) {
        if self.resets.len() < MAX_RESETS {
            self.resets.push_back((host_port, guest_port));
        }
    }

    /// Whether anything may be due to the guest.
    pub fn has_work(&self) -> bool {
        !(self.resets.is_empty() && self.ready.is_empty())
    }

    /// Gives the guest what is due.
    pub fn serve(&mut self, rx: &mut RxQueue) -> Result<Progress, QueueError> {
        while let Some(&(host_port, guest_port)) = self.resets.front() {
            let header = Header {
                src_cid: HOST_CID,
                dst_cid: self.guest_cid,
                src_port: host_port,
                dst_port: guest_port,
                kind: TYPE_STREAM,
                op: Op::Reset as u16,
                ..Header::default()
            };
            if !rx.send(&header)? {
                return Ok(Progress::Starved);
            }
            self.resets.pop_front();
            self.metrics.rx_packets.inc();
            self.metrics.resets_sent.inc();
        }
        for _ in 0..TURN {
            let Some(handle) = self.ready.pop_front() else {
                return Ok(Progress::Done);
            };
            if let Some(connection) = self.table.connection(handle) {
                connection.queued = false;
            }
            match self.serve_connection(handle, rx)? {
                Served::Idle => {}
                Served::More => self.make_ready(handle),
                Served::Starved => {
                    if let Some(connection) = self.table.connection(handle) {
                        connection.queued = true;
                        self.ready.push_front(handle);
                    }
                    return Ok(Progress::Starved);
                }
            }
        }
        Ok(if self.has_work() {
            Progress::TurnOver
        } else {
            Progress::Done
        })
    }

    fn serve_connection(&mut self, handle: Handle, rx: &mut RxQueue) -> Result<Served, QueueError> {
        let cid = self.guest_cid;
        let metrics = &self.metrics;
        let Some(connection) = self.table.connection(handle) else {
            return Ok(Served::Idle);
        };
        let mut announce = |connection: &mut Connection, op: Op, flags: u32| {
            let header = Header {
                flags,
                ..connection.header(cid, op)
            };
            let sent = rx.send(&header)?;
            if sent {
                metrics.rx_packets.inc();
                connection.announced();
            }
            Ok::<_, QueueError>(sent)
        };
        if connection.due.request {
            if !announce(connection, Op::Request, 0)? {
                return Ok(Served::Starved);
            }
            connection.due.request = false;
        }
        if connection.due.response {
            if !announce(connection, Op::Response, 0)? {
                return Ok(Served::Starved);
            }
            connection.due.response = false;
        }
        if connection.credit_update_due() && !announce(connection, Op::CreditUpdate, 0)? {
            return Ok(Served::Starved);
        }
        if connection.due.credit_request {
            if !announce(connection, Op::CreditRequest, 0)? {
                return Ok(Served::Starved);
            }
            connection.due.credit_request = false;
        }
        if connection.wants_data() {
            match Self::serve_data(connection, cid, metrics, rx)? {
                // An end of the stream is told below.
                Served::Idle => {}
                other => return Ok(other),
            }
        }
        if let Some(flags) = connection.shutdown_due() {
            let header = Header {
                flags,
                ..connection.header(cid, Op::Shutdown)
            };
            if !rx.send(&header)? {
                return Ok(Served::Starved);
            }
            metrics.rx_packets.inc();
            connection.shutdown_told(flags);
            if connection.is_shut() && connection.guest_has_consumed() {
                self.expect_reset(handle);
            }
        }
        Ok(Served::Idle)
    }

    /// One read from a socket into the guest.
    fn serve_data(
        connection: &mut Connection,
        cid: u64,
        metrics: &super::VsockMetrics,
        rx: &mut RxQueue,
    ) -> Result<Served, QueueError> {
        let credit = connection.credit().min(BUF_ALLOC);
        if credit == 0 {
            connection.run_out_of_credit();
            return Ok(if connection.due.credit_request {
                Served::More
            } else {
                Served::Idle
            });
        }
        let header = connection.header(cid, Op::ReadWrite);
        match rx.receive(&connection.stream, &header, credit, connection.batch)? {
            Received::Data { bytes, filled } => {
                connection.sent(bytes, filled);
                connection.announced();
                metrics.rx_packets.inc();
                metrics.rx_bytes.add(bytes.into());
                rx.signal()?;
                Ok(Served::More)
            }
            Received::WouldBlock => {
                connection.readable = false;
                Ok(Served::Idle)
            }
            Received::End => {
                connection.host_stopped_sending();
                Ok(Served::Idle)
            }
            Received::Failed(error) => {
                debug!(%error, "a vsock connection's socket failed");
                connection.hung_up = true;
                connection.host_stopped_sending();
                Ok(Served::Idle)
            }
            Received::Starved => Ok(Served::Starved),
        }
    }
}
