//! Log lines on stderr, for as long as somebody reads them.
//!
//! The microVM outlives whoever started it, and a guest can cause log lines: a stderr that is closed, or a pipe that nobody
//! empties, must neither end nor stop the process. Lines that can't be written at once are dropped.

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::io::{self, Write};
use tracing_subscriber::EnvFilter;

/// A pipe that is ready takes this much without blocking (`PIPE_BUF`).
const MAX_LINE_BYTES: usize = 4096;

/// Stderr that never blocks.
#[derive(Debug, Clone, Copy)]
pub struct PatientStderr;

impl Write for PatientStderr {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut stderr = io::stderr().lock();
        let ready = {
            let mut fds = [PollFd::new(&stderr, PollFlags::OUT)];
            matches!(
                poll(
                    &mut fds,
                    Some(&Timespec {
                        tv_sec: 0,
                        tv_nsec: 0
                    })
                ),
                Ok(1)
            ) && fds[0].revents().contains(PollFlags::OUT)
        };
        if ready {
            let _ = stderr.write(&bytes[..bytes.len().min(MAX_LINE_BYTES)]);
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Starts logging as the environment variable `HULL_LOG` says; warnings and errors without it.
pub fn init() {
    let filter = EnvFilter::try_from_env("HULL_LOG").unwrap_or_else(|_| EnvFilter::new("warn"));
    tracing_subscriber::fmt()
        .with_writer(|| PatientStderr)
        .with_env_filter(filter)
        .with_ansi(false)
        .log_internal_errors(false)
        .init();
}

/// One line for people, after the program's name.
pub fn complain(message: &str) {
    let _ = PatientStderr.write(format!("hull-vmm: {message}\n").as_bytes());
}
