//! runtime.md, "State" and "Query State".

use anyhow::{Result, ensure};
use serde_json::json;

use super::equal;
use crate::case::{Case, must};
use crate::world::World;

const STATE: &str = "runtime.md#state";
const QUERY: &str = "runtime.md#query-state";

pub fn cases() -> Vec<Case> {
    vec![
        must(
            "state.has_oci_version",
            STATE,
            "ociVersion is the version of the Open Container Initiative Runtime Specification with which the state complies",
            oci_version,
        ),
        must(
            "state.id_is_the_containers",
            STATE,
            "id is the container's ID",
            |world| {
                let container = world.create(&world.bundle()?)?;
                equal("id", container.state()?["id"].clone(), container.id.as_str())
            },
        ),
        must(
            "state.created_after_create",
            "runtime.md#create",
            "created: the runtime has finished the create operation, and the container process has neither exited nor executed the user-specified program",
            |world| {
                let container = world.create(&world.bundle()?)?;
                equal("status", container.status()?, "created")
            },
        ),
        must(
            "state.running_while_the_program_runs",
            STATE,
            "running: the container process has executed the user-specified program but has not exited",
            running,
        ),
        must(
            "state.stopped_after_exit",
            STATE,
            "stopped: the container process has exited",
            |world| {
                let mut bundle = world.bundle()?;
                let container = world.create(bundle.probe(&["exit", "3"]))?;
                container.start()?;
                container.wait_stopped()?;
                equal("status", container.status()?, "stopped")
            },
        ),
        must(
            "state.pid_while_created",
            STATE,
            "pid is REQUIRED when status is created or running on Linux: the ID of the container process",
            |world| {
                let container = world.create(&world.bundle()?)?;
                equal("pid", container.state()?["pid"].clone(), container.pid)?;
                ensure!(
                    container.process_exists(),
                    "there is no process {} on the host",
                    container.pid
                );
                Ok(())
            },
        ),
        must(
            "state.pid_while_running",
            STATE,
            "pid is REQUIRED when status is created or running on Linux: the ID of the container process",
            |world| {
                let mut bundle = world.bundle()?;
                let container = world.create(bundle.probe(&["pause"]))?;
                container.start()?;
                equal("pid", container.state()?["pid"].clone(), container.pid)?;
                ensure!(
                    container.process_exists(),
                    "there is no process {} on the host",
                    container.pid
                );
                Ok(())
            },
        ),
        must(
            "state.bundle_is_an_absolute_path",
            STATE,
            "bundle (REQUIRED) is the absolute path to the container's bundle directory",
            |world| {
                let bundle = world.bundle()?;
                let container = world.create(&bundle)?;
                equal(
                    "bundle",
                    container.state()?["bundle"].clone(),
                    bundle.path().display().to_string(),
                )
            },
        ),
        must(
            "state.bundle_is_absolute_when_given_relative",
            STATE,
            "bundle (REQUIRED) is the absolute path to the container's bundle directory",
            relative_bundle,
        ),
        must(
            "state.annotations_are_the_containers",
            STATE,
            "annotations contains the list of annotations associated with the container",
            |world| {
                let mut bundle = world.bundle()?;
                let annotations = json!({"com.example.key": "value", "com.example.empty": ""});
                bundle.set("/annotations", annotations.clone());
                let container = world.create(&bundle)?;
                equal(
                    "annotations",
                    container.state()?["annotations"].clone(),
                    annotations,
                )
            },
        ),
        must(
            "state.annotations_absent_or_empty_without_any",
            STATE,
            "If no annotations were provided then this property MAY either be absent or an empty map",
            |world| {
                let found = world.create(&world.bundle()?)?.state()?["annotations"].clone();
                ensure!(found.is_null() || found == json!({}), "annotations: {found}");
                Ok(())
            },
        ),
        must(
            "state.adheres_to_the_schema",
            STATE,
            "When serialized in JSON, the format MUST adhere to the JSON Schema schema/state-schema.json",
            schema,
        ),
        must(
            "state.adheres_to_the_schema_when_stopped",
            STATE,
            "The state of a container includes ociVersion, id, status and bundle",
            |world| {
                let mut bundle = world.bundle()?;
                let container = world.create(bundle.probe(&["exit", "0"]))?;
                container.start()?;
                container.wait_stopped()?;
                let state = container.state()?;
                for name in ["ociVersion", "id", "status", "bundle"] {
                    ensure!(state[name].is_string(), "{name} is no string in {state}");
                }
                Ok(())
            },
        ),
        must(
            "state.without_id_is_an_error",
            QUERY,
            "This operation MUST generate an error if it is not provided the ID of a container",
            |world| world.invoke(&["state"])?.expect_error().map(drop),
        ),
        must(
            "state.of_a_missing_container_is_an_error",
            QUERY,
            "Attempting to query a container that does not exist MUST generate an error",
            |world| {
                world
                    .invoke(&["state", &world.new_id()])?
                    .expect_error()
                    .map(drop)
            },
        ),
        must(
            "state.of_a_deleted_container_is_an_error",
            QUERY,
            "Attempting to query a container that does not exist MUST generate an error",
            |world| {
                let mut bundle = world.bundle()?;
                let container = world.create(bundle.probe(&["exit", "0"]))?;
                container.start()?;
                container.wait_stopped()?;
                container.delete()?;
                container.invoke("state", &[])?.expect_error().map(drop)
            },
        ),
    ]
}

fn oci_version(world: &World<'_>) -> Result<()> {
    let state = world.create(&world.bundle()?)?.state()?;
    let version = state["ociVersion"].as_str().unwrap_or_default();
    let release = version.split(['-', '+']).next().unwrap_or_default();
    let numbers: Vec<&str> = release.split('.').collect();
    ensure!(
        numbers.len() == 3 && numbers.iter().all(|number| number.parse::<u32>().is_ok()),
        "ociVersion {version:?} is no semantic version"
    );
    Ok(())
}

fn running(world: &World<'_>) -> Result<()> {
    let mut bundle = world.bundle()?;
    let container = world.create(bundle.probe(&["pause"]))?;
    container.start()?;
    container.wait_printed("pause")?;
    equal("status", container.status()?, "running")
}

fn relative_bundle(world: &World<'_>) -> Result<()> {
    let bundle = world.bundle()?;
    bundle.write()?;
    let id = world.new_id();
    let name = bundle
        .path()
        .file_name()
        .unwrap_or_default()
        .to_string_lossy()
        .into_owned();
    // Invocations run in the folder that holds the bundles.
    world.invoke(&["create", "--bundle", &name, &id])?.expect_ok()?;
    let state: serde_json::Value = serde_json::from_str(&world.invoke(&["state", &id])?.expect_ok()?)?;
    equal(
        "bundle",
        state["bundle"].clone(),
        bundle.path().display().to_string(),
    )
}

fn schema(world: &World<'_>) -> Result<()> {
    let mut bundle = world.bundle()?;
    bundle.set("/annotations", json!({"com.example.key": "value"}));
    let state = world.create(&bundle)?.state()?;
    ensure!(
        state["ociVersion"].is_string(),
        "ociVersion is no string in {state}"
    );
    ensure!(state["id"].is_string(), "id is no string in {state}");
    let status = state["status"].as_str().unwrap_or_default();
    ensure!(
        ["creating", "created", "running", "stopped"].contains(&status),
        "status is none of those defined in {state}"
    );
    ensure!(
        state["pid"].as_i64().is_some_and(|pid| pid >= 0),
        "pid is no number in {state}"
    );
    ensure!(state["bundle"].is_string(), "bundle is no string in {state}");
    let annotations = state["annotations"].as_object();
    ensure!(
        annotations.is_some_and(|map| map.values().all(serde_json::Value::is_string)),
        "annotations is no map of strings in {state}"
    );
    Ok(())
}
