//! The bounded queue between the control thread and the driver.

use rustix::event::{EventfdFlags, eventfd};
use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
        mpsc::{Receiver, RecvTimeoutError, SyncSender, TryRecvError, TrySendError, sync_channel},
    },
    time::Duration,
};
use vmm_api::{ApiError, ControlMetrics, ErrorCode, RequestBody, ResponseBody, StopReason};
use vmm_sys_util::eventfd::EventFd;

/// The control thread sends one request at a time; a little room keeps the notices from blocking.
const DEPTH: usize = 4;
/// No request takes longer, short of a bug; the client then learns of it instead of waiting for ever.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(60);

/// What the control thread asks of the driver.
#[derive(Debug)]
pub enum Order {
    /// A client's request.
    Request {
        /// What it asks for.
        body: RequestBody,
        /// The descriptors that came along.
        fds: Vec<OwnedFd>,
        /// Where the answer goes.
        reply: SyncSender<Result<ResponseBody, ApiError>>,
    },
    /// No client is left and none can come.
    Abandoned,
}

/// Counters of the control thread.
#[derive(Debug, Default)]
pub struct ControlCounters {
    pub(super) requests: AtomicU64,
    pub(super) failed_requests: AtomicU64,
    pub(super) dropped_clients: AtomicU64,
}

impl ControlCounters {
    /// The counts at this moment.
    #[must_use]
    pub fn snapshot(&self) -> ControlMetrics {
        ControlMetrics {
            requests: self.requests.load(Ordering::Relaxed),
            failed_requests: self.failed_requests.load(Ordering::Relaxed),
            dropped_clients: self.dropped_clients.load(Ordering::Relaxed),
        }
    }
}

/// The control thread's end.
#[derive(Debug)]
pub struct ServerEnd {
    orders: SyncSender<Order>,
    orders_event: EventFd,
    stopped: Receiver<StopReason>,
    stopped_event: OwnedFd,
    /// Counters, shared with the driver.
    pub counters: Arc<ControlCounters>,
}

/// The driver's end.
#[derive(Debug)]
pub struct DriverEnd {
    orders: Receiver<Order>,
    orders_event: EventFd,
    stopped: SyncSender<StopReason>,
    stopped_event: OwnedFd,
    counters: Arc<ControlCounters>,
}

/// Makes both ends.
///
/// # Errors
/// If there is no descriptor left.
pub fn queue() -> io::Result<(ServerEnd, DriverEnd)> {
    let orders_event = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?;
    let stopped_event = eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)?;
    let (orders_sender, orders_receiver) = sync_channel(DEPTH);
    let (stopped_sender, stopped_receiver) = sync_channel(1);
    let counters = Arc::new(ControlCounters::default());
    let server = ServerEnd {
        orders: orders_sender,
        orders_event: orders_event.try_clone()?,
        stopped: stopped_receiver,
        stopped_event: stopped_event.try_clone()?,
        counters: Arc::clone(&counters),
    };
    let driver = DriverEnd {
        orders: orders_receiver,
        orders_event,
        stopped: stopped_sender,
        stopped_event,
        counters,
    };
    Ok((server, driver))
}

impl ServerEnd {
    /// Puts a request into the queue and waits for the answer.
    pub(super) fn ask(&self, body: RequestBody, fds: Vec<OwnedFd>) -> Result<ResponseBody, ApiError> {
        let (reply, answer) = sync_channel(1);
        self.send(Order::Request { body, fds, reply })?;
        answer.recv_timeout(ANSWER_TIMEOUT).unwrap_or_else(|error| {
            Err(match error {
                RecvTimeoutError::Timeout => busy("the microVM did not get to the request in time"),
                RecvTimeoutError::Disconnected => busy("the microVM is stopping"),
            })
        })
    }

    /// Tells the driver that nobody will ever ask again.
    pub(super) fn abandon(&self) {
        let _ = self.send(Order::Abandoned);
    }

    fn send(&self, order: Order) -> Result<(), ApiError> {
        match self.orders.try_send(order) {
            Ok(()) => {}
            Err(TrySendError::Full(_)) => return Err(busy("too many requests wait")),
            Err(TrySendError::Disconnected(_)) => return Err(busy("the microVM is stopping")),
        }
        self.orders_event
            .write(1)
            .map_err(|_| busy("the event loop can't be woken"))
    }

    /// Readable once the microVM has stopped.
    pub(super) fn stopped_event(&self) -> BorrowedFd<'_> {
        self.stopped_event.as_fd()
    }

    /// Why it stopped; `None` if it hasn't.
    pub(super) fn stopped(&self) -> Option<StopReason> {
        self.stopped.try_recv().ok()
    }
}

impl Drop for ServerEnd {
    /// However the control thread ends, nobody can ask any more. A driver that is stopping already doesn't look.
    fn drop(&mut self) {
        self.abandon();
    }
}

impl DriverEnd {
    /// Readable while orders may wait.
    pub(super) fn event(&self) -> &EventFd {
        &self.orders_event
    }

    /// The next order. `Err` once the control thread has ended.
    pub(super) fn next(&self) -> Result<Option<Order>, ()> {
        match self.orders.try_recv() {
            Ok(order) => Ok(Some(order)),
            Err(TryRecvError::Empty) => Ok(None),
            Err(TryRecvError::Disconnected) => Err(()),
        }
    }

    /// Has the control thread tell all clients, and then end.
    pub(super) fn announce_stop(&self, reason: StopReason) {
        let _ = self.stopped.try_send(reason);
        let _ = rustix::io::write(&self.stopped_event, &1u64.to_ne_bytes());
    }

    /// The control thread's counters.
    pub(super) fn counters(&self) -> &ControlCounters {
        &self.counters
    }
}

fn busy(message: &str) -> ApiError {
    ApiError {
        code: ErrorCode::Busy,
        message: message.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn end_of_the_control_thread_is_noticed() {
        let (server, driver) = queue().unwrap();
        drop(server);
        assert!(matches!(driver.next(), Ok(Some(Order::Abandoned))));
        assert!(driver.next().is_err());
    }

    #[test]
    fn request_to_a_driver_that_is_gone_is_answered() {
        let (server, driver) = queue().unwrap();
        drop(driver);
        assert_eq!(
            server.ask(RequestBody::State, Vec::new()).unwrap_err().code,
            ErrorCode::Busy
        );
    }
}
