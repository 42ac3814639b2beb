//! config.md, "User".

use anyhow::Result;
use serde_json::json;

use super::{equal, worked};
use crate::case::{Case, must};

const USER: &str = "config.md#posix-platform-user";

pub fn cases() -> Vec<Case> {
    vec![
        must(
            "user.uid_and_gid",
            USER,
            "uid specifies the user ID in the container namespace; gid the group ID",
            |world| {
                let mut bundle = world.bundle()?;
                bundle.set("/process/user", json!({"uid": 1234, "gid": 5678}));
                let report = world.report(&mut bundle)?;
                equal("uid", report["uid"].clone(), 1234)?;
                equal("effective uid", report["euid"].clone(), 1234)?;
                equal("gid", report["gid"].clone(), 5678)?;
                equal("effective gid", report["egid"].clone(), 5678)
            },
        ),
        must(
            "user.need_not_be_in_etc_passwd",
            USER,
            "symbolic name for uid and gid are left to upper levels to derive",
            |world| {
                let mut bundle = world.bundle()?;
                std::fs::remove_file(bundle.rootfs("etc/passwd"))?;
                std::fs::remove_file(bundle.rootfs("etc/group"))?;
                bundle.set("/process/user", json!({"uid": 4_000_000, "gid": 4_000_001}));
                let report = world.report(&mut bundle)?;
                equal("uid", report["uid"].clone(), 4_000_000)?;
                equal("gid", report["gid"].clone(), 4_000_001)
            },
        ),
        must(
            "user.additional_gids",
            USER,
            "additionalGids specifies additional group IDs in the container namespace to be added to the process",
            |world| {
                let mut bundle = world.bundle()?;
                bundle.set(
                    "/process/user",
                    json!({"uid": 1000, "gid": 1000, "additionalGids": [5, 6, 70_000]}),
                );
                let groups = world.report(&mut bundle)?["groups"].clone();
                for wanted in [5, 6, 70_000] {
                    anyhow::ensure!(
                        groups
                            .as_array()
                            .is_some_and(|list| list.contains(&json!(wanted))),
                        "{wanted} is not in {groups}"
                    );
                }
                Ok(())
            },
        ),
        must(
            "user.has_no_other_groups",
            USER,
            "additionalGids specifies additional group IDs in the container namespace to be added to the process",
            |world| {
                let mut bundle = world.bundle()?;
                bundle.set("/process/user", json!({"uid": 1000, "gid": 1000}));
                let groups = world.report(&mut bundle)?["groups"].clone();
                anyhow::ensure!(
                    groups == json!([]) || groups == json!([1000]),
                    "the process is in the groups {groups}"
                );
                Ok(())
            },
        ),
        must(
            "user.umask",
            USER,
            "umask specifies the umask of the user",
            |world| {
                let mut bundle = world.bundle()?;
                bundle.set("/process/user", json!({"uid": 0, "gid": 0, "umask": 0o027}));
                let lines = world.probe(&mut bundle, &["report", "write", "/new", "x", "stat", "/new"])?;
                equal("umask", lines[0]["umask"].clone(), 0o027)?;
                worked(&lines[1])?;
                equal("the mode of a new file", lines[2]["mode"].clone(), 0o640)
            },
        ),
        must(
            "user.umask_unspecified_is_not_changed",
            USER,
            "If unspecified, the umask should not be changed from the calling process' umask",
            |world| {
                let report = world.report(&mut world.bundle()?)?;
                equal("umask", report["umask"].clone(), own_umask()?)
            },
        )
        .should(),
        must(
            "user.cannot_do_what_it_may_not",
            USER,
            "user allows specific control over which user the process runs as",
            |world| {
                let mut bundle = world.bundle()?;
                bundle.set("/process/user", json!({"uid": 1000, "gid": 1000}));
                let lines = world.probe(&mut bundle, &["write", "/new", "x", "read", "/etc/passwd"])?;
                super::failed_with(&lines[0], &[nix::errno::Errno::EACCES])?;
                worked(&lines[1])
            },
        ),
        must(
            "user.owner_of_new_files",
            USER,
            "user allows specific control over which user the process runs as",
            |world| {
                let mut bundle = world.bundle()?;
                std::os::unix::fs::chown(bundle.rootfs("home/user"), Some(1000), Some(1001))?;
                bundle.set("/process/user", json!({"uid": 1000, "gid": 1001}));
                let lines = world.probe(
                    &mut bundle,
                    &["write", "/home/user/new", "x", "stat", "/home/user/new"],
                )?;
                worked(&lines[0])?;
                equal("owner", lines[1]["uid"].clone(), 1000)?;
                equal("group", lines[1]["gid"].clone(), 1001)?;
                let found = std::fs::metadata(bundle.rootfs("home/user/new"))?;
                equal(
                    "owner on the host",
                    std::os::unix::fs::MetadataExt::uid(&found),
                    1000,
                )
            },
        ),
    ]
}

fn own_umask() -> Result<u32> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let mask = status
        .lines()
        .find_map(|line| line.strip_prefix("Umask:"))
        .unwrap_or("0022");
    Ok(u32::from_str_radix(mask.trim(), 8)?)
}
