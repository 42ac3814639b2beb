//! runtime.md, "Create", and what "Lifecycle" and "Errors" say of it.

use std::fs;

use anyhow::{Result, ensure};
use serde_json::json;

use super::equal;
use crate::case::{Case, must};
use crate::container::Container;
use crate::host::cgroup_dir;
use crate::world::World;

const CREATE: &str = "runtime.md#create";
const LIFECYCLE: &str = "runtime.md#lifecycle";

pub fn cases() -> Vec<Case> {
    vec![
        must("create.without_id_is_an_error", CREATE,
            "This operation MUST generate an error if it is not provided a path to the bundle and the container ID",
            |world| {
                let bundle = world.bundle()?;
                bundle.write()?;
                let path = bundle.path().display().to_string();
                world.invoke(&["create", "--bundle", &path])?.expect_error().map(drop)
            }),
        must("create.of_a_missing_bundle_is_an_error", CREATE,
            "This operation MUST generate an error if it is not provided a path to the bundle",
            |world| {
                let path = world.path().join("nowhere").display().to_string();
                world.invoke(&["create", "--bundle", &path, &world.new_id()])?.expect_error().map(drop)
            }),
        must("create.without_config_json_is_an_error", "bundle.md#container-format",
            "This REQUIRED file MUST reside in the root of the bundle directory and MUST be named config.json",
            |world| {
                let bundle = world.bundle()?;
                let path = bundle.path().display().to_string();
                world.invoke(&["create", "--bundle", &path, &world.new_id()])?.expect_error().map(drop)
            }),
        must("create.of_what_is_no_json_is_an_error", LIFECYCLE,
            "If the runtime is unable to create the environment specified in config.json, it MUST generate an error",
            |world| {
                let bundle = world.bundle()?;
                fs::write(bundle.path().join("config.json"), "{\"ociVersion\": \"1.0.2\", ")?;
                let path = bundle.path().display().to_string();
                world.invoke(&["create", "--bundle", &path, &world.new_id()])?.expect_error().map(drop)
            }),
        must("create.with_an_id_in_use_is_an_error", CREATE,
            "If the ID provided is not unique across all containers within the scope of the runtime, the implementation MUST generate an error and a new container MUST NOT be created",
            id_in_use),
        must("create.with_an_id_that_names_another_folder_is_an_error", CREATE,
            "If the ID provided is not valid in any other way, the implementation MUST generate an error and a new container MUST NOT be created",
            invalid_ids),
        must("create.does_not_run_the_program", CREATE,
            "All of the resources associated with the container MUST be created, however, the user-specified program MUST NOT be run at this time",
            |world| {
                let mut bundle = world.bundle()?;
                let container = world.create(bundle.probe(&["write", "/ran", "yes", "echo", "ran"]))?;
                equal("status", container.status()?, "created")?;
                ensure!(container.stdout().is_empty(), "the program has printed {:?}", container.stdout());
                ensure!(!bundle.rootfs("ran").exists(), "the program has written a file");
                container.start()?;
                container.wait_stopped()?;
                ensure!(container.stdout().contains("ran"), "the program did not run at `start` either");
                Ok(())
            }),
        must("create.keeps_the_configuration_of_that_time", LIFECYCLE,
            "Any updates to config.json after this step MUST NOT affect the container",
            |world| {
                let mut bundle = world.bundle()?;
                let container = world.create(bundle.probe(&["echo", "first"]))?;
                bundle.probe(&["echo", "second"]).write()?;
                container.start()?;
                container.wait_stopped()?;
                ensure!(container.stdout().contains("first"), "the program printed {:?}", container.stdout());
                Ok(())
            }),
        must("create.survives_the_removal_of_config_json", LIFECYCLE,
            "Any updates to config.json after this step MUST NOT affect the container",
            |world| {
                let mut bundle = world.bundle()?;
                let container = world.create(bundle.probe(&["echo", "here"]))?;
                fs::remove_file(bundle.path().join("config.json"))?;
                container.start()?;
                container.wait_stopped()?;
                ensure!(container.stdout().contains("here"), "the program printed {:?}", container.stdout());
                container.delete()
            }),
        must("create.that_fails_leaves_no_container", "runtime.md#errors",
            "Unless otherwise stated, generating an error MUST leave the state of the environment as if the operation were never attempted",
            failed_create_leaves_nothing),
        must("create.that_fails_leaves_no_cgroup", "runtime.md#errors",
            "Unless otherwise stated, generating an error MUST leave the state of the environment as if the operation were never attempted",
            failed_create_leaves_no_cgroup).on_host(),
        must("create.runs_two_containers_of_one_bundle", CREATE,
            "Using the data in config.json, this operation MUST create a new container",
            |world| {
                let mut bundle = world.bundle()?;
                bundle.probe(&["echo", "here"]);
                let both = [world.create(&bundle)?, world.create(&bundle)?];
                for container in &both {
                    container.start()?;
                    container.wait_stopped()?;
                    ensure!(container.stdout().contains("here"), "the program printed {:?}", container.stdout());
                }
                Ok(())
            }),
    ]
}

fn id_in_use(world: &World<'_>) -> Result<()> {
    let mut bundle = world.bundle()?;
    let container = world.create(bundle.probe(&["echo", "first"]))?;
    let mut other = world.bundle()?;
    other.probe(&["echo", "second"]).write()?;
    let path = other.path().display().to_string();
    world
        .invoke(&["create", "--bundle", &path, &container.id])?
        .expect_error()?;
    let state = container.state()?;
    equal("the first container's status", state["status"].clone(), "created")?;
    equal(
        "the first container's bundle",
        state["bundle"].clone(),
        bundle.path().display().to_string(),
    )?;
    container.start()?;
    container.wait_stopped()?;
    ensure!(
        container.stdout().contains("first"),
        "the first container's program printed {:?}",
        container.stdout()
    );
    Ok(())
}

fn invalid_ids(world: &World<'_>) -> Result<()> {
    let bundle = world.bundle()?;
    bundle.write()?;
    let path = bundle.path().display().to_string();
    for id in ["", "..", "../above", "in/side"] {
        let output = world.invoke(&["create", "--bundle", &path, id])?;
        if output.ok() {
            world.invoke(&["delete", "--force", id])?;
        }
        output.expect_error()?;
    }
    let above = world.path().join("above");
    ensure!(!above.exists(), "{} was made", above.display());
    Ok(())
}

fn failed_create_leaves_nothing(world: &World<'_>) -> Result<()> {
    let mut bundle = world.bundle()?;
    let id = world.new_id();
    bundle.mount("/data", "bind", "/nowhere/at/all", &["bind"]);
    Container::try_create(world, &bundle, &id, &[])?.expect_error()?;
    world.invoke(&["state", &id])?.expect_error()?;
    let list = world.invoke(&["list", "--quiet"])?.expect_ok()?;
    ensure!(!list.contains(&id), "it is still listed");
    // The id is free again.
    let mut good = world.bundle()?;
    good.probe(&["echo", "here"]);
    Container::try_create(world, &good, &id, &[])?.expect_ok()?;
    let container = Container::of(world, &id)?;
    container.start()?;
    container.wait_stopped()?;
    Ok(())
}

fn failed_create_leaves_no_cgroup(world: &World<'_>) -> Result<()> {
    let mut bundle = world.bundle()?;
    let id = world.new_id();
    let path = format!("/conformance-{id}");
    bundle.set("/linux/cgroupsPath", json!(path));
    bundle.mount("/data", "bind", "/nowhere/at/all", &["bind"]);
    Container::try_create(world, &bundle, &id, &[])?.expect_error()?;
    let left = cgroup_dir("memory", &path);
    ensure!(!left.exists(), "{} is left", left.display());
    Ok(())
}
