//! Names a denied system call before the process dies of it.
//!
//! The filter's action is `Trap`: the kernel skips the call and sends `SIGSYS` with its number. The handler writes a line and
//! makes a call that no list has. The signal is blocked by then and its disposition back at the default, so the second one
//! kills the whole process, and the parent sees a death by `SIGSYS`.

#![expect(
    unsafe_code,
    reason = "a signal handler reads siginfo and makes raw system calls"
)]

use std::io;

/// Writes `number` in decimal to the end of `buffer` and returns where it begins.
fn decimal(mut number: u32, buffer: &mut [u8; 10]) -> &[u8] {
    let mut start = buffer.len();
    loop {
        start -= 1;
        buffer[start] = b'0' + u8::try_from(number % 10).unwrap_or(0);
        number /= 10;
        if number == 0 {
            return &buffer[start..];
        }
    }
}

/// `siginfo_t` of `SIGSYS`, as far as it is used: `_sigsys._syscall` follows the address.
const SYSCALL_OFFSET: usize = 24;

extern "C" fn denied(_: libc::c_int, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // SAFETY: the kernel hands over a whole siginfo_t; for SIGSYS this offset holds the number of the call.
    let call = unsafe {
        info.cast::<u8>()
            .add(SYSCALL_OFFSET)
            .cast::<u32>()
            .read_unaligned()
    };
    let mut digits = [0; 10];
    let mut line = [0; 80];
    let mut length = 0;
    for part in [
        b"hull-vmm: killed: system call ".as_slice(),
        decimal(call, &mut digits),
        b" is not allowed\n",
    ] {
        line[length..length + part.len()].copy_from_slice(part);
        length += part.len();
    }
    // SAFETY: a write of initialised bytes; its failure changes nothing.
    let _ = unsafe { libc::write(libc::STDERR_FILENO, line.as_ptr().cast(), length) };
    // SAFETY: denied by every filter, so this ends the process before the arguments are looked at.
    unsafe { libc::syscall(libc::SYS_execve, 0, 0, 0) };
    // SAFETY: not reached under a filter.
    unsafe { libc::_exit(128 + libc::SIGSYS) }
}

/// Installs the handler, for one signal.
pub(super) fn install_handler() -> io::Result<()> {
    // SAFETY: all zeroes is a valid sigaction; the handler is async-signal-safe.
    let result = unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = denied as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_RESETHAND;
        libc::sigaction(libc::SIGSYS, &raw const action, std::ptr::null_mut())
    };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

#[cfg(test)]
mod tests {
    use super::decimal;

    #[test]
    fn numbers_are_written_in_decimal() {
        for number in [0, 7, 59, 435, u32::MAX] {
            assert_eq!(decimal(number, &mut [0; 10]), number.to_string().as_bytes());
        }
    }
}
