//! Docker's default profile, said the other way round: of the calls the guest kernel has, those that are not allowed,
//! and the capability that opens them.

use super::{
    action,
    bpf::{Comparison, Condition},
    profile::{Profile, Rule},
    syscalls,
};

/// Allowed to nobody: keys, which have no namespace; another kernel; swap; calls with a long history of holes; and
/// what the kernel no longer has.
const NEVER: [&str; 37] = [
    "_sysctl",
    "add_key",
    "afs_syscall",
    "create_module",
    "get_kernel_syms",
    "getpmsg",
    "io_uring_enter",
    "io_uring_register",
    "io_uring_setup",
    "kexec_file_load",
    "kexec_load",
    "keyctl",
    "migrate_pages",
    "move_pages",
    "nfsservctl",
    "pivot_root",
    "putpmsg",
    "query_module",
    "request_key",
    "rtas",
    "security",
    "set_mempolicy_home_node",
    "swapoff",
    "swapon",
    "sysfs",
    "tuxcall",
    "uselib",
    "userfaultfd",
    "ustat",
    "vm86",
    "vm86old",
    "vserver",
    "bdflush",
    "break",
    "ftime",
    "gtty",
    "idle",
];

/// (capability number, what it opens)
const OPENED_BY: [(u32, &[&str]); 14] = [
    // DAC_READ_SEARCH
    (2, &["open_by_handle_at"]),
    // SYS_MODULE
    (16, &["delete_module", "finit_module", "init_module"]),
    // SYS_RAWIO
    (17, &["ioperm", "iopl"]),
    // SYS_CHROOT
    (18, &["chroot"]),
    // SYS_PTRACE
    (19, &["kcmp", "pidfd_getfd", "process_madvise"]),
    // SYS_PACCT
    (20, &["acct"]),
    // SYS_ADMIN
    (
        21,
        &[
            "bpf",
            "clone3",
            "fanotify_init",
            "fsconfig",
            "fsmount",
            "fsopen",
            "fspick",
            "lookup_dcookie",
            "lsm_get_self_attr",
            "lsm_list_modules",
            "lsm_set_self_attr",
            "mount",
            "mount_setattr",
            "move_mount",
            "open_tree",
            "perf_event_open",
            "quotactl",
            "quotactl_fd",
            "setdomainname",
            "sethostname",
            "setns",
            "syslog",
            "umount",
            "umount2",
            "unshare",
        ],
    ),
    // SYS_BOOT
    (22, &["reboot"]),
    // SYS_NICE
    (
        23,
        &[
            "get_mempolicy",
            "mbind",
            "set_mempolicy",
            "set_mempolicy_home_node",
        ],
    ),
    // SYS_TIME
    (25, &["clock_settime", "clock_settime64", "settimeofday", "stime"]),
    // SYS_TTY_CONFIG
    (26, &["vhangup"]),
    // SYSLOG
    (34, &["syslog"]),
    // PERFMON
    (38, &["perf_event_open"]),
    // BPF
    (39, &["bpf"]),
];

const SYS_ADMIN: u32 = 21;
/// `clone`'s flags for new namespaces.
const NEW_NAMESPACES: u64 = 0x7e02_0000;
/// AF_VSOCK: the host, and the agent.
const VSOCK: u64 = 40;
/// What `personality` may set: the default, PER_LINUX32, each with UNAME26; and asking.
const PERSONALITIES: [u64; 5] = [0x0, 0x8, 0x2_0000, 0x2_0008, 0xffff_ffff];

fn when(argument: u8, comparison: Comparison, value: u64) -> Vec<Condition> {
    vec![Condition {
        argument,
        comparison,
        value,
    }]
}

/// The profile for a container with these capabilities in its bounding set.
pub(super) fn profile(bounding: u64) -> Profile {
    let has = |capability: u32| bounding & (1 << capability) != 0;
    let refused = |name: &str| {
        let mut openers = OPENED_BY
            .iter()
            .filter(|(_, names)| names.contains(&name))
            .peekable();
        NEVER.contains(&name) && openers.peek().is_none()
            || openers.peek().is_some() && !openers.any(|(capability, _)| has(*capability))
    };
    let mut profile = Profile::new(action::ERRNO | action::EPERM);
    let mut add = |name: &str, conditions, action| profile.add(name, Rule { conditions, action });
    for (name, _) in syscalls::X86_64.iter().chain(&syscalls::I386) {
        match *name {
            "clone3" if refused(name) => add(name, Vec::new(), action::ERRNO | action::ENOSYS),
            "clone" if !has(SYS_ADMIN) => {
                let none = Comparison::MaskedEqual { mask: NEW_NAMESPACES };
                add(name, when(0, none, 0), action::ALLOW);
            }
            "socket" => {
                add(name, when(0, Comparison::Less, VSOCK), action::ALLOW);
                add(name, when(0, Comparison::Greater, VSOCK), action::ALLOW);
            }
            "personality" => {
                for value in PERSONALITIES {
                    add(name, when(0, Comparison::Equal, value), action::ALLOW);
                }
            }
            name if refused(name) => {}
            name => add(name, Vec::new(), action::ALLOW),
        }
    }
    profile
}
