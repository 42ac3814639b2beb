//! config-linux.md, "Devices", "Default Devices" and "Allowed Device list".

use std::fs;

use anyhow::{Result, ensure};
use nix::errno::Errno;
use serde_json::{Value, json};

use super::{equal, failed_with, worked};
use crate::case::{Case, must};
use crate::world::World;

const DEVICES: &str = "config-linux.md#devices";
const DEFAULT: &str = "config-linux.md#default-devices";
const ALLOWED: &str = "config-linux.md#allowed-device-list";

pub fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for (name, major, minor) in [
        ("null", 1, 3),
        ("zero", 1, 5),
        ("full", 1, 7),
        ("random", 1, 8),
        ("urandom", 1, 9),
        ("tty", 5, 0),
    ] {
        cases.push(must(
            format!("devices.default_{name}"),
            DEFAULT,
            format!("In addition to any devices configured with this setting, the runtime MUST also supply: /dev/{name}"),
            move |world| default_device(world, name, major, minor),
        ));
    }
    cases.extend([
        must("devices.default_ptmx", DEFAULT, "/dev/ptmx: a bind-mount or symlink of the container's /dev/pts/ptmx", |world| {
            let mut bundle = world.bundle()?;
            let lines = world.probe(&mut bundle, &["stat", "/dev/ptmx", "stat", "/dev/pts/ptmx", "open", "/dev/ptmx"])?;
            equal("type", lines[0]["type"].clone(), "char")?;
            equal("number", lines[0]["minor"].clone(), lines[1]["minor"].clone())?;
            worked(&lines[2])
        }),
        must("devices.default_ones_work", DEFAULT, "the runtime MUST also supply: /dev/null, /dev/zero, /dev/full, /dev/random, /dev/urandom", |world| {
            let mut bundle = world.bundle()?;
            let operations = ["put", "/dev/null", "x", "read", "/dev/null", "put", "/dev/full", "x", "open", "/dev/zero", "open", "/dev/random", "open", "/dev/urandom"];
            let lines = world.probe(&mut bundle, &operations)?;
            worked(&lines[0])?;
            equal("what /dev/null holds", lines[1]["data"].clone(), "")?;
            failed_with(&lines[2], &[Errno::ENOSPC])?;
            lines[3..].iter().try_for_each(worked)
        }),
        must("devices.default_ones_work_for_another_user", DEFAULT, "the runtime MUST also supply: /dev/null, …", |world| {
            let mut bundle = world.bundle()?;
            bundle.set("/process/user", json!({"uid": 1000, "gid": 1000}));
            let lines = world.probe(&mut bundle, &["put", "/dev/null", "x", "open", "/dev/urandom", "put", "/dev/full", "x"])?;
            worked(&lines[0])?;
            worked(&lines[1])?;
            failed_with(&lines[2], &[Errno::ENOSPC])
        }),
        must("devices.standard_stream_links", DEFAULT, "as runc does: /dev/stdin, /dev/stdout, /dev/stderr and /dev/fd lead to /proc/self/fd", |world| {
            let mut bundle = world.bundle()?;
            let lines = world.probe(&mut bundle, &["readlink", "/dev/stdin", "readlink", "/dev/stdout", "readlink", "/dev/stderr", "readlink", "/dev/fd"])?;
            let links: Vec<_> = lines.iter().map(|line| line["data"].as_str().unwrap_or_default()).collect();
            equal("links", links, ["/proc/self/fd/0", "/proc/self/fd/1", "/proc/self/fd/2", "/proc/self/fd"])
        }).practice(),
        must("devices.listed_ones_are_there", DEVICES, "devices lists devices that MUST be available in the container", |world| {
            let entry = json!({"path": "/dev/mine", "type": "c", "major": 1, "minor": 3, "fileMode": 0o640, "uid": 11, "gid": 12});
            let found = listed(world, &entry, "/dev/mine")?;
            equal("type", found["type"].clone(), "char")?;
            equal("number", [found["major"].clone(), found["minor"].clone()], [json!(1), json!(3)])?;
            equal("mode", found["mode"].clone(), 0o640)?;
            equal("uid: id of device owner", found["uid"].clone(), 11)?;
            equal("gid: id of device group", found["gid"].clone(), 12)
        }),
        must("devices.a_block_device", DEVICES, "type of device: c, b, u or p", |world| {
            let entry = json!({"path": "/dev/disk0", "type": "b", "major": 7, "minor": 77, "fileMode": 0o600});
            let found = listed(world, &entry, "/dev/disk0")?;
            equal("type", found["type"].clone(), "block")?;
            equal("number", [found["major"].clone(), found["minor"].clone()], [json!(7), json!(77)])
        }),
        must("devices.an_unbuffered_device", DEVICES, "type of device: c, b, u or p", |world| {
            let entry = json!({"path": "/dev/mine", "type": "u", "major": 1, "minor": 5});
            equal("type", listed(world, &entry, "/dev/mine")?["type"].clone(), "char")
        }),
        must("devices.a_fifo", DEVICES, "type of device: c, b, u or p; major, minor REQUIRED unless type is p", |world| {
            let entry = json!({"path": "/dev/pipe", "type": "p", "fileMode": 0o600});
            equal("type", listed(world, &entry, "/dev/pipe")?["type"].clone(), "fifo")
        }),
        must("devices.in_a_folder_that_is_not_there", DEVICES, "path: full path to device inside container", |world| {
            let entry = json!({"path": "/dev/a/b/mine", "type": "c", "major": 1, "minor": 3});
            equal("type", listed(world, &entry, "/dev/a/b/mine")?["type"].clone(), "char")
        }),
        must("devices.outside_of_dev", DEVICES, "The path MAY be anywhere in the container filesystem, notably outside of /dev", |world| {
            let entry = json!({"path": "/srv/mine", "type": "c", "major": 1, "minor": 3});
            let found = listed(world, &entry, "/srv/mine")?;
            equal("type", found["type"].clone(), "char")?;
            equal("number", [found["major"].clone(), found["minor"].clone()], [json!(1), json!(3)])
        }),
        must("devices.on_another_file_is_an_error", DEVICES,
            "If a file already exists at path that does not match the requested device, the runtime MUST generate an error",
            |world| {
                let mut bundle = world.bundle()?;
                fs::write(bundle.rootfs("mine"), "a file")?;
                bundle.push("/linux/devices", json!({"path": "/mine", "type": "c", "major": 1, "minor": 3}));
                world.refused(&bundle)?;
                equal("the file", fs::read_to_string(bundle.rootfs("mine"))?, "a file")
            }),
        must("devices.of_an_unknown_type_is_an_error", "config.md#valid-values",
            "Runtimes MUST generate an error when invalid or unsupported values are encountered",
            |world| {
                let mut bundle = world.bundle()?;
                bundle.push("/linux/devices", json!({"path": "/dev/mine", "type": "x", "major": 1, "minor": 3}));
                world.refused(&bundle).map(drop)
            }),
        must("devices.not_listed_ones_are_not_there", DEVICES,
            "Containers MAY NOT access any device node that is not either explicitly referenced in the devices array or listed as being part of the default devices",
            |world| {
                let mut bundle = world.bundle()?;
                let lines = world.probe(&mut bundle, &["list", "/dev"])?;
                let known = ["null", "zero", "full", "random", "urandom", "tty", "ptmx", "pts", "shm", "mqueue", "fd", "stdin", "stdout", "stderr", "core", "console"];
                for name in lines[0]["names"].as_array().into_iter().flatten().filter_map(Value::as_str) {
                    ensure!(known.contains(&name), "/dev/{name} is there");
                }
                Ok(())
            }),
        must("device_list.made_nodes_open_nothing", ALLOWED, "allow: whether the entry is allowed or denied", |world| {
            // All is denied but what every container gets: a node that the container makes itself must not open.
            let mut bundle = world.bundle()?;
            bundle.capabilities(&["CAP_MKNOD", "CAP_DAC_OVERRIDE", "CAP_SYS_RAWIO"]);
            let lines = world.probe(&mut bundle, &["mknod", "/dev/kmsg2", "c", "1", "11", "open", "/dev/kmsg2", "mknod", "/dev/b", "b", "254", "0", "open", "/dev/b"])?;
            for line in [&lines[1], &lines[3]] {
                ensure!(line["errno"] != 0, "{} could be opened", line["path"]);
            }
            Ok(())
        }),
        must("device_list.allows", ALLOWED, "allow: whether the entry is allowed or denied", |world| {
            let rules = [json!({"allow": false, "access": "rwm"}), json!({"allow": true, "type": "c", "major": 1, "minor": 11, "access": "rwm"})];
            let lines = with_rules(world, &rules)?;
            worked(&lines[0])?;
            worked(&lines[1])
        }),
        must("device_list.entries_are_applied_in_order", ALLOWED, "The runtime MUST apply entries in the listed order", |world| {
            let rules = [
                json!({"allow": false, "access": "rwm"}),
                json!({"allow": true, "type": "c", "major": 1, "minor": 11, "access": "rwm"}),
                json!({"allow": false, "type": "c", "major": 1, "minor": 11, "access": "rwm"}),
            ];
            let lines = with_rules(world, &rules)?;
            ensure!(lines[1]["errno"] != 0, "the device could be opened");
            Ok(())
        }),
        must("device_list.unset_major_and_minor_mean_all", ALLOWED, "major, minor: unset values mean \"all\"", |world| {
            let rules = [json!({"allow": false, "access": "rwm"}), json!({"allow": true, "type": "c", "access": "rwm"})];
            let lines = with_rules(world, &rules)?;
            worked(&lines[0])?;
            worked(&lines[1])
        }),
        must("device_list.access_is_heeded", ALLOWED, "access: a composition of r (read), w (write), and m (mknod)", |world| {
            let rules = [json!({"allow": false, "access": "rwm"}), json!({"allow": true, "type": "c", "major": 1, "minor": 11, "access": "rm"})];
            let lines = with_rules(world, &rules)?;
            worked(&lines[0])?;
            worked(&lines[1])?;
            failed_with(&lines[2], &[Errno::EPERM])
        }),
        must("device_list.leaves_the_default_devices", DEFAULT, "the runtime MUST also supply: /dev/null, …", |world| {
            let mut bundle = world.bundle()?;
            bundle.set("/linux/resources/devices", json!([{"allow": false, "access": "rwm"}]));
            let lines = world.probe(&mut bundle, &["put", "/dev/null", "x", "open", "/dev/zero", "open", "/dev/tty"])?;
            worked(&lines[0])?;
            worked(&lines[1])?;
            failed_with(&lines[2], &[Errno::ENXIO])
        }),
    ]);
    cases
}

fn default_device(world: &World<'_>, name: &str, major: u32, minor: u32) -> Result<()> {
    let mut bundle = world.bundle()?;
    let path = format!("/dev/{name}");
    let found = world.probe(&mut bundle, &["stat", &path])?.remove(0);
    worked(&found)?;
    equal("type", found["type"].clone(), "char")?;
    equal(
        "number",
        [found["major"].clone(), found["minor"].clone()],
        [json!(major), json!(minor)],
    )?;
    equal("mode", found["mode"].clone(), 0o666)
}

fn listed(world: &World<'_>, entry: &Value, path: &str) -> Result<Value> {
    let mut bundle = world.bundle()?;
    bundle.push("/linux/devices", entry.clone());
    let found = world.probe(&mut bundle, &["stat", path])?.remove(0);
    worked(&found)?;
    Ok(found)
}

/// Makes a node for the kernel log (1:11), opens it for reading and for writing, under these rules.
fn with_rules(world: &World<'_>, rules: &[Value]) -> Result<Vec<Value>> {
    let mut bundle = world.bundle()?;
    bundle.set("/linux/resources/devices", json!(rules));
    bundle.capabilities(&["CAP_MKNOD", "CAP_DAC_OVERRIDE", "CAP_SYSLOG", "CAP_SYS_ADMIN"]);
    world.probe(
        &mut bundle,
        &[
            "mknod",
            "/dev/log2",
            "c",
            "1",
            "11",
            "open",
            "/dev/log2",
            "openw",
            "/dev/log2",
        ],
    )
}
