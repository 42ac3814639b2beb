//! The soak: databases, stressors, debuggers and process storms side by side in one microVM, each checking its own results.
//!
//! Short here; the long one is `cargo xtask soak` (`HULL_SOAK_MINUTES`, `HULL_SOAK_VCPUS`).

#![expect(clippy::unwrap_used, reason = "a test may panic")]

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use hull_tests::kernel_guest::Guest;
use hull_tests::kernel_vm::{Entry, KernelVm, Machine};
use hull_tests::soak_root;

/// Starting, stopping and the last round of each workload, on top of the time it runs for.
const SLACK: Duration = Duration::from_secs(240);

/// What the workloads provoke on purpose: processes that crash, and memory that runs out in their own control groups.
const PROVOKED: [&str; 2] = ["general protection fault ip", "Call Trace"];

/// How often the host is interrupted meanwhile, on each of its CPUs: each time a vCPU leaves its guest at whatever instruction
/// it is, and an interrupt may come to the guest just there.
const DISTURBANCE: Duration = Duration::from_micros(50);

/// Runs something while the host is disturbed.
fn disturbed<T>(body: impl FnOnce() -> T) -> T {
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().map_or(1, usize::from) {
            scope.spawn(|| {
                while !over.load(Ordering::Relaxed) {
                    std::thread::sleep(DISTURBANCE);
                }
            });
        }
        let result = body();
        over.store(true, Ordering::Relaxed);
        result
    })
}

fn soak(vcpus: u8, duration: Duration) {
    let Some(vm) = KernelVm::prepare(Machine::Hull(Entry::Linux64), Guest::Soak) else {
        return;
    };
    let root = soak_root::image().unwrap();
    let vm = vm
        .vcpus(vcpus)
        .memory_mib(1536)
        .disk(&root, true)
        .parameters(&format!("soak_seconds={}", duration.as_secs()))
        .timeout(duration + SLACK);
    let run = disturbed(|| vm.run()).unwrap();
    for report in run.reports().iter().filter(|report| report.get("soak").is_some()) {
        eprintln!("{vcpus} vCPUs: {report}");
    }
    let trouble: Vec<_> = run
        .trouble()
        .into_iter()
        .filter(|line| !PROVOKED.iter().any(|sign| line.contains(sign)))
        .collect();
    assert!(
        run.failures().is_empty() && trouble.is_empty(),
        "{:?} {trouble:?} {}",
        run.failures(),
        run.verdict().err().unwrap_or_default()
    );
    let finished = run.reports().iter().any(|report| report["done"] == "soak");
    assert!(
        finished && run.status.is_some_and(|status| status.success()),
        "{:?}",
        run.verdict()
    );
    eprintln!(
        "{vcpus} vCPUs, {} s: no oops, no wrong result, no unexpected exit of the VMM",
        duration.as_secs()
    );
}

#[test]
fn two_vcpus_survive_a_short_soak() {
    soak(2, Duration::from_secs(60));
}

/// `HULL_SOAK_MINUTES=30 HULL_SOAK_VCPUS=1,2,4 cargo test -p hull-tests --test kernel_soak -- --ignored --nocapture`
#[test]
#[ignore = "takes as long as it is told to, half an hour for each vCPU count by default"]
fn long_soak() {
    let setting = |name: &str, default: &str| std::env::var(name).unwrap_or_else(|_| default.to_owned());
    let minutes: u64 = setting("HULL_SOAK_MINUTES", "30").parse().unwrap();
    for vcpus in setting("HULL_SOAK_VCPUS", "1,2,4").split(',') {
        soak(vcpus.trim().parse().unwrap(), Duration::from_secs(minutes * 60));
    }
}
