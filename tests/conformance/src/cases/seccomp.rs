//! config-linux.md, "Seccomp".

use anyhow::{Context, Result, ensure};
use nix::errno::Errno;
use serde_json::{Value, json};

use super::{equal, status_line};
use crate::bundle::Bundle;
use crate::case::{Case, must};
use crate::world::World;

const SECCOMP: &str = "config-linux.md#seccomp";
/// `acct(NULL)`: harmless, and EPERM without CAP_SYS_PACCT.
const ACCT: &str = "163";
/// `dup(fd)`: EBADF for descriptors that are not there, whatever the number.
const DUP: &str = "32";
const SIGSYS: i64 = 31;

/// What the probe and the last steps of a runtime take.
const ENOUGH: &[&str] = &[
    "access",
    "arch_prctl",
    "brk",
    "capget",
    "capset",
    "chdir",
    "clock_gettime",
    "clone",
    "clone3",
    "close",
    "close_range",
    "dup",
    "dup2",
    "dup3",
    "epoll_create1",
    "epoll_ctl",
    "epoll_pwait",
    "epoll_wait",
    "eventfd2",
    "execve",
    "execveat",
    "exit",
    "exit_group",
    "faccessat",
    "faccessat2",
    "fchdir",
    "fchown",
    "fcntl",
    "fork",
    "fstat",
    "fstatfs",
    "futex",
    "getcwd",
    "getdents64",
    "getegid",
    "geteuid",
    "getgid",
    "getgroups",
    "getpid",
    "getppid",
    "getpgrp",
    "getpgid",
    "getrandom",
    "getrlimit",
    "getsid",
    "gettid",
    "getuid",
    "ioctl",
    "kill",
    "lseek",
    "madvise",
    "memfd_create",
    "mkdirat",
    "mmap",
    "mprotect",
    "mremap",
    "munmap",
    "nanosleep",
    "newfstatat",
    "open",
    "openat",
    "openat2",
    "pipe",
    "pipe2",
    "poll",
    "ppoll",
    "prctl",
    "pread64",
    "prlimit64",
    "read",
    "readlink",
    "readlinkat",
    "restart_syscall",
    "rseq",
    "rt_sigaction",
    "rt_sigprocmask",
    "rt_sigreturn",
    "sched_getaffinity",
    "sched_yield",
    "sendmsg",
    "sendto",
    "recvmsg",
    "recvfrom",
    "set_robust_list",
    "set_tid_address",
    "setgid",
    "setgroups",
    "setresgid",
    "setresuid",
    "setsid",
    "setuid",
    "sigaltstack",
    "socket",
    "connect",
    "stat",
    "statfs",
    "statx",
    "sysinfo",
    "tgkill",
    "umask",
    "uname",
    "unlinkat",
    "vfork",
    "wait4",
    "waitid",
    "write",
    "writev",
    "seccomp",
];

pub fn cases() -> Vec<Case> {
    let mut cases = vec![
        must(
            "seccomp.errno_is_eperm_by_default",
            SECCOMP,
            "errnoRet: if not specified its default value is EPERM",
            |world| {
                denied(
                    world,
                    &json!({"action": "SCMP_ACT_ERRNO"}),
                    Errno::EPERM as i64,
                    0,
                )
            },
        ),
        must(
            "seccomp.errno_ret",
            SECCOMP,
            "errnoRet: the errno return code to use",
            |world| denied(world, &json!({"action": "SCMP_ACT_ERRNO", "errnoRet": 95}), 95, 0),
        ),
        must(
            "seccomp.default_action_errno",
            SECCOMP,
            "defaultAction: the default action for seccomp",
            |world| default_action(world, None, Errno::EPERM as i64),
        ),
        must(
            "seccomp.default_errno_ret",
            SECCOMP,
            "defaultErrnoRet: the errno return code to use",
            |world| default_action(world, Some(77), 77),
        ),
        must(
            "seccomp.kill_process",
            SECCOMP,
            "SCMP_ACT_KILL_PROCESS",
            |world| denied(world, &json!({"action": "SCMP_ACT_KILL_PROCESS"}), -1, SIGSYS),
        ),
        must("seccomp.kill_thread", SECCOMP, "SCMP_ACT_KILL_THREAD", |world| {
            denied(world, &json!({"action": "SCMP_ACT_KILL_THREAD"}), -1, SIGSYS)
        }),
        must("seccomp.kill", SECCOMP, "SCMP_ACT_KILL", |world| {
            denied(world, &json!({"action": "SCMP_ACT_KILL"}), -1, SIGSYS)
        }),
        must("seccomp.trap", SECCOMP, "SCMP_ACT_TRAP", |world| {
            denied(world, &json!({"action": "SCMP_ACT_TRAP"}), -1, SIGSYS)
        }),
        must(
            "seccomp.trace_without_tracer",
            SECCOMP,
            "SCMP_ACT_TRACE",
            |world| {
                denied(
                    world,
                    &json!({"action": "SCMP_ACT_TRACE"}),
                    Errno::ENOSYS as i64,
                    0,
                )
            },
        ),
        must("seccomp.log_allows", SECCOMP, "SCMP_ACT_LOG", |world| {
            let mut bundle = with(world, &json!([{"names": ["dup"], "action": "SCMP_ACT_LOG"}]))?;
            // What the call itself says.
            let lines = world.probe(&mut bundle, &["syscall", DUP, "777", "."])?;
            equal("the error", lines[0]["errno"].clone(), Errno::EBADF as i64)
        }),
        must(
            "seccomp.several_names_in_one_entry",
            SECCOMP,
            "names (array of strings, REQUIRED): the names of the syscalls",
            |world| {
                let mut bundle = with(
                    world,
                    &json!([{"names": ["acct", "dup", "getcwd"], "action": "SCMP_ACT_ERRNO", "errnoRet": 95}]),
                )?;
                let lines = world.probe(
                    &mut bundle,
                    &["syscall", ACCT, "0", ".", "syscall", DUP, "777", "."],
                )?;
                equal("acct", lines[0]["errno"].clone(), 95)?;
                equal("dup", lines[1]["errno"].clone(), 95)
            },
        ),
        must(
            "seccomp.empty_names_are_an_error",
            SECCOMP,
            "names MUST contain at least one entry",
            |world| {
                let bundle = with(world, &json!([{"names": [], "action": "SCMP_ACT_ERRNO"}]))?;
                world.refused(&bundle).map(drop)
            },
        ),
        must(
            "seccomp.unknown_names_are_no_failure",
            SECCOMP,
            "as runc does: profiles list calls of newer kernels",
            |world| {
                let mut bundle = with(
                    world,
                    &json!([{"names": ["acct", "no_such_call"], "action": "SCMP_ACT_ERRNO", "errnoRet": 95}]),
                )?;
                equal(
                    "acct",
                    world.probe(&mut bundle, &["syscall", ACCT, "0", "."])?[0]["errno"].clone(),
                    95,
                )
            },
        )
        .practice(),
        must(
            "seccomp.several_conditions_must_all_hold",
            SECCOMP,
            "args: the specific syscall in seccomp",
            |world| {
                // lseek(fd, offset, whence)
                let mut bundle = with(
                    world,
                    &json!([{
                        "names": ["lseek"], "action": "SCMP_ACT_ERRNO", "errnoRet": 95,
                        "args": [{"index": 0, "value": 777, "op": "SCMP_CMP_EQ"}, {"index": 1, "value": 5, "op": "SCMP_CMP_EQ"}],
                    }]),
                )?;
                let lines = world.probe(
                    &mut bundle,
                    &[
                        "syscall", "8", "777", "5", "0", ".", "syscall", "8", "777", "6", "0", ".",
                    ],
                )?;
                equal("both hold", lines[0]["errno"].clone(), 95)?;
                equal("one holds", lines[1]["errno"].clone(), Errno::EBADF as i64)
            },
        ),
        must(
            "seccomp.is_on",
            SECCOMP,
            "Seccomp configuration allows one to configure actions to take for matched syscalls",
            |world| {
                let mut bundle = with(world, &json!([{"names": ["acct"], "action": "SCMP_ACT_ERRNO"}]))?;
                equal(
                    "Seccomp",
                    status_line(&world.report(&mut bundle)?, "Seccomp")?,
                    "2",
                )
            },
        ),
        must(
            "seccomp.is_off_without",
            SECCOMP,
            "seccomp (object, OPTIONAL)",
            |world| {
                let report = world.report(&mut world.bundle()?)?;
                equal("Seccomp", status_line(&report, "Seccomp")?, "0")
            },
        ),
        must(
            "seccomp.works_without_no_new_privileges",
            SECCOMP,
            "Seccomp configuration allows one to configure actions to take for matched syscalls",
            |world| {
                let mut bundle = with(
                    world,
                    &json!([{"names": ["acct"], "action": "SCMP_ACT_ERRNO", "errnoRet": 95}]),
                )?;
                bundle
                    .set("/process/noNewPrivileges", json!(false))
                    .set("/process/user", json!({"uid": 1000, "gid": 1000}));
                equal(
                    "acct",
                    world.probe(&mut bundle, &["syscall", ACCT, "0", "."])?[0]["errno"].clone(),
                    95,
                )
            },
        ),
        must(
            "seccomp.errno_of_an_action_without_is_an_error",
            SECCOMP,
            "When the action doesn't support an errno, the runtime MUST print an error and fail",
            |world| {
                let bundle = with(
                    world,
                    &json!([{"names": ["acct"], "action": "SCMP_ACT_KILL", "errnoRet": 95}]),
                )?;
                world.refused(&bundle).map(drop)
            },
        ),
        must(
            "seccomp.metadata_without_listener_is_an_error",
            SECCOMP,
            "listenerMetadata: this field MUST NOT be set if listenerPath is not set",
            |world| {
                let mut bundle = with(world, &json!([{"names": ["acct"], "action": "SCMP_ACT_ERRNO"}]))?;
                bundle.set("/linux/seccomp/listenerMetadata", json!("x"));
                world.refused(&bundle).map(drop)
            },
        ),
        must(
            "seccomp.notify_without_anybody_listening_is_an_error",
            SECCOMP,
            "listenerPath: if sending to this socket fails, the runtime MUST generate an error",
            |world| {
                let mut bundle = with(world, &json!([{"names": ["acct"], "action": "SCMP_ACT_NOTIFY"}]))?;
                bundle.set(
                    "/linux/seccomp/listenerPath",
                    json!(world.path().join("nobody.sock")),
                );
                world.refused(&bundle).map(drop)
            },
        ),
    ];
    for (name, field, value) in [
        (
            "seccomp.unknown_default_action_is_an_error",
            "/linux/seccomp/defaultAction",
            json!("SCMP_ACT_SHRUG"),
        ),
        (
            "seccomp.unknown_action_is_an_error",
            "/linux/seccomp/syscalls/0/action",
            json!("SCMP_ACT_SHRUG"),
        ),
        (
            "seccomp.unknown_architecture_is_an_error",
            "/linux/seccomp/architectures",
            json!(["SCMP_ARCH_VAX"]),
        ),
        (
            "seccomp.unknown_flag_is_an_error",
            "/linux/seccomp/flags",
            json!(["SECCOMP_FILTER_FLAG_NONSENSE"]),
        ),
        (
            "seccomp.unknown_operator_is_an_error",
            "/linux/seccomp/syscalls/0/args",
            json!([{"index": 0, "value": 1, "op": "SCMP_CMP_ROUGHLY"}]),
        ),
        (
            "seccomp.argument_that_no_call_has_is_an_error",
            "/linux/seccomp/syscalls/0/args",
            json!([{"index": 6, "value": 1, "op": "SCMP_CMP_EQ"}]),
        ),
    ] {
        cases.push(must(
            name,
            "config.md#valid-values",
            "Runtimes MUST generate an error when invalid or unsupported values are encountered",
            move |world| {
                let mut bundle = with(world, &json!([{"names": ["acct"], "action": "SCMP_ACT_ERRNO"}]))?;
                bundle.set(field, value.clone());
                world.refused(&bundle).map(drop)
            },
        ));
    }
    for flag in [
        "SECCOMP_FILTER_FLAG_LOG",
        "SECCOMP_FILTER_FLAG_SPEC_ALLOW",
        "SECCOMP_FILTER_FLAG_TSYNC",
    ] {
        let name = flag.trim_start_matches("SECCOMP_FILTER_FLAG_").to_lowercase();
        cases.push(must(
            format!("seccomp.flag_{name}"),
            SECCOMP,
            format!("flags: list of flags to use with seccomp(2): {flag}"),
            move |world| {
                let mut bundle = with(
                    world,
                    &json!([{"names": ["acct"], "action": "SCMP_ACT_ERRNO", "errnoRet": 95}]),
                )?;
                bundle.set("/linux/seccomp/flags", json!([flag]));
                equal(
                    "acct",
                    world.probe(&mut bundle, &["syscall", ACCT, "0", "."])?[0]["errno"].clone(),
                    95,
                )
            },
        ));
    }
    // dup(777) against a condition on its argument: whether the filter or the kernel answers.
    for (op, value, second, hit) in [
        ("NE", 777, 0, false),
        ("NE", 778, 0, true),
        ("LT", 777, 0, false),
        ("LT", 778, 0, true),
        ("LE", 776, 0, false),
        ("LE", 777, 0, true),
        ("EQ", 776, 0, false),
        ("EQ", 777, 0, true),
        ("GE", 778, 0, false),
        ("GE", 777, 0, true),
        ("GT", 777, 0, false),
        ("GT", 776, 0, true),
        // 777 & 0x300 is 0x300: `value` is the mask, `valueTwo` what it has to leave.
        ("MASKED_EQ", 0x300, 0x100, false),
        ("MASKED_EQ", 0x300, 0x300, true),
    ] {
        let word = if hit { "holds" } else { "does_not_hold" };
        cases.push(must(
            format!("seccomp.{}_{value}_{word}", op.to_lowercase()),
            SECCOMP,
            format!("op: the operator for syscall arguments in seccomp: SCMP_CMP_{op}"),
            move |world| {
                let mut bundle = with(world, &json!([{
                    "names": ["dup"], "action": "SCMP_ACT_ERRNO", "errnoRet": 95,
                    "args": [{"index": 0, "value": value, "valueTwo": second, "op": format!("SCMP_CMP_{op}")}],
                }]))?;
                let wanted = if hit { 95 } else { Errno::EBADF as i64 };
                equal("the error", world.probe(&mut bundle, &["syscall", DUP, "777", "."])?[0]["errno"].clone(), wanted)
            },
        ));
    }
    // One name for the two of this operator.
    for (at, case) in cases
        .iter_mut()
        .filter(|case| case.name.contains("masked_eq"))
        .enumerate()
    {
        case.name = format!("seccomp.masked_eq_{}", ["does_not_hold", "holds"][at]);
    }
    cases
}

/// A bundle with these entries of a filter that allows the rest.
fn with(world: &World<'_>, entries: &Value) -> Result<Bundle> {
    let mut bundle = world.bundle()?;
    bundle.set(
        "/linux/seccomp",
        json!({
            "defaultAction": "SCMP_ACT_ALLOW", "architectures": ["SCMP_ARCH_X86_64"], "syscalls": entries,
        }),
    );
    Ok(bundle)
}

/// `acct` under an entry: the error it gives, and the signal its caller gets.
fn denied(world: &World<'_>, entry: &Value, error: i64, signal: i64) -> Result<()> {
    let mut entry = entry.clone();
    entry["names"] = json!(["acct"]);
    let mut bundle = with(world, &json!([entry]))?;
    let lines = world.probe(
        &mut bundle,
        &["syscall", ACCT, "0", ".", "syscall", DUP, "777", "."],
    )?;
    equal("the error", lines[0]["errno"].clone(), error)?;
    equal("the signal", lines[0]["signal"].clone(), signal)?;
    equal(
        "the error of another call",
        lines[1]["errno"].clone(),
        Errno::EBADF as i64,
    )
}

fn default_action(world: &World<'_>, number: Option<u32>, wanted: i64) -> Result<()> {
    let mut bundle = with(world, &json!([{"names": ENOUGH, "action": "SCMP_ACT_ALLOW"}]))?;
    bundle.set("/linux/seccomp/defaultAction", json!("SCMP_ACT_ERRNO"));
    if let Some(number) = number {
        bundle.set("/linux/seccomp/defaultErrnoRet", json!(number));
    }
    // getpriority(0, 0) works, and is not on the list.
    let lines = world.probe(
        &mut bundle,
        &["syscall", "140", "0", "0", ".", "syscall", DUP, "777", "."],
    )?;
    let first = lines.first().context("the process printed nothing")?;
    equal(
        "the error of a call that is not listed",
        first["errno"].clone(),
        wanted,
    )?;
    ensure!(
        lines[1]["errno"] == Errno::EBADF as i64,
        "a listed call gave {}",
        lines[1]["errno"]
    );
    Ok(())
}
