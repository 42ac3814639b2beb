//! config-linux.md: "Masked Paths", "Readonly Paths", "Sysctl", "Personality".

use std::fs;

use anyhow::ensure;
use nix::errno::Errno;
use serde_json::json;

use super::{equal, failed_with, worked};
use crate::case::{Case, must};

const MASKED: &str = "config-linux.md#masked-paths";
const READONLY: &str = "config-linux.md#readonly-paths";
const SYSCTL: &str = "config-linux.md#sysctl";
const PERSONALITY: &str = "config-linux.md#personality";

pub fn cases() -> Vec<Case> {
    vec![
        must(
            "masked_paths.a_file_cannot_be_read",
            MASKED,
            "maskedPaths will mask over the provided paths inside the container so that they cannot be read",
            |world| {
                let mut bundle = world.bundle()?;
                fs::write(bundle.rootfs("etc/secret"), "a secret")?;
                bundle.set("/linux/maskedPaths", json!(["/etc/secret"]));
                let found = world.probe(&mut bundle, &["read", "/etc/secret"])?.remove(0);
                ensure!(
                    found["data"] == "" || found["errno"] != 0,
                    "it reads {}",
                    found["data"]
                );
                Ok(())
            },
        ),
        must(
            "masked_paths.a_folder_cannot_be_read",
            MASKED,
            "maskedPaths will mask over the provided paths inside the container so that they cannot be read",
            |world| {
                let mut bundle = world.bundle()?;
                fs::create_dir(bundle.rootfs("secrets"))?;
                fs::write(bundle.rootfs("secrets/one"), "a secret")?;
                bundle.set("/linux/maskedPaths", json!(["/secrets"]));
                let lines = world.probe(&mut bundle, &["read", "/secrets/one", "list", "/secrets"])?;
                failed_with(&lines[0], &[Errno::ENOENT, Errno::EACCES])?;
                equal("what is in it", lines[1]["names"].clone(), json!([]))
            },
        ),
        must(
            "masked_paths.of_proc",
            MASKED,
            "maskedPaths will mask over the provided paths inside the container so that they cannot be read",
            |world| {
                let mut bundle = world.bundle()?;
                bundle.set(
                    "/linux/maskedPaths",
                    json!(["/proc/interrupts", "/proc/fs", "/sys/firmware"]),
                );
                let lines = world.probe(
                    &mut bundle,
                    &[
                        "read",
                        "/proc/interrupts",
                        "list",
                        "/proc/fs",
                        "list",
                        "/sys/firmware",
                    ],
                )?;
                equal("/proc/interrupts", lines[0]["data"].clone(), "")?;
                equal("/proc/fs", lines[1]["names"].clone(), json!([]))?;
                equal("/sys/firmware", lines[2]["names"].clone(), json!([]))
            },
        ),
        must(
            "masked_paths.cannot_be_written",
            MASKED,
            "maskedPaths will mask over the provided paths inside the container",
            |world| {
                let mut bundle = world.bundle()?;
                fs::create_dir(bundle.rootfs("secrets"))?;
                fs::write(bundle.rootfs("etc/secret"), "a secret")?;
                bundle.set("/linux/maskedPaths", json!(["/secrets", "/etc/secret"]));
                let lines = world.probe(
                    &mut bundle,
                    &["write", "/secrets/new", "x", "put", "/etc/secret", "x"],
                )?;
                ensure!(lines[0]["errno"] != 0, "a masked folder could be written to");
                equal(
                    "the file on the host",
                    fs::read_to_string(bundle.rootfs("etc/secret"))?,
                    "a secret",
                )
            },
        ),
        must(
            "masked_paths.that_are_not_there_are_no_failure",
            MASKED,
            "as runc does: engines mask paths that some kernels lack",
            |world| {
                let mut bundle = world.bundle()?;
                bundle.set("/linux/maskedPaths", json!(["/proc/no_such", "/nowhere/at/all"]));
                world.report(&mut bundle).map(drop)
            },
        )
        .practice(),
        must(
            "masked_paths.other_paths_stay_readable",
            MASKED,
            "maskedPaths will mask over the provided paths",
            |world| {
                let mut bundle = world.bundle()?;
                bundle.set("/linux/maskedPaths", json!(["/proc/interrupts"]));
                let lines = world.probe(&mut bundle, &["read", "/proc/uptime"])?;
                worked(&lines[0])
            },
        ),
        must(
            "masked_paths.relative_is_an_error",
            MASKED,
            "The values MUST be absolute paths in the container namespace",
            |world| {
                let mut bundle = world.bundle()?;
                bundle.set("/linux/maskedPaths", json!(["etc/passwd"]));
                world.refused(&bundle).map(drop)
            },
        ),
        must(
            "readonly_paths.cannot_be_written",
            READONLY,
            "readonlyPaths will set the provided paths as readonly inside the container",
            |world| {
                let mut bundle = world.bundle()?;
                fs::create_dir(bundle.rootfs("kept"))?;
                fs::write(bundle.rootfs("kept/file"), "kept")?;
                fs::write(bundle.rootfs("etc/file"), "kept")?;
                bundle.set("/linux/readonlyPaths", json!(["/kept", "/etc/file"]));
                let lines = world.probe(
                    &mut bundle,
                    &[
                        "put",
                        "/kept/file",
                        "x",
                        "write",
                        "/kept/new",
                        "x",
                        "put",
                        "/etc/file",
                        "x",
                        "read",
                        "/kept/file",
                        "write",
                        "/etc/other",
                        "x",
                    ],
                )?;
                for line in &lines[..3] {
                    failed_with(line, &[Errno::EROFS])?;
                }
                equal("its content", lines[3]["data"].clone(), "kept")?;
                worked(&lines[4])
            },
        ),
        must(
            "readonly_paths.of_proc",
            READONLY,
            "readonlyPaths will set the provided paths as readonly inside the container",
            |world| {
                let mut bundle = world.bundle()?;
                bundle.set("/linux/readonlyPaths", json!(["/proc/sys", "/proc/irq"]));
                let lines = world.probe(
                    &mut bundle,
                    &[
                        "put",
                        "/proc/sys/kernel/domainname",
                        "x",
                        "openw",
                        "/proc/irq/default_smp_affinity",
                        "read",
                        "/proc/sys/kernel/ostype",
                    ],
                )?;
                failed_with(&lines[0], &[Errno::EROFS])?;
                failed_with(&lines[1], &[Errno::EROFS])?;
                worked(&lines[2])
            },
        ),
        must(
            "readonly_paths.keep_the_mounts_below",
            READONLY,
            "readonlyPaths will set the provided paths as readonly inside the container",
            |world| {
                let mut bundle = world.bundle()?;
                bundle
                    .mount("/kept/below", "tmpfs", "tmpfs", &[])
                    .set("/linux/readonlyPaths", json!(["/kept"]));
                let lines = world.probe(&mut bundle, &["statfs", "/kept/below"])?;
                equal("a tmpfs is there", lines[0]["type"].clone(), 0x0102_1994)
            },
        ),
        must(
            "readonly_paths.that_are_not_there_are_no_failure",
            READONLY,
            "as runc does: engines name paths that some kernels lack",
            |world| {
                let mut bundle = world.bundle()?;
                bundle.set("/linux/readonlyPaths", json!(["/proc/no_such", "/proc/asound"]));
                world.report(&mut bundle).map(drop)
            },
        )
        .practice(),
        must(
            "readonly_paths.relative_is_an_error",
            READONLY,
            "The values MUST be absolute paths in the container namespace",
            |world| {
                let mut bundle = world.bundle()?;
                bundle.set("/linux/readonlyPaths", json!(["etc/passwd"]));
                world.refused(&bundle).map(drop)
            },
        ),
        must(
            "sysctl.of_the_network",
            SYSCTL,
            "sysctl allows kernel parameters to be modified at runtime for the container",
            |world| {
                let mut bundle = world.bundle()?;
                bundle.set(
                    "/linux/sysctl",
                    json!({"net.ipv4.ip_forward": "1", "net.core.somaxconn": "256"}),
                );
                let lines = world.probe(
                    &mut bundle,
                    &[
                        "read",
                        "/proc/sys/net/ipv4/ip_forward",
                        "read",
                        "/proc/sys/net/core/somaxconn",
                    ],
                )?;
                equal("net.ipv4.ip_forward", lines[0]["data"].clone(), "1\n")?;
                equal("net.core.somaxconn", lines[1]["data"].clone(), "256\n")
            },
        ),
        must(
            "sysctl.of_ipc",
            SYSCTL,
            "sysctl allows kernel parameters to be modified at runtime for the container",
            |world| {
                let mut bundle = world.bundle()?;
                bundle.set(
                    "/linux/sysctl",
                    json!({"kernel.shmmni": "1234", "fs.mqueue.msg_max": "77"}),
                );
                let lines = world.probe(
                    &mut bundle,
                    &[
                        "read",
                        "/proc/sys/kernel/shmmni",
                        "read",
                        "/proc/sys/fs/mqueue/msg_max",
                    ],
                )?;
                equal("kernel.shmmni", lines[0]["data"].clone(), "1234\n")?;
                equal("fs.mqueue.msg_max", lines[1]["data"].clone(), "77\n")
            },
        ),
        must(
            "sysctl.leaves_the_host_alone",
            SYSCTL,
            "sysctl allows kernel parameters to be modified at runtime for the container",
            |world| {
                let path = "/proc/sys/net/core/somaxconn";
                let before = fs::read_to_string(path)?;
                let mut bundle = world.bundle()?;
                bundle.set("/linux/sysctl", json!({"net.core.somaxconn": "333"}));
                world.report(&mut bundle)?;
                equal("the host's", fs::read_to_string(path)?, before)
            },
        ),
        must(
            "sysctl.unknown_is_an_error",
            SYSCTL,
            "If the runtime is unable to create the environment specified in config.json, it MUST generate an error",
            |world| {
                let mut bundle = world.bundle()?;
                bundle.set("/linux/sysctl", json!({"net.ipv4.no_such": "1"}));
                world.refused(&bundle).map(drop)
            },
        ),
        must(
            "sysctl.does_not_lead_out_of_proc_sys",
            SYSCTL,
            "sysctl allows kernel parameters to be modified: as runc does, nothing else",
            |world| {
                let mut bundle = world.bundle()?;
                bundle.set("/linux/sysctl", json!({"net/../../self/oom_score_adj": "777"}));
                world.refused(&bundle).map(drop)
            },
        )
        .practice(),
        must(
            "personality.linux32",
            PERSONALITY,
            "LINUX32 will set the uname system call to show a 32 bit CPU type, such as i686",
            |world| {
                let mut bundle = world.bundle()?;
                bundle.set("/linux/personality", json!({"domain": "LINUX32"}));
                let report = world.report(&mut bundle)?;
                equal("machine", report["machine"].clone(), "i686")
            },
        ),
        must(
            "personality.linux",
            PERSONALITY,
            "domain: the execution domain: LINUX, LINUX32",
            |world| {
                let mut bundle = world.bundle()?;
                bundle.set("/linux/personality", json!({"domain": "LINUX"}));
                let report = world.report(&mut bundle)?;
                equal("personality", report["personality"].clone(), 0)
            },
        ),
        must(
            "personality.unknown_is_an_error",
            "config.md#valid-values",
            "Runtimes MUST generate an error when invalid or unsupported values are encountered",
            |world| {
                let mut bundle = world.bundle()?;
                bundle.set("/linux/personality", json!({"domain": "XENIX"}));
                world.refused(&bundle).map(drop)
            },
        ),
    ]
}
