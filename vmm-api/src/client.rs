//! A small blocking client of the control socket.

use crate::{
    frame::{FrameError, FrameReader, Received, write_frame},
    message::{ApiError, Event, Request, RequestBody, Response, ResponseBody, ServerMessage, StopReason},
};
use std::{
    collections::VecDeque,
    os::{
        fd::{AsFd, BorrowedFd},
        unix::net::UnixStream,
    },
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

/// Why a call failed.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody listens, or no access.
    #[error("can't connect to the VMM at {}", path.display())]
    Connect {
        /// The socket.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
    /// The socket failed or the peer broke the framing.
    #[error("talking to the VMM")]
    Frame(#[from] FrameError),
    /// The VMM has gone.
    #[error("the VMM closed the control connection")]
    Closed,
    /// No answer within the time-out.
    #[error("the VMM did not answer within {} ms", timeout.as_millis())]
    TimedOut {
        /// The time-out that passed.
        timeout: Duration,
    },
    /// The answer is not of the protocol.
    #[error("the VMM's message can't be read")]
    Decode(#[source] serde_json::Error),
    /// The request can't be written as JSON (a path that isn't UTF-8).
    #[error("the request can't be encoded")]
    Encode(#[source] serde_json::Error),
    /// An answer to something else.
    #[error("the VMM answered request {got} while {expected} was waited for")]
    UnexpectedId {
        /// The request sent.
        expected: u64,
        /// The id in the answer.
        got: u64,
    },
    /// The VMM refused.
    #[error("the VMM refused the request")]
    Refused(#[source] ApiError),
}

/// One connection to a VMM. Calls are answered in order, one at a time; events that arrive in between are kept.
#[derive(Debug)]
pub struct Client {
    stream: UnixStream,
    reader: FrameReader,
    next_id: u64,
    events: VecDeque<Event>,
    timeout: Option<Duration>,
}

impl Client {
    /// Connects to a listening VMM.
    ///
    /// # Errors
    /// [`ClientError::Connect`].
    pub fn connect(path: impl AsRef<Path>) -> Result<Self, ClientError> {
        let path = path.as_ref();
        let stream = UnixStream::connect(path).map_err(|source| ClientError::Connect {
            path: path.to_owned(),
            source,
        })?;
        Ok(Self::from_stream(stream))
    }

    /// Uses a connected stream.
    #[must_use]
    pub fn from_stream(stream: UnixStream) -> Self {
        Self {
            stream,
            reader: FrameReader::new(),
            next_id: 1,
            events: VecDeque::new(),
            timeout: None,
        }
    }

    /// Bounds how long [`Client::call`] waits; without one it waits until the VMM answers or dies.
    pub fn set_timeout(&mut self, timeout: Option<Duration>) {
        self.timeout = timeout;
    }

    /// The underlying socket, for polling.
    #[must_use]
    pub fn as_stream(&self) -> &UnixStream {
        &self.stream
    }

    /// Sends a request and waits for its answer.
    ///
    /// # Errors
    /// [`ClientError::Refused`] if the VMM said no; anything else means the connection is of no more use.
    pub fn call(&mut self, body: RequestBody, fds: &[BorrowedFd<'_>]) -> Result<ResponseBody, ClientError> {
        let id = self.next_id;
        self.next_id += 1;
        let payload = serde_json::to_vec(&Request { id, body }).map_err(ClientError::Encode)?;
        write_frame(&self.stream, &payload, fds)?;
        let deadline = self.timeout.map(|timeout| Instant::now() + timeout);
        loop {
            match self.receive(deadline)? {
                Some(ServerMessage::Event(event)) => self.events.push_back(event),
                Some(ServerMessage::Response(Response { id: got, result })) if got == id || got == 0 => {
                    return result.map_err(ClientError::Refused);
                }
                Some(ServerMessage::Response(Response { id: got, .. })) => {
                    return Err(ClientError::UnexpectedId { expected: id, got });
                }
                None => {
                    return Err(ClientError::TimedOut {
                        timeout: self.timeout.unwrap_or_default(),
                    });
                }
            }
        }
    }

    /// The next event, waiting until `timeout` has passed if there is one; `None` if none came.
    ///
    /// # Errors
    /// [`ClientError::Closed`] once the VMM has gone.
    pub fn next_event(&mut self, timeout: Option<Duration>) -> Result<Option<Event>, ClientError> {
        if let Some(event) = self.events.pop_front() {
            return Ok(Some(event));
        }
        let deadline = timeout.map(|timeout| Instant::now() + timeout);
        loop {
            match self.receive(deadline)? {
                Some(ServerMessage::Event(event)) => return Ok(Some(event)),
                // The late answer to a call that timed out.
                Some(ServerMessage::Response(_)) => {}
                None => return Ok(None),
            }
        }
    }

    /// Waits until the microVM stops. `None` if the VMM went away without saying why (killed).
    ///
    /// # Errors
    /// As [`Client::next_event`], except that a closed connection is an answer here.
    pub fn wait_stopped(&mut self) -> Result<Option<StopReason>, ClientError> {
        match self.next_event(None) {
            Ok(Some(Event::Stopped { reason })) => Ok(Some(reason)),
            Ok(None) | Err(ClientError::Closed | ClientError::Frame(FrameError::Truncated)) => Ok(None),
            Err(ClientError::Frame(FrameError::Io(error)))
                if error.kind() == std::io::ErrorKind::ConnectionReset =>
            {
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }

    /// One message, or `None` when the deadline has passed.
    fn receive(&mut self, deadline: Option<Instant>) -> Result<Option<ServerMessage>, ClientError> {
        loop {
            let remaining = match deadline {
                None => None,
                Some(deadline) => match deadline.checked_duration_since(Instant::now()) {
                    None | Some(Duration::ZERO) => return Ok(None),
                    some => some,
                },
            };
            self.stream.set_read_timeout(remaining).map_err(FrameError::Io)?;
            match self.reader.read(self.stream.as_fd())? {
                Received::Frame(frame) => {
                    return serde_json::from_slice(&frame.payload)
                        .map(Some)
                        .map_err(ClientError::Decode);
                }
                Received::WouldBlock => {}
                Received::Closed => return Err(ClientError::Closed),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::message::ErrorCode;
    use std::thread;

    fn answer(stream: &UnixStream, reader: &mut FrameReader, messages: &[ServerMessage]) -> (Request, usize) {
        let Received::Frame(frame) = reader.read(stream).unwrap() else {
            panic!("no frame")
        };
        for message in messages {
            write_frame(stream, &serde_json::to_vec(message).unwrap(), &[]).unwrap();
        }
        (serde_json::from_slice(&frame.payload).unwrap(), frame.fds.len())
    }

    #[test]
    fn event_before_the_answer_is_kept() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let server = thread::spawn(move || {
            answer(
                &theirs,
                &mut FrameReader::new(),
                &[
                    ServerMessage::Event(Event::Stopped {
                        reason: StopReason::GuestShutdown,
                    }),
                    ServerMessage::Response(Response {
                        id: 1,
                        result: Ok(ResponseBody::Done),
                    }),
                ],
            )
        });
        let mut client = Client::from_stream(ours);
        let file = tempfile::tempfile().unwrap();
        assert_eq!(
            client.call(RequestBody::Pause, &[file.as_fd()]).unwrap(),
            ResponseBody::Done
        );
        assert_eq!(
            server.join().unwrap(),
            (
                Request {
                    id: 1,
                    body: RequestBody::Pause
                },
                1
            )
        );
        assert_eq!(client.wait_stopped().unwrap(), Some(StopReason::GuestShutdown));
    }

    #[test]
    fn refusal_carries_code_and_message() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let refusal = ApiError {
            code: ErrorCode::WrongState,
            message: "not configured".into(),
        };
        let sent = refusal.clone();
        let server = thread::spawn(move || {
            answer(
                &theirs,
                &mut FrameReader::new(),
                &[ServerMessage::Response(Response {
                    id: 1,
                    result: Err(sent),
                })],
            )
        });
        let error = Client::from_stream(ours)
            .call(RequestBody::Start, &[])
            .unwrap_err();
        assert!(matches!(error, ClientError::Refused(error) if error == refusal));
        server.join().unwrap();
    }

    #[test]
    fn silent_server_times_out_and_gone_server_is_closed() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let mut client = Client::from_stream(ours);
        client.set_timeout(Some(Duration::from_millis(20)));
        assert!(matches!(
            client.call(RequestBody::State, &[]),
            Err(ClientError::TimedOut { .. })
        ));
        assert_eq!(client.next_event(Some(Duration::from_millis(5))).unwrap(), None);
        drop(theirs);
        assert!(client.next_event(None).is_err());
    }
}
