//! What a hostile program in a container would try; run there by `tests/agent_confinement.rs`, which sends it in by stdin.
//!
//! `container_probe syscalls NUMBER[:ARGUMENT]…` prints the errors of system calls; `container_probe vsock` tries to reach the
//! agent and the host; `container_probe trace` tries to look into every process.

use std::fs;
use std::os::fd::AsRawFd as _;
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, VsockAddr, connect, setsockopt, socket, sockopt};
use nix::sys::time::{TimeVal, TimeValLike as _};

fn main() {
    let mut arguments = std::env::args().skip(1);
    match arguments.next().as_deref() {
        Some("syscalls") => arguments.for_each(|call| print!("{} ", call_error(&call))),
        Some("vsock") => reach_by_vsock(),
        Some("trace") => look_into_processes(),
        other => panic!("no such probe: {other:?}"),
    }
    println!("done");
}

#[expect(unsafe_code, reason = "a system call by its number")]
fn call_error(call: &str) -> i32 {
    let (number, argument) = call.split_once(':').unwrap_or((call, "0"));
    let (number, argument): (i64, i64) = (
        number.parse().expect("a number"),
        argument.parse().expect("a number"),
    );
    // SAFETY: the callers name calls that are refused, or that do nothing with these arguments.
    let result = unsafe { nix::libc::syscall(number, argument, 0, 0, 0, 0, 0) };
    if result < 0 { Errno::last_raw() } else { 0 }
}

/// Says which ports can be talked to. All at once, because some never answer.
fn reach_by_vsock() {
    std::thread::scope(|scope| {
        for cid in [0, 1, 2, 3, u32::MAX] {
            for port in [1023, 1024, 1025, 1026] {
                scope.spawn(move || reach_one(cid, port));
            }
        }
    });
}

fn reach_one(cid: u32, port: u32) {
    let Ok(stream) = socket(AddressFamily::Vsock, SockType::Stream, SockFlag::empty(), None) else {
        return;
    };
    let patience = TimeVal::seconds(2);
    let _ = setsockopt(&stream, sockopt::SendTimeout, &patience);
    let _ = setsockopt(&stream, sockopt::ReceiveTimeout, &patience);
    if connect(stream.as_raw_fd(), &VsockAddr::new(cid, port)).is_err() {
        return;
    }
    // Half a frame: who serves this stream waits for the rest, who turns it away closes it.
    let _ = nix::unistd::write(&stream, b"\0\0\0\0\0");
    let answer = nix::unistd::read(&stream, &mut [0; 1]);
    if !matches!(
        answer,
        Ok(0) | Err(Errno::ECONNRESET | Errno::EPIPE | Errno::ENOTCONN)
    ) {
        println!("REACHED {cid}:{port} {answer:?}");
    }
}

/// Watches for a while, for processes that others start meanwhile.
fn look_into_processes() {
    let own = std::process::id();
    let until = std::time::Instant::now() + Duration::from_secs(3);
    while std::time::Instant::now() < until {
        for entry in fs::read_dir("/proc").expect("/proc is there").flatten() {
            let name = entry.file_name();
            let Some(pid) = name.to_str().and_then(|name| name.parse::<u32>().ok()) else {
                continue;
            };
            if pid == own {
                continue;
            }
            let of = |what: &str| format!("/proc/{pid}/{what}");
            let says_agent = |text: &[u8]| text.windows(10).any(|window| window == b"hull-agent");
            if fs::read_link(of("exe")).is_ok_and(|path| path.to_string_lossy().contains("hull-agent")) {
                println!("EXE {pid}");
            }
            if fs::read(of("maps")).is_ok_and(|maps| says_agent(&maps)) {
                println!("MAPS {pid}");
            }
            if fs::read(of("environ")).is_ok_and(|text| says_agent(&text)) {
                println!("ENVIRON {pid}");
            }
        }
    }
}
