//! config.md, "POSIX process": `rlimits`.

use anyhow::{Result, ensure};
use serde_json::json;

use super::equal;
use crate::case::{Case, must};
use crate::world::World;

const POSIX: &str = "config.md#posix-process";

/// Every limit getrlimit(2) of Linux has, with values below what a host allows (and above what the probe needs).
const LIMITS: &[(&str, u64, u64)] = &[
    ("RLIMIT_AS", 1 << 33, 1 << 34),
    ("RLIMIT_CORE", 4096, 8192),
    ("RLIMIT_CPU", 1000, 2000),
    ("RLIMIT_DATA", 1 << 30, 1 << 31),
    ("RLIMIT_FSIZE", 1 << 30, 1 << 31),
    ("RLIMIT_LOCKS", 100, 200),
    ("RLIMIT_MEMLOCK", 32768, 65536),
    ("RLIMIT_MSGQUEUE", 100_000, 200_000),
    ("RLIMIT_NICE", 0, 0),
    ("RLIMIT_NOFILE", 512, 1024),
    ("RLIMIT_NPROC", 500, 1000),
    ("RLIMIT_RSS", 1 << 30, 1 << 31),
    ("RLIMIT_RTPRIO", 0, 0),
    ("RLIMIT_RTTIME", 100_000, 200_000),
    ("RLIMIT_SIGPENDING", 100, 200),
    ("RLIMIT_STACK", 1 << 22, 1 << 23),
];

pub fn cases() -> Vec<Case> {
    let mut cases: Vec<Case> = LIMITS
        .iter()
        .map(|&(name, soft, hard)| {
            must(
                format!("rlimits.{}", name.to_lowercase()),
                POSIX,
                "rlim.rlim_cur MUST match the configured value (soft); rlim.rlim_max MUST match the configured value (hard)",
                move |world| one(world, name, soft, hard),
            )
        })
        .collect();
    cases.extend([
        must("rlimits.several_at_once", POSIX, "For each entry in rlimits, a getrlimit(3) on type MUST succeed", |world| {
            let mut bundle = world.bundle()?;
            bundle.set("/process/rlimits", json!([
                {"type": "RLIMIT_NOFILE", "soft": 100, "hard": 200}, {"type": "RLIMIT_CORE", "soft": 0, "hard": 0},
            ]));
            let limits = world.report(&mut bundle)?["rlimits"].clone();
            equal("RLIMIT_NOFILE", limits["RLIMIT_NOFILE"].clone(), json!([100, 200]))?;
            equal("RLIMIT_CORE", limits["RLIMIT_CORE"].clone(), json!([0, 0]))
        }),
        must("rlimits.of_another_user", POSIX, "rlim.rlim_cur MUST match the configured value (soft)", |world| {
            let mut bundle = world.bundle()?;
            bundle.set("/process/user", json!({"uid": 1000, "gid": 1000}));
            bundle.set("/process/rlimits", json!([{"type": "RLIMIT_NOFILE", "soft": 100, "hard": 200}]));
            equal("RLIMIT_NOFILE", world.report(&mut bundle)?["rlimits"]["RLIMIT_NOFILE"].clone(), json!([100, 200]))
        }),
        must("rlimits.unknown_type_is_an_error", POSIX,
            "The runtime MUST generate an error for any values which cannot be mapped to a relevant kernel interface",
            |world| {
                let mut bundle = world.bundle()?;
                bundle.set("/process/rlimits", json!([{"type": "RLIMIT_NONSENSE", "soft": 1, "hard": 1}]));
                world.refused(&bundle).map(drop)
            }),
        must("rlimits.duplicates_are_an_error", POSIX,
            "If rlimits contains duplicated entries with same type, the runtime MUST generate an error",
            |world| {
                let mut bundle = world.bundle()?;
                let entry = json!({"type": "RLIMIT_NOFILE", "soft": 100, "hard": 200});
                bundle.set("/process/rlimits", json!([entry, entry]));
                world.refused(&bundle).map(drop)
            }),
        must("rlimits.soft_above_hard_is_an_error", "config.md#valid-values",
            "Runtimes MUST generate an error when invalid or unsupported values are encountered",
            |world| {
                let mut bundle = world.bundle()?;
                bundle.set("/process/rlimits", json!([{"type": "RLIMIT_NOFILE", "soft": 200, "hard": 100}]));
                world.refused(&bundle).map(drop)
            }),
        must("rlimits.take_effect", POSIX, "soft: the value of the limit enforced for the corresponding resource", |world| {
            let mut bundle = world.bundle()?;
            bundle.set("/process/rlimits", json!([{"type": "RLIMIT_FSIZE", "soft": 1 << 20, "hard": 1 << 20}]));
            bundle.mount("/data", "tmpfs", "tmpfs", &[]);
            bundle.shell("exec busybox dd if=/dev/zero of=/data/file bs=1M count=2");
            let container = world.create(&bundle)?;
            container.start()?;
            let ended = container.wait_stopped()?;
            let limited = !matches!(ended, nix::sys::wait::WaitStatus::Exited(_, 0)) || !container.stderr().is_empty();
            ensure!(limited, "the file could be written");
            Ok(())
        }),
    ]);
    cases
}

fn one(world: &World<'_>, name: &str, soft: u64, hard: u64) -> Result<()> {
    let mut bundle = world.bundle()?;
    bundle.set(
        "/process/rlimits",
        json!([{"type": name, "soft": soft, "hard": hard}]),
    );
    equal(
        name,
        world.report(&mut bundle)?["rlimits"][name].clone(),
        json!([soft, hard]),
    )
}
