//! The control socket and the state machine behind it.
//!
//! ```text
//!                 Configure              Start             Pause
//!   unconfigured ───────────► configured ──────► running ◄──────► paused
//!        │                        │                 │     Resume     │
//!        └──────────── Shutdown ──┴─── or the guest ends, or fails ──┴──► stopped ──► Stopped event ──► exit
//! ```
//!
//! Threads: [`server`] has its own; it reads frames, decodes them and puts requests into the bounded [`queue`]. The
//! [`driver`] on the event-loop thread takes them one at a time, so that a request sees the microVM in one state and a
//! hostile or broken client can't delay a device.
//!
//! Invariants:
//! - Every readable request is answered, in order; one not allowed in the present state is refused and changes nothing.
//! - A failed Configure leaves the state unconfigured and nothing of the attempt behind.
//! - A client that goes away changes nothing, unless nobody could ever start the microVM any more: then the process ends.

pub mod driver;
pub mod queue;
pub mod server;
