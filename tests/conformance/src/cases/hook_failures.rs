//! runtime.md, "Lifecycle": what happens when a hook fails, and config.md's `timeout`.

use anyhow::{Result, ensure};
use serde_json::{Value, json};

use super::equal;
use super::hooks::{names, recorded, recording};
use crate::case::{Case, must};
use crate::container::Container;
use crate::world::World;

const LIFECYCLE: &str = "runtime.md#lifecycle";

pub fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for kind in ["prestart", "createRuntime", "createContainer"] {
        cases.push(must(
            format!("hooks.{kind}_that_fails_fails_create"),
            LIFECYCLE,
            format!("If any {kind} hook fails, the runtime MUST generate an error, stop the container, and continue the lifecycle at step 12 (destroy it)"),
            move |world| fails_create(world, kind, &json!({"path": world.programs.probe(), "args": ["hook", "stdin", "exit", "1"]})),
        ));
        cases.push(must(
            format!("hooks.{kind}_that_is_not_there_fails_create"),
            LIFECYCLE,
            format!("The value of path MUST resolve in the runtime namespace; if any {kind} hook fails, the runtime MUST generate an error"),
            move |world| fails_create(world, kind, &json!({"path": "/no/such/hook"})),
        ));
    }
    cases.extend([
        must("hooks.create_runtime_that_fails_lets_poststop_run", LIFECYCLE,
            "If any createRuntime hook fails, … continue the lifecycle at step 12; 13: the poststop hooks MUST be invoked by the runtime",
            poststop_after_failure),
        must("hooks.create_runtime_that_takes_too_long_is_aborted", "config.md#posix-platform-hooks",
            "timeout (int, OPTIONAL) is the number of seconds before aborting the hook",
            |world| {
                let hook = json!({"path": world.programs.probe(), "args": ["hook", "pause"], "timeout": 1});
                fails_create(world, "createRuntime", &hook)
            }),
        must("hooks.within_its_timeout_is_left_alone", "config.md#posix-platform-hooks",
            "timeout (int, OPTIONAL) is the number of seconds before aborting the hook",
            |world| {
                let mut bundle = world.bundle()?;
                let mut hook = recording(world, "createRuntime", "once");
                hook["timeout"] = json!(60);
                bundle.set("/hooks/createRuntime", json!([hook]));
                world.run(&bundle)?;
                equal("the hooks", names(&recorded(world)?), ["once"])
            }),
        must("hooks.start_container_that_fails_fails_start", LIFECYCLE,
            "If any startContainer hook fails, the runtime MUST generate an error, stop the container, and continue the lifecycle at step 12",
            start_container_fails),
        must("hooks.poststart_that_fails_is_no_silent_success", LIFECYCLE,
            "If any poststart hook fails, the runtime MUST generate an error and stop the container (1.2.1), or log a warning (before)",
            poststart_fails),
        must("hooks.poststop_that_fails_is_a_warning", LIFECYCLE,
            "If any poststop hook fails, the runtime MUST log a warning, but the remaining hooks and lifecycle continue as if the hook had succeeded",
            poststop_fails),
        must("hooks.relative_path_is_an_error", "config.md#posix-platform-hooks",
            "This specification extends the IEEE standard in that path MUST be absolute",
            |world| fails_create(world, "createRuntime", &json!({"path": "probe"}))),
    ]);
    cases
}

fn fails_create(world: &World<'_>, kind: &str, hook: &Value) -> Result<()> {
    let mut bundle = world.bundle()?;
    bundle.set(
        &format!("/hooks/{kind}"),
        json!([hook, recording(world, kind, "after")]),
    );
    let id = world.new_id();
    Container::try_create(world, &bundle, &id, &[])?.expect_error()?;
    let after = names(&recorded(world)?);
    ensure!(
        after.is_empty(),
        "hooks after the one that failed were called: {after:?}"
    );
    world.invoke(&["state", &id])?.expect_error()?;
    Ok(())
}

fn poststop_after_failure(world: &World<'_>) -> Result<()> {
    let mut bundle = world.bundle()?;
    let failing = json!({"path": world.programs.probe(), "args": ["hook", "stdin", "exit", "1"]});
    bundle.set("/hooks/createRuntime", json!([failing]));
    bundle.set(
        "/hooks/poststop",
        json!([recording(world, "poststop", "poststop")]),
    );
    Container::try_create(world, &bundle, &world.new_id(), &[])?.expect_error()?;
    equal("the hooks", names(&recorded(world)?), ["poststop"])
}

fn start_container_fails(world: &World<'_>) -> Result<()> {
    let mut bundle = world.bundle()?;
    bundle.set(
        "/hooks/startContainer",
        json!([{"path": "/bin/probe", "args": ["hook", "stdin", "exit", "1"]}]),
    );
    let container = world.create(bundle.probe(&["echo", "ran", "pause"]))?;
    container.invoke("start", &[])?.expect_error()?;
    ensure!(!container.stdout().contains("ran"), "the program ran");
    // Destroyed, or at least stopped.
    let state = container.invoke("state", &[])?;
    if state.ok() {
        container.wait_stopped()?;
    }
    Ok(())
}

fn poststart_fails(world: &World<'_>) -> Result<()> {
    let mut bundle = world.bundle()?;
    // It reads its standard input: the runtime's end of it is another matter.
    let hook = json!({"path": world.programs.probe(), "args": ["hook", "stdin", "exit", "1"]});
    bundle.set("/hooks/poststart", json!([hook]));
    let container = world.create(bundle.probe(&["pause"]))?;
    let started = container.invoke("start", &[])?;
    if !started.ok() {
        return started.expect_error().map(drop);
    }
    ensure!(
        !started.stderr.trim().is_empty(),
        "`start` succeeded and logged no warning"
    );
    equal("status", container.status()?, "running")
}

fn poststop_fails(world: &World<'_>) -> Result<()> {
    let mut bundle = world.bundle()?;
    let failing = json!({"path": world.programs.probe(), "args": ["hook", "stdin", "exit", "1"]});
    bundle.set(
        "/hooks/poststop",
        json!([failing, recording(world, "poststop", "second")]),
    );
    let container = world.create(bundle.probe(&["exit", "0"]))?;
    container.start()?;
    container.wait_stopped()?;
    let deleted = container.invoke("delete", &[])?;
    let warned = !deleted.stderr.trim().is_empty();
    deleted.expect_ok()?;
    ensure!(warned, "`delete` logged no warning");
    equal("the hooks", names(&recorded(world)?), ["second"])?;
    world.invoke(&["state", &container.id])?.expect_error().map(drop)
}
