//! Signals: those that would end the process where an error serves better, and the mask a process is given.

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

/// Blocks no signal, whatever whoever started this process does: threads are interrupted by signals.
///
/// # Errors
/// If the kernel refuses.
pub fn block_none() -> io::Result<()> {
    // SAFETY: an all-zero set is a valid value to be initialised, and both pointers are to locals or null.
    let result = unsafe {
        let mut none: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut none);
        libc::sigprocmask(libc::SIG_SETMASK, &raw const none, std::ptr::null_mut())
    };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}
