//! The RPC server: ttRPC on vsock, one thread per connection of the host.
//!
//! A connection's requests are handled in order; `WaitProcess` is answered later, by the reaper. Another
//! connection is never held up by one whose request takes long.
//!
//! Invariants: a message is checked before it is acted on; the first request must be `Connect`; a peer that
//! breaks the framing loses its connection, never PID 1.

mod methods;

use std::{
    fs::File,
    io::{Read as _, Write as _},
    os::fd::OwnedFd,
    sync::{
        Arc, Mutex, PoisonError,
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
    socket::{setsockopt, sockopt},
    time::{TimeVal, TimeValLike as _},
};

use crate::{containers::Containers, error::AgentError, log::log, vsock};

/// Connections at once; the host has one per front-end command.
const MAX_CONNECTIONS: usize = 256;
/// A host that doesn't take its answers for so long has lost its connection.
const SEND_TIMEOUT_S: i64 = 10;

/// What is known of the boot, for `Connect`.
#[derive(Debug, Clone, Copy)]
pub struct BootTimes {
    /// When the agent began.
    pub agent_ns: u64,
    /// When it listened.
    pub ready_ns: u64,
}

/// The sending side of a connection, shared with the reaper.
#[derive(Debug, Clone)]
pub struct Responder {
    socket: Arc<Mutex<File>>,
    stream_id: u32,
}

impl Responder {
    fn send(&self, frame: &[u8]) {
        let mut socket = self.socket.lock().unwrap_or_else(PoisonError::into_inner);
        if let Err(error) = socket.write_all(frame) {
            log!("answering the host: {error}");
        }
    }

    /// Answers with a message.
    pub fn succeed(&self, message: &impl Message) {
        let frame = message
            .write_to_bytes()
            .map_err(Into::into)
            .and_then(|payload| frame::encode_response(self.stream_id, payload));
        match frame {
            Ok(frame) => self.send(&frame),
            Err(error) => log!("encoding an answer: {error}"),
        }
    }

    /// Answers with an error.
    pub fn fail(&self, error: &AgentError) {
        let (code, detail) = error.to_status();
        match frame::encode_failure(self.stream_id, code, &error.to_string(), &detail) {
            Ok(frame) => self.send(&frame),
            Err(error) => log!("encoding an error: {error}"),
        }
    }
}

/// Serves the host for ever.
pub fn serve(listener: &OwnedFd, containers: &Arc<Containers>, boot: BootTimes) -> ! {
    let connections = Arc::new(AtomicUsize::new(0));
    loop {
        let socket = match vsock::accept_host(listener) {
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
        let spawned = thread::Builder::new()
            .name("connection".into())
            .stack_size(256 * 1024)
            .spawn(move || {
                if let Err(error) = serve_connection(&socket, &containers, boot) {
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
    mut socket: &File,
    containers: &Arc<Containers>,
    boot: BootTimes,
) -> Result<(), Box<dyn std::error::Error>> {
    setsockopt(&socket, sockopt::SendTimeout, &TimeVal::seconds(SEND_TIMEOUT_S))?;
    let writer = Arc::new(Mutex::new(socket.try_clone()?));
    let mut connection = methods::Connection::new(Arc::clone(containers), boot);
    loop {
        let mut header = [0; HEADER_BYTES];
        match socket.read_exact(&mut header) {
            Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => return Ok(()),
            result => result?,
        }
        let header = FrameHeader::parse(header)?;
        let mut payload = vec![0; header.payload_bytes];
        socket.read_exact(&mut payload)?;
        if header.frame_type != FrameType::Request {
            continue;
        }
        let responder = Responder {
            socket: Arc::clone(&writer),
            stream_id: header.stream_id,
        };
        match frame::decode_request(&payload) {
            Ok(request) => {
                if let Err(error) = connection.handle(&request, &responder) {
                    responder.fail(&error);
                }
            }
            Err(_) => responder.fail(&AgentError::Malformed),
        }
    }
}
