//! config.md, "Root" and "Specification version".

use std::fs;

use anyhow::ensure;
use nix::errno::Errno;
use serde_json::json;

use super::{equal, failed_with, mount_at, worked};
use crate::case::{Case, must};

const ROOT: &str = "config.md#root";

pub fn cases() -> Vec<Case> {
    vec![
        must(
            "root.relative_path_is_relative_to_the_bundle",
            ROOT,
            "On POSIX platforms, path is either an absolute path or a relative path to the bundle",
            |world| {
                let mut bundle = world.bundle()?;
                fs::rename(bundle.rootfs(""), bundle.path().join("other"))?;
                bundle.set("/root/path", json!("other"));
                world.report(&mut bundle).map(drop)
            },
        ),
        must(
            "root.absolute_path",
            ROOT,
            "On POSIX platforms, path is either an absolute path or a relative path to the bundle",
            |world| {
                let mut bundle = world.bundle()?;
                let elsewhere = world.path().join("elsewhere");
                fs::rename(bundle.rootfs(""), &elsewhere)?;
                bundle.set("/root/path", json!(elsewhere));
                world.report(&mut bundle).map(drop)
            },
        ),
        must(
            "root.path_that_is_not_there_is_an_error",
            ROOT,
            "A directory MUST exist at the path declared by the field",
            |world| {
                let mut bundle = world.bundle()?;
                bundle.set("/root/path", json!("nowhere"));
                world.refused(&bundle).map(drop)
            },
        ),
        must(
            "root.path_that_is_a_file_is_an_error",
            ROOT,
            "A directory MUST exist at the path declared by the field",
            |world| {
                let mut bundle = world.bundle()?;
                fs::write(bundle.path().join("file"), "no folder")?;
                bundle.set("/root/path", json!("file"));
                world.refused(&bundle).map(drop)
            },
        ),
        must(
            "root.missing_is_an_error",
            ROOT,
            "On all other platforms, this field is REQUIRED",
            |world| {
                let mut bundle = world.bundle()?;
                bundle.remove("/root");
                world.refused(&bundle).map(drop)
            },
        ),
        must(
            "root.readonly_cannot_be_written",
            ROOT,
            "readonly: if true then the root filesystem MUST be read-only inside the container",
            |world| {
                let mut bundle = world.bundle()?;
                bundle.set("/root/readonly", json!(true));
                let lines = world.probe(
                    &mut bundle,
                    &[
                        "write",
                        "/new",
                        "x",
                        "mkdir",
                        "/dir",
                        "put",
                        "/etc/passwd",
                        "x",
                        "report",
                    ],
                )?;
                for line in &lines[..3] {
                    failed_with(line, &[Errno::EROFS])?;
                }
                let options = mount_at(&lines[3], "/")?.options;
                ensure!(
                    options.iter().any(|option| option == "ro"),
                    "the root is mounted {options:?}"
                );
                ensure!(!bundle.rootfs("new").exists(), "a file was written on the host");
                Ok(())
            },
        ),
        must(
            "root.readonly_leaves_mounts_writable",
            ROOT,
            "readonly: if true then the root filesystem MUST be read-only inside the container",
            |world| {
                let mut bundle = world.bundle()?;
                bundle
                    .set("/root/readonly", json!(true))
                    .mount("/tmp", "tmpfs", "tmpfs", &["mode=1777"]);
                let lines = world.probe(
                    &mut bundle,
                    &["write", "/tmp/new", "x", "write", "/dev/shm/new", "x"],
                )?;
                lines.iter().try_for_each(worked)
            },
        ),
        must(
            "root.is_writable_by_default",
            ROOT,
            "readonly … defaults to false",
            |world| {
                let mut bundle = world.bundle()?;
                bundle.remove("/root/readonly");
                let lines = world.probe(&mut bundle, &["write", "/new", "written inside", "read", "/new"])?;
                worked(&lines[0])?;
                equal("the file's content", lines[1]["data"].clone(), "written inside")
            },
        ),
        must(
            "root.is_the_bundles_folder",
            ROOT,
            "path specifies the path to the root filesystem for the container",
            |world| {
                let mut bundle = world.bundle()?;
                fs::write(bundle.rootfs("from-host"), "from the host")?;
                let lines = world.probe(
                    &mut bundle,
                    &["read", "/from-host", "write", "/from-container", "from inside"],
                )?;
                equal(
                    "the host's file inside",
                    lines[0]["data"].clone(),
                    "from the host",
                )?;
                worked(&lines[1])?;
                equal(
                    "the container's file outside",
                    fs::read_to_string(bundle.rootfs("from-container"))?,
                    "from inside",
                )
            },
        ),
        must(
            "root.ends_at_its_folder",
            ROOT,
            "path specifies the path to the root filesystem for the container",
            |world| {
                let mut bundle = world.bundle()?;
                fs::write(bundle.path().join("outside"), "secret")?;
                let lines = world.probe(
                    &mut bundle,
                    &[
                        "read",
                        "/../outside",
                        "stat",
                        "/proc/1/root/bin/probe",
                        "list",
                        "/..",
                    ],
                )?;
                failed_with(&lines[0], &[Errno::ENOENT])?;
                worked(&lines[1])?;
                let names = lines[2]["names"].to_string();
                ensure!(
                    names.contains("\"bin\"") && !names.contains("config.json"),
                    "/.. holds {names}"
                );
                Ok(())
            },
        ),
        must(
            "version.missing_is_an_error",
            "config.md#specification-version",
            "ociVersion (string, REQUIRED)",
            |world| {
                let mut bundle = world.bundle()?;
                bundle.remove("/ociVersion");
                world.refused(&bundle).map(drop)
            },
        ),
        must(
            "version.that_is_no_semver_is_an_error",
            "config.md#specification-version",
            "ociVersion MUST be in SemVer v2.0.0 format",
            |world| {
                let mut bundle = world.bundle()?;
                bundle.set("/ociVersion", json!("one"));
                world.refused(&bundle).map(drop)
            },
        ),
        must(
            "version.of_another_major_is_an_error",
            "config.md#valid-values",
            "Runtimes MUST generate an error when invalid or unsupported values are encountered",
            |world| {
                let mut bundle = world.bundle()?;
                bundle.set("/ociVersion", json!("9.0.0"));
                world.refused(&bundle).map(drop)
            },
        ),
        must(
            "version.1_0_0_is_accepted",
            "config.md#specification-version",
            "A configuration compliant with version 1.x is compatible with all runtimes that support any 1.x or later release",
            |world| {
                let mut bundle = world.bundle()?;
                bundle.set("/ociVersion", json!("1.0.0"));
                world.report(&mut bundle).map(drop)
            },
        ),
    ]
}
