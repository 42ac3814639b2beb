//! Messages of the control socket of `hull-vmm`, its wire configuration, the framing of both, and a small blocking client.
//!
//! Owner: both ends of the socket link this crate: the VMM (server) and `sandbox` (client). It knows no KVM.
//!
//! # Protocol
//!
//! An `AF_UNIX` stream carries frames in both directions:
//!
//! ```text
//! u32 LE payload length (1 ..= 1 MiB) | u16 LE protocol version | u16 LE flags (0) | payload: one JSON value
//! ```
//!
//! The client sends [`Request`]s, the server answers each with one [`Response`] carrying the same id, in order, and sends an
//! [`Event`] of its own accord; both travel as [`ServerMessage`]. File descriptors travel as `SCM_RIGHTS` with the first byte of
//! the frame that names them, at most [`MAX_FDS`] a frame.
//!
//! Invariants:
//! - No length in a frame makes the receiver allocate before the bytes have arrived.
//! - Wire types reject unknown fields, so that a misspelt option is an error and never a silent default.
//! - A frame of another protocol version is answered with [`ErrorCode::UnsupportedVersion`], not guessed at.

mod client;
mod config;
mod frame;
pub mod marks;
mod message;
mod metrics;
mod share_orders;

pub use client::{Client, ClientError};
pub use config::{
    BalloonConfig, BlkConfig, BootProtocol, FsConfig, FsShareConfig, GuestPortConfig, HugePages, IoEngine,
    NetConfig, RateLimit, ResourceRef, SerialConfig, TokenBucket, UPPER_DIR, VmConfig, VsockConfig, WORK_DIR,
};
pub use frame::{
    Frame, FrameError, FrameReader, HEADER_BYTES, MAX_FDS, MAX_PAYLOAD_BYTES, Received, write_frame,
};
pub use message::{
    ApiError, ErrorCode, Event, HelloInfo, KvmBackend, Request, RequestBody, Response, ResponseBody,
    ServerMessage, StateReport, StopReason, VmState,
};
pub use metrics::{
    BootPhase, ControlMetrics, DeviceMetrics, ExitCounts, MetricsReport, StartMetrics, VcpuMetrics,
};
pub use share_orders::{MAX_LIVE_SHARES, SHARE_MESSAGE_BYTES, ShareOrder, ShareReply};

/// Version carried by every frame. It changes when a message changes incompatibly.
pub const PROTOCOL_VERSION: u16 = 1;
