//! What a microVM costs while its guest does nothing.

#![expect(clippy::unwrap_used, reason = "test code: a panic is a failed test")]

mod support;

use std::{collections::BTreeMap, fs, os::unix::net::UnixListener, time::Duration};
use support::{Code, Guest, Vmm, kvm_is_usable};
use vmm_api::RequestBody;

const MEMORY_MIB: u64 = 128;
/// Beside guest memory.
const MAX_VMM_KIB: u64 = 4096;
const WATCHED: Duration = Duration::from_secs(4);

/// A guest with one of every device.
fn guest_with_devices() -> Guest {
    let guest = Guest::new(&Code::new().print("up").idle());
    support::write_file(&guest.path("disk"), &[0; 4096]);
    let disk = serde_json::json!([{ "id": "root", "source": { "fd": 2 }, "read_only": true, "queues": 2 }]);
    guest
        .with("memory_mib", MEMORY_MIB.into())
        .with("vcpu_count", 2.into())
        .with("blk", disk)
        .with("vsock", serde_json::json!({ "cid": 3, "listener": { "fd": 3 } }))
        .with("rng", true.into())
        .with("balloon", serde_json::json!({}))
}

fn start(guest: &Guest) -> Vmm {
    let mut vmm = Vmm::spawn();
    let (config, mut fds) = guest.wire();
    fds.push(fs::File::open(guest.path("disk")).unwrap().into());
    fds.push(UnixListener::bind(guest.path("vsock")).unwrap().into());
    let fds: Vec<_> = fds.iter().map(std::os::fd::AsFd::as_fd).collect();
    vmm.client
        .call(RequestBody::Configure(Box::new(config)), &fds)
        .unwrap();
    vmm.call(RequestBody::Start).unwrap();
    guest.wait_for_console("up");
    vmm
}

/// Context switches and run time of each thread of the VMM.
fn activity(pid: u32) -> BTreeMap<String, (u64, u64)> {
    let mut threads = BTreeMap::new();
    for task in fs::read_dir(format!("/proc/{pid}/task")).unwrap() {
        let path = task.unwrap().path();
        let name = fs::read_to_string(path.join("comm")).unwrap().trim().to_owned();
        let status = fs::read_to_string(path.join("status")).unwrap();
        let switches = status.lines().filter(|line| line.contains("ctxt_switches"));
        let switches = switches
            .filter_map(|line| line.split_whitespace().last()?.parse::<u64>().ok())
            .sum();
        let schedstat = fs::read_to_string(path.join("schedstat")).unwrap();
        let run_ns = schedstat.split_whitespace().next().unwrap().parse().unwrap();
        threads.insert(name, (switches, run_ns));
    }
    threads
}

#[test]
fn nothing_wakes_up_while_the_guest_is_halted() {
    if !kvm_is_usable() {
        return;
    }
    let guest = guest_with_devices();
    let vmm = start(&guest);
    // The start has last steps of its own, and a loaded host takes its time over them.
    let mut settled = activity(vmm.pid());
    support::wait_until(
        || {
            std::thread::sleep(Duration::from_millis(300));
            let now = activity(vmm.pid());
            std::mem::replace(&mut settled, now.clone()) == now
        },
        || "the end of the start".to_owned(),
    );
    let before = activity(vmm.pid());
    std::thread::sleep(WATCHED);
    let after = activity(vmm.pid());
    for thread in ["hull-vmm", "control", "vcpu0", "vcpu1"] {
        let ((switches, run_ns), (was_switches, was_run_ns)) = (after[thread], before[thread]);
        assert_eq!(switches, was_switches, "{thread} woke up: {before:?} {after:?}");
        assert_eq!(run_ns, was_run_ns, "{thread} ran: {before:?} {after:?}");
    }
}

#[test]
fn vmm_itself_takes_little_memory() {
    if !kvm_is_usable() {
        return;
    }
    let guest = guest_with_devices();
    let vmm = start(&guest);
    let smaps = fs::read_to_string(format!("/proc/{}/smaps", vmm.pid())).unwrap();
    let (mut vmm_kib, mut ram_found, mut in_ram) = (0, false, false);
    for line in smaps.lines() {
        let mut words = line.split_whitespace();
        let (name, value) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
        match name {
            "Size:" => {
                in_ram = value.parse() == Ok(MEMORY_MIB << 10);
                ram_found |= in_ram;
            }
            "Pss:" if !in_ram => vmm_kib += value.parse::<u64>().unwrap(),
            _ => {}
        }
    }
    assert!(ram_found, "no mapping of the guest's memory: {smaps}");
    println!("VMM memory beside the guest's: {vmm_kib} KiB");
    assert!(vmm_kib <= MAX_VMM_KIB, "{vmm_kib} KiB");
}
