//! What `hull-vmm` reports about itself. Every quantity carries its unit in its name; a plain name is a count.

use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Answer to [`crate::RequestBody::Metrics`].
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MetricsReport {
    /// How long the process has run.
    pub uptime_us: u64,
    /// How long each step up to the first `KVM_RUN` took.
    pub start: StartMetrics,
    /// Marks the guest set while booting, in order of arrival.
    pub boot_phases: Vec<BootPhase>,
    /// One entry a vCPU.
    pub vcpus: Vec<VcpuMetrics>,
    /// One entry a device, by its id.
    pub devices: BTreeMap<String, DeviceMetrics>,
    /// Accesses to ports and addresses no device claims.
    pub unclaimed_accesses: u64,
    /// The control socket.
    pub control: ControlMetrics,
}

/// How long each step up to the first `KVM_RUN` took.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StartMetrics {
    /// Process start to jail entered.
    pub jail_us: u64,
    /// Creating the VM, its memory and its interrupt controllers.
    pub create_vm_us: u64,
    /// Loading the kernel and the initial RAM disk.
    pub load_kernel_us: u64,
    /// Creating and attaching the devices.
    pub devices_us: u64,
    /// Creating and preparing the vCPUs.
    pub vcpus_us: u64,
    /// Process start to the first `KVM_RUN`; missing until then.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub main_to_first_run_us: Option<u64>,
}

/// One mark the guest set on the boot timer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BootPhase {
    /// The byte written.
    pub phase: u8,
    /// Time since the first `KVM_RUN` of the microVM.
    pub since_first_run_ns: u64,
}

/// One vCPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VcpuMetrics {
    /// Exits to the VMM (exits KVM handles itself aren't seen here).
    pub exits: ExitCounts,
}

/// Exits to the VMM by kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ExitCounts {
    /// Port reads.
    pub pio_in: u64,
    /// Port writes.
    pub pio_out: u64,
    /// Reads of device memory.
    pub mmio_read: u64,
    /// Writes of device memory.
    pub mmio_write: u64,
    /// Halts that reached the VMM (none with the in-kernel interrupt controller).
    pub hlt: u64,
    /// Interruptions by the VMM itself (pause, stop) or by a signal.
    pub interrupted: u64,
    /// Shutdowns (triple faults).
    pub shutdown: u64,
    /// Failed entries and internal errors.
    pub failed: u64,
    /// All others.
    pub other: u64,
}

/// Counters of one device by name.
pub type DeviceMetrics = BTreeMap<String, u64>;

/// The control socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ControlMetrics {
    /// Requests taken.
    pub requests: u64,
    /// Requests answered with an error, malformed ones included.
    pub failed_requests: u64,
    /// Clients dropped because they broke the protocol or didn't read.
    pub dropped_clients: u64,
}
