//! Requests, responses and events.

use crate::{
    config::{ResourceRef, VmConfig},
    metrics::MetricsReport,
};
use serde::{Deserialize, Serialize};

/// One request of the client.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Request {
    /// Chosen by the client, repeated in the response.
    pub id: u64,
    /// What is asked for.
    pub body: RequestBody,
}

/// What is asked for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum RequestBody {
    /// Who is there? Answered with [`ResponseBody::Hello`] in every state.
    Hello,
    /// Assembles the microVM. The frame carries the file descriptors the configuration names.
    Configure(Box<VmConfig>),
    /// Runs the configured microVM.
    Start,
    /// Stops all vCPUs; devices finish what they have begun.
    Pause,
    /// Runs a paused microVM again.
    Resume,
    /// Sets the size the balloon shall take from the guest.
    Balloon {
        /// Memory the balloon shall hold; the guest decides how fast it follows.
        target_mib: u64,
    },
    /// Gives a network device that has no link its tap, whether the microVM runs or not. The frame carries the descriptors.
    AttachNet {
        /// Name of the device.
        id: String,
        /// The tap, as in [`crate::NetConfig::taps`].
        taps: Vec<ResourceRef>,
    },
    /// Asks for the counters.
    Metrics,
    /// Asks for the state.
    State,
    /// Stops the microVM without asking the guest, then ends the process.
    Shutdown,
}

/// What the server sends.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum ServerMessage {
    /// The answer to a request.
    Response(Response),
    /// Something that happened.
    Event(Event),
}

/// The answer to one request.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Response {
    /// The id of the request; 0 if the frame could not be read as a request.
    pub id: u64,
    /// The outcome.
    pub result: Result<ResponseBody, ApiError>,
}

/// What a successful request yields.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum ResponseBody {
    /// To [`RequestBody::Hello`].
    Hello(HelloInfo),
    /// To [`RequestBody::Metrics`].
    Metrics(Box<MetricsReport>),
    /// To [`RequestBody::State`].
    State(StateReport),
    /// To everything else: it is done.
    Done,
}

/// Who the server is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HelloInfo {
    /// Version of the program.
    pub vmm_version: String,
    /// Version of the protocol.
    pub protocol_version: u16,
    /// What KVM runs guests with on this host.
    pub backend: KvmBackend,
}

/// What KVM runs guests with on this host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum KvmBackend {
    /// VMX or SVM.
    Hardware,
    /// Shadow page tables, guest kernels at CPL 3.
    Pvm,
}

/// Where a microVM is in its life. `vmm::control` documents the transitions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum VmState {
    /// The process runs, nothing is configured.
    Unconfigured,
    /// Assembled, not yet started.
    Configured,
    /// The vCPUs run.
    Running,
    /// The vCPUs are held.
    Paused,
    /// It has stopped and can't run again.
    Stopped,
}

/// Answer to [`RequestBody::State`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StateReport {
    /// The state.
    pub state: VmState,
    /// Why it stopped, once it has.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stopped: Option<StopReason>,
}

/// What the server reports of its own accord, to every connected client.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Event {
    /// The microVM has stopped; the process ends soon after.
    Stopped {
        /// Why.
        reason: StopReason,
    },
}

/// Why a microVM stopped.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum StopReason {
    /// The guest ended itself: a triple fault (`reboot=t`) or a reset request. The orderly end.
    GuestShutdown,
    /// The client asked for it.
    Requested,
    /// A vCPU could not go on.
    VcpuFailed {
        /// What KVM said.
        message: String,
    },
    /// The VMM itself failed.
    VmmFailed {
        /// What happened.
        message: String,
    },
}

/// Why a request failed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
#[serde(deny_unknown_fields)]
pub struct ApiError {
    /// For programs.
    pub code: ErrorCode,
    /// For people: names the thing and the way out.
    pub message: String,
}

/// Kinds of failure a program may want to tell apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ErrorCode {
    /// The frame or its JSON can't be read, or it names an unknown request or field.
    Malformed,
    /// The frame is of another protocol version.
    UnsupportedVersion,
    /// Not allowed in the present state.
    WrongState,
    /// The configuration is impossible.
    InvalidConfig,
    /// A resource named by the configuration can't be used (kernel, image, descriptor).
    Resource,
    /// The host can't do it (KVM, memory).
    Host,
    /// The microVM has no such device.
    NoSuchDevice,
    /// Too much at once; try again.
    Busy,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn json<T: Serialize>(value: &T) -> String {
        serde_json::to_string(value).unwrap()
    }

    #[test]
    fn requests_have_the_documented_form() {
        assert_eq!(
            json(&Request {
                id: 7,
                body: RequestBody::Start
            }),
            r#"{"id":7,"body":"start"}"#
        );
        assert_eq!(
            json(&Request {
                id: 8,
                body: RequestBody::Balloon { target_mib: 64 }
            }),
            r#"{"id":8,"body":{"balloon":{"target_mib":64}}}"#
        );
    }

    #[test]
    fn responses_and_events_round_trip() {
        let messages = [
            ServerMessage::Response(Response {
                id: 1,
                result: Ok(ResponseBody::Done),
            }),
            ServerMessage::Response(Response {
                id: 0,
                result: Err(ApiError {
                    code: ErrorCode::Malformed,
                    message: "bad".into(),
                }),
            }),
            ServerMessage::Event(Event::Stopped {
                reason: StopReason::VcpuFailed {
                    message: "exit 17".into(),
                },
            }),
        ];
        for message in messages {
            assert_eq!(
                serde_json::from_str::<ServerMessage>(&json(&message)).unwrap(),
                message
            );
        }
    }

    #[test]
    fn unknown_request_is_refused() {
        assert!(serde_json::from_str::<Request>(r#"{"id":1,"body":"explode"}"#).is_err());
        assert!(
            serde_json::from_str::<Request>(r#"{"id":1,"body":{"balloon":{"target_mib":1,"x":2}}}"#).is_err()
        );
        assert!(serde_json::from_str::<Request>(r#"{"id":1,"body":"start","extra":0}"#).is_err());
    }
}
