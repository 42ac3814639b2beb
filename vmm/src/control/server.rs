//! The control socket's own thread: accepts clients, reads frames, and lets the driver answer.
//!
//! Invariants:
//! - Sockets are non-blocking: a client that sends half a frame, or does not read its answers, hinders nobody.
//! - A client that breaks the framing gets one error and is dropped; one whose JSON is wrong gets an error and stays.

use super::queue::ServerEnd;
use rustix::{
    event::{PollFd, PollFlags, poll},
    io::Errno,
};
use std::{
    io,
    os::{
        fd::AsFd,
        unix::net::{UnixListener, UnixStream},
    },
    sync::atomic::{AtomicU64, Ordering},
    thread::{self, JoinHandle},
};
use vmm_api::{
    ApiError, ErrorCode, Event, Frame, FrameError, FrameReader, Received, Request, Response, ResponseBody,
    ServerMessage, write_frame,
};

/// More clients than front-ends ever are at once; further ones wait in the backlog.
const MAX_CLIENTS: usize = 16;
/// A frame of the largest size is parsed on the heap; the stack needs little.
const STACK_BYTES: usize = 128 << 10;

/// What the control socket is.
#[derive(Debug)]
pub enum Endpoint {
    /// Clients connect.
    Listener(UnixListener),
    /// The one client is there already.
    Connected(UnixStream),
}

struct Client {
    stream: UnixStream,
    reader: FrameReader,
}

/// The thread's state.
struct Server {
    listener: Option<UnixListener>,
    clients: Vec<Client>,
    queue: ServerEnd,
    abandoned: bool,
}

/// Starts the thread, which first confines itself with `confine`. It ends once the microVM has stopped and every client
/// has been told.
///
/// # Errors
/// If the socket or the thread can't be had.
pub fn spawn(
    endpoint: Endpoint,
    queue: ServerEnd,
    confine: impl FnOnce() -> Result<(), String> + Send + 'static,
) -> io::Result<JoinHandle<()>> {
    let mut server = Server {
        listener: None,
        clients: Vec::new(),
        queue,
        abandoned: false,
    };
    match endpoint {
        Endpoint::Listener(listener) => {
            listener.set_nonblocking(true)?;
            server.listener = Some(listener);
        }
        Endpoint::Connected(stream) => server.admit(stream)?,
    }
    thread::Builder::new()
        .name("control".to_owned())
        .stack_size(STACK_BYTES)
        .spawn(move || match confine() {
            Ok(()) => server.run(),
            Err(error) => tracing::error!(error, "control thread"),
        })
}

impl Server {
    fn admit(&mut self, stream: UnixStream) -> io::Result<()> {
        stream.set_nonblocking(true)?;
        self.clients.push(Client {
            stream,
            reader: FrameReader::new(),
        });
        Ok(())
    }

    fn run(&mut self) {
        loop {
            match self.wait() {
                Ok(Ready { stopped: true, .. }) => break self.announce_stop(),
                Ok(Ready { accept, clients, .. }) => {
                    self.serve_clients(&clients);
                    if accept {
                        self.accept();
                    }
                }
                Err(error) => break tracing::error!(%error, "control socket"),
            }
            if self.clients.is_empty() && self.listener.is_none() && !self.abandoned {
                self.abandoned = true;
                self.queue.abandon();
            }
        }
    }

    /// Sleeps until there is something to do.
    fn wait(&self) -> io::Result<Ready> {
        let mut fds = vec![PollFd::from_borrowed_fd(
            self.queue.stopped_event(),
            PollFlags::IN,
        )];
        fds.extend(
            self.clients
                .iter()
                .map(|client| PollFd::new(&client.stream, PollFlags::IN)),
        );
        let accepting = self
            .listener
            .as_ref()
            .filter(|_| self.clients.len() < MAX_CLIENTS);
        fds.extend(accepting.map(|listener| PollFd::new(listener, PollFlags::IN)));
        loop {
            match poll(&mut fds, None) {
                Ok(_) => break,
                Err(Errno::INTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
        let ready: Vec<bool> = fds.iter().map(|fd| !fd.revents().is_empty()).collect();
        let (stopped, rest) = (ready[0], &ready[1..]);
        let (clients, listener) = rest.split_at(self.clients.len());
        Ok(Ready {
            stopped,
            clients: clients.to_vec(),
            accept: listener == [true],
        })
    }

    fn accept(&mut self) {
        let Some(listener) = &self.listener else { return };
        match listener.accept() {
            Ok((stream, _)) => {
                if let Err(error) = self.admit(stream) {
                    tracing::warn!(%error, "control client");
                }
            }
            Err(error) => tracing::debug!(%error, "control client left before it was accepted"),
        }
    }

    fn serve_clients(&mut self, ready: &[bool]) {
        let mut ready = ready.iter().copied();
        let queue = &self.queue;
        self.clients.retain_mut(|client| {
            if !ready.next().unwrap_or(false) {
                return true;
            }
            let keep = client.serve(queue);
            if keep.is_err() {
                count(&queue.counters.dropped_clients);
            }
            keep.unwrap_or(false)
        });
    }

    fn announce_stop(&mut self) {
        let Some(reason) = self.queue.stopped() else {
            return;
        };
        let message = ServerMessage::Event(Event::Stopped { reason });
        for client in &self.clients {
            // Who doesn't read or has gone will see the end of the connection.
            let _ = send(&client.stream, &message);
        }
    }
}

/// What poll found.
struct Ready {
    stopped: bool,
    clients: Vec<bool>,
    accept: bool,
}

impl Client {
    /// Serves one frame at most, so that clients take turns. False once the client has gone.
    fn serve(&mut self, queue: &ServerEnd) -> Result<bool, FrameError> {
        let frame = match self.reader.read(self.stream.as_fd()) {
            Ok(Received::Frame(frame)) => frame,
            Ok(Received::WouldBlock) => return Ok(true),
            Ok(Received::Closed) => return Ok(false),
            Err(error) => {
                self.refuse_frame(queue, &error);
                return Err(error);
            }
        };
        let response = respond(queue, frame);
        if response.result.is_err() {
            count(&queue.counters.failed_requests);
        }
        send(&self.stream, &ServerMessage::Response(response)).map(|()| true)
    }

    /// The last thing a client that breaks the framing hears.
    fn refuse_frame(&self, queue: &ServerEnd, error: &FrameError) {
        count(&queue.counters.requests);
        count(&queue.counters.failed_requests);
        let code = match error {
            FrameError::Version { .. } => ErrorCode::UnsupportedVersion,
            _ => ErrorCode::Malformed,
        };
        let result = Err(ApiError {
            code,
            message: error.to_string(),
        });
        let _ = send(&self.stream, &ServerMessage::Response(Response { id: 0, result }));
    }
}

fn respond(queue: &ServerEnd, frame: Frame) -> Response {
    count(&queue.counters.requests);
    match serde_json::from_slice::<Request>(&frame.payload) {
        Ok(Request { id, body }) => Response {
            id,
            result: queue.ask(body, frame.fds),
        },
        Err(error) => {
            let message = format!("the request can't be read: {error}");
            Response {
                id: 0,
                result: Err(ApiError {
                    code: ErrorCode::Malformed,
                    message,
                }),
            }
        }
    }
}

fn send(stream: &UnixStream, message: &ServerMessage) -> Result<(), FrameError> {
    let payload = serde_json::to_vec(message).or_else(|error| {
        let result: Result<ResponseBody, _> = Err(ApiError {
            code: ErrorCode::Host,
            message: format!("the answer can't be written: {error}"),
        });
        serde_json::to_vec(&ServerMessage::Response(Response { id: 0, result }))
    });
    write_frame(stream, &payload.unwrap_or_default(), &[])
}

fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::queue::{DriverEnd, Order, queue};
    use std::{io::Write, time::Duration};
    use vmm_api::{Client as ApiClient, ClientError, RequestBody, StateReport, StopReason, VmState};

    /// A server whose driver reports a state until told to stop.
    fn serve(endpoint: Endpoint) -> (JoinHandle<()>, DriverEnd) {
        let (server, driver) = queue().unwrap();
        (spawn(endpoint, server, || Ok(())).unwrap(), driver)
    }

    fn connected() -> (ApiClient, JoinHandle<()>, DriverEnd) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let (thread, driver) = serve(Endpoint::Connected(theirs));
        (ApiClient::from_stream(ours), thread, driver)
    }

    fn answer_states(driver: DriverEnd, count: usize) -> JoinHandle<DriverEnd> {
        thread::spawn(move || {
            for _ in 0..count {
                let order = loop {
                    match driver.next().unwrap() {
                        Some(order) => break order,
                        None => thread::sleep(Duration::from_millis(1)),
                    }
                };
                let Order::Request { reply, .. } = order else {
                    panic!("{order:?}")
                };
                let report = StateReport {
                    state: VmState::Running,
                    stopped: None,
                };
                reply.send(Ok(ResponseBody::State(report))).unwrap();
            }
            driver
        })
    }

    #[test]
    fn malformed_json_is_answered_and_the_client_stays() {
        let (mut client, thread, driver) = connected();
        write_frame(client.as_stream(), b"{\"id\":1,\"body\":\"explode\"}", &[]).unwrap();
        let driver = answer_states(driver, 1);
        let error = client.call(RequestBody::State, &[]).unwrap_err();
        assert!(matches!(error, ClientError::Refused(error) if error.code == ErrorCode::Malformed));
        let driver = driver.join().unwrap();
        assert_eq!(driver.counters().snapshot().failed_requests, 1);
        driver.announce_stop(StopReason::GuestShutdown);
        assert_eq!(client.wait_stopped().unwrap(), Some(StopReason::GuestShutdown));
        thread.join().unwrap();
    }

    #[test]
    fn broken_framing_is_answered_once_and_the_client_dropped() {
        for (header, code) in [
            ([255, 255, 255, 255, 1, 0, 0, 0], ErrorCode::Malformed),
            ([0, 0, 0, 0, 1, 0, 0, 0], ErrorCode::Malformed),
            ([2, 0, 0, 0, 9, 0, 0, 0], ErrorCode::UnsupportedVersion),
            ([2, 0, 0, 0, 1, 0, 1, 0], ErrorCode::Malformed),
        ] {
            let (ours, theirs) = UnixStream::pair().unwrap();
            let (thread, driver) = serve(Endpoint::Connected(theirs));
            (&ours).write_all(&header).unwrap();
            let mut reader = FrameReader::new();
            let Received::Frame(frame) = reader.read(&ours).unwrap() else {
                panic!("no answer")
            };
            let message: ServerMessage = serde_json::from_slice(&frame.payload).unwrap();
            assert!(
                matches!(&message, ServerMessage::Response(Response { id: 0, result: Err(e) }) if e.code == code),
                "{message:?}"
            );
            assert!(matches!(reader.read(&ours), Ok(Received::Closed)));
            driver.announce_stop(StopReason::Requested);
            thread.join().unwrap();
            assert_eq!(driver.counters().snapshot().dropped_clients, 1);
        }
    }

    #[test]
    fn half_a_frame_does_not_hinder_another_client() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("control");
        let (thread, driver) = serve(Endpoint::Listener(UnixListener::bind(&path).unwrap()));
        let mut slow = UnixStream::connect(&path).unwrap();
        slow.write_all(&[9, 0, 0]).unwrap();
        let driver = answer_states(driver, 1);
        let mut client = ApiClient::connect(&path).unwrap();
        client.set_timeout(Some(Duration::from_secs(10)));
        assert!(matches!(
            client.call(RequestBody::State, &[]).unwrap(),
            ResponseBody::State(_)
        ));
        driver.join().unwrap().announce_stop(StopReason::Requested);
        thread.join().unwrap();
    }

    #[test]
    fn last_client_leaving_is_reported_only_where_none_can_come() {
        let (client, thread, driver) = connected();
        drop(client);
        let order = loop {
            if let Some(order) = driver.next().unwrap() {
                break order;
            }
            thread::sleep(Duration::from_millis(1));
        };
        assert!(matches!(order, Order::Abandoned));
        driver.announce_stop(StopReason::Requested);
        thread.join().unwrap();
    }

    #[test]
    fn client_that_does_not_read_is_dropped() {
        let (client, thread, driver) = connected();
        let stream = client.as_stream();
        let flood = thread::spawn({
            let stream = stream.try_clone().unwrap();
            move || {
                for _ in 0..100_000 {
                    if write_frame(&stream, b"{}", &[]).is_err() {
                        break;
                    }
                }
            }
        });
        while driver.counters().snapshot().dropped_clients == 0 {
            thread::sleep(Duration::from_millis(1));
        }
        flood.join().unwrap();
        driver.announce_stop(StopReason::Requested);
        thread.join().unwrap();
    }
}
