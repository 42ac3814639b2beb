//! The RPC server: ttRPC on vsock, one thread per connection of the host.
//!
//! A connection's requests are handled in order; `WaitProcess` is answered later, by the reaper. Another
//! connection is never held up by one whose request takes long. Requests that came together are read together, and
//! answered together: on a PVM host each system call of a guest is an exit.
//!
//! Invariants: a message is checked before it is acted on; the first request must be `Connect`; a peer that
//! breaks the framing loses its connection, never PID 1.

mod methods;

use std::{
    fs::File,
    io::{BufRead as _, BufReader, Read as _, Write as _},
    os::fd::OwnedFd,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
    time::Duration,
};

use agent_protocol::{
    Message,
    frame::{self, FrameHeader, FrameType, HEADER_BYTES},
};
use nix::sys::{
    socket::{SockFlag, setsockopt, sockopt},
    time::{TimeVal, TimeValLike as _},
};

use crate::{containers::Containers, error::AgentError, log::log, vsock, workers};

/// Connections at once; the host has one per front-end command.
const MAX_CONNECTIONS: usize = 256;
/// A host that doesn't take its answers for so long has lost its connection.
const SEND_TIMEOUT_S: i64 = 10;
/// What is read at once; a longer message is read in more parts.
const BUFFER_BYTES: usize = 8 * 1024;

/// What is known of the boot, for `Connect`.
#[derive(Debug, Clone, Copy)]
pub struct BootTimes {
    /// When the agent began.
    pub agent_ns: u64,
    /// When it listened.
    pub ready_ns: u64,
}

/// A connection, and the answers that wait for others to go along with.
#[derive(Debug)]
struct Sender {
    socket: File,
    waiting: Mutex<Waiting>,
}

#[derive(Debug, Default)]
struct Waiting {
    frames: Vec<u8>,
    /// More requests are there already, whose answers will follow.
    more: bool,
}

impl Sender {
    fn new(socket: File) -> Self {
        Self {
            socket,
            waiting: Mutex::default(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Says whether answers shall wait.
    fn expect_more(&self, more: bool) {
        self.lock().more = more;
    }

    fn send(&self, frame: &[u8]) {
        let mut waiting = self.lock();
        waiting.frames.extend_from_slice(frame);
        if !waiting.more {
            self.write(&mut waiting);
        }
    }

    /// Sends what waits.
    fn flush(&self) {
        let mut waiting = self.lock();
        waiting.more = false;
        if !waiting.frames.is_empty() {
            self.write(&mut waiting);
        }
    }

    fn write(&self, waiting: &mut Waiting) {
        if let Err(error) = (&self.socket).write_all(&std::mem::take(&mut waiting.frames)) {
            log!("answering the host: {error}");
        }
    }
}

/// The sending side of a connection, shared with the reaper.
#[derive(Debug, Clone)]
pub struct Responder {
    sender: Arc<Sender>,
    stream_id: u32,
}

impl Responder {
    /// Lets earlier answers go, because this one may take as long as the host likes.
    fn send_waiting(&self) {
        self.sender.flush();
    }

    /// Answers with a message.
    pub fn succeed(&self, message: &impl Message) {
        let frame = message
            .write_to_bytes()
            .map_err(Into::into)
            .and_then(|payload| frame::encode_response(self.stream_id, payload));
        match frame {
            Ok(frame) => self.sender.send(&frame),
            Err(error) => log!("encoding an answer: {error}"),
        }
    }

    /// Answers with an error.
    pub fn fail(&self, error: &AgentError) {
        let (code, detail) = error.to_status();
        match frame::encode_failure(self.stream_id, code, &error.to_string(), &detail) {
            Ok(frame) => self.sender.send(&frame),
            Err(error) => log!("encoding an error: {error}"),
        }
    }
}

/// Serves the host for ever.
pub fn serve(listener: &OwnedFd, containers: &Arc<Containers>, boot: BootTimes) -> ! {
    let connections = Arc::new(AtomicUsize::new(0));
    loop {
        let socket = match vsock::accept_host(listener, SockFlag::empty()) {
            Ok(socket) => socket,
            Err(errno) => {
                log!("accepting a connection: {errno}");
                thread::sleep(Duration::from_millis(100));
                continue;
            }
        };
        if connections.fetch_add(1, Ordering::Relaxed) >= MAX_CONNECTIONS {
            connections.fetch_sub(1, Ordering::Relaxed);
            continue;
        }
        let (containers, counter) = (Arc::clone(containers), Arc::clone(&connections));
        let spawned = workers::spawn(move || {
            if let Err(error) = serve_connection(socket, &containers, boot) {
                log!("connection of the host: {error}");
            }
            counter.fetch_sub(1, Ordering::Relaxed);
        });
        if let Err(error) = spawned {
            connections.fetch_sub(1, Ordering::Relaxed);
            log!("starting a connection's thread: {error}");
        }
    }
}

fn serve_connection(
    socket: File,
    containers: &Arc<Containers>,
    boot: BootTimes,
) -> Result<(), Box<dyn std::error::Error>> {
    setsockopt(&socket, sockopt::SendTimeout, &TimeVal::seconds(SEND_TIMEOUT_S))?;
    let sender = Arc::new(Sender::new(socket));
    let result = serve_requests(
        &sender,
        &mut methods::Connection::new(Arc::clone(containers), boot),
    );
    // What was right before something wrong came is answered.
    sender.flush();
    result
}

fn serve_requests(
    sender: &Arc<Sender>,
    connection: &mut methods::Connection,
) -> Result<(), Box<dyn std::error::Error>> {
    let mut requests = BufReader::with_capacity(BUFFER_BYTES, &sender.socket);
    loop {
        if requests.fill_buf()?.is_empty() {
            return Ok(());
        }
        let mut header = [0; HEADER_BYTES];
        requests.read_exact(&mut header)?;
        let header = FrameHeader::parse(header)?;
        let mut payload = vec![0; header.payload_bytes];
        requests.read_exact(&mut payload)?;
        sender.expect_more(begins_with_request(requests.buffer()));
        if header.frame_type == FrameType::Request {
            let responder = Responder {
                sender: Arc::clone(sender),
                stream_id: header.stream_id,
            };
            let handled = frame::decode_request(&payload)
                .map_err(|_| AgentError::Malformed)
                .and_then(|request| connection.handle(&request, &responder));
            if let Err(error) = handled {
                responder.fail(&error);
            }
        }
        if !begins_with_request(requests.buffer()) {
            sender.flush();
        }
    }
}

/// Whether a whole message is there: it will be handled without waiting for the host.
fn begins_with_request(buffer: &[u8]) -> bool {
    let Some((header, rest)) = buffer.split_first_chunk::<HEADER_BYTES>() else {
        return false;
    };
    // One that is no header ends the connection.
    FrameHeader::parse(*header).is_ok_and(|header| header.payload_bytes <= rest.len())
}

#[cfg(test)]
mod tests {
    use std::{
        io::{Read as _, Write as _},
        os::{fd::OwnedFd, unix::net::UnixStream},
    };

    use agent_protocol::{
        Connect, ConnectRequest, ContainerRef, GetStats, Method, PROTOCOL_VERSION, SERVICE,
        frame::encode_request,
    };
    use proptest::{collection::vec, prelude::*};

    use super::*;

    fn encoded<M: Method>(stream_id: u32, request: &M::Request) -> Vec<u8> {
        let payload = request.write_to_bytes().unwrap();
        encode_request(stream_id, SERVICE, M::NAME, payload).unwrap()
    }

    /// Serves what is written to the stream that is returned, on a thread.
    fn served() -> (UnixStream, thread::JoinHandle<()>) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let socket = File::from(OwnedFd::from(theirs));
        let serving = thread::spawn(move || {
            let boot = BootTimes {
                agent_ns: 1,
                ready_ns: 2,
            };
            // A peer that breaks the framing gets an error here, and no answer.
            let _ = serve_connection(socket, &Arc::new(Containers::default()), boot);
        });
        (ours, serving)
    }

    /// The stream ids of the answers that come.
    fn answered(stream: &mut UnixStream, count: usize) -> Vec<u32> {
        let one = |_| {
            let mut header = [0; HEADER_BYTES];
            stream.read_exact(&mut header).unwrap();
            let header = FrameHeader::parse(header).unwrap();
            stream.read_exact(&mut vec![0; header.payload_bytes]).unwrap();
            header.stream_id
        };
        (0..count).map(one).collect()
    }

    fn hello() -> Vec<u8> {
        encoded::<Connect>(
            1,
            &ConnectRequest {
                protocol_version: PROTOCOL_VERSION,
                ..ConnectRequest::default()
            },
        )
    }

    fn stats(stream_id: u32) -> Vec<u8> {
        let container = ContainerRef {
            container_id: "c".into(),
            ..ContainerRef::default()
        };
        encoded::<GetStats>(stream_id, &container)
    }

    #[test]
    fn requests_are_answered_in_order_however_they_are_cut() {
        let requests = [hello(), stats(3), stats(5), stats(7)].concat();
        for piece in [1, 3, 11, 40, requests.len()] {
            let (mut stream, serving) = served();
            for part in requests.chunks(piece) {
                stream.write_all(part).unwrap();
            }
            assert_eq!(answered(&mut stream, 4), [1, 3, 5, 7], "in pieces of {piece}");
            // Nothing waits for more to come.
            stream.write_all(&stats(9)).unwrap();
            assert_eq!(answered(&mut stream, 1), [9]);
            drop(stream);
            serving.join().unwrap();
        }
    }

    #[test]
    fn what_came_before_nonsense_is_answered() {
        let (mut stream, serving) = served();
        let nonsense = [0xff; HEADER_BYTES];
        stream
            .write_all(&[&hello()[..], &stats(3), &nonsense].concat())
            .unwrap();
        assert_eq!(answered(&mut stream, 2), [1, 3]);
        assert_eq!(stream.read(&mut [0]).unwrap(), 0);
        serving.join().unwrap();
    }

    /// Something right, or something wrong.
    fn part() -> impl Strategy<Value = Vec<u8>> {
        let exec = |(stream_id, payload)| encode_request(stream_id, SERVICE, "CreateExec", payload).unwrap();
        prop_oneof![
            vec(any::<u8>(), 0..60),
            (0_u32..9).prop_map(stats),
            (0_u32..9, vec(any::<u8>(), 0..60)).prop_map(exec),
            Just(hello()),
        ]
    }

    proptest! {
        #[test]
        fn no_bytes_of_a_peer_end_more_than_its_connection(parts in vec(part(), 0..12)) {
            let (mut stream, serving) = served();
            // It may have ended the connection.
            let _ = stream.write_all(&parts.concat());
            let _ = stream.shutdown(std::net::Shutdown::Write);
            let mut answers = Vec::new();
            let _ = stream.read_to_end(&mut answers);
            prop_assert!(serving.join().is_ok());
        }
    }
}
