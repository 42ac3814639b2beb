//! Mount propagation: config.md's options of a mount, config-linux.md's `rootfsPropagation`.

use anyhow::{Result, ensure};
use serde_json::json;

use super::mounts::folder;
use super::{MountInfo, mount_at, worked};
use crate::case::{Case, must};
use crate::world::World;

const OPTIONS: &str = "config.md#linux-mount-options";
const ROOTFS: &str = "config-linux.md#rootfs-mount-propagation";

pub fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for option in [
        "private",
        "rprivate",
        "shared",
        "rshared",
        "slave",
        "rslave",
        "unbindable",
        "runbindable",
    ] {
        cases.push(must(
            format!("mount_options.{option}"),
            OPTIONS,
            format!("Runtimes MUST implement the following option strings for Linux: {option}"),
            move |world| of_a_mount(world, option),
        ));
    }
    for (value, sentence) in [
        ("shared", "shared: the rootfs mount belongs to a new peer group"),
        (
            "slave",
            "slave: the rootfs mount receives propagation events from the host … but not the other way around",
        ),
        (
            "private",
            "private: the rootfs mount doesn't receive mount propagation events from the host",
        ),
        (
            "unbindable",
            "unbindable: the rootfs mount is a private mount that cannot be bind-mounted",
        ),
    ] {
        cases.push(must(
            format!("rootfs_propagation.{value}"),
            ROOTFS,
            sentence,
            move |world| of_the_root(world, value),
        ));
    }
    cases.push(must(
        "rootfs_propagation.unknown_value_is_an_error",
        "config.md#valid-values",
        "Its value is either shared, slave, private or unbindable; runtimes MUST generate an error when invalid values are encountered",
        |world| {
            let mut bundle = world.bundle()?;
            bundle.set("/linux/rootfsPropagation", json!("sideways"));
            world.refused(&bundle).map(drop)
        },
    ));
    cases
}

fn has(mount: &MountInfo, tag: &str) -> bool {
    mount.propagation.iter().any(|field| field.starts_with(tag))
}

fn fits(mount: &MountInfo, value: &str) -> Result<()> {
    let (shared, unbindable) = (has(mount, "shared:"), has(mount, "unbindable"));
    let fits = match value {
        "shared" => shared,
        // Of a mount that had no peers there is nobody to be the slave of: it is private then.
        "slave" => !shared && !unbindable,
        "private" => !shared && !unbindable && !has(mount, "master:"),
        _ => unbindable && !shared,
    };
    ensure!(fits, "it is mounted with propagation {:?}", mount.propagation);
    Ok(())
}

fn of_a_mount(world: &World<'_>, option: &str) -> Result<()> {
    let mut bundle = world.bundle()?;
    let source = folder(world, "source")?;
    bundle.mount("/data", "bind", &source, &["rbind", option]);
    let report = world.report(&mut bundle)?;
    fits(&mount_at(&report, "/data")?, option.trim_start_matches('r'))
}

fn of_the_root(world: &World<'_>, value: &str) -> Result<()> {
    let mut bundle = world.bundle()?;
    bundle.set("/linux/rootfsPropagation", json!(value));
    bundle.capabilities(&["CAP_SYS_ADMIN", "CAP_DAC_OVERRIDE"]);
    let lines = world.probe(&mut bundle, &["report", "mkdir", "/there", "bind", "/", "/there"])?;
    fits(&mount_at(&lines[0], "/")?, value)?;
    worked(&lines[1])?;
    if value == "unbindable" {
        ensure!(lines[2]["errno"] != 0, "the root could be bind-mounted");
        Ok(())
    } else {
        worked(&lines[2])
    }
}
