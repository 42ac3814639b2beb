//! Host ↔ guest messages, their bounds and their version. No I/O.
//!
//! The protocol is ttRPC on the wire (frames of `frame.rs`, envelope of `proto/ttrpc.proto`) with the
//! methods of `proto/agent.proto`, over vsock; bulk stdio has connections of its own (`stdio.rs`).
//! `docs/adr/0003-agent-protocol.md` says why the runtime is our own.
//!
//! Invariant: nothing is acted on before [`Bounded::check`] held for it, on either side.
//!
//! The agent listens, the host connects. The first call on a connection is [`Connect`], which settles the
//! version: the host refuses an agent of another version, and the agent a host of another version.

pub mod frame;
pub mod limits;
pub mod stdio;

#[expect(clippy::pedantic, reason = "generated from proto/ by the build script")]
mod messages {
    include!(concat!(env!("OUT_DIR"), "/messages/mod.rs"));
}

pub use limits::{Bounded, InvalidMessage};
pub use messages::agent::*;
pub use protobuf::{Enum, EnumOrUnknown, Message, MessageField};

/// The envelope's messages.
pub mod envelope {
    pub use crate::messages::ttrpc::{Any, KeyValue, Request, Response, Status};
}

/// Raised whenever a peer of the old version would misunderstand the new one.
pub const PROTOCOL_VERSION: u32 = 4;

/// vsock port of the agent's RPC server.
pub const RPC_PORT: u32 = 1024;
/// vsock port of the agent's stdio server.
pub const STDIO_PORT: u32 = 1025;
/// vsock port on the host that the agent connects to once, when its servers listen.
pub const READY_PORT: u32 = 1023;

/// What the agent mounts the shares by.
pub const SHARES_TAG: &str = "hull";
/// Where a share that is a writable layer has it.
pub const UPPER_DIR: &str = "fs";
/// The directory that overlayfs works in, beside it.
pub const WORK_DIR: &str = "work";
/// The type of a mount that is a share.
pub const SHARE_MOUNT_TYPE: &str = "virtiofs";

/// Name of the service in every request.
pub const SERVICE: &str = "hull.agent.v1.Agent";

/// What the agent writes to the ready port.
#[must_use]
pub fn ready_line() -> String {
    format!("READY {PROTOCOL_VERSION}\n")
}

/// One method: its name and its two messages.
pub trait Method {
    /// Name in a request.
    const NAME: &'static str;
    /// What is asked.
    type Request: Message + Bounded;
    /// What is answered.
    type Response: Message + Bounded;
}

macro_rules! methods {
    ($($name:ident($request:ty) -> $response:ty;)*) => {
        $(
            #[doc = concat!("The method `", stringify!($name), "` of `agent.proto`.")]
            #[derive(Debug)]
            pub enum $name {}

            impl Method for $name {
                const NAME: &'static str = stringify!($name);
                type Request = $request;
                type Response = $response;
            }
        )*
    };
}

methods! {
    Connect(ConnectRequest) -> ConnectResponse;
    CreateContainer(CreateContainerRequest) -> Empty;
    CreateExec(CreateExecRequest) -> Empty;
    StartProcess(ProcessRef) -> StartProcessResponse;
    SignalProcess(SignalProcessRequest) -> Empty;
    WaitProcess(ProcessRef) -> WaitProcessResponse;
    ResizeTty(ResizeTtyRequest) -> Empty;
    CloseStdin(ProcessRef) -> Empty;
    ListProcesses(ContainerRef) -> ListProcessesResponse;
    GetStats(ContainerRef) -> StatsResponse;
    UpdateContainer(UpdateContainerRequest) -> Empty;
    StatPath(PathRequest) -> PathStat;
    Archive(ArchiveRequest) -> PathStat;
    Extract(ExtractRequest) -> Empty;
    ConfigureNetwork(ConfigureNetworkRequest) -> Empty;
    RemoveContainer(ContainerRef) -> Empty;
    FreezeContainer(FreezeContainerRequest) -> Empty;
    Shutdown(Empty) -> Empty;
}

/// Why bytes are not an acceptable message.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DecodeError {
    /// Not protobuf, or not of this type.
    #[error("malformed message")]
    Malformed {
        /// What the decoder said.
        #[from]
        source: protobuf::Error,
    },
    /// A bound is broken.
    #[error(transparent)]
    Invalid(#[from] InvalidMessage),
}

/// Decodes a message and checks its bounds.
///
/// # Errors
///
/// The bytes are malformed or a bound is broken.
pub fn decode<M: Message + Bounded>(bytes: &[u8]) -> Result<M, DecodeError> {
    let message = M::parse_from_bytes(bytes)?;
    message.check()?;
    Ok(message)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn create_request() -> CreateContainerRequest {
        CreateContainerRequest {
            container_id: "c".into(),
            rootfs: Some(Rootfs {
                layer_serials: vec!["layer0".into()],
                upper: Some(rootfs::Upper::TmpfsBytes(1 << 20)),
                ..Rootfs::default()
            })
            .into(),
            process: Some(Process {
                args: vec!["/bin/true".into()],
                cwd: "/".into(),
                ..Process::default()
            })
            .into(),
            ..CreateContainerRequest::default()
        }
    }

    #[test]
    fn complete_request_is_accepted() {
        let bytes = create_request().write_to_bytes().unwrap();
        assert_eq!(
            decode::<CreateContainerRequest>(&bytes).unwrap(),
            create_request()
        );
    }

    #[test]
    fn relative_working_directory_is_refused() {
        let mut request = create_request();
        request.process.mut_or_insert_default().cwd = "tmp".into();
        assert_eq!(request.check().unwrap_err().field, "process.cwd");
    }

    #[test]
    fn process_without_a_command_is_refused() {
        let mut request = create_request();
        request.process.mut_or_insert_default().args.clear();
        assert_eq!(request.check().unwrap_err().field, "process.args");
    }

    #[test]
    fn too_many_layers_are_refused() {
        let mut request = create_request();
        request.rootfs.mut_or_insert_default().layer_serials = vec!["l".into(); limits::MAX_LAYERS + 1];
        assert_eq!(request.check().unwrap_err().field, "rootfs.layer_serials");
    }

    #[test]
    fn capability_that_no_kernel_has_is_refused() {
        let mut request = create_request();
        request.process.mut_or_insert_default().capabilities = Some(Capabilities {
            effective: 1 << 60,
            ..Capabilities::default()
        })
        .into();
        assert_eq!(request.check().unwrap_err().field, "process.capabilities");
    }

    #[test]
    fn zero_byte_in_an_argument_is_refused() {
        let mut request = create_request();
        request.process.mut_or_insert_default().args.push("a\0b".into());
        assert_eq!(request.check().unwrap_err().field, "process.args");
    }

    proptest! {
        #[test]
        fn no_bytes_make_a_decoder_panic(bytes in proptest::collection::vec(any::<u8>(), 0..1024)) {
            let _ = decode::<CreateContainerRequest>(&bytes);
            let _ = decode::<WaitProcessResponse>(&bytes);
            let _ = decode::<ConnectResponse>(&bytes);
            let _ = decode::<StatsResponse>(&bytes);
        }
    }
}
