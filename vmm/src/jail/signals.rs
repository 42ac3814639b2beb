//! Signals that would end the process where an error serves better.

#![expect(unsafe_code, reason = "signal dispositions")]

use std::io;

/// Ignores the signals of a closed pipe and of the file size limit: the write that caused them fails, which is handled.
///
/// # Errors
/// If the kernel refuses.
pub fn ignore_write_signals() -> io::Result<()> {
    for signal in [libc::SIGPIPE, libc::SIGXFSZ] {
        // SAFETY: ignoring a signal runs no code.
        if unsafe { libc::signal(signal, libc::SIG_IGN) } == libc::SIG_ERR {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}
