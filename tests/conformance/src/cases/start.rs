//! runtime.md, "Start".

use anyhow::{Result, ensure};
use serde_json::json;

use super::equal;
use crate::case::{Case, must};
use crate::container::Container;
use crate::world::World;

const START: &str = "runtime.md#start";

pub fn cases() -> Vec<Case> {
    vec![
        must(
            "start.without_id_is_an_error",
            START,
            "This operation MUST generate an error if it is not provided the container ID",
            |world| world.invoke(&["start"])?.expect_error().map(drop),
        ),
        must(
            "start.of_a_missing_container_is_an_error",
            START,
            "Attempting to start a container that is not created MUST generate an error",
            |world| {
                world
                    .invoke(&["start", &world.new_id()])?
                    .expect_error()
                    .map(drop)
            },
        ),
        must(
            "start.of_a_running_container_is_an_error_without_effect",
            START,
            "Attempting to start a container that is not created MUST have no effect on the container and MUST generate an error",
            of_a_running_container,
        ),
        must(
            "start.of_a_stopped_container_is_an_error_without_effect",
            START,
            "Attempting to start a container that is not created MUST have no effect on the container and MUST generate an error",
            of_a_stopped_container,
        ),
        must(
            "start.runs_the_program",
            START,
            "This operation MUST run the user-specified program as specified by process",
            |world| {
                let mut bundle = world.bundle()?;
                let lines = world.probe(&mut bundle, &["echo", "one", "echo", "two"])?;
                equal("the lines", lines.len(), 2)?;
                equal("the second", lines[1]["text"].clone(), "two")
            },
        ),
        must(
            "start.without_process_is_an_error",
            START,
            "This operation MUST generate an error if process was not set",
            without_process,
        ),
        must(
            "start.returns_while_the_program_runs",
            START,
            "Upon successful completion of this operation the status property of this container MUST be running",
            |world| {
                let mut bundle = world.bundle()?;
                let container = world.create(bundle.probe(&["pause"]))?;
                container.start()?;
                equal("status", container.status()?, "running")
            },
        ),
        must(
            "start.of_a_program_that_is_not_there_is_an_error",
            START,
            "This operation MUST run the user-specified program; what can't be run is an error of create or start",
            |world| {
                let mut bundle = world.bundle()?;
                bundle.set("/process/args", json!(["/bin/no-such-program"]));
                world.refused(&bundle).map(drop)
            },
        ),
        must(
            "start.of_a_program_that_is_not_executable_is_an_error",
            START,
            "This operation MUST run the user-specified program; what can't be run is an error of create or start",
            |world| {
                let mut bundle = world.bundle()?;
                bundle.set("/process/args", json!(["/etc/passwd"]));
                world.refused(&bundle).map(drop)
            },
        ),
    ]
}

fn of_a_running_container(world: &World<'_>) -> Result<()> {
    let mut bundle = world.bundle()?;
    let container = world.create(bundle.probe(&["echo", "begun", "pause"]))?;
    container.start()?;
    container.wait_printed("pause")?;
    container.invoke("start", &[])?.expect_error()?;
    equal("status", container.status()?, "running")?;
    equal("pid", container.state()?["pid"].clone(), container.pid)?;
    equal(
        "how often the program began",
        container.stdout().matches("begun").count(),
        1,
    )
}

fn of_a_stopped_container(world: &World<'_>) -> Result<()> {
    let mut bundle = world.bundle()?;
    let container = world.create(bundle.probe(&["echo", "begun"]))?;
    container.start()?;
    container.wait_stopped()?;
    container.invoke("start", &[])?.expect_error()?;
    equal("status", container.status()?, "stopped")?;
    equal(
        "how often the program began",
        container.stdout().matches("begun").count(),
        1,
    )
}

fn without_process(world: &World<'_>) -> Result<()> {
    let mut bundle = world.bundle()?;
    bundle.remove("/process");
    let id = world.new_id();
    // `process` is REQUIRED only when `start` is called: to refuse it earlier is stricter, and leaves nothing to be started.
    let created = Container::try_create(world, &bundle, &id, &[])?;
    if created.ok() {
        world.invoke(&["start", &id])?.expect_error()?;
    } else {
        let message = created.expect_error()?;
        ensure!(!message.contains("panic"), "the runtime fell over: {message}");
    }
    Ok(())
}
