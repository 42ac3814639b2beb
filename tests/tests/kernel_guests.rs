//! What the guest kernel does once it runs: it keeps user code out, behaves as hardware does, and has every feature.

#![expect(clippy::unwrap_used, reason = "a test may panic")]

use std::time::Duration;

use hull_tests::kernel_guest::Guest;
use hull_tests::kernel_vm::{Entry, KernelVm, Machine, Run};

const HERE: Machine = Machine::Hull(Entry::Linux64);

fn run(machine: Machine, guest: Guest, vcpus: u8) -> Option<Run> {
    let vm = KernelVm::prepare(machine, guest)?
        .vcpus(vcpus)
        .memory_mib(256)
        .timeout(Duration::from_secs(600));
    Some(vm.run().unwrap())
}

/// The guest's own checks passed, and the kernel has nothing to complain of that the guest did not provoke on purpose.
fn all_checks_pass(machine: Machine, guest: Guest, vcpus: u8) {
    let Some(run) = run(machine, guest, vcpus) else {
        return;
    };
    let provoked = [
        "general protection",
        "Memory cgroup out of memory",
        "invoked oom-killer",
        "traps:",
    ];
    let trouble: Vec<_> = run
        .trouble()
        .into_iter()
        .filter(|line| !provoked.iter().any(|sign| line.contains(sign)))
        .collect();
    assert!(
        run.reports().iter().any(|report| report.get("done").is_some()),
        "{:?}",
        run.verdict()
    );
    assert!(
        run.status.is_some_and(|status| status.success()),
        "{:?}",
        run.verdict()
    );
    let failures = run.failures();
    assert!(failures.is_empty(), "{}", failures.join("\n"));
    // The OOM killer prints a call trace of the process it kills.
    let trouble: Vec<_> = trouble
        .into_iter()
        .filter(|line| !line.contains("Call Trace"))
        .collect();
    assert!(trouble.is_empty(), "{}", trouble.join("\n"));
}

#[test]
fn user_code_stays_out_of_the_kernel_on_one_vcpu() {
    all_checks_pass(HERE, Guest::Isolation, 1);
}

#[test]
fn user_code_stays_out_of_the_kernel_on_four_vcpus() {
    all_checks_pass(HERE, Guest::Isolation, 4);
}

#[test]
fn every_feature_works_on_this_host() {
    all_checks_pass(HERE, Guest::Features, 2);
}

/// The same image without the PVM backend: TCG offers none, so every feature must work on the ordinary paths too.
#[test]
fn every_feature_works_on_an_ordinary_machine() {
    all_checks_pass(Machine::QemuTcg, Guest::Features, 2);
}

/// Not judged, only shown: `cargo test -p hull-tests --test kernel_guests -- --ignored --nocapture`.
#[test]
#[ignore = "shows costs and judges nothing"]
fn costs_are_measured() {
    let Some(run) = run(HERE, Guest::Bench, 1) else {
        return;
    };
    run.verdict().unwrap_or_else(|wrong| panic!("{wrong}"));
    for report in run.reports() {
        if let (Some(name), Some(cost)) = (report["bench"].as_str(), report["ns"].as_f64()) {
            eprintln!("{name:32} {cost:12.0} ns");
        }
    }
}
