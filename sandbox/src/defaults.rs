//! What a container gets unless told otherwise: the same as from docker.

use agent_protocol::{Capabilities, Mount, Rlimit};

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

/// CHOWN, DAC_OVERRIDE, FOWNER, FSETID, KILL, SETGID, SETUID, SETPCAP, NET_BIND_SERVICE, NET_RAW, SYS_CHROOT,
/// MKNOD, AUDIT_WRITE, SETFCAP.
const CAPABILITY_NUMBERS: [u32; 14] = [0, 1, 3, 4, 5, 6, 7, 8, 10, 13, 18, 27, 29, 31];

/// RLIMIT_NOFILE.
const NOFILE: u32 = 7;
const NOFILE_LIMIT: u64 = 1_048_576;

pub(crate) fn mounts() -> Vec<Mount> {
    let entry = |destination: &str, kind: &str, options: &[&str]| Mount {
        destination: destination.to_owned(),
        type_: kind.to_owned(),
        source: kind.to_owned(),
        options: options.iter().copied().map(str::to_owned).collect(),
        ..Mount::default()
    };
    let plain = ["nosuid", "noexec", "nodev"];
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
        entry("/sys", "sysfs", &["nosuid", "noexec", "nodev", "ro"]),
        entry(
            "/sys/fs/cgroup",
            "cgroup2",
            &["nosuid", "noexec", "nodev", "relatime", "ro"],
        ),
        entry("/dev/mqueue", "mqueue", &plain),
        entry(
            "/dev/shm",
            "tmpfs",
            &["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"],
        ),
    ]
}

pub(crate) fn capabilities() -> Capabilities {
    let mask = CAPABILITY_NUMBERS
        .iter()
        .fold(0, |mask, number| mask | 1 << number);
    Capabilities {
        bounding: mask,
        effective: mask,
        permitted: mask,
        root_only: true,
        ..Capabilities::default()
    }
}

pub(crate) fn rlimits() -> Vec<Rlimit> {
    vec![Rlimit {
        resource: NOFILE,
        soft: NOFILE_LIMIT,
        hard: NOFILE_LIMIT,
        ..Rlimit::default()
    }]
}

pub(crate) fn hosts(hostname: &str) -> String {
    format!("127.0.0.1\tlocalhost {hostname}\n::1\tlocalhost ip6-localhost ip6-loopback\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn capabilities_are_dockers_fourteen() {
        assert_eq!(capabilities().bounding, 0xa804_25fb);
    }
}
