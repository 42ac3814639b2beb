//! The one line a standalone run prints for benchmarks.

use serde_json::{Value, json};
use vmm_api::{ExitCounts, MetricsReport};

/// Boot timing and exits as one line of JSON.
#[must_use]
pub fn standalone_report(metrics: &MetricsReport) -> Value {
    let marks: Vec<_> = metrics
        .boot_phases
        .iter()
        .map(|mark| json!({ "phase": mark.phase, "since_first_run_us": mark.since_first_run_ns / 1000 }))
        .collect();
    let exits = metrics
        .vcpus
        .iter()
        .fold(ExitCounts::default(), |sum, vcpu| add(sum, vcpu.exits));
    json!({
        "boot_timer": {
            "main_to_first_run_us": metrics.start.main_to_first_run_us,
            "jail_us": metrics.start.jail_us,
            "configure_us": metrics.start.create_vm_us + metrics.start.devices_us + metrics.start.vcpus_us,
            "load_us": metrics.start.load_kernel_us,
            "marks": marks,
        },
        "exits": exits,
        "unclaimed_accesses": metrics.unclaimed_accesses,
        "uptime_us": metrics.uptime_us,
    })
}

fn add(a: ExitCounts, b: ExitCounts) -> ExitCounts {
    ExitCounts {
        pio_in: a.pio_in + b.pio_in,
        pio_out: a.pio_out + b.pio_out,
        mmio_read: a.mmio_read + b.mmio_read,
        mmio_write: a.mmio_write + b.mmio_write,
        hlt: a.hlt + b.hlt,
        interrupted: a.interrupted + b.interrupted,
        shutdown: a.shutdown + b.shutdown,
        failed: a.failed + b.failed,
        other: a.other + b.other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vmm_api::{BootPhase, VcpuMetrics};

    #[test]
    fn exits_of_all_vcpus_are_added_and_marks_are_in_microseconds() {
        let vcpu = VcpuMetrics {
            exits: ExitCounts {
                pio_out: 2,
                ..Default::default()
            },
        };
        let metrics = MetricsReport {
            vcpus: vec![vcpu, vcpu],
            boot_phases: vec![BootPhase {
                phase: 7,
                since_first_run_ns: 30_500_000,
            }],
            ..Default::default()
        };
        let line = standalone_report(&metrics);
        assert_eq!(line["exits"]["pio_out"], 4);
        assert_eq!(
            line["boot_timer"]["marks"][0],
            json!({"phase": 7, "since_first_run_us": 30_500})
        );
        assert!(!line.to_string().contains('\n'));
    }
}
