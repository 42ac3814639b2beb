//! The host's side of the socket device: the listener, the sockets and their timeouts.
//!
//! Owner: the device, under its lock. All sockets are watched by one epoll descriptor of the backend's own, which the
//! event loop watches in turn: connections come and go on any thread without the event loop's help. Sockets are
//! edge-triggered: one that can't be served (no credit, no guest buffers) causes no wake-ups.
//!
//! What concerns the guest is in `guest.rs`, an `impl` of the same type.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::net::{RecvFlags, SendFlags, recv, send};
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create, timerfd_settime,
};
use tracing::{debug, warn};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::connection::{Connection, State};
use super::metrics::VsockMetrics;
use super::table::{Entry, Handle, Table};

/// Time a host program has for its `CONNECT` line.
const GREETING_TIMEOUT: Duration = Duration::from_secs(5);
/// Time the guest has to answer a request.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);
/// Time the guest has to reset a connection that is over.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(2);
/// Pause after the host couldn't give another socket.
const ACCEPT_RETRY: Duration = Duration::from_millis(500);
/// Longest greeting: `CONNECT 4294967295\n` and some leniency.
const GREETING_LEN: usize = 32;
/// First port given to connections of the host.
const FIRST_HOST_PORT: u32 = 1 << 30;

// Handles never have the highest bit set.
const LISTENER: u64 = u64::MAX;
const TIMER: u64 = u64::MAX - 1;

/// Everything about connections that isn't the guest's rings.
#[derive(Debug)]
pub struct Backend {
    pub(super) guest_cid: u64,
    pub(super) table: Table,
    /// Connections with something to do for the guest, each at most once.
    pub(super) ready: VecDeque<Handle>,
    /// Resets due for connections that don't exist: host port, guest port.
    pub(super) resets: VecDeque<(u32, u32)>,
    pub(super) metrics: Arc<VsockMetrics>,
    listener: UnixListener,
    /// The guest has a driver.
    started: bool,
    listening: bool,
    accept_again: Option<Instant>,
    /// Streams for the guest's requests, each for one.
    guest_ports: Vec<(u32, UnixStream)>,
    next_host_port: u32,
    epoll: Epoll,
    timer: std::os::fd::OwnedFd,
    timer_at: Option<Instant>,
}

impl Backend {
    /// Takes over the host's sockets. Nothing is accepted before [`Backend::start`].
    pub fn new(
        guest_cid: u64,
        listener: UnixListener,
        guest_ports: Vec<(u32, UnixStream)>,
        metrics: Arc<VsockMetrics>,
    ) -> io::Result<Self> {
        listener.set_nonblocking(true)?;
        for (_, stream) in &guest_ports {
            stream.set_nonblocking(true)?;
        }
        let timer = timerfd_create(
            TimerfdClockId::Monotonic,
            TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC,
        )?;
        let epoll = Epoll::new()?;
        epoll.ctl(
            ControlOperation::Add,
            timer.as_raw_fd(),
            EpollEvent::new(EventSet::IN, TIMER),
        )?;
        Ok(Self {
            guest_cid,
            table: Table::default(),
            ready: VecDeque::new(),
            resets: VecDeque::new(),
            metrics,
            listener,
            started: false,
            listening: false,
            accept_again: None,
            guest_ports,
            next_host_port: FIRST_HOST_PORT,
            epoll,
            timer,
            timer_at: None,
        })
    }

    /// Readable when the backend has something to do.
    pub fn event(&self) -> RawFd {
        self.epoll.as_raw_fd()
    }

    /// Begins to accept connections: the guest has a driver.
    pub fn start(&mut self) {
        self.started = true;
        self.listen();
    }

    /// Stops accepting and ends all connections: there is no driver any more. What the guest has sent still waits for its
    /// readers.
    pub fn stop(&mut self) {
        self.started = false;
        self.unlisten();
        self.accept_again = None;
        self.ready.clear();
        self.resets.clear();
        for handle in self.table.handles() {
            match self.table.connection(handle) {
                Some(connection) if connection.backlog_len() > 0 => self.drain(handle),
                _ => self.remove(handle),
            }
        }
        self.set_timer(None);
    }

    /// Bytes from the guest that wait for the host's readers.
    pub fn undelivered_bytes(&mut self) -> usize {
        let waiting = self
            .table
            .connections()
            .map(|(_, connection)| connection.backlog_len());
        waiting.sum()
    }

    /// Writes what sockets have room for. Events come only once a socket is nearly empty, which is too late where time is
    /// short.
    pub fn flush(&mut self) {
        for handle in self.table.handles() {
            if let Some(connection) = self.table.connection(handle)
                && connection.backlog_len() > 0
            {
                connection.flush();
                self.after_flush(handle);
            }
        }
    }

    fn listen(&mut self) {
        if self.started && !self.listening {
            let event = EpollEvent::new(EventSet::IN, LISTENER);
            match self
                .epoll
                .ctl(ControlOperation::Add, self.listener.as_raw_fd(), event)
            {
                Ok(()) => self.listening = true,
                Err(error) => warn!(%error, "can't watch the vsock listener"),
            }
        }
    }

    fn unlisten(&mut self) {
        if std::mem::take(&mut self.listening) {
            let fd = self.listener.as_raw_fd();
            // It was added, so it can be removed.
            let _ = self
                .epoll
                .ctl(ControlOperation::Delete, fd, EpollEvent::default());
        }
    }

    /// Handles what is ready; more than fits one call makes the descriptor readable again.
    pub fn process_events(&mut self) {
        let mut events = [EpollEvent::default(); 64];
        let count = self.epoll.wait(0, &mut events).unwrap_or(0);
        for event in &events[..count] {
            match event.data() {
                LISTENER => self.accept(),
                TIMER => self.process_timer(),
                token => self.process_socket(Handle::from_token(token), event.event_set()),
            }
        }
    }

    fn accept(&mut self) {
        loop {
            if self.table.is_full() {
                // Until an entry is freed.
                self.unlisten();
                return;
            }
            let stream = match self.listener.accept() {
                Ok((stream, _)) => stream,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) if is_transient(&error) => continue,
                Err(error) => {
                    warn!(%error, "can't accept a vsock connection, trying again later");
                    self.unlisten();
                    let at = Instant::now() + ACCEPT_RETRY;
                    self.accept_again = Some(at);
                    self.remind(at);
                    return;
                }
            };
            let deadline = Instant::now() + GREETING_TIMEOUT;
            let fd = stream.as_raw_fd();
            let watched = stream.set_nonblocking(true).and_then(|()| {
                let handle = self
                    .table
                    .insert(Entry::Greeting { stream, deadline })
                    .map_err(|_| io::Error::from(io::ErrorKind::OutOfMemory))?;
                self.watch(handle, fd, ControlOperation::Add, false)
                    .inspect_err(|_| drop(self.table.remove(handle)))?;
                Ok(handle)
            });
            match watched {
                Ok(handle) => {
                    self.remind(deadline);
                    // Most greet at once, and several connect together: the guest hears of all of them by one interrupt.
                    self.process_socket(handle, EventSet::IN);
                }
                Err(error) => warn!(%error, "can't take a vsock connection"),
            }
            self.metrics.connections_open_count.set(self.table.len() as u64);
        }
    }

    fn watch(
        &self,
        handle: Handle,
        fd: RawFd,
        operation: ControlOperation,
        writable: bool,
    ) -> io::Result<()> {
        let mut events = EventSet::IN | EventSet::READ_HANG_UP | EventSet::EDGE_TRIGGERED;
        if writable {
            events |= EventSet::OUT;
        }
        self.epoll
            .ctl(operation, fd, EpollEvent::new(events, handle.to_token()))
    }

    fn process_socket(&mut self, handle: Handle, events: EventSet) {
        match self.table.entry(handle) {
            None => {}
            Some(Entry::Greeting { stream, .. }) => match read_greeting(stream) {
                Greeting::Incomplete => {}
                Greeting::Invalid => {
                    debug!("a vsock client didn't begin with CONNECT and a port");
                    self.metrics.refused_connections.inc();
                    self.remove(handle);
                }
                Greeting::Port(port) => self.request(handle, port),
            },
            Some(Entry::Connection(connection)) => {
                if events
                    .intersects(EventSet::IN | EventSet::READ_HANG_UP | EventSet::HANG_UP | EventSet::ERROR)
                {
                    connection.readable = true;
                }
                if events.intersects(EventSet::HANG_UP | EventSet::ERROR) {
                    connection.hung_up = true;
                    // Nobody can read what is left; a host that closed both ways before reading gave it up.
                    connection.host_stopped_receiving();
                } else if events.contains(EventSet::OUT) {
                    connection.flush();
                }
                self.after_flush(handle);
            }
        }
    }

    /// What may have become possible now that a connection's backlog shrank.
    pub(super) fn after_flush(&mut self, handle: Handle) {
        let Some(connection) = self.table.connection(handle) else {
            return;
        };
        let blocked = connection.backlog_len() > 0;
        if connection.state == State::Draining && !blocked {
            self.remove(handle);
            return;
        }
        connection.pass_shutdown_on();
        if connection.watches_writable != blocked {
            connection.watches_writable = blocked;
            let fd = connection.stream.as_raw_fd();
            if let Err(error) = self.watch(handle, fd, ControlOperation::Modify, blocked) {
                warn!(%error, "can't watch a vsock connection");
            }
        }
        self.make_ready(handle);
    }

    /// A host program has asked for a port of the guest.
    fn request(&mut self, handle: Handle, guest_port: u32) {
        let Some(host_port) = self.allocate_host_port(guest_port) else {
            self.remove(handle);
            return;
        };
        let deadline = Instant::now() + REQUEST_TIMEOUT;
        self.table.promote(handle, |stream| {
            let mut connection = Connection::new(stream, host_port, guest_port, State::Requested);
            connection.due.request = true;
            connection.deadline = Some(deadline);
            // What came with the greeting causes no further edge.
            connection.readable = true;
            connection
        });
        self.table.bind(handle);
        self.metrics.host_connections.inc();
        self.remind(deadline);
        self.make_ready(handle);
    }

    fn allocate_host_port(&mut self, guest_port: u32) -> Option<u32> {
        // More attempts than there can be connections.
        for _ in 0..=super::table::MAX_ENTRIES {
            let port = self.next_host_port;
            self.next_host_port = port
                .checked_add(1)
                .filter(|&port| port != u32::MAX)
                .unwrap_or(FIRST_HOST_PORT);
            if self.table.find(port, guest_port).is_none() {
                return Some(port);
            }
        }
        None
    }

    /// Takes the stream the configuration has for a port, if it hasn't been used.
    pub(super) fn take_guest_port(&mut self, port: u32) -> Option<UnixStream> {
        let index = self.guest_ports.iter().position(|(have, _)| *have == port)?;
        Some(self.guest_ports.swap_remove(index).1)
    }

    /// Adds a connection that the guest asked for.
    pub(super) fn add_connection(&mut self, connection: Connection) -> Option<Handle> {
        let fd = connection.stream.as_raw_fd();
        let handle = self.table.insert(Entry::Connection(connection)).ok()?;
        if let Err(error) = self.watch(handle, fd, ControlOperation::Add, false) {
            warn!(%error, "can't watch a vsock connection");
            drop(self.table.remove(handle));
            return None;
        }
        self.table.bind(handle);
        self.metrics.connections_open_count.set(self.table.len() as u64);
        Some(handle)
    }

    /// Tells the host program that its connection stands.
    pub(super) fn confirm(&mut self, handle: Handle) -> bool {
        let Some(connection) = self.table.connection(handle) else {
            return false;
        };
        let line = format!("OK {}\n", connection.host_port);
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        // Nothing has been written to this socket: a line always fits.
        send(&connection.stream, line.as_bytes(), flags).is_ok_and(|sent| sent == line.len())
    }

    /// Puts a connection into the list of those to be looked at for the guest.
    pub(super) fn make_ready(&mut self, handle: Handle) {
        if let Some(connection) = self.table.connection(handle)
            && !std::mem::replace(&mut connection.queued, true)
        {
            self.ready.push_back(handle);
        }
    }

    /// Tells the guest of all progress it doesn't know of.
    pub(super) fn tell_progress(&mut self) {
        let behind: Vec<Handle> = self
            .table
            .connections()
            .filter_map(|(handle, connection)| connection.tell_progress().then_some(handle))
            .collect();
        for handle in behind {
            self.make_ready(handle);
        }
    }

    /// Closes a socket and forgets it.
    pub(super) fn remove(&mut self, handle: Handle) {
        if let Some(Entry::Connection(mut connection)) = self.table.remove(handle) {
            connection.discard_unread();
        }
        self.metrics.connections_open_count.set(self.table.len() as u64);
        if !self.listening && self.accept_again.is_none() {
            self.listen();
        }
    }

    /// Gives the guest time to reset a connection that is over both ways.
    pub(super) fn expect_reset(&mut self, handle: Handle) {
        let deadline = Instant::now() + CLOSE_TIMEOUT;
        if let Some(connection) = self.table.connection(handle)
            && connection.deadline.is_none()
        {
            connection.deadline = Some(deadline);
            self.remind(deadline);
        }
    }

    fn process_timer(&mut self) {
        let mut expirations = [0; 8];
        // Nothing to read if it was set again in the meantime.
        let _ = rustix::io::read(&self.timer, &mut expirations);
        self.timer_at = None;
        let now = Instant::now();
        if self.accept_again.is_some_and(|at| at <= now) {
            self.accept_again = None;
            self.listen();
        }
        let expired: Vec<Handle> = self
            .table
            .deadlines()
            .filter(|(_, at)| *at <= now)
            .map(|(handle, _)| handle)
            .collect();
        for handle in expired {
            self.metrics.refused_connections.inc();
            self.reset(handle);
        }
        let next = self
            .table
            .deadlines()
            .map(|(_, at)| at)
            .chain(self.accept_again)
            .min();
        self.set_timer(next);
    }

    fn remind(&mut self, at: Instant) {
        if self.timer_at.is_none_or(|set| at < set) {
            self.set_timer(Some(at));
        }
    }

    fn set_timer(&mut self, at: Option<Instant>) {
        self.timer_at = at;
        let zero = Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        let value = at.map_or(zero, |at| {
            // Never zero, which would disarm it.
            let wait = at
                .saturating_duration_since(Instant::now())
                .max(Duration::from_micros(1));
            Timespec {
                tv_sec: i64::try_from(wait.as_secs()).unwrap_or(i64::MAX),
                tv_nsec: wait.subsec_nanos().into(),
            }
        });
        let spec = Itimerspec {
            it_interval: zero,
            it_value: value,
        };
        if let Err(error) = timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &spec) {
            warn!(%error, "can't set the timer of vsock connections");
        }
    }
}

enum Greeting {
    Incomplete,
    Invalid,
    Port(u32),
}

/// Reads `CONNECT <port>\n` and not a byte more.
fn read_greeting(stream: &UnixStream) -> Greeting {
    let mut line = [0; GREETING_LEN];
    let peeked = match recv(stream, &mut line[..], RecvFlags::PEEK | RecvFlags::DONTWAIT) {
        Ok((_, 0)) => return Greeting::Invalid,
        Ok((_, len)) => &line[..len.min(GREETING_LEN)],
        Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => return Greeting::Incomplete,
        Err(_) => return Greeting::Invalid,
    };
    let Some(end) = peeked.iter().position(|&byte| byte == b'\n') else {
        return if peeked.len() == GREETING_LEN {
            Greeting::Invalid
        } else {
            Greeting::Incomplete
        };
    };
    let port = std::str::from_utf8(&peeked[..end])
        .ok()
        .and_then(|line| line.strip_prefix("CONNECT "))
        .and_then(|port| port.trim_end().parse().ok());
    let mut consumed = [0; GREETING_LEN];
    match (port, recv(stream, &mut consumed[..=end], RecvFlags::DONTWAIT)) {
        (Some(port), Ok((_, len))) if len == end + 1 => Greeting::Port(port),
        _ => Greeting::Invalid,
    }
}

fn is_transient(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::ConnectionAborted | io::ErrorKind::Interrupted
    )
}
