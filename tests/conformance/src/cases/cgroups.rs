//! config-linux.md, "Control groups": the path, and limits as the container meets them and as the host shows them.

use std::fs;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::equal;
use crate::case::{Case, must, skip};
use crate::container::Container;
use crate::host::{cgroup_dir, has_cgroup_v1};
use crate::world::World;

const PATH: &str = "config-linux.md#cgroups-path";
const MEMORY: &str = "config-linux.md#memory";
const CPU: &str = "config-linux.md#cpu";
const PIDS: &str = "config-linux.md#pids";

const MIB: i64 = 1 << 20;

pub fn cases() -> Vec<Case> {
    vec![
        must("cgroups.absolute_path_is_below_the_mount_point", PATH,
            "In the case of an absolute path, the runtime MUST take the path to be relative to the cgroups mount point",
            |world| {
                let mut bundle = world.bundle()?;
                let path = format!("/conformance-{}/inner", world.new_id());
                bundle.set("/linux/cgroupsPath", json!(path));
                let container = world.create(&bundle)?;
                ensure!(in_cgroup("memory", &path, container.pid)?, "the process {} is not in {path}", container.pid);
                container.kill("KILL")?;
                container.wait_stopped()?;
                container.delete()?;
                remove_parent(&path)
            }).on_host(),
        must("cgroups.same_path_is_the_same_place", PATH,
            "If the value is specified, the runtime MUST consistently attach to the same place in the cgroups hierarchy given the same value of cgroupsPath",
            |world| {
                let mut bundle = world.bundle()?;
                let path = format!("/conformance-{}", world.new_id());
                bundle.set("/linux/cgroupsPath", json!(path)).probe(&["pause"]);
                for _ in 0..2 {
                    let container = world.create(&bundle)?;
                    container.start()?;
                    ensure!(in_cgroup("memory", &path, container.pid)?, "the process {} is not in {path}", container.pid);
                    container.kill("KILL")?;
                    container.wait_stopped()?;
                    container.delete()?;
                }
                Ok(())
            }).on_host(),
        must("cgroups.path_is_made_if_it_is_not_there", PATH, "The cgroups will be created if they don't exist", |world| {
            let mut bundle = world.bundle()?;
            let path = format!("/conformance-{}", world.new_id());
            bundle.set("/linux/cgroupsPath", json!(path));
            let _container = world.create(&bundle)?;
            for controller in ["memory", "cpu", "pids"] {
                let dir = cgroup_dir(controller, &path);
                ensure!(dir.exists(), "{} was not made", dir.display());
            }
            Ok(())
        }).on_host(),
        must("cgroups.relative_path_is_accepted", PATH,
            "In the case of a relative path, the runtime MAY interpret the path relative to a runtime-determined location",
            |world| {
                let mut bundle = world.bundle()?;
                bundle.set("/linux/cgroupsPath", json!(format!("conformance-{}", world.new_id())));
                world.report(&mut bundle).map(drop)
            }),
        must("cgroups.no_path_is_accepted", PATH, "If the value is not specified, the runtime MAY define the default cgroups path", |world| {
            let mut bundle = world.bundle()?;
            bundle.remove("/linux/cgroupsPath");
            world.report(&mut bundle).map(drop)
        }),
        must("cgroups.path_does_not_lead_out", PATH,
            "Runtimes MAY consider certain cgroupsPath values to be invalid, and MUST generate an error if this is the case",
            |world| {
                let mut bundle = world.bundle()?;
                let name = format!("conformance-out-{}", world.new_id());
                bundle.set("/linux/cgroupsPath", json!(format!("/../../../../../../tmp/{name}")));
                // Refused or taken to be inside: never a folder outside of the hierarchy.
                let id = world.new_id();
                let output = Container::try_create(world, &bundle, &id, &[])?;
                let outside = std::path::Path::new("/tmp").join(&name);
                let made = outside.exists();
                if output.ok() {
                    world.invoke(&["state", &id])?.expect_ok().and_then(|state| Ok(serde_json::from_str::<Value>(&state)?))?;
                    world.invoke(&["delete", "--force", &id])?.expect_ok()?;
                }
                fs::remove_dir_all(&outside).ok();
                ensure!(!made, "{} was made", outside.display());
                Ok(())
            }),
        must("memory.limit_is_enforced", MEMORY, "limit: sets limit of memory usage", |world| {
            let mut bundle = world.bundle()?;
            bundle.set("/linux/resources/memory", json!({"limit": 64 * MIB, "swap": 64 * MIB}));
            let lines = world.probe(&mut bundle, &["touch", &(16 * MIB).to_string(), "touch", &(160 * MIB).to_string()])?;
            equal("16 MiB: exit code", lines[0]["code"].clone(), 0)?;
            ensure!(lines[1]["code"] != 0, "160 MiB could be used");
            Ok(())
        }),
        must("memory.limit_shows_inside", MEMORY, "limit: sets limit of memory usage", |world| {
            let found = inside(world, json!({"memory": {"limit": 96 * MIB}}), "memory/memory.limit_in_bytes", "memory.max")?;
            equal("the limit", found, (96 * MIB).to_string())
        }),
        must("memory.limit_shows_on_the_host", MEMORY, "limit: sets limit of memory usage", |world| {
            let found = outside(world, json!({"memory": {"limit": 96 * MIB}}), "memory", "memory.limit_in_bytes", "memory.max")?;
            equal("the limit", found, (96 * MIB).to_string())
        }).on_host(),
        must("memory.reservation_shows_inside", MEMORY, "reservation: sets soft limit of memory usage", |world| {
            let found = inside(world, json!({"memory": {"limit": 96 * MIB, "reservation": 64 * MIB}}), "memory/memory.soft_limit_in_bytes", "memory.low")?;
            equal("the reservation", found, (64 * MIB).to_string())
        }),
        must("memory.unlimited_is_accepted", MEMORY, "Values for memory specify the limit in bytes, or -1 for unlimited memory", |world| {
            let mut bundle = world.bundle()?;
            bundle.set("/linux/resources/memory", json!({"limit": -1, "swap": -1}));
            world.report(&mut bundle).map(drop)
        }),
        must("memory.end_by_the_oom_killer_is_the_programs_end", MEMORY,
            "tasks that attempt to consume more memory than they are allowed are immediately killed by the OOM killer",
            |world| {
                let mut bundle = world.bundle()?;
                bundle.set("/linux/resources/memory", json!({"limit": 64 * MIB, "swap": 64 * MIB}));
                bundle.shell("x=0123456789abcdef; while :; do x=$x$x; done");
                let container = world.create(&bundle)?;
                container.start()?;
                let ended = container.wait_stopped()?;
                ensure!(!matches!(ended, nix::sys::wait::WaitStatus::Exited(_, 0)), "it ended with {ended:?}");
                Ok(())
            }),
        must("cpu.shares_show_on_the_host", CPU, "shares: specifies a relative share of CPU time available to the tasks in a cgroup", |world| {
            let found = outside(world, json!({"cpu": {"shares": 512}}), "cpu", "cpu.shares", "cpu.weight")?;
            equal("shares", found, if has_cgroup_v1() { "512" } else { "20" })
        }).on_host(),
        must("cpu.quota_shows_on_the_host", CPU,
            "quota: the total amount of time in microseconds for which all tasks in a cgroup can run during one period",
            |world| {
                let found = outside(world, json!({"cpu": {"quota": 50_000, "period": 100_000}}), "cpu", "cpu.cfs_quota_us", "cpu.max")?;
                equal("the quota", found.split(' ').next(), Some("50000"))
            }).on_host(),
        must("cpu.quota_is_accepted", CPU,
            "quota: the total amount of time in microseconds for which all tasks in a cgroup can run during one period",
            |world| {
                let mut bundle = world.bundle()?;
                bundle.set("/linux/resources/cpu", json!({"quota": 80_000, "period": 100_000, "shares": 512}));
                world.report(&mut bundle).map(drop)
            }),
        must("cpu.cpus_are_those_the_process_may_use", CPU, "cpus: list of CPUs the container will run in", |world| {
            let mut bundle = world.bundle()?;
            bundle.set("/linux/resources/cpu", json!({"cpus": "0"}));
            equal("CPUs", world.report(&mut bundle)?["cpus"].clone(), json!([0]))
        }),
        must("cpu.cpus_show_on_the_host", CPU, "cpus: list of CPUs the container will run in", |world| {
            let found = outside(world, json!({"cpu": {"cpus": "0"}}), "cpuset", "cpuset.cpus", "cpuset.cpus")?;
            equal("cpus", found, "0")
        }).on_host(),
        must("cpu.cpus_that_are_not_there_are_an_error", "config.md#valid-values",
            "Runtimes MUST generate an error when invalid or unsupported values are encountered",
            |world| {
                let mut bundle = world.bundle()?;
                bundle.set("/linux/resources/cpu", json!({"cpus": "4000-4001"}));
                world.refused(&bundle).map(drop)
            }),
        must("pids.limit_is_enforced", PIDS, "limit: specifies the maximum number of tasks in the cgroup", |world| {
            let mut bundle = world.bundle()?;
            bundle.set("/linux/resources/pids", json!({"limit": 20}));
            let lines = world.probe(&mut bundle, &["forks", "60"])?;
            let had = lines[0]["count"].as_i64().context("no count")?;
            ensure!((10..20).contains(&had), "{had} processes could be had at once");
            Ok(())
        }),
        must("pids.limit_shows_inside", PIDS, "limit: specifies the maximum number of tasks in the cgroup", |world| {
            let found = inside(world, json!({"pids": {"limit": 234}}), "pids/pids.max", "pids.max")?;
            equal("the limit", found, "234")
        }),
        must("pids.limit_shows_on_the_host", PIDS, "limit: specifies the maximum number of tasks in the cgroup", |world| {
            let found = outside(world, json!({"pids": {"limit": 234}}), "pids", "pids.max", "pids.max")?;
            equal("the limit", found, "234")
        }).on_host(),
        must("unified.of_an_absent_controller_is_an_error", "config-linux.md#unified",
            "The runtime MUST generate an error when the configuration refers to a cgroup controller that is not present or that cannot be enabled",
            |world| {
                let mut bundle = world.bundle()?;
                bundle.set("/linux/resources/unified", json!({"nonsense.max": "1"}));
                world.refused(&bundle).map(drop)
            }),
        must("unified.memory_shows_inside", "config-linux.md#unified",
            "unified allows cgroup v2 parameters to be to be set and modified for the container",
            |world| {
                if has_cgroup_v1() {
                    return skip("this host's cgroups are of version 1");
                }
                let found = inside(world, json!({"unified": {"memory.high": (80 * MIB).to_string()}}), "", "memory.high")?;
                equal("memory.high", found, (80 * MIB).to_string())
            }),
        must("rdt.without_resctrl_is_an_error", "config-linux.md#intelrdt",
            "If no mounted resctrl pseudo-filesystem is available in the runtime mount namespace, the runtime MUST generate an error",
            |world| {
                if fs::read_to_string("/proc/mounts")?.contains(" resctrl ") {
                    return skip("this host has a resctrl filesystem mounted");
                }
                let mut bundle = world.bundle()?;
                bundle.set("/linux/intelRdt", json!({"closID": "guaranteed_group", "l3CacheSchema": "L3:0=f"}));
                world.refused(&bundle).map(drop)
            }),
    ]
}

fn in_cgroup(controller: &str, path: &str, pid: i32) -> Result<bool> {
    let file = cgroup_dir(controller, path).join("cgroup.procs");
    let list = fs::read_to_string(&file).with_context(|| format!("cannot read {}", file.display()))?;
    Ok(list.lines().any(|line| line == pid.to_string()))
}

/// The folder above a container's cgroup is the engine's, which here is us.
fn remove_parent(path: &str) -> Result<()> {
    let parent = path.rsplit_once('/').map_or("", |(parent, _)| parent);
    for line in fs::read_to_string("/proc/self/cgroup")?.lines() {
        let controllers = line.split(':').nth(1).unwrap_or_default();
        let name = controllers.strip_prefix("name=").unwrap_or(controllers);
        for name in name.split(',') {
            for dir in [
                cgroup_dir(name, parent),
                std::path::Path::new("/sys/fs/cgroup/unified").join(parent.trim_start_matches('/')),
            ] {
                fs::remove_dir(dir).ok();
            }
        }
    }
    Ok(())
}

/// A file of the container's cgroup as the process reads it.
fn inside(world: &World<'_>, resources: Value, version_1: &str, version_2: &str) -> Result<String> {
    let mut bundle = world.bundle()?;
    for (name, value) in resources.as_object().into_iter().flatten() {
        bundle.set(&format!("/linux/resources/{name}"), value.clone());
    }
    bundle.push("/linux/namespaces", json!({"type": "cgroup"}));
    bundle.mount(
        "/sys/fs/cgroup",
        "cgroup",
        "cgroup",
        &["nosuid", "noexec", "nodev", "relatime", "ro"],
    );
    let (first, second) = (
        format!("/sys/fs/cgroup/{version_1}"),
        format!("/sys/fs/cgroup/{version_2}"),
    );
    let lines = world.probe(&mut bundle, &["read", &first, "read", &second])?;
    let found = lines.iter().find_map(|line| line["data"].as_str());
    Ok(found
        .with_context(|| format!("neither {first} nor {second} is there inside"))?
        .trim()
        .to_owned())
}

/// A file of the container's cgroup as the host shows it.
fn outside(
    world: &World<'_>,
    resources: Value,
    controller: &str,
    version_1: &str,
    version_2: &str,
) -> Result<String> {
    let mut bundle = world.bundle()?;
    for (name, value) in resources.as_object().into_iter().flatten() {
        bundle.set(&format!("/linux/resources/{name}"), value.clone());
    }
    let path = format!("/conformance-{}", world.new_id());
    bundle.set("/linux/cgroupsPath", json!(path));
    let _container = world.create(&bundle)?;
    let file = cgroup_dir(controller, &path).join(if has_cgroup_v1() { version_1 } else { version_2 });
    let text = fs::read_to_string(&file).with_context(|| format!("cannot read {}", file.display()))?;
    Ok(text.trim().to_owned())
}
