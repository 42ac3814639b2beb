//! The agent's own messages go to the kernel's log, which the VMM shows when its serial port is on.

use std::{fmt, fs::OpenOptions, io::Write as _};

/// Writes one line to the kernel's log. Failing to log is not an error of its own.
pub fn line(arguments: fmt::Arguments<'_>) {
    let text = format!("<4>hull-agent: {arguments}\n");
    match OpenOptions::new().write(true).open("/dev/kmsg") {
        // One write is one record.
        Ok(mut kmsg) => drop(kmsg.write_all(text.as_bytes())),
        Err(_) => drop(std::io::stderr().write_all(text.as_bytes())),
    }
}

macro_rules! log {
    ($($argument:tt)*) => { $crate::log::line(format_args!($($argument)*)) };
}
pub(crate) use log;
