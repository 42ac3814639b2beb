//! config.md, "Linux mount options": every option a runtime has to know, one case each, and what those that show do.

use std::fs;

use anyhow::{Context, Result, ensure};
use nix::errno::Errno;

use super::mounts::folder;
use super::{equal, failed_with, mount_at, worked};
use crate::case::{Case, must, skip};
use crate::world::World;

const OPTIONS: &str = "config.md#linux-mount-options";

/// An option on a tmpfs, and what shows in `mountinfo`: words that must be there, words that must not.
struct Shown {
    options: &'static [&'static str],
    there: &'static [&'static str],
    absent: &'static [&'static str],
}

const SHOWN: &[Shown] = &[
    Shown {
        options: &["ro"],
        there: &["ro"],
        absent: &["rw"],
    },
    Shown {
        options: &["rw"],
        there: &["rw"],
        absent: &["ro"],
    },
    Shown {
        options: &["ro", "rw"],
        there: &["rw"],
        absent: &["ro"],
    },
    Shown {
        options: &["nosuid"],
        there: &["nosuid"],
        absent: &[],
    },
    Shown {
        options: &["nosuid", "suid"],
        there: &[],
        absent: &["nosuid"],
    },
    Shown {
        options: &["nodev"],
        there: &["nodev"],
        absent: &[],
    },
    Shown {
        options: &["nodev", "dev"],
        there: &[],
        absent: &["nodev"],
    },
    Shown {
        options: &["noexec"],
        there: &["noexec"],
        absent: &[],
    },
    Shown {
        options: &["noexec", "exec"],
        there: &[],
        absent: &["noexec"],
    },
    Shown {
        options: &["noatime"],
        there: &["noatime"],
        absent: &["relatime"],
    },
    Shown {
        options: &["noatime", "atime"],
        there: &[],
        absent: &["noatime"],
    },
    Shown {
        options: &["relatime"],
        there: &["relatime"],
        absent: &["noatime"],
    },
    Shown {
        options: &["strictatime"],
        there: &[],
        absent: &["relatime", "noatime"],
    },
    Shown {
        options: &["strictatime", "nostrictatime"],
        there: &["relatime"],
        absent: &[],
    },
    Shown {
        options: &["nodiratime"],
        there: &["nodiratime"],
        absent: &[],
    },
    Shown {
        options: &["nodiratime", "diratime"],
        there: &[],
        absent: &["nodiratime"],
    },
    Shown {
        options: &["sync"],
        there: &["sync"],
        absent: &[],
    },
    Shown {
        options: &["sync", "async"],
        there: &[],
        absent: &["sync"],
    },
    Shown {
        options: &["dirsync"],
        there: &["dirsync"],
        absent: &[],
    },
    Shown {
        options: &["lazytime"],
        there: &["lazytime"],
        absent: &[],
    },
    Shown {
        options: &["lazytime", "nolazytime"],
        there: &[],
        absent: &["lazytime"],
    },
    Shown {
        options: &["defaults"],
        there: &["rw"],
        absent: &["nosuid", "nodev", "noexec"],
    },
    Shown {
        options: &["nosuid", "nodev", "noexec"],
        there: &["nosuid", "nodev", "noexec"],
        absent: &[],
    },
];

/// Options that change nothing one could see here, and have to be accepted.
const ACCEPTED: &[&str] = &["iversion", "noiversion", "loud", "silent", "norelatime", "async"];

/// Recursive ones: on a bind mount with another mount below it.
const RECURSIVE: &[(&str, &str, bool)] = &[
    ("rro", "ro", true),
    ("rnosuid", "nosuid", true),
    ("rnodev", "nodev", true),
    ("rnoexec", "noexec", true),
    ("rnoatime", "noatime", true),
    ("rnodiratime", "nodiratime", true),
    ("rrelatime", "relatime", true),
    ("rstrictatime", "relatime", false),
    ("rnosymfollow", "nosymfollow", true),
];

pub fn cases() -> Vec<Case> {
    let mut cases: Vec<Case> = SHOWN
        .iter()
        .map(|row| {
            must(
                format!("mount_options.{}", row.options.join("_")),
                OPTIONS,
                format!(
                    "Runtimes MUST implement the following option strings for Linux: {}",
                    row.options.join(", ")
                ),
                |world| shown(world, row),
            )
        })
        .collect();
    cases.extend(ACCEPTED.iter().map(|&option| {
        must(
            format!("mount_options.{option}_is_accepted"),
            OPTIONS,
            format!("Runtimes MUST implement the following option strings for Linux: {option}"),
            move |world| accepted(world, option),
        )
    }));
    cases.extend(RECURSIVE.iter().map(|&(option, word, there)| {
        must(
            format!("mount_options.{option}"),
            OPTIONS,
            format!("Runtimes SHOULD implement the following option strings for Linux: {option}"),
            move |world| recursive(world, option, word, there),
        )
        .should()
    }));
    cases.extend([
        must(
            "mount_options.nosymfollow",
            OPTIONS,
            "Runtimes SHOULD implement the following option strings for Linux: nosymfollow",
            nosymfollow,
        )
        .should(),
        must(
            "mount_options.ro_on_a_bind_mount",
            OPTIONS,
            "Runtimes MUST implement the following option strings for Linux: ro, bind",
            |world| {
                let mut bundle = world.bundle()?;
                let source = folder(world, "source")?;
                bundle.mount("/data", "bind", &source, &["rbind", "ro"]);
                let lines = world.probe(
                    &mut bundle,
                    &[
                        "read",
                        "/data/name",
                        "write",
                        "/data/new",
                        "x",
                        "put",
                        "/data/name",
                        "x",
                    ],
                )?;
                worked(&lines[0])?;
                failed_with(&lines[1], &[Errno::EROFS])?;
                failed_with(&lines[2], &[Errno::EROFS])?;
                equal(
                    "the file on the host",
                    fs::read_to_string(format!("{source}/name"))?,
                    "source",
                )
            },
        ),
        must(
            "mount_options.noexec_on_a_bind_mount",
            OPTIONS,
            "Runtimes MUST implement the following option strings for Linux: noexec, bind",
            |world| {
                let mut bundle = world.bundle()?;
                let source = folder(world, "source")?;
                fs::copy(world.programs.probe(), format!("{source}/program"))?;
                bundle
                    .mount("/data", "bind", &source, &["rbind", "noexec"])
                    .mount("/exec", "bind", &source, &["rbind"]);
                let lines = world.probe(&mut bundle, &["exec", "/data/program", "exec", "/exec/program"])?;
                let tried: Vec<_> = lines.iter().filter(|line| line["op"] == "exec").collect();
                failed_with(tried[0], &[Errno::EACCES])?;
                worked(tried[1])
            },
        ),
        must(
            "mount_options.nosuid_on_a_bind_mount",
            OPTIONS,
            "Runtimes MUST implement the following option strings for Linux: nosuid, bind",
            nosuid,
        ),
        must(
            "mount_options.nodev_on_a_bind_mount",
            OPTIONS,
            "Runtimes MUST implement the following option strings for Linux: nodev, bind",
            |world| {
                let mut bundle = world.bundle()?;
                let source = folder(world, "source")?;
                bundle.mount("/data", "bind", &source, &["rbind", "nodev"]);
                let report = world.report(&mut bundle)?;
                let options = mount_at(&report, "/data")?.options;
                ensure!(
                    options.iter().any(|option| option == "nodev"),
                    "it is mounted {options:?}"
                );
                Ok(())
            },
        ),
        must(
            "mount_options.remount_changes_an_earlier_mount",
            OPTIONS,
            "Runtimes MUST implement the following option strings for Linux: remount",
            |world| {
                let mut bundle = world.bundle()?;
                bundle.mount("/data", "tmpfs", "tmpfs", &["rw"]).mount(
                    "/data",
                    "tmpfs",
                    "tmpfs",
                    &["remount", "ro"],
                );
                let lines = world.probe(&mut bundle, &["write", "/data/new", "x"])?;
                failed_with(&lines[0], &[Errno::EROFS])
            },
        ),
    ]);
    cases
}

fn shown(world: &World<'_>, row: &Shown) -> Result<()> {
    let mut bundle = world.bundle()?;
    bundle.mount("/data", "tmpfs", "tmpfs", row.options);
    let report = world.report(&mut bundle)?;
    let mount = mount_at(&report, "/data")?;
    // Some of them are of the mount, some of the filesystem; "ro" of either makes it read-only.
    let has = |word: &str| {
        let of_the_filesystem =
            word != "rw" && word != "ro" && mount.super_options.iter().any(|option| option == word);
        of_the_filesystem || mount.options.iter().any(|option| option == word)
    };
    for word in row.there {
        ensure!(has(word), "{word} does not show: {mount:?}");
    }
    for word in row.absent {
        ensure!(!has(word), "{word} shows: {mount:?}");
    }
    Ok(())
}

fn accepted(world: &World<'_>, option: &str) -> Result<()> {
    let mut bundle = world.bundle()?;
    bundle.mount("/data", "tmpfs", "tmpfs", &[option]);
    let lines = world.probe(&mut bundle, &["write", "/data/new", "x"])?;
    worked(&lines[0])
}

fn recursive(world: &World<'_>, option: &str, word: &str, there: bool) -> Result<()> {
    let mut bundle = world.bundle()?;
    let source = folder(world, "tree")?;
    let below = format!("{source}/below");
    fs::create_dir(&below)?;
    let flags = nix::mount::MsFlags::empty();
    nix::mount::mount(Some("tmpfs"), below.as_str(), Some("tmpfs"), flags, None::<&str>)
        .context("cannot mount a tmpfs")?;
    bundle.mount("/data", "bind", &source, &["rbind", option]);
    let report = world.report(&mut bundle);
    nix::mount::umount(below.as_str())?;
    let report = report?;
    for point in ["/data", "/data/below"] {
        let options = mount_at(&report, point)?.options;
        ensure!(
            options.iter().any(|option| option == word) == there,
            "{point} is mounted {options:?}"
        );
    }
    Ok(())
}

fn nosymfollow(world: &World<'_>) -> Result<()> {
    let mut bundle = world.bundle()?;
    let source = folder(world, "source")?;
    std::os::unix::fs::symlink("name", format!("{source}/link"))?;
    bundle.mount("/data", "bind", &source, &["rbind", "nosymfollow"]);
    let lines = world.probe(&mut bundle, &["read", "/data/link", "readlink", "/data/link"])?;
    failed_with(&lines[0], &[Errno::ELOOP])?;
    worked(&lines[1])
}

fn nosuid(world: &World<'_>) -> Result<()> {
    let mut bundle = world.bundle()?;
    let source = folder(world, "source")?;
    let program = format!("{source}/program");
    fs::copy(world.programs.probe(), &program)?;
    let rights = std::os::unix::fs::PermissionsExt::from_mode(0o4755);
    fs::set_permissions(&program, rights)?;
    if fs::metadata(&program)
        .is_ok_and(|found| std::os::unix::fs::PermissionsExt::mode(&found.permissions()) & 0o4000 == 0)
    {
        return skip("this filesystem keeps no set-user-ID bit");
    }
    bundle
        .mount("/data", "bind", &source, &["rbind", "nosuid"])
        .mount("/suid", "bind", &source, &["rbind", "suid"]);
    bundle.set("/process/user", serde_json::json!({"uid": 1000, "gid": 1000}));
    bundle.set("/process/noNewPrivileges", serde_json::json!(false));
    let lines = world.probe(&mut bundle, &["exec", "/data/program", "exec", "/suid/program"])?;
    let seen: Vec<_> = lines.iter().filter(|line| line["op"] == "whoami").collect();
    equal("answers", seen.len(), 2)?;
    equal("effective user with nosuid", seen[0]["euid"].clone(), 1000)?;
    equal("effective user without", seen[1]["euid"].clone(), 0)
}
