//! The host's side of the agent's protocol: one connection, many calls under way, no thread of its own.
//!
//! A call is sent ([`AgentClient::send`]) and its answer taken later ([`AgentClient::take`]), so that the first
//! calls of a container need one round trip together and a `WaitProcess` is just a call whose answer comes late.
//!
//! Invariant: the guest is hostile. A frame's length is checked before it is read, an answer before it is
//! used, and answers to calls that nobody made end the connection.

use std::{
    collections::HashMap,
    io::{self, ErrorKind, Read as _, Write as _},
    marker::PhantomData,
    os::{
        fd::{AsFd, BorrowedFd},
        unix::net::UnixStream,
    },
    time::{Duration, Instant},
};

use agent_protocol::{
    Bounded as _, Connect, ConnectRequest, ConnectResponse, ErrorKind as AgentErrorKind, Message as _,
    Method, PROTOCOL_VERSION, SERVICE, decode,
    frame::{FrameHeader, FrameType, HEADER_BYTES, Outcome, decode_response, encode_request},
};

use crate::{Result, SandboxError, identity::random_bytes};

/// How long the agent may take for a call that doesn't wait for anything.
pub const CALL_TIMEOUT: Duration = Duration::from_secs(30);

/// A call under way.
#[derive(Debug)]
#[must_use = "an answer that isn't taken is kept for ever"]
pub struct Pending<M> {
    stream_id: u32,
    method: PhantomData<fn() -> M>,
}

/// A connection to an agent.
#[derive(Debug)]
pub struct AgentClient {
    stream: UnixStream,
    next_stream_id: u32,
    /// Calls under way and the answers that have come.
    calls: HashMap<u32, Option<Outcome>>,
}

fn protocol(problem: impl Into<String>) -> SandboxError {
    SandboxError::AgentProtocol {
        problem: problem.into(),
    }
}

fn connection(source: io::Error) -> SandboxError {
    SandboxError::AgentConnection { source }
}

impl AgentClient {
    /// Uses a stream that is connected to the agent's RPC port.
    #[must_use]
    pub fn new(stream: UnixStream) -> Self {
        Self {
            stream,
            next_stream_id: 1,
            calls: HashMap::new(),
        }
    }

    /// Sends a request.
    ///
    /// # Errors
    ///
    /// The request breaks a bound, or the connection is broken.
    pub fn send<M: Method>(&mut self, request: &M::Request) -> Result<Pending<M>> {
        request.check()?;
        let stream_id = self.next_stream_id;
        // Streams that a client opens are odd.
        self.next_stream_id = stream_id
            .checked_add(2)
            .ok_or_else(|| protocol("used up its stream ids"))?;
        let payload = request
            .write_to_bytes()
            .map_err(|error| protocol(error.to_string()))?;
        let frame = encode_request(stream_id, SERVICE, M::NAME, payload)
            .map_err(|error| protocol(format!("can't take a request: {error}")))?;
        self.stream.write_all(&frame).map_err(connection)?;
        self.calls.insert(stream_id, None);
        Ok(Pending {
            stream_id,
            method: PhantomData,
        })
    }

    /// Takes a call's answer if it has come.
    ///
    /// # Errors
    ///
    /// The agent refused, or its answer is not acceptable.
    pub fn take<M: Method>(&mut self, pending: &Pending<M>) -> Result<Option<M::Response>> {
        match self.calls.get(&pending.stream_id) {
            Some(Some(_)) => {}
            Some(None) => return Ok(None),
            None => return Err(protocol("was asked for an answer twice")),
        }
        match self.calls.remove(&pending.stream_id).flatten() {
            Some(Outcome::Payload(payload)) => decode::<M::Response>(&payload)
                .map(Some)
                .map_err(|error| protocol(format!("answered {} with nonsense: {error}", M::NAME))),
            Some(Outcome::Failure { message, detail, .. }) => {
                if detail.kind.enum_value_or_default() == AgentErrorKind::VERSION_MISMATCH {
                    return Err(SandboxError::AgentVersion {
                        found: printable(&message),
                    });
                }
                Err(SandboxError::Agent {
                    message: printable(&message),
                    detail: Box::new(detail),
                })
            }
            None => Ok(None),
        }
    }

    /// Waits for a call's answer.
    ///
    /// # Errors
    ///
    /// The agent refused, its answer is not acceptable, or it didn't come in time.
    pub fn wait<M: Method>(
        &mut self,
        pending: &Pending<M>,
        timeout: Option<Duration>,
    ) -> Result<M::Response> {
        let deadline = timeout.map(|timeout| Instant::now() + timeout);
        loop {
            if let Some(response) = self.take(pending)? {
                return Ok(response);
            }
            self.receive(deadline)?;
        }
    }

    /// Sends a request and waits for its answer.
    ///
    /// # Errors
    ///
    /// As [`AgentClient::send`] and [`AgentClient::wait`].
    pub fn call<M: Method>(&mut self, request: &M::Request) -> Result<M::Response> {
        let pending = self.send::<M>(request)?;
        self.wait(&pending, Some(CALL_TIMEOUT))
    }

    /// Reads one frame; call it when the connection is readable.
    ///
    /// # Errors
    ///
    /// The connection ended or broke, or the frame is not acceptable.
    pub fn receive(&mut self, deadline: Option<Instant>) -> Result<()> {
        let mut header = [0; HEADER_BYTES];
        self.read_exact(&mut header, deadline)?;
        let header = FrameHeader::parse(header).map_err(|error| protocol(error.to_string()))?;
        let mut payload = vec![0; header.payload_bytes];
        self.read_exact(&mut payload, deadline)?;
        if header.frame_type != FrameType::Response {
            return Err(protocol("sent a request"));
        }
        let outcome = decode_response(&payload).map_err(|error| protocol(error.to_string()))?;
        match self.calls.get_mut(&header.stream_id) {
            Some(slot @ None) => *slot = Some(outcome),
            _ => return Err(protocol("answered a call nobody made")),
        }
        Ok(())
    }

    fn read_exact(&mut self, buffer: &mut [u8], deadline: Option<Instant>) -> Result<()> {
        let late = || {
            connection(io::Error::new(
                ErrorKind::TimedOut,
                "the agent did not answer in time",
            ))
        };
        let mut filled = 0;
        while filled < buffer.len() {
            let left = match deadline.map(|deadline| deadline.saturating_duration_since(Instant::now())) {
                Some(Duration::ZERO) => return Err(late()),
                left => left,
            };
            self.stream.set_read_timeout(left).map_err(connection)?;
            match self.stream.read(&mut buffer[filled..]) {
                Ok(0) => return Err(connection(ErrorKind::UnexpectedEof.into())),
                Ok(length) => filled += length,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Err(late()),
                Err(error) => return Err(connection(error)),
            }
        }
        Ok(())
    }

    /// Settles the version, and gives a fresh microVM the time. Entropy is welcome at any time.
    pub(crate) fn send_connect(&mut self, fresh: bool) -> Result<Pending<Connect>> {
        let now = std::time::SystemTime::now()
            .duration_since(std::time::UNIX_EPOCH)
            .unwrap_or_default();
        let entropy: [u8; 64] = random_bytes()?;
        self.send::<Connect>(&ConnectRequest {
            protocol_version: PROTOCOL_VERSION,
            // The clock of a running container isn't set back under it.
            realtime_ns: if fresh {
                u64::try_from(now.as_nanos()).unwrap_or(0)
            } else {
                0
            },
            entropy: entropy.to_vec(),
            ..ConnectRequest::default()
        })
    }

    /// Takes the answer to [`AgentClient::send_connect`].
    pub(crate) fn finish_connect(&mut self, pending: &Pending<Connect>) -> Result<ConnectResponse> {
        let response = self.wait(pending, Some(CALL_TIMEOUT))?;
        if response.protocol_version != PROTOCOL_VERSION {
            let found = response.protocol_version.to_string();
            return Err(SandboxError::AgentVersion { found });
        }
        Ok(response)
    }
}

impl AsFd for AgentClient {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

/// A guest's words, made safe to print on a terminal.
fn printable(text: &str) -> String {
    text.chars()
        .take(2000)
        .map(|c| if c.is_control() { ' ' } else { c })
        .collect()
}

#[cfg(test)]
mod tests {
    use agent_protocol::{
        Empty, ErrorDetail, GetStats, Shutdown, StatsResponse,
        frame::{StatusCode, encode_failure, encode_response},
    };

    use super::*;

    fn pair() -> (AgentClient, UnixStream) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        (AgentClient::new(ours), theirs)
    }

    #[test]
    fn answers_in_another_order_find_their_calls() {
        let (mut client, mut agent) = pair();
        let first = client.send::<Shutdown>(&Empty::default()).unwrap();
        let request = agent_protocol::ContainerRef {
            container_id: "c".into(),
            ..Default::default()
        };
        let second = client.send::<GetStats>(&request).unwrap();
        let stats = StatsResponse {
            pids_current: 4,
            ..StatsResponse::default()
        };
        agent
            .write_all(&encode_response(3, stats.write_to_bytes().unwrap()).unwrap())
            .unwrap();
        agent.write_all(&encode_response(1, Vec::new()).unwrap()).unwrap();
        assert_eq!(client.wait(&second, Some(CALL_TIMEOUT)).unwrap().pids_current, 4);
        client.wait(&first, Some(CALL_TIMEOUT)).unwrap();
    }

    #[test]
    fn answer_nobody_asked_for_ends_the_connection() {
        let (mut client, mut agent) = pair();
        agent.write_all(&encode_response(9, Vec::new()).unwrap()).unwrap();
        assert!(matches!(
            client.receive(None),
            Err(SandboxError::AgentProtocol { .. })
        ));
    }

    #[test]
    fn refusal_is_an_error_without_control_characters() {
        let (mut client, mut agent) = pair();
        let pending = client.send::<Shutdown>(&Empty::default()).unwrap();
        let detail = ErrorDetail {
            kind: AgentErrorKind::INTERNAL.into(),
            ..ErrorDetail::default()
        };
        let frame = encode_failure(1, StatusCode::Internal, "no\x1b[2J", &detail).unwrap();
        agent.write_all(&frame).unwrap();
        let error = client.wait(&pending, Some(CALL_TIMEOUT)).unwrap_err();
        assert_eq!(error.to_string(), "no [2J");
    }

    #[test]
    fn silent_agent_times_out() {
        let (mut client, _agent) = pair();
        let pending = client.send::<Shutdown>(&Empty::default()).unwrap();
        let error = client
            .wait(&pending, Some(Duration::from_millis(10)))
            .unwrap_err();
        assert!(matches!(error, SandboxError::AgentConnection { .. }));
    }

    #[test]
    fn agent_that_drips_is_given_up_in_time() {
        let (mut client, mut agent) = pair();
        let pending = client.send::<Shutdown>(&Empty::default()).unwrap();
        let dripping = std::thread::spawn(move || {
            // A frame of four MiB, a byte at a time: each arrives well before the deadline.
            let header = [0, 0x40, 0, 0, 0, 0, 0, 1, 2, 0];
            for byte in header.into_iter().chain(std::iter::repeat(0)) {
                if agent.write_all(&[byte]).is_err() {
                    return;
                }
                std::thread::sleep(Duration::from_millis(1));
            }
        });
        let error = client
            .wait(&pending, Some(Duration::from_millis(50)))
            .unwrap_err();
        assert!(matches!(error, SandboxError::AgentConnection { .. }));
        drop(client);
        dripping.join().unwrap();
    }

    #[test]
    fn frame_over_the_bound_is_refused_before_anything_is_kept() {
        let (mut client, mut agent) = pair();
        let pending = client.send::<Shutdown>(&Empty::default()).unwrap();
        agent
            .write_all(&[0xff, 0xff, 0xff, 0xff, 0, 0, 0, 1, 2, 0])
            .unwrap();
        let error = client.wait(&pending, Some(CALL_TIMEOUT)).unwrap_err();
        assert!(matches!(error, SandboxError::AgentProtocol { .. }), "{error}");
    }

    #[test]
    fn answers_without_end_to_calls_nobody_made_end_the_connection() {
        let (mut client, mut agent) = pair();
        let pending = client.send::<Shutdown>(&Empty::default()).unwrap();
        let flooding = std::thread::spawn(move || {
            let frame = encode_response(7, vec![0; 1000]).unwrap();
            while agent.write_all(&frame).is_ok() {}
        });
        assert!(client.wait(&pending, Some(CALL_TIMEOUT)).is_err());
        drop(client);
        flooding.join().unwrap();
    }

    /// Frames as a hostile guest makes them: each part may be right or wrong, and so may the length.
    fn hostile_frame() -> impl proptest::strategy::Strategy<Value = Vec<u8>> {
        use proptest::prelude::*;
        let payload = prop_oneof![
            proptest::collection::vec(any::<u8>(), 0..200),
            proptest::collection::vec(any::<u8>(), 0..60)
                .prop_map(|payload| encode_response(1, payload).unwrap()[HEADER_BYTES..].to_vec()),
        ];
        (
            0_u32..8,
            0_u8..4,
            prop_oneof![9 => Just(0_u8), 1 => any::<u8>()],
            payload,
            -3_i64..4,
        )
            .prop_map(|(stream, kind, flags, payload, lie)| {
                let length = i64::try_from(payload.len()).unwrap().saturating_add(lie).max(0);
                let mut frame = u32::try_from(length).unwrap().to_be_bytes().to_vec();
                frame.extend(stream.to_be_bytes());
                frame.extend([kind, flags]);
                frame.extend(payload);
                frame
            })
    }

    proptest::proptest! {
        #![proptest_config(proptest::prelude::ProptestConfig::with_cases(2000))]

        #[test]
        fn no_frames_of_a_hostile_agent_hang_or_crash_the_host(
            frames in proptest::collection::vec(hostile_frame(), 0..20),
        ) {
            let (mut client, mut agent) = pair();
            let stats = agent_protocol::ContainerRef { container_id: "c".into(), ..Default::default() };
            let first = client.send::<Shutdown>(&Empty::default()).unwrap();
            let second = client.send::<GetStats>(&stats).unwrap();
            let third = client.send_connect(false).unwrap();
            agent.write_all(&frames.concat()).unwrap();
            drop(agent);
            let _ = client.wait(&second, Some(CALL_TIMEOUT));
            let _ = client.wait(&first, Some(CALL_TIMEOUT));
            let _ = client.finish_connect(&third);
            // Never more answers than calls.
            proptest::prop_assert!(client.calls.len() <= 3);
        }

        #[test]
        fn whatever_a_guest_sends_ends_in_an_error_or_an_answer(
            bytes in proptest::collection::vec(proptest::prelude::any::<u8>(), 0..256),
        ) {
            let (mut client, mut agent) = pair();
            let pending = client.send::<Shutdown>(&Empty::default()).unwrap();
            agent.write_all(&bytes).unwrap();
            // The end of the stream is the latest at which the client gives up.
            drop(agent);
            let _ = client.wait(&pending, Some(CALL_TIMEOUT));
        }
    }
}
