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
//! - With a listening socket, a client that goes away changes nothing: the microVM outlives whoever started it. A connected
//!   socket is its owner's instead: when it closes, the microVM is stopped, so that a killed owner leaves nothing behind. The
//!   same happens should the control thread fail: no microVM runs that nobody can reach.

pub mod driver;
pub mod queue;
pub mod server;
