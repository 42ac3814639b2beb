//! The control socket of a real process: the state machine, errors, disconnects, kill.

#![expect(clippy::unwrap_used, reason = "test code: a panic is a failed test")]

mod support;

use std::{
    io::Write,
    os::{
        fd::{AsFd, OwnedFd},
        unix::{net::UnixStream, process::ExitStatusExt},
    },
    process::{Command, Stdio},
    time::Duration,
};
use support::{Code, Guest, Vmm, kvm_is_usable};
use vmm_api::{
    Client, ClientError, ErrorCode, RequestBody, ResponseBody, ServerMessage, StopReason, VmConfig, VmState,
    write_frame,
};

fn idle_guest() -> Guest {
    Guest::new(&Code::new().print("up").idle())
}

fn code(result: Result<ResponseBody, ClientError>) -> ErrorCode {
    match result {
        Err(ClientError::Refused(error)) => error.code,
        other => panic!("{other:?}"),
    }
}

fn state(vmm: &mut Vmm) -> VmState {
    match vmm.call(RequestBody::State).unwrap() {
        ResponseBody::State(report) => report.state,
        other => panic!("{other:?}"),
    }
}

#[test]
fn life_of_a_microvm_follows_the_diagram() {
    if !kvm_is_usable() {
        return;
    }
    let guest = idle_guest();
    let mut vmm = Vmm::spawn();
    assert!(
        matches!(vmm.call(RequestBody::Hello).unwrap(), ResponseBody::Hello(info) if info.protocol_version == 1)
    );
    assert_eq!(state(&mut vmm), VmState::Unconfigured);
    for early in [
        RequestBody::Start,
        RequestBody::Pause,
        RequestBody::Resume,
        RequestBody::Balloon { target_mib: 1 },
    ] {
        assert_eq!(code(vmm.call(early)), ErrorCode::WrongState);
    }
    vmm.configure(&guest).unwrap();
    assert_eq!(state(&mut vmm), VmState::Configured);
    assert_eq!(code(vmm.configure(&guest)), ErrorCode::WrongState);
    assert_eq!(code(vmm.call(RequestBody::Pause)), ErrorCode::WrongState);
    vmm.call(RequestBody::Start).unwrap();
    assert_eq!(state(&mut vmm), VmState::Running);
    guest.wait_for_console("up");
    assert_eq!(code(vmm.call(RequestBody::Start)), ErrorCode::WrongState);
    assert_eq!(code(vmm.call(RequestBody::Resume)), ErrorCode::WrongState);
    for _ in 0..20 {
        vmm.call(RequestBody::Pause).unwrap();
        assert_eq!(state(&mut vmm), VmState::Paused);
        assert_eq!(code(vmm.call(RequestBody::Pause)), ErrorCode::WrongState);
        vmm.call(RequestBody::Resume).unwrap();
    }
    assert_eq!(
        code(vmm.call(RequestBody::Balloon { target_mib: 1 })),
        ErrorCode::NoSuchDevice
    );
    vmm.call(RequestBody::Shutdown).unwrap();
    assert_eq!(vmm.client.wait_stopped().unwrap(), Some(StopReason::Requested));
    assert!(support::wait(&mut vmm.child).success());
}

#[test]
fn shutdown_works_in_every_state() {
    if !kvm_is_usable() {
        return;
    }
    let guest = idle_guest();
    for steps in 0..4 {
        let mut vmm = Vmm::spawn();
        if steps > 0 {
            vmm.configure(&guest).unwrap();
        }
        if steps > 1 {
            vmm.call(RequestBody::Start).unwrap();
        }
        if steps > 2 {
            vmm.call(RequestBody::Pause).unwrap();
        }
        vmm.call(RequestBody::Shutdown).unwrap();
        assert!(support::wait(&mut vmm.child).success(), "after {steps} steps");
    }
}

#[test]
fn spinning_guest_is_shut_down() {
    if !kvm_is_usable() {
        return;
    }
    let guest = Guest::new(&Code::new().print("up").spin()).with("vcpu_count", 4.into());
    let mut vmm = Vmm::start(&guest);
    guest.wait_for_console("up");
    vmm.call(RequestBody::Shutdown).unwrap();
    assert!(support::wait(&mut vmm.child).success());
}

#[test]
fn guest_that_ends_itself_is_announced() {
    if !kvm_is_usable() {
        return;
    }
    let guest = Guest::new(&Code::new().triple_fault());
    let mut vmm = Vmm::start(&guest);
    assert_eq!(
        vmm.client.wait_stopped().unwrap(),
        Some(StopReason::GuestShutdown)
    );
    assert!(support::wait(&mut vmm.child).success());
}

#[test]
fn failed_configure_names_the_cause_and_can_be_tried_again() {
    if !kvm_is_usable() {
        return;
    }
    let guest = idle_guest();
    let mut vmm = Vmm::spawn();
    let mut configure = |change: &dyn Fn(&mut serde_json::Value), fds: &[OwnedFd]| {
        let (config, _) = guest.wire();
        let mut config = serde_json::to_value(config).unwrap();
        change(&mut config);
        let config: VmConfig = serde_json::from_value(config).unwrap();
        let fds: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
        match vmm.client.call(RequestBody::Configure(Box::new(config)), &fds) {
            Err(ClientError::Refused(error)) => (error.code, error.message),
            other => panic!("{other:?}"),
        }
    };
    let good = || guest.wire().1;
    let (error, message) = configure(&|config| config["vcpu_count"] = 0.into(), &good());
    assert_eq!(
        (error, message.contains("vcpu_count")),
        (ErrorCode::InvalidConfig, true),
        "{message}"
    );
    let (error, message) = configure(&|config| config["memory_mib"] = 1_000_000_000.into(), &good());
    assert_eq!(
        (error, message.contains("memory_mib")),
        (ErrorCode::InvalidConfig, true),
        "{message}"
    );
    let (error, message) = configure(&|config| config["kernel"]["fd"] = 5.into(), &good());
    assert_eq!(
        (error, message.contains("kernel")),
        (ErrorCode::Resource, true),
        "{message}"
    );
    let (error, message) = configure(&|_| (), &[tempfile::tempfile().unwrap().into(), good().remove(1)]);
    assert_eq!(
        (error, message.contains("empty file")),
        (ErrorCode::Resource, true),
        "{message}"
    );
    let (error, message) = configure(&|config| config["cmdline"] = "x".repeat(4000).into(), &good());
    assert_eq!(
        (error, message.contains("command line")),
        (ErrorCode::InvalidConfig, true),
        "{message}"
    );
    let (error, message) = configure(&|config| config["boot_protocol"] = "pvh".into(), &good());
    assert_eq!(
        (error, message.contains("PVH")),
        (ErrorCode::Resource, true),
        "{message}"
    );
    vmm.configure(&guest).unwrap();
    vmm.call(RequestBody::Start).unwrap();
    guest.wait_for_console("up");
}

#[test]
fn garbage_does_not_hinder_the_next_request() {
    if !kvm_is_usable() {
        return;
    }
    let mut vmm = Vmm::spawn();
    for garbage in [
        &b"{"[..],
        b"\xff\xfe",
        b"[]",
        b"{\"id\":1,\"body\":{\"configure\":{}}}",
        &[b'['; 100_000],
    ] {
        write_frame(vmm.client.as_stream(), garbage, &[]).unwrap();
        let Err(ClientError::Refused(error)) = vmm.call(RequestBody::State) else {
            panic!("not refused")
        };
        assert_eq!(error.code, ErrorCode::Malformed);
        // The answer to the request itself.
        let late = vmm_api::FrameReader::new().read(vmm.client.as_stream()).unwrap();
        let vmm_api::Received::Frame(frame) = late else {
            panic!("{late:?}")
        };
        assert!(matches!(
            serde_json::from_slice(&frame.payload).unwrap(),
            ServerMessage::Response(_)
        ));
    }
    assert_eq!(state(&mut vmm), VmState::Unconfigured);
    assert_eq!(vmm.metrics().control.failed_requests, 5);
}

#[test]
fn oversized_frame_ends_the_connection_and_with_it_the_owned_process() {
    if !kvm_is_usable() {
        return;
    }
    let mut vmm = Vmm::spawn();
    vmm.client
        .as_stream()
        .write_all(&[0xff, 0xff, 0xff, 0x7f, 1, 0, 0, 0])
        .unwrap();
    assert_eq!(code(vmm.call(RequestBody::State)), ErrorCode::Malformed);
    assert!(support::wait(&mut vmm.child).success());
}

#[test]
fn owner_that_goes_away_takes_its_microvm_along() {
    if !kvm_is_usable() {
        return;
    }
    let guest = idle_guest();
    let mut vmm = Vmm::start(&guest);
    guest.wait_for_console("up");
    let (stand_in, _other) = UnixStream::pair().unwrap();
    drop(std::mem::replace(&mut vmm.client, Client::from_stream(stand_in)));
    assert!(support::wait(&mut vmm.child).success());
}

#[test]
fn microvm_behind_a_listening_socket_outlives_its_clients() {
    if !kvm_is_usable() {
        return;
    }
    let guest = idle_guest();
    let path = guest.path("control");
    let mut child = Command::new(support::VMM)
        .arg("--control-socket")
        .arg(&path)
        .stdin(Stdio::null())
        .spawn()
        .unwrap();
    support::wait_until(|| path.exists(), || "the control socket".to_owned());
    let connect = || {
        let mut client = Client::connect(&path).unwrap();
        client.set_timeout(Some(support::TIMEOUT));
        client
    };
    let (config, fds) = guest.wire();
    let fds: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
    let mut first = connect();
    first
        .call(RequestBody::Configure(Box::new(config)), &fds)
        .unwrap();
    first.call(RequestBody::Start, &[]).unwrap();
    drop(first);
    guest.wait_for_console("up");
    let (mut watcher, mut second) = (connect(), connect());
    assert!(
        matches!(second.call(RequestBody::State, &[]).unwrap(), ResponseBody::State(s) if s.state == VmState::Running)
    );
    second.call(RequestBody::Shutdown, &[]).unwrap();
    assert_eq!(watcher.wait_stopped().unwrap(), Some(StopReason::Requested));
    assert!(support::wait(&mut child).success());
}

#[test]
fn killed_process_leaves_nothing_running() {
    if !kvm_is_usable() {
        return;
    }
    let guest = idle_guest();
    let mut vmm = Vmm::start(&guest);
    guest.wait_for_console("up");
    vmm.child.kill().unwrap();
    assert_eq!(vmm.client.wait_stopped().unwrap(), None);
    assert_eq!(support::wait(&mut vmm.child).signal(), Some(libc::SIGKILL));
    assert!(!std::path::Path::new(&format!("/proc/{}/task", vmm.pid())).exists());
}

#[test]
fn killing_at_any_moment_of_a_start_leaves_nothing_running() {
    if !kvm_is_usable() {
        return;
    }
    let guest = idle_guest();
    for delay_us in (0..20).map(|step| step * 1500) {
        let mut vmm = Vmm::spawn();
        let (config, fds) = guest.wire();
        let fds: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
        let request = vmm_api::Request {
            id: 1,
            body: RequestBody::Configure(Box::new(config)),
        };
        write_frame(
            vmm.client.as_stream(),
            &serde_json::to_vec(&request).unwrap(),
            &fds,
        )
        .unwrap();
        let start = vmm_api::Request {
            id: 2,
            body: RequestBody::Start,
        };
        write_frame(vmm.client.as_stream(), &serde_json::to_vec(&start).unwrap(), &[]).unwrap();
        std::thread::sleep(Duration::from_micros(delay_us));
        vmm.child.kill().unwrap();
        support::wait(&mut vmm.child);
        assert!(!std::path::Path::new(&format!("/proc/{}/task", vmm.pid())).exists());
    }
}

/// A guest that causes log lines without end, and counts on the console.
fn noisy_guest() -> Guest {
    // 1: mov dx, 0x700; out dx, al; inc ecx; test cl, 0x3f; jne 1b; '.'; jmp 1b
    let code = Code::new().raw(&[
        0x66, 0xba, 0x00, 0x07, 0xee, 0xff, 0xc1, 0xf6, 0xc1, 0x3f, 0x75, 0xf4,
    ]);
    Guest::new(&code.print(".").raw(&[0xeb, 0xeb]))
}

/// Leaves no room in a pipe.
fn fill(pipe: &std::io::PipeWriter) {
    use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
    let flags = fcntl_getfl(pipe).unwrap();
    fcntl_setfl(pipe, flags | OFlags::NONBLOCK).unwrap();
    while rustix::io::write(pipe, &[b'x'; 512]).is_ok() {}
    fcntl_setfl(pipe, flags).unwrap();
}

#[test]
fn stderr_that_nobody_reads_or_that_is_closed_hinders_nothing() {
    if !kvm_is_usable() {
        return;
    }
    for close in [true, false] {
        let guest = noisy_guest();
        let (ours, theirs) = UnixStream::pair().unwrap();
        let (reader, writer) = std::io::pipe().unwrap();
        fill(&writer);
        let mut command = Command::new(support::VMM);
        command
            .args(["--control-fd", "3"])
            .env("HULL_LOG", "trace")
            .stdin(Stdio::null())
            .stderr(writer);
        support::inherit_as(&mut command, theirs.into(), 3);
        let mut child = command.spawn().unwrap();
        drop(command);
        let _reader = (!close).then_some(reader);
        let mut client = Client::from_stream(ours);
        client.set_timeout(Some(support::TIMEOUT));
        let (config, fds) = guest.wire();
        let fds: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
        client
            .call(RequestBody::Configure(Box::new(config)), &fds)
            .unwrap();
        client.call(RequestBody::Start, &[]).unwrap();
        guest.wait_for_console("....................");
        for _ in 0..2000 {
            client.call(RequestBody::State, &[]).unwrap();
        }
        client.call(RequestBody::Shutdown, &[]).unwrap();
        assert!(support::wait(&mut child).success(), "closed: {close}");
    }
}
