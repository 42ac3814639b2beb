//! ttRPC frames: the 10-byte header and its bounds, without I/O.
//!
//! ```text
//! 0        4           8      9       10
//! | length | stream id | type | flags | payload (length bytes) …
//!   u32 BE   u32 BE      u8     u8
//! ```
//!
//! Invariant: a header that was parsed announces at most [`MAX_PAYLOAD_BYTES`], so a reader may allocate
//! what it says.

use protobuf::Message as _;

use crate::ErrorDetail;
use crate::envelope::{Any, Request, Response, Status};

/// Length of a frame's header.
pub const HEADER_BYTES: usize = 10;

/// The largest payload of one frame, as the ttRPC specification has it.
pub const MAX_PAYLOAD_BYTES: usize = 4 << 20;

/// Name of [`ErrorDetail`] in the details of a status.
pub const ERROR_DETAIL_TYPE: &str = "hull.agent.v1.ErrorDetail";

/// What a frame carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FrameType {
    /// A [`Request`].
    Request,
    /// A [`Response`].
    Response,
}

/// A frame's checked header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FrameHeader {
    /// Payload length, at most [`MAX_PAYLOAD_BYTES`].
    pub payload_bytes: usize,
    /// Pairs a response with its request; odd for those a client opens.
    pub stream_id: u32,
    /// What the payload is.
    pub frame_type: FrameType,
}

/// Why bytes are not an acceptable frame.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FrameError {
    /// The header or the message announces more than the bound.
    #[error("frame of {length} bytes is over the limit of {MAX_PAYLOAD_BYTES}")]
    TooLong {
        /// The announced length.
        length: usize,
    },
    /// A frame type this protocol doesn't use.
    #[error("unknown frame type {frame_type}")]
    UnknownType {
        /// The byte received.
        frame_type: u8,
    },
    /// Streaming flags are not used by this protocol.
    #[error("unsupported frame flags {flags:#x}")]
    UnsupportedFlags {
        /// The byte received.
        flags: u8,
    },
    /// The payload isn't the message expected.
    #[error("malformed message")]
    Malformed {
        /// What the decoder said.
        #[from]
        source: protobuf::Error,
    },
}

impl FrameHeader {
    /// Checks and decodes a header.
    ///
    /// # Errors
    ///
    /// A length over the bound, an unknown type, or flags.
    pub fn parse(bytes: [u8; HEADER_BYTES]) -> Result<Self, FrameError> {
        let [l0, l1, l2, l3, s0, s1, s2, s3, frame_type, flags] = bytes;
        let length = u32::from_be_bytes([l0, l1, l2, l3]) as usize;
        if length > MAX_PAYLOAD_BYTES {
            return Err(FrameError::TooLong { length });
        }
        let frame_type = match frame_type {
            1 => FrameType::Request,
            2 => FrameType::Response,
            frame_type => return Err(FrameError::UnknownType { frame_type }),
        };
        if flags != 0 {
            return Err(FrameError::UnsupportedFlags { flags });
        }
        Ok(Self {
            payload_bytes: length,
            stream_id: u32::from_be_bytes([s0, s1, s2, s3]),
            frame_type,
        })
    }
}

fn encode(
    stream_id: u32,
    frame_type: FrameType,
    message: &impl protobuf::Message,
) -> Result<Vec<u8>, FrameError> {
    let mut bytes = vec![0; HEADER_BYTES];
    message.write_to_vec(&mut bytes)?;
    let length = bytes.len() - HEADER_BYTES;
    let length_field = u32::try_from(length).unwrap_or(u32::MAX);
    if length > MAX_PAYLOAD_BYTES {
        return Err(FrameError::TooLong { length });
    }
    let (header, _) = bytes.split_at_mut(HEADER_BYTES);
    header[..4].copy_from_slice(&length_field.to_be_bytes());
    header[4..8].copy_from_slice(&stream_id.to_be_bytes());
    header[8] = match frame_type {
        FrameType::Request => 1,
        FrameType::Response => 2,
    };
    Ok(bytes)
}

/// A request as one frame, ready to be written.
///
/// # Errors
///
/// The message is over the bound.
pub fn encode_request(
    stream_id: u32,
    service: &str,
    method: &str,
    payload: Vec<u8>,
) -> Result<Vec<u8>, FrameError> {
    let request = Request {
        service: service.to_owned(),
        method: method.to_owned(),
        payload,
        ..Request::default()
    };
    encode(stream_id, FrameType::Request, &request)
}

/// A successful response as one frame.
///
/// # Errors
///
/// The message is over the bound.
pub fn encode_response(stream_id: u32, payload: Vec<u8>) -> Result<Vec<u8>, FrameError> {
    encode(
        stream_id,
        FrameType::Response,
        &Response {
            payload,
            ..Response::default()
        },
    )
}

/// A failed response as one frame.
///
/// # Errors
///
/// The message is over the bound.
pub fn encode_failure(
    stream_id: u32,
    code: StatusCode,
    message: &str,
    detail: &ErrorDetail,
) -> Result<Vec<u8>, FrameError> {
    let detail = Any {
        type_url: ERROR_DETAIL_TYPE.to_owned(),
        value: detail.write_to_bytes()?,
        ..Any::default()
    };
    let status = Status {
        code: code as i32,
        message: message.to_owned(),
        details: vec![detail],
        ..Status::default()
    };
    encode(
        stream_id,
        FrameType::Response,
        &Response {
            status: Some(status).into(),
            ..Response::default()
        },
    )
}

/// The codes of gRPC that the agent uses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(i32)]
pub enum StatusCode {
    /// The request breaks a rule of this protocol.
    InvalidArgument = 3,
    /// No such container or process.
    NotFound = 5,
    /// The id is taken.
    AlreadyExists = 6,
    /// Not in this state.
    FailedPrecondition = 9,
    /// No such method.
    Unimplemented = 12,
    /// Everything else.
    Internal = 13,
}

/// What a response says.
#[derive(Debug)]
pub enum Outcome {
    /// The method's answer, to be decoded as its response type.
    Payload(Vec<u8>),
    /// The method failed.
    Failure {
        /// The gRPC code.
        code: i32,
        /// For people.
        message: String,
        /// For programs, where the peer gave it.
        detail: ErrorDetail,
    },
}

/// Decodes a response frame's payload.
///
/// # Errors
///
/// The bytes aren't a response.
pub fn decode_response(payload: &[u8]) -> Result<Outcome, FrameError> {
    let mut response = Response::parse_from_bytes(payload)?;
    match response.status.take() {
        Some(status) if status.code != 0 => {
            let detail = status
                .details
                .iter()
                .find(|any| any.type_url == ERROR_DETAIL_TYPE)
                .and_then(|any| ErrorDetail::parse_from_bytes(&any.value).ok())
                .unwrap_or_default();
            Ok(Outcome::Failure {
                code: status.code,
                message: status.message,
                detail,
            })
        }
        _ => Ok(Outcome::Payload(response.payload)),
    }
}

/// Decodes a request frame's payload.
///
/// # Errors
///
/// The bytes aren't a request.
pub fn decode_request(payload: &[u8]) -> Result<Request, FrameError> {
    Ok(Request::parse_from_bytes(payload)?)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn request_frame_survives_a_round_trip() {
        let frame = encode_request(7, "service", "Method", vec![1, 2, 3]).unwrap();
        let header = FrameHeader::parse(frame[..HEADER_BYTES].try_into().unwrap()).unwrap();
        assert_eq!(header.stream_id, 7);
        assert_eq!(header.frame_type, FrameType::Request);
        assert_eq!(header.payload_bytes, frame.len() - HEADER_BYTES);
        let request = decode_request(&frame[HEADER_BYTES..]).unwrap();
        assert_eq!(
            (request.service.as_str(), request.method.as_str()),
            ("service", "Method")
        );
        assert_eq!(request.payload, [1, 2, 3]);
    }

    #[test]
    fn failure_carries_its_detail() {
        let detail = ErrorDetail {
            subject: "/bin/x".into(),
            errno: 2,
            ..ErrorDetail::default()
        };
        let frame = encode_failure(1, StatusCode::NotFound, "no", &detail).unwrap();
        match decode_response(&frame[HEADER_BYTES..]).unwrap() {
            Outcome::Failure {
                code,
                message,
                detail,
            } => {
                assert_eq!((code, message.as_str()), (5, "no"));
                assert_eq!((detail.subject.as_str(), detail.errno), ("/bin/x", 2));
            }
            Outcome::Payload(_) => panic!("expected a failure"),
        }
    }

    #[test]
    fn header_over_the_limit_is_refused() {
        let mut bytes = [0; HEADER_BYTES];
        bytes[..4].copy_from_slice(&(4_u32 << 20).wrapping_add(1).to_be_bytes());
        bytes[8] = 1;
        assert!(matches!(
            FrameHeader::parse(bytes),
            Err(FrameError::TooLong { .. })
        ));
    }

    #[test]
    fn message_over_the_limit_is_not_encoded() {
        let result = encode_response(1, vec![0; MAX_PAYLOAD_BYTES + 1]);
        assert!(matches!(result, Err(FrameError::TooLong { .. })));
    }

    proptest! {
        #[test]
        fn no_payload_makes_the_decoders_panic(bytes in proptest::collection::vec(any::<u8>(), 0..512)) {
            let _ = decode_request(&bytes);
            let _ = decode_response(&bytes);
        }

        #[test]
        fn every_header_is_parsed_or_refused(bytes in any::<[u8; HEADER_BYTES]>()) {
            if let Ok(header) = FrameHeader::parse(bytes) {
                prop_assert!(header.payload_bytes <= MAX_PAYLOAD_BYTES);
            }
        }
    }
}
