//! What a monitor and its clients say to each other: JSON in the frames of `vmm_api`, descriptors beside them.
//!
//! The launch connection carries one [`Request::Launch`]; its answer is [`Reply::Started`] or [`Reply::Failed`], and from
//! then on it is a connection like those to `monitor.sock`. A client asks for one thing at a time, but what happens to the
//! container may be told in between.
//!
//! Invariant: a message is at most [`MAX_MESSAGE_BYTES`] long; a client that sends more, or nonsense, or doesn't read,
//! loses its connection and nothing else.

use std::{
    io,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::net::UnixStream,
    },
    path::PathBuf,
    time::{Duration, Instant},
};

use serde::{Deserialize, Serialize, de::DeserializeOwned};
use vmm_api::{FrameReader, Received, write_frame};

use crate::{Components, Result, SandboxError, Timing, bundle, wait};

/// Longest message; what a container is made of is in its record, not in a message.
const MAX_MESSAGE_BYTES: usize = 64 * 1024;

/// Which streams a client wants. The descriptors its output goes to come with the message: stdout's, then stderr's.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct AttachRequest {
    /// The container's stdin, to be written directly.
    pub(crate) stdin: bool,
    /// A descriptor for stdout comes along.
    pub(crate) stdout: bool,
    /// A descriptor for stderr comes along.
    pub(crate) stderr: bool,
    /// The container was started for this client: its input ends with the client.
    pub(crate) owner: bool,
    /// The container's output ends when nobody reads this client's any more.
    pub(crate) output_ends_it: bool,
}

/// What a client asks for.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub(crate) enum Request {
    /// Start the container whose locked home comes along as the first descriptor.
    Launch {
        home: PathBuf,
        run: PathBuf,
        components: Components,
        attach: Option<AttachRequest>,
        client_us: u64,
    },
    /// Make a container from a bundle.
    LaunchBundle(bundle::LaunchRequest),
    /// Run a further process in such a container.
    ExecBundle(bundle::ExecRequest),
    /// Be given the container's streams.
    Attach(AttachRequest),
    /// Send a signal to the first process, or to all.
    Signal { signal: i32, all: bool },
    /// The client's terminal has this size; not answered.
    Resize { rows: u16, columns: u16 },
    /// Stop the vCPUs.
    Pause,
    /// Let them run again.
    Resume,
    /// Say when the container has exited.
    Wait,
    /// Take another name, which the client holds free.
    Rename { name: String },
}

/// What a monitor says.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub(crate) enum Reply {
    /// It is done.
    Done,
    /// The streams are attached; stdin's comes along where it was asked for and there is one.
    Attached,
    /// The container's process runs; stdin's stream as with [`Reply::Attached`].
    Started { timing: Timing },
    /// It isn't done.
    Failed { message: String, exit_code: u8 },
    /// Something the user should know; everything goes on.
    Warning { message: String },
    /// Output can't be written any more to what the client gave; `message` is empty where its reader has gone.
    OutputFailed { message: String },
    /// The container has exited. The last message.
    Exited(ExitReport),
}

/// How a container ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct ExitReport {
    pub(crate) code: u8,
    pub(crate) oom_killed: bool,
    /// Why its microVM stopped, if that is what ended it.
    pub(crate) error: Option<String>,
    pub(crate) timing: Timing,
}

/// What arrived.
#[derive(Debug)]
pub(crate) enum Incoming<T> {
    Message(T, Vec<OwnedFd>),
    /// Nothing more for now.
    Nothing,
    /// The other end has gone, or can't be understood.
    Closed,
}

/// One end of a connection.
#[derive(Debug)]
pub(crate) struct Connection {
    stream: UnixStream,
    reader: FrameReader,
}

impl Connection {
    /// Takes a connected stream, which becomes non-blocking.
    pub(crate) fn new(stream: UnixStream) -> io::Result<Self> {
        stream.set_nonblocking(true)?;
        Ok(Self {
            stream,
            reader: FrameReader::new(),
        })
    }

    /// Sends a message; an error means that the connection is of no more use.
    pub(crate) fn send<T: Serialize>(&self, message: &T, fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        let payload = serde_json::to_vec(message)?;
        if payload.len() > MAX_MESSAGE_BYTES {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        write_frame(&self.stream, &payload, fds).map_err(io::Error::other)
    }

    /// Takes what has arrived, without waiting.
    pub(crate) fn receive<T: DeserializeOwned>(&mut self) -> Incoming<T> {
        match self.reader.read(&self.stream) {
            Ok(Received::Frame(frame)) if frame.payload.len() <= MAX_MESSAGE_BYTES => {
                match serde_json::from_slice(&frame.payload) {
                    Ok(message) => Incoming::Message(message, frame.fds),
                    Err(error) => {
                        tracing::debug!(%error, "a message can't be understood");
                        Incoming::Closed
                    }
                }
            }
            Ok(Received::WouldBlock) => Incoming::Nothing,
            Ok(Received::Frame(_) | Received::Closed) | Err(_) => Incoming::Closed,
        }
    }

    /// Waits for the next message; `None` when the other end has gone or the time has passed.
    pub(crate) fn wait<T: DeserializeOwned>(
        &mut self,
        timeout: Option<Duration>,
    ) -> Result<Option<(T, Vec<OwnedFd>)>> {
        let deadline = timeout.map(|timeout| Instant::now() + timeout);
        loop {
            match self.receive() {
                Incoming::Message(message, fds) => return Ok(Some((message, fds))),
                Incoming::Closed => return Ok(None),
                Incoming::Nothing => {}
            }
            let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
            let readable = wait::readable(self.stream.as_fd(), left)
                .map_err(SandboxError::system("waiting for the monitor"))?;
            if !readable {
                return Ok(None);
            }
        }
    }

    /// Says that nothing more will be sent.
    pub(crate) fn close_sending(&self) {
        drop(self.stream.shutdown(std::net::Shutdown::Write));
    }
}

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    fn pair() -> (Connection, Connection) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        (Connection::new(ours).unwrap(), Connection::new(theirs).unwrap())
    }

    #[test]
    fn message_arrives_with_its_descriptors() {
        let (client, mut server) = pair();
        let file = tempfile::tempfile().unwrap();
        let request = Request::Attach(AttachRequest {
            stdout: true,
            ..AttachRequest::default()
        });
        client.send(&request, &[file.as_fd()]).unwrap();
        let (received, fds) = server.wait::<Request>(None).unwrap().unwrap();
        assert!(matches!(
            received,
            Request::Attach(AttachRequest { stdout: true, .. })
        ));
        assert_eq!(fds.len(), 1);
    }

    #[test]
    fn message_over_the_bound_is_neither_sent_nor_accepted() {
        let (client, mut server) = pair();
        let message = Reply::Warning {
            message: "x".repeat(MAX_MESSAGE_BYTES),
        };
        assert!(client.send(&message, &[]).is_err());
        let payload = serde_json::to_vec(&message).unwrap();
        write_frame(&client.stream, &payload, &[]).unwrap();
        assert!(matches!(server.receive::<Reply>(), Incoming::Closed));
    }

    #[test]
    fn nonsense_closes_and_half_a_message_waits() {
        let (mut client, mut server) = pair();
        client.stream.write_all(&[7, 0]).unwrap();
        assert!(matches!(server.receive::<Request>(), Incoming::Nothing));
        client.stream.write_all(&[0xff; 64]).unwrap();
        assert!(matches!(server.receive::<Request>(), Incoming::Closed));
    }

    proptest::proptest! {
        #[test]
        fn whatever_a_client_sends_is_a_message_or_the_end(
            bytes in proptest::collection::vec(proptest::prelude::any::<u8>(), 0..256),
        ) {
            let (mut client, mut server) = pair();
            client.stream.write_all(&bytes).unwrap();
            drop(client);
            while let Incoming::Message(..) = server.receive::<Request>() {}
        }
    }
}
