//! Which system calls a container may make: docker's default profile, or one in docker's or runc's JSON format,
//! as the program that the agent installs in the guest.
//!
//! The program is made on the host, so that the guest needs neither a parser nor a table of names. It covers
//! 64-bit and 32-bit calls. A call that is newer than everything the profile knows is answered with `ENOSYS`, so
//! that a C library falls back to an older one, as runc does it.
//!
//! `docs/adr/0007-seccomp-and-devices.md` says why the compiler is our own.

mod bpf;
mod default_profile;
mod oci;
mod profile;
mod syscalls;

use bpf::{Decision, Table};
pub(crate) use oci::oci_programs;

use crate::{Result, SandboxError, confinement::SeccompSpec};
use profile::Profile;

const AUDIT_ARCH_X86_64: u32 = 0xc000_003e;
const AUDIT_ARCH_I386: u32 = 0x4000_0003;
/// Kernel version of the guest, for rules that ask for one.
const KERNEL: (u32, u32) = (6, 12);

/// What a filter returns.
mod action {
    pub const KILL_PROCESS: u32 = 0x8000_0000;
    pub const KILL_THREAD: u32 = 0;
    pub const TRAP: u32 = 0x0003_0000;
    pub const ERRNO: u32 = 0x0005_0000;
    pub const TRACE: u32 = 0x7ff0_0000;
    pub const LOG: u32 = 0x7ffc_0000;
    pub const ALLOW: u32 = 0x7fff_0000;
    pub const EPERM: u32 = 1;
    pub const ENOSYS: u32 = 38;
}

/// The programs for a container with these capabilities in its bounding set (bit n being capability n).
///
/// # Errors
///
/// The profile can't be understood; says what.
pub(crate) fn programs(spec: &SeccompSpec, bounding: u64) -> Result<Vec<Vec<u8>>> {
    let profile = match spec {
        SeccompSpec::Unconfined => return Ok(Vec::new()),
        SeccompSpec::Default => default_profile::profile(bounding),
        SeccompSpec::Profile(text) => {
            Profile::parse(text, bounding).map_err(|problem| SandboxError::InvalidOption {
                option: "--security-opt",
                problem: format!("the seccomp profile {problem}"),
            })?
        }
    };
    let program = profile.compile();
    Ok(vec![bpf::bytes(&program)])
}

impl Profile {
    fn compile(&self) -> Vec<bpf::Instruction> {
        let tables = [
            self.table(AUDIT_ARCH_X86_64, &syscalls::X86_64),
            self.table(AUDIT_ARCH_I386, &syscalls::I386),
        ];
        bpf::compile(&tables, action::KILL_PROCESS)
    }

    fn table(&self, architecture: u32, names: &[(&str, u32)]) -> Table {
        Table {
            architecture,
            ranges: self.ranges(names),
        }
    }

    /// What is decided for each number, equal neighbours as one range.
    fn ranges(&self, names: &[(&str, u32)]) -> Vec<(u32, Decision)> {
        let mut numbered: Vec<(u32, &str)> = names.iter().map(|(name, number)| (*number, *name)).collect();
        numbered.sort_unstable();
        let plain = |otherwise| Decision {
            rules: Vec::new(),
            otherwise,
        };
        let newest = numbered
            .iter()
            .rev()
            .find(|(_, name)| self.knows(name))
            .map_or(0, |(number, _)| *number);
        // Unless newer calls are allowed, they are to look as on an older kernel.
        let refuses = self.default_action & 0xffff_0000 == action::ERRNO;
        let beyond = if refuses {
            action::ERRNO | action::ENOSYS
        } else {
            self.default_action
        };
        let mut ranges: Vec<(u32, Decision)> = Vec::new();
        let mut push = |number: u32, decision: Decision| match ranges.last() {
            Some((_, last)) if *last == decision => {}
            _ => ranges.push((number, decision)),
        };
        push(0, plain(self.default_action));
        let mut next = 0;
        for (number, name) in numbered.into_iter().take_while(|(number, _)| *number <= newest) {
            if number > next {
                push(next, plain(self.default_action));
            }
            push(number, self.decide(name));
            next = number + 1;
        }
        push(next, plain(beyond));
        // Numbers of the x32 ABI, which the guest kernel doesn't have, are beyond everything.
        ranges
    }
}

#[cfg(test)]
mod tests {
    use super::{bpf::machine, *};

    const DEFAULT_CAPABILITIES: u64 = 0xa804_25fb;
    const SYS_ADMIN: u64 = 1 << 21;

    fn number(name: &str) -> u32 {
        let find = syscalls::X86_64.binary_search_by(|(known, _)| known.cmp(&name));
        syscalls::X86_64[find.unwrap()].1
    }

    fn verdict(profile: &Profile, name: &str, arguments: [u64; 6]) -> u32 {
        machine::run(&profile.compile(), AUDIT_ARCH_X86_64, number(name), arguments)
    }

    const EPERM: u32 = action::ERRNO | action::EPERM;
    const ENOSYS: u32 = action::ERRNO | action::ENOSYS;

    #[test]
    fn default_profile_decides_as_dockers() {
        let profile = default_profile::profile(DEFAULT_CAPABILITIES);
        let verdict = |name, arguments| verdict(&profile, name, arguments);
        for name in [
            "read",
            "execve",
            "chroot",
            "ptrace",
            "memfd_create",
            "mknod",
            "setuid",
            "statx",
            "fork",
        ] {
            assert_eq!(verdict(name, [0; 6]), action::ALLOW, "{name}");
        }
        for name in [
            "mount",
            "bpf",
            "setns",
            "unshare",
            "kexec_load",
            "keyctl",
            "io_uring_setup",
            "reboot",
            "init_module",
            "open_by_handle_at",
            "perf_event_open",
            "swapon",
            "clock_settime",
            "userfaultfd",
        ] {
            assert_eq!(verdict(name, [0; 6]), EPERM, "{name}");
        }
        assert_eq!(verdict("clone3", [0; 6]), ENOSYS);
        // A thread, and a new user namespace.
        assert_eq!(verdict("clone", [0x3d_0f00, 0, 0, 0, 0, 0]), action::ALLOW);
        assert_eq!(verdict("clone", [0x1000_0000, 0, 0, 0, 0, 0]), EPERM);
        // Of the families of sockets only vsock.
        assert_eq!(verdict("socket", [2, 1, 0, 0, 0, 0]), action::ALLOW);
        assert_eq!(verdict("socket", [16, 3, 0, 0, 0, 0]), action::ALLOW);
        assert_eq!(verdict("socket", [40, 1, 0, 0, 0, 0]), EPERM);
        assert_eq!(verdict("personality", [8, 0, 0, 0, 0, 0]), action::ALLOW);
        assert_eq!(verdict("personality", [0x40_0000, 0, 0, 0, 0, 0]), EPERM);
    }

    #[test]
    fn capability_opens_the_calls_it_is_for() {
        let profile = default_profile::profile(DEFAULT_CAPABILITIES | SYS_ADMIN);
        for name in ["mount", "setns", "unshare", "clone3"] {
            assert_eq!(verdict(&profile, name, [0; 6]), action::ALLOW, "{name}");
        }
        assert_eq!(
            verdict(&profile, "clone", [0x1000_0000, 0, 0, 0, 0, 0]),
            action::ALLOW
        );
        assert_eq!(verdict(&profile, "init_module", [0; 6]), EPERM);
    }

    #[test]
    fn unknown_calls_look_as_on_an_older_kernel_and_other_architectures_are_refused() {
        let program = default_profile::profile(0).compile();
        for number in [463, 5000, 0x4000_0000] {
            assert_eq!(
                machine::run(&program, AUDIT_ARCH_X86_64, number, [0; 6]),
                ENOSYS,
                "{number}"
            );
        }
        assert_eq!(
            machine::run(&program, 0xc000_00b7, 0, [0; 6]),
            action::KILL_PROCESS
        );
        // 32-bit: read is 3, mount is 21.
        assert_eq!(machine::run(&program, AUDIT_ARCH_I386, 3, [0; 6]), action::ALLOW);
        assert_eq!(machine::run(&program, AUDIT_ARCH_I386, 21, [0; 6]), EPERM);
    }

    #[test]
    fn default_profile_is_one_short_program() {
        let programs = programs(&SeccompSpec::Default, DEFAULT_CAPABILITIES).unwrap();
        assert_eq!(programs.len(), 1);
        assert!(
            programs[0].len() / 8 < 600,
            "{} instructions",
            programs[0].len() / 8
        );
    }

    #[test]
    fn profile_in_dockers_format_is_followed() {
        let text = r#"{
            "defaultAction": "SCMP_ACT_ALLOW",
            "architectures": ["SCMP_ARCH_X86_64"],
            "syscalls": [
                {"names": ["mkdir", "no_such_call"], "action": "SCMP_ACT_ERRNO", "errnoRet": 30},
                {"name": "chmod", "action": "SCMP_ACT_KILL"},
                {"names": ["kill"], "action": "SCMP_ACT_ERRNO",
                 "args": [{"index": 1, "value": 9, "op": "SCMP_CMP_EQ"}]},
                {"names": ["chown"], "action": "SCMP_ACT_ERRNO", "includes": {"caps": ["CAP_SYS_ADMIN"]}},
                {"names": ["rmdir"], "action": "SCMP_ACT_ERRNO", "excludes": {"caps": ["CAP_SYS_ADMIN"]}}
            ]}"#;
        let profile = Profile::parse(text, DEFAULT_CAPABILITIES).unwrap();
        let verdict = |name, arguments| verdict(&profile, name, arguments);
        assert_eq!(verdict("mkdir", [0; 6]), action::ERRNO | 30);
        assert_eq!(verdict("chmod", [0; 6]), action::KILL_THREAD);
        assert_eq!(verdict("kill", [1, 9, 0, 0, 0, 0]), EPERM);
        assert_eq!(verdict("kill", [1, 15, 0, 0, 0, 0]), action::ALLOW);
        assert_eq!(verdict("chown", [0; 6]), action::ALLOW);
        assert_eq!(verdict("rmdir", [0; 6]), EPERM);
        assert_eq!(verdict("read", [0; 6]), action::ALLOW);
    }

    #[test]
    fn profile_that_makes_no_sense_is_refused_with_what_is_wrong() {
        for (text, word) in [
            ("{", "JSON"),
            (r#"{"defaultAction": "SCMP_ACT_MAYBE"}"#, "SCMP_ACT_MAYBE"),
            (
                r#"{"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"names": ["kill"], "action": "SCMP_ACT_ERRNO",
                    "args": [{"index": 6, "value": 0, "op": "SCMP_CMP_EQ"}]}]}"#,
                "index",
            ),
            (r#"{"defaultAction": "SCMP_ACT_NOTIFY"}"#, "SCMP_ACT_NOTIFY"),
        ] {
            let error = programs(&SeccompSpec::Profile(text.into()), 0).unwrap_err();
            assert!(error.to_string().contains(word), "{error}");
        }
    }

    proptest::proptest! {
        #[test]
        fn no_text_makes_the_parser_panic(text in ".{0,200}") {
            let _ = programs(&SeccompSpec::Profile(text), 0);
        }
    }
}
