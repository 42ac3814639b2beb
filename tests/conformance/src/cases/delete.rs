//! runtime.md, "Delete".

use std::fs;

use anyhow::{Result, ensure};
use serde_json::json;

use super::equal;
use crate::case::{Case, must};
use crate::container::Container;
use crate::host::cgroup_dir;
use crate::world::World;

const DELETE: &str = "runtime.md#delete";

pub fn cases() -> Vec<Case> {
    vec![
        must(
            "delete.without_id_is_an_error",
            DELETE,
            "This operation MUST generate an error if it is not provided the container ID",
            |world| world.invoke(&["delete"])?.expect_error().map(drop),
        ),
        must(
            "delete.of_a_missing_container_is_an_error",
            DELETE,
            "Attempting to delete a container that does not exist MUST generate an error",
            |world| {
                world
                    .invoke(&["delete", &world.new_id()])?
                    .expect_error()
                    .map(drop)
            },
        ),
        must(
            "delete.of_a_running_container_is_an_error_without_effect",
            DELETE,
            "Attempting to delete a container that is not stopped MUST have no effect on the container and MUST generate an error",
            |world| {
                let mut bundle = world.bundle()?;
                let container = world.create(bundle.probe(&["pause"]))?;
                container.start()?;
                container.invoke("delete", &[])?.expect_error()?;
                equal("status", container.status()?, "running")?;
                ensure!(container.process_exists(), "its process is gone");
                Ok(())
            },
        ),
        must(
            "delete.of_a_created_container_is_an_error_without_effect",
            DELETE,
            "Attempting to delete a container that is not stopped MUST have no effect on the container and MUST generate an error",
            |world| {
                let container = world.create(&world.bundle()?)?;
                container.invoke("delete", &[])?.expect_error()?;
                equal("status", container.status()?, "created")
            },
        ),
        must(
            "delete.frees_the_id",
            DELETE,
            "Once a container is deleted its ID MAY be used by a subsequent container",
            frees_the_id,
        ),
        must(
            "delete.removes_the_cgroup",
            DELETE,
            "Deleting a container MUST delete the resources that were created during the create step",
            removes_the_cgroup,
        )
        .on_host(),
        must(
            "delete.leaves_no_mount",
            DELETE,
            "Deleting a container MUST delete the resources that were created during the create step",
            leaves_no_mount,
        )
        .on_host(),
        must(
            "delete.leaves_no_process",
            DELETE,
            "Deleting a container MUST delete the resources that were created during the create step",
            |world| {
                let mut bundle = world.bundle()?;
                let container = stopped(world, bundle.probe(&["exit", "0"]))?;
                container.delete()?;
                ensure!(
                    !container.process_exists(),
                    "the process {} is still there",
                    container.pid
                );
                Ok(())
            },
        ),
        must(
            "delete.leaves_the_bundle_alone",
            DELETE,
            "Note that resources associated with the container, but not created by this container, MUST NOT be deleted",
            |world| {
                let mut bundle = world.bundle()?;
                let source = world.path().join("data");
                fs::create_dir(&source)?;
                fs::write(source.join("kept"), "kept")?;
                bundle.mount("/data", "bind", &source.display().to_string(), &["rbind", "rw"]);
                let container = stopped(world, bundle.probe(&["read", "/data/kept"]))?;
                container.delete()?;
                ensure!(
                    source.join("kept").exists(),
                    "a file of a bind mount's source is gone"
                );
                ensure!(bundle.path().join("config.json").exists(), "config.json is gone");
                ensure!(
                    bundle.rootfs("bin/probe").exists(),
                    "a file of the root filesystem is gone"
                );
                Ok(())
            },
        ),
        must(
            "delete.removes_it_from_the_list",
            DELETE,
            "Deleting a container MUST delete the resources that were created during the create step",
            |world| {
                let mut bundle = world.bundle()?;
                let container = stopped(world, bundle.probe(&["exit", "0"]))?;
                let before = world.invoke(&["list", "--quiet"])?.expect_ok()?;
                ensure!(before.contains(&container.id), "it is not listed before");
                container.delete()?;
                let after = world.invoke(&["list", "--quiet"])?.expect_ok()?;
                ensure!(!after.contains(&container.id), "it is listed after");
                Ok(())
            },
        )
        .practice(),
        must(
            "delete.twice_is_an_error",
            DELETE,
            "Attempting to delete a container that does not exist MUST generate an error",
            |world| {
                let mut bundle = world.bundle()?;
                let container = stopped(world, bundle.probe(&["exit", "0"]))?;
                container.delete()?;
                container.invoke("delete", &[])?.expect_error().map(drop)
            },
        ),
    ]
}

fn stopped<'w>(world: &'w World<'_>, bundle: &crate::bundle::Bundle) -> Result<Container<'w>> {
    let container = world.create(bundle)?;
    container.start()?;
    container.wait_stopped()?;
    Ok(container)
}

fn frees_the_id(world: &World<'_>) -> Result<()> {
    let mut bundle = world.bundle()?;
    let first = stopped(world, bundle.probe(&["echo", "first"]))?;
    first.delete()?;
    bundle.probe(&["echo", "second"]);
    Container::try_create(world, &bundle, &first.id, &[])?.expect_ok()?;
    let second = Container::of(world, &first.id)?;
    second.start()?;
    second.wait_stopped()?;
    ensure!(
        second.stdout().contains("second"),
        "the program printed {:?}",
        second.stdout()
    );
    Ok(())
}

fn removes_the_cgroup(world: &World<'_>) -> Result<()> {
    let mut bundle = world.bundle()?;
    let path = format!("/conformance-{}", world.new_id());
    bundle.set("/linux/cgroupsPath", json!(path)).probe(&["pause"]);
    let container = world.create(&bundle)?;
    container.start()?;
    let dir = cgroup_dir("memory", &path);
    ensure!(dir.exists(), "{} was not made", dir.display());
    container.kill("KILL")?;
    container.wait_stopped()?;
    container.delete()?;
    ensure!(!dir.exists(), "{} is left", dir.display());
    Ok(())
}

fn leaves_no_mount(world: &World<'_>) -> Result<()> {
    let mut bundle = world.bundle()?;
    bundle.mount("/data", "tmpfs", "tmpfs", &[]);
    let container = stopped(world, bundle.probe(&["exit", "0"]))?;
    container.delete()?;
    let ours = world.path().display().to_string();
    let mounts = fs::read_to_string("/proc/self/mountinfo")?;
    let left: Vec<&str> = mounts.lines().filter(|line| line.contains(&ours)).collect();
    ensure!(left.is_empty(), "mounts are left: {left:?}");
    Ok(())
}
