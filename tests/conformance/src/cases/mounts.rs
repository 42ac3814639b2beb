//! config.md, "Mounts": order, destinations, sources, kinds.

use std::fs;
use std::os::unix::fs::symlink;

use anyhow::{Context, Result, ensure};
use nix::errno::Errno;
use serde_json::json;

use super::{MountInfo, equal, failed_with, mount_at, mounts_of, worked};
use crate::case::{Case, must};
use crate::container::Container;
use crate::world::World;

const MOUNTS: &str = "config.md#mounts";

pub fn cases() -> Vec<Case> {
    vec![
        must("mounts.are_made_in_the_listed_order", MOUNTS, "The runtime MUST mount entries in the listed order", listed_order),
        must("mounts.later_ones_cover_earlier_ones", MOUNTS, "The runtime MUST mount entries in the listed order",
            |world| {
                let mut bundle = world.bundle()?;
                let (first, second) = (folder(world, "first")?, folder(world, "second")?);
                bundle.mount("/data", "bind", &first, &["bind"]).mount("/data", "bind", &second, &["bind"]);
                let lines = world.probe(&mut bundle, &["read", "/data/name"])?;
                equal("what is on top", lines[0]["data"].clone(), "second")
            }),
        must("mounts.relative_destination_is_relative_to_the_root", MOUNTS,
            "For compatibility, it MAY be a relative path, in which case it MUST be interpreted as relative to \"/\"",
            |world| {
                let mut bundle = world.bundle()?;
                bundle.mount("srv/data", "tmpfs", "tmpfs", &[]);
                let report = world.report(&mut bundle)?;
                equal("the type", mount_at(&report, "/srv/data")?.kind, "tmpfs")
            }),
        must("mounts.destination_is_made", MOUNTS, "destination: path inside container",
            |world| {
                let mut bundle = world.bundle()?;
                bundle.mount("/deep/er/than/that", "tmpfs", "tmpfs", &[]);
                let report = world.report(&mut bundle)?;
                equal("the type", mount_at(&report, "/deep/er/than/that")?.kind, "tmpfs")
            }),
        must("mounts.symbolic_links_of_the_destination_end_at_the_root", MOUNTS, "destination: path inside container", symlinks),
        must("mounts.bind_source_relative_to_the_bundle", MOUNTS,
            "Path values for bind mounts are either absolute or relative to the bundle",
            |world| {
                let mut bundle = world.bundle()?;
                fs::create_dir(bundle.path().join("data"))?;
                fs::write(bundle.path().join("data/name"), "beside")?;
                bundle.mount("/data", "none", "data", &["bind"]);
                let lines = world.probe(&mut bundle, &["read", "/data/name"])?;
                equal("the file", lines[0]["data"].clone(), "beside")
            }),
        must("mounts.bind_of_a_folder_is_seen_on_both_sides", MOUNTS,
            "A mount is a bind mount if it has either bind or rbind in the options", both_sides),
        must("mounts.bind_of_a_file", MOUNTS,
            "A device name, but can also be a file or directory name for bind mounts",
            |world| {
                let mut bundle = world.bundle()?;
                let file = world.path().join("file");
                fs::write(&file, "a file")?;
                bundle.mount("/etc/hosts", "bind", &file.display().to_string(), &["bind"]);
                let lines = world.probe(&mut bundle, &["read", "/etc/hosts", "put", "/etc/hosts", "A FILE"])?;
                equal("the file inside", lines[0]["data"].clone(), "a file")?;
                worked(&lines[1])?;
                equal("the file outside", fs::read_to_string(file)?, "A FILE")
            }),
        must("mounts.bind_does_not_depend_on_the_type", "config.md#posix-platform-mounts",
            "For bind mounts (when options include either bind or rbind), the type is a dummy, often \"none\"",
            |world| {
                for kind in ["none", "bind", "tmpfs"] {
                    let mut bundle = world.bundle()?;
                    let source = folder(world, kind)?;
                    bundle.mount("/data", kind, &source, &["rbind"]);
                    let lines = world.probe(&mut bundle, &["read", "/data/name"])?;
                    equal("the file", lines[0]["data"].clone(), kind)?;
                }
                Ok(())
            }),
        must("mounts.bind_without_a_type", "config.md#posix-platform-mounts", "type (string, OPTIONAL)",
            |world| {
                let mut bundle = world.bundle()?;
                let source = folder(world, "typeless")?;
                bundle.push("/mounts", json!({"destination": "/data", "source": source, "options": ["rbind"]}));
                let lines = world.probe(&mut bundle, &["read", "/data/name"])?;
                equal("the file", lines[0]["data"].clone(), "typeless")
            }),
        must("mounts.bind_of_a_missing_source_is_an_error", "runtime.md#lifecycle",
            "If the runtime is unable to create the environment specified in config.json, it MUST generate an error",
            |world| {
                let mut bundle = world.bundle()?;
                bundle.mount("/data", "bind", "/nowhere/at/all", &["bind"]);
                world.refused(&bundle).map(drop)
            }),
        must("mounts.unknown_type_is_an_error", "config.md#valid-values",
            "Runtimes MUST generate an error when invalid or unsupported values are encountered",
            |world| {
                let mut bundle = world.bundle()?;
                bundle.mount("/data", "nosuchfs", "none", &[]);
                world.refused(&bundle).map(drop)
            }),
        must("mounts.bind_is_not_recursive", "config.md#linux-mount-options", "bind: bind mount", |world| submount(world, "bind", false)),
        must("mounts.rbind_is_recursive", "config.md#linux-mount-options", "rbind: recursive bind mount", |world| submount(world, "rbind", true)),
        must("mounts.tmpfs_has_its_size_and_mode", "config.md#linux-mount-options",
            "Runtimes SHOULD treat unknown options as filesystem-specific ones and pass those as a comma-separated string to the fifth argument of mount(2)",
            |world| {
                let mut bundle = world.bundle()?;
                bundle.mount("/data", "tmpfs", "tmpfs", &["size=64k", "mode=0711", "nr_inodes=77"]);
                let lines = world.probe(&mut bundle, &["statfs", "/data", "stat", "/data"])?;
                equal("bytes", lines[0]["bytes"].clone(), 65536)?;
                equal("files", lines[0]["files"].clone(), 77)?;
                equal("mode", lines[1]["mode"].clone(), 0o711)
            }).should(),
        must("mounts.tmpfs_hides_what_is_below", MOUNTS, "mounts specifies additional mounts beyond root",
            |world| {
                let mut bundle = world.bundle()?;
                bundle.mount("/home", "tmpfs", "tmpfs", &[]);
                let lines = world.probe(&mut bundle, &["list", "/home", "write", "/home/new", "x"])?;
                equal("what is in it", lines[0]["names"].clone(), json!([]))?;
                worked(&lines[1])?;
                ensure!(!bundle.rootfs("home/new").exists(), "it was written to the root filesystem");
                Ok(())
            }),
        must("mounts.default_filesystems_are_there", "config-linux.md#default-filesystems",
            "The following filesystems SHOULD be made available in each container's filesystem: /proc, /sys, /dev/pts, /dev/shm",
            |world| {
                let report = world.report(&mut world.bundle()?)?;
                for (point, kind) in [("/proc", "proc"), ("/sys", "sysfs"), ("/dev/pts", "devpts"), ("/dev/shm", "tmpfs")] {
                    equal(point, mount_at(&report, point)?.kind, kind)?;
                }
                Ok(())
            }).should(),
        must("mounts.mqueue", MOUNTS, "type: filesystem types supported by the kernel as listed in /proc/filesystems",
            |world| {
                let report = world.report(&mut world.bundle()?)?;
                equal("/dev/mqueue", mount_at(&report, "/dev/mqueue")?.kind, "mqueue")
            }),
        must("mounts.devpts_is_a_new_instance", MOUNTS, "type: filesystem types supported by the kernel as listed in /proc/filesystems",
            |world| {
                let mut bundle = world.bundle()?;
                let lines = world.probe(&mut bundle, &["list", "/dev/pts", "stat", "/dev/pts/ptmx", "open", "/dev/ptmx"])?;
                equal("what is in it", lines[0]["names"].clone(), json!(["ptmx"]))?;
                equal("the mode of ptmx", lines[1]["mode"].clone(), 0o666)?;
                worked(&lines[2])
            }),
        must("mounts.idmap_maps_owners", "config.md#linux-mount-options",
            "idmap: indicates that the mount MUST have an idmapping applied; if uidMappings or gidMappings are specified for the mount, the runtime MUST use those values",
            idmap).should(),
        must("mounts.cgroup_is_shown", MOUNTS, "type: filesystem types supported by the kernel as listed in /proc/filesystems", cgroup_mount),
    ]
}

/// A folder of the host with a file that tells its name.
pub fn folder(world: &World<'_>, name: &str) -> Result<String> {
    let dir = world.path().join(format!("dir-{name}"));
    fs::create_dir(&dir)?;
    fs::write(dir.join("name"), name)?;
    Ok(dir.display().to_string())
}

fn listed_order(world: &World<'_>) -> Result<()> {
    let mut bundle = world.bundle()?;
    let inner = folder(world, "inner")?;
    bundle.mount("/outer", "tmpfs", "tmpfs", &[]);
    bundle.mount("/outer/inner", "bind", &inner, &["bind"]);
    bundle.mount("/outer/inner/most", "tmpfs", "tmpfs", &["mode=0700"]);
    let lines = world.probe(
        &mut bundle,
        &[
            "read",
            "/outer/inner/name",
            "stat",
            "/outer/inner/most",
            "list",
            "/outer",
        ],
    )?;
    equal("the file of the second", lines[0]["data"].clone(), "inner")?;
    equal("the mode of the third", lines[1]["mode"].clone(), 0o700)?;
    equal(
        "what is in the first",
        lines[2]["names"].clone(),
        json!(["inner"]),
    )
}

fn symlinks(world: &World<'_>) -> Result<()> {
    let mut bundle = world.bundle()?;
    let outside = world.path().join("outside");
    fs::create_dir(&outside)?;
    // Taken by its words it leads to a folder of the host; inside, it leads to one of the root filesystem's own.
    symlink(&outside, bundle.rootfs("absolute"))?;
    fs::create_dir_all(bundle.rootfs(&outside.display().to_string()))?;
    fs::create_dir_all(bundle.rootfs("srv/up"))?;
    symlink("../../../../../../../../../../srv/up", bundle.rootfs("upwards"))?;
    let data = folder(world, "data")?;
    bundle.mount("/absolute/here", "bind", &data, &["bind"]);
    bundle.mount("/upwards/here", "bind", &data, &["bind"]);
    let id = world.new_id();
    let output = Container::try_create(world, bundle.probe(&["read", "/upwards/here/name"]), &id, &[])?;
    ensure!(
        fs::read_dir(&outside)?.next().is_none(),
        "something was made in a folder of the host"
    );
    output.expect_ok()?;
    let container = Container::of(world, &id)?;
    container.start()?;
    container.wait_stopped()?;
    equal("the mount", container.lines()?[0]["data"].clone(), "data")
}

fn both_sides(world: &World<'_>) -> Result<()> {
    let mut bundle = world.bundle()?;
    let source = folder(world, "shared")?;
    bundle.mount("/data", "bind", &source, &["rbind", "rw"]);
    let lines = world.probe(
        &mut bundle,
        &[
            "read",
            "/data/name",
            "write",
            "/data/new",
            "from inside",
            "mkdir",
            "/data/sub",
        ],
    )?;
    equal("the host's file inside", lines[0]["data"].clone(), "shared")?;
    worked(&lines[1])?;
    worked(&lines[2])?;
    equal(
        "the container's file outside",
        fs::read_to_string(format!("{source}/new"))?,
        "from inside",
    )?;
    ensure!(
        fs::metadata(format!("{source}/sub"))?.is_dir(),
        "the container's folder is not there outside"
    );
    Ok(())
}

fn submount(world: &World<'_>, option: &str, wanted: bool) -> Result<()> {
    let mut bundle = world.bundle()?;
    let source = folder(world, "tree")?;
    let below = format!("{source}/below");
    fs::create_dir(&below)?;
    let flags = nix::mount::MsFlags::empty();
    nix::mount::mount(Some("tmpfs"), below.as_str(), Some("tmpfs"), flags, None::<&str>)
        .context("cannot mount a tmpfs")?;
    fs::write(format!("{below}/deep"), "deep")?;
    bundle.mount("/data", "bind", &source, &[option]);
    let lines = world.probe(&mut bundle, &["read", "/data/below/deep"]);
    nix::mount::umount(below.as_str())?;
    let lines = lines?;
    if wanted {
        equal("the file of the mount below", lines[0]["data"].clone(), "deep")
    } else {
        failed_with(&lines[0], &[Errno::ENOENT])
    }
}

fn idmap(world: &World<'_>) -> Result<()> {
    let mut bundle = world.bundle()?;
    let source = folder(world, "mapped")?;
    std::os::unix::fs::chown(format!("{source}/name"), Some(5000), Some(6000))?;
    let mapping = |from: u32, to: u32| json!([{"containerID": from, "hostID": to, "size": 1}]);
    bundle.push(
        "/mounts",
        json!({
            "destination": "/data", "type": "bind", "source": source, "options": ["bind", "idmap"],
            "uidMappings": mapping(5000, 1000), "gidMappings": mapping(6000, 1001),
        }),
    );
    let lines = world.probe(&mut bundle, &["stat", "/data/name"])?;
    equal("owner", lines[0]["uid"].clone(), 1000)?;
    equal("group", lines[0]["gid"].clone(), 1001)
}

fn cgroup_mount(world: &World<'_>) -> Result<()> {
    let mut bundle = world.bundle()?;
    bundle.mount(
        "/sys/fs/cgroup",
        "cgroup",
        "cgroup",
        &["nosuid", "noexec", "nodev", "relatime", "ro"],
    );
    let report = world.report(&mut bundle)?;
    // Version 1 has a mount for each hierarchy below it.
    let shown: Vec<MountInfo> = mounts_of(&report)?
        .into_iter()
        .filter(|mount| mount.point.starts_with("/sys/fs/cgroup") && mount.kind.starts_with("cgroup"))
        .collect();
    ensure!(!shown.is_empty(), "no cgroup filesystem is there");
    for mount in shown {
        ensure!(
            mount.options.iter().any(|option| option == "ro"),
            "{} is mounted {:?}",
            mount.point,
            mount.options
        );
    }
    Ok(())
}
