//! A container's statistics, as the agent has them, in the form of control groups that containerd's clients expect.
//!
//! Clients decode what the host itself has: version 1 or version 2 of control groups, by the type's name.

use agent_protocol::StatsResponse;
use containerd_shim_protos::{
    cgroups::metrics as v1,
    cgroups_v2::metrics as v2,
    protobuf::{MessageField, well_known_types::any::Any},
};

use crate::{error::Result, publisher::any};

/// Which version's form is wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    V1,
    V2,
}

impl Form {
    /// The host's own: clients choose by it.
    pub fn of_host() -> Self {
        if std::path::Path::new("/sys/fs/cgroup/cgroup.controllers").exists() {
            Self::V2
        } else {
            Self::V1
        }
    }
}

/// The statistics in a form.
pub fn encode(stats: &StatsResponse, form: Form) -> Result<Any> {
    match form {
        Form::V1 => any(&version_1(stats)),
        Form::V2 => any(&version_2(stats)),
    }
}

const NS_PER_US: u64 = 1000;

fn version_1(stats: &StatsResponse) -> v1::Metrics {
    let usage = v1::CPUUsage {
        total: stats.cpu_usage_us.saturating_mul(NS_PER_US),
        kernel: stats.cpu_system_us.saturating_mul(NS_PER_US),
        user: stats.cpu_user_us.saturating_mul(NS_PER_US),
        ..v1::CPUUsage::default()
    };
    let memory = v1::MemoryStat {
        cache: stats.memory_file_bytes,
        rss: stats.memory_anon_bytes,
        total_cache: stats.memory_file_bytes,
        total_rss: stats.memory_anon_bytes,
        hierarchical_memory_limit: stats.guest_memory_total_bytes,
        usage: MessageField::some(v1::MemoryEntry {
            limit: stats.guest_memory_total_bytes,
            usage: stats.memory_current_bytes,
            max: stats.memory_peak_bytes,
            ..v1::MemoryEntry::default()
        }),
        ..v1::MemoryStat::default()
    };
    let transferred = |op: &str, value| v1::BlkIOEntry {
        op: op.to_owned(),
        value,
        ..v1::BlkIOEntry::default()
    };
    v1::Metrics {
        pids: MessageField::some(v1::PidsStat {
            current: stats.pids_current,
            ..v1::PidsStat::default()
        }),
        cpu: MessageField::some(v1::CPUStat {
            usage: MessageField::some(usage),
            throttling: MessageField::some(v1::Throttle::default()),
            ..v1::CPUStat::default()
        }),
        memory: MessageField::some(memory),
        blkio: MessageField::some(v1::BlkIOStat {
            io_service_bytes_recursive: vec![
                transferred("Read", stats.io_read_bytes),
                transferred("Write", stats.io_write_bytes),
            ],
            ..v1::BlkIOStat::default()
        }),
        memory_oom_control: MessageField::some(v1::MemoryOomControl {
            oom_kill: stats.oom_kills,
            ..v1::MemoryOomControl::default()
        }),
        ..v1::Metrics::default()
    }
}

fn version_2(stats: &StatsResponse) -> v2::Metrics {
    v2::Metrics {
        pids: MessageField::some(v2::PidsStat {
            current: stats.pids_current,
            ..v2::PidsStat::default()
        }),
        cpu: MessageField::some(v2::CPUStat {
            usage_usec: stats.cpu_usage_us,
            user_usec: stats.cpu_user_us,
            system_usec: stats.cpu_system_us,
            ..v2::CPUStat::default()
        }),
        memory: MessageField::some(v2::MemoryStat {
            anon: stats.memory_anon_bytes,
            file: stats.memory_file_bytes,
            usage: stats.memory_current_bytes,
            usage_limit: stats.guest_memory_total_bytes,
            ..v2::MemoryStat::default()
        }),
        io: MessageField::some(v2::IOStat {
            usage: vec![v2::IOEntry {
                rbytes: stats.io_read_bytes,
                wbytes: stats.io_write_bytes,
                ..v2::IOEntry::default()
            }],
            ..v2::IOStat::default()
        }),
        memory_events: MessageField::some(v2::MemoryEvents {
            oom_kill: stats.oom_kills,
            ..v2::MemoryEvents::default()
        }),
        ..v2::Metrics::default()
    }
}

#[cfg(test)]
mod tests {
    use containerd_shim_protos::protobuf::Message as _;

    use super::*;

    fn stats() -> StatsResponse {
        StatsResponse {
            cpu_usage_us: 7,
            memory_current_bytes: 4096,
            pids_current: 3,
            guest_memory_total_bytes: 1 << 28,
            ..StatsResponse::default()
        }
    }

    #[test]
    fn version_1_counts_cpu_in_nanoseconds() {
        let any = encode(&stats(), Form::V1).unwrap();
        assert_eq!(any.type_url, "io.containerd.cgroups.v1.Metrics");
        let metrics = v1::Metrics::parse_from_bytes(&any.value).unwrap();
        assert_eq!(metrics.cpu.usage.total, 7000);
        assert_eq!(
            (metrics.memory.usage.usage, metrics.memory.usage.limit),
            (4096, 1 << 28)
        );
        assert_eq!(metrics.pids.current, 3);
    }

    #[test]
    fn version_2_counts_cpu_in_microseconds() {
        let any = encode(&stats(), Form::V2).unwrap();
        assert_eq!(any.type_url, "io.containerd.cgroups.v2.Metrics");
        let metrics = v2::Metrics::parse_from_bytes(&any.value).unwrap();
        assert_eq!((metrics.cpu.usage_usec, metrics.memory.usage), (7, 4096));
    }

    #[test]
    fn guest_that_claims_absurd_numbers_overflows_nothing() {
        let stats = StatsResponse {
            cpu_usage_us: u64::MAX,
            ..StatsResponse::default()
        };
        let any = encode(&stats, Form::V1).unwrap();
        assert_eq!(
            v1::Metrics::parse_from_bytes(&any.value).unwrap().cpu.usage.total,
            u64::MAX
        );
    }
}
