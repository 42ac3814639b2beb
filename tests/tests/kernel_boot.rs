//! The guest kernel boots wherever it may have to: on our VMM by every protocol and with every vCPU count, on QEMU with KVM
//! and without, and time after time.

#![expect(clippy::unwrap_used, reason = "a test may panic")]

use hull_tests::hull::PATIENCE;
use hull_tests::kernel_guest::Guest;
use hull_tests::kernel_vm::{Entry, KernelVm, Machine, Run};
use serde_json::Value;

/// Of 128 MiB, what is gone when init starts: with the image and the page structures, and what the kernel took of the rest. The test's
/// own program in its initramfs is 0.8 MiB of both.
const GONE_AT_INIT_KIB: u64 = 18 * 1024 + 768;
const USED_AT_INIT_KIB: u64 = 4 * 1024 + 512;

fn init_report(run: &Run) -> Value {
    run.verdict().unwrap_or_else(|wrong| panic!("{wrong}"));
    run.reports()
        .into_iter()
        .find(|report| report.get("init").is_some())
        .unwrap()
}

/// Boots to init and checks that all vCPUs came up. `None` where the machine is not to be had.
fn boots(machine: Machine, vcpus: u8) -> Option<Value> {
    let vm = KernelVm::prepare(machine, Guest::Minimal)?
        .vcpus(vcpus)
        .timeout(PATIENCE);
    let report = init_report(&vm.run().unwrap());
    assert_eq!(report["cpus"], vcpus, "{report}");
    Some(report)
}

#[test]
fn one_vcpu_reaches_init() {
    boots(Machine::Hull(Entry::Linux64), 1);
}

#[test]
fn two_vcpus_reach_init() {
    boots(Machine::Hull(Entry::Linux64), 2);
}

#[test]
fn four_vcpus_reach_init() {
    boots(Machine::Hull(Entry::Linux64), 4);
}

#[test]
fn sixteen_vcpus_reach_init() {
    boots(Machine::Hull(Entry::Linux64), 16);
}

#[test]
fn pvh_entry_reaches_init() {
    boots(Machine::Hull(Entry::Pvh), 1);
    boots(Machine::Hull(Entry::Pvh), 2);
}

#[test]
fn firecracker_entry_state_reaches_init() {
    boots(Machine::Hull(Entry::Firecracker), 1);
    boots(Machine::Hull(Entry::Firecracker), 2);
}

#[test]
fn qemu_microvm_with_kvm_reaches_init() {
    boots(Machine::QemuKvm, 1);
    boots(Machine::QemuKvm, 2);
}

#[test]
fn qemu_microvm_without_kvm_reaches_init() {
    boots(Machine::QemuTcg, 1);
    boots(Machine::QemuTcg, 2);
}

#[test]
fn memory_in_use_at_init_is_bounded() {
    let Some(report) = boots(Machine::Hull(Entry::Linux64), 1) else {
        return;
    };
    let (total, free) = (
        report["total_kib"].as_u64().unwrap(),
        report["free_kib"].as_u64().unwrap(),
    );
    eprintln!(
        "of 131072 KiB: {} KiB reserved by the image and the page structures, {} KiB in use",
        131_072 - total,
        total - free
    );
    assert!(total - free <= USED_AT_INIT_KIB, "{} KiB in use", total - free);
    assert!(131_072 - free <= GONE_AT_INIT_KIB, "{} KiB gone", 131_072 - free);
}

/// Boots `count` times, alternating one and two vCPUs; every one must reach init.
fn boots_in_a_row(count: u32) {
    let mut milliseconds = Vec::new();
    for round in 0..count {
        let vcpus = if round % 2 == 0 { 1 } else { 2 };
        let Some(vm) = KernelVm::prepare(Machine::Hull(Entry::Linux64), Guest::Minimal) else {
            return;
        };
        let run = vm.vcpus(vcpus).timeout(PATIENCE).run().unwrap();
        run.verdict()
            .unwrap_or_else(|wrong| panic!("boot {} of {count}, {vcpus} vCPUs: {wrong}", round + 1));
        milliseconds.push(run.elapsed.as_millis());
    }
    milliseconds.sort_unstable();
    let at = |percent: usize| milliseconds[(milliseconds.len() - 1) * percent / 100];
    eprintln!(
        "{count} boots of {count}; start to end of the VMM: p50 {} ms, p99 {} ms",
        at(50),
        at(99)
    );
}

#[test]
fn boots_thirty_times_in_a_row() {
    boots_in_a_row(30);
}

/// `cargo test -p hull-tests --test kernel_boot -- --ignored --nocapture`
#[test]
#[ignore = "takes minutes; the thirty above are its short version"]
fn boots_five_hundred_times_in_a_row() {
    boots_in_a_row(500);
}
