//! The few devices of a PC that a microVM keeps.

mod boot_timer;
mod i8042;
mod serial;

pub use boot_timer::BootTimerDevice;
pub use i8042::I8042;
pub use serial::{Serial, SerialError};
