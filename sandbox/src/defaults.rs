//! What a container gets unless told otherwise: the same as from docker.

use agent_protocol::{Mount, Rlimit};

/// PATH where an image gives none.
pub(crate) const PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Kernel interfaces that show the machine rather than the container.
pub(crate) const MASKED_PATHS: [&str; 10] = [
    "/proc/asound",
    "/proc/acpi",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/sys/firmware",
];

/// Kernel interfaces that change the machine.
pub(crate) const READONLY_PATHS: [&str; 5] = [
    "/proc/bus",
    "/proc/fs",
    "/proc/irq",
    "/proc/sys",
    "/proc/sysrq-trigger",
];

/// RLIMIT_NOFILE.
const NOFILE: u32 = 7;
const NOFILE_LIMIT: u64 = 1_048_576;

/// Docker's size of `/dev/shm`.
const SHM_BYTES: u64 = 64 << 20;

pub(crate) fn mounts(shm_bytes: Option<u64>, privileged: bool) -> Vec<Mount> {
    let entry = |destination: &str, kind: &str, options: &[&str]| Mount {
        destination: destination.to_owned(),
        type_: kind.to_owned(),
        source: kind.to_owned(),
        options: options.iter().copied().map(str::to_owned).collect(),
        ..Mount::default()
    };
    let plain = ["nosuid", "noexec", "nodev"];
    let shm_size = format!("size={}", shm_bytes.unwrap_or(SHM_BYTES));
    let kernel = if privileged { "rw" } else { "ro" };
    vec![
        entry("/proc", "proc", &plain),
        entry(
            "/dev",
            "tmpfs",
            &["nosuid", "strictatime", "mode=755", "size=65536k"],
        ),
        entry(
            "/dev/pts",
            "devpts",
            &[
                "nosuid",
                "noexec",
                "newinstance",
                "ptmxmode=0666",
                "mode=0620",
                "gid=5",
            ],
        ),
        entry("/sys", "sysfs", &["nosuid", "noexec", "nodev", kernel]),
        entry(
            "/sys/fs/cgroup",
            "cgroup2",
            &["nosuid", "noexec", "nodev", "relatime", kernel],
        ),
        entry("/dev/mqueue", "mqueue", &plain),
        entry(
            "/dev/shm",
            "tmpfs",
            &["nosuid", "noexec", "nodev", "mode=1777", &shm_size],
        ),
    ]
}

pub(crate) fn rlimits() -> Vec<Rlimit> {
    vec![Rlimit {
        resource: NOFILE,
        soft: NOFILE_LIMIT,
        hard: NOFILE_LIMIT,
        ..Rlimit::default()
    }]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shared_memory_has_the_size_asked_for() {
        let options = |mounts: Vec<Mount>| {
            mounts
                .into_iter()
                .find(|m| m.destination == "/dev/shm")
                .unwrap()
                .options
        };
        assert!(options(mounts(None, false)).contains(&"size=67108864".to_owned()));
        assert!(options(mounts(Some(4096), false)).contains(&"size=4096".to_owned()));
    }

    #[test]
    fn kernel_interfaces_are_writable_for_the_privileged_alone() {
        let read_only = |privileged| {
            mounts(None, privileged)
                .iter()
                .filter(|mount| mount.options.contains(&"ro".to_owned()))
                .count()
        };
        assert_eq!((read_only(false), read_only(true)), (2, 0));
    }
}
