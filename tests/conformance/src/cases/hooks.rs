//! config.md, "POSIX-platform Hooks": when each kind is called, in which namespaces, and with what.
//!
//! Every hook is the probe, which writes down what it is given and sees. Hooks that run on the host write to one log, the one
//! that runs in the container to a file of its root filesystem.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::equal;
use crate::bundle::Bundle;
use crate::case::{Case, must};
use crate::host::own_namespace;
use crate::world::World;

const HOOKS: &str = "config.md#posix-platform-hooks";

/// The kinds whose path resolves in the runtime namespace.
pub const ON_HOST: [&str; 5] = [
    "prestart",
    "createRuntime",
    "createContainer",
    "poststart",
    "poststop",
];
/// All kinds, with the status a container has when they are called.
const STATUS: [(&str, &[&str]); 6] = [
    ("prestart", &["creating", "created"]),
    ("createRuntime", &["creating", "created"]),
    ("createContainer", &["creating", "created"]),
    ("startContainer", &["created"]),
    ("poststart", &["running"]),
    ("poststop", &["stopped"]),
];

pub fn cases() -> Vec<Case> {
    let mut cases = vec![
        must(
            "hooks.prestart_comes_before_create_runtime",
            "config.md#prestart",
            "The prestart hooks MUST be called before the createRuntime hooks",
            |world| order(world, "prestart", "createRuntime"),
        ),
        must(
            "hooks.create_container_comes_after_create_runtime",
            "config.md#createcontainer-hooks",
            "The createContainer hooks MUST be called after the createRuntime hooks",
            |world| order(world, "createRuntime", "createContainer"),
        ),
        must(
            "hooks.prestart_is_part_of_create",
            "config.md#prestart",
            "The prestart hooks MUST be called as part of the create operation",
            |world| called(world, "prestart", Stage::Create),
        ),
        must(
            "hooks.create_runtime_is_part_of_create",
            "config.md#createruntime-hooks",
            "The createRuntime hooks MUST be called as part of the create operation",
            |world| called(world, "createRuntime", Stage::Create),
        ),
        must(
            "hooks.create_container_is_part_of_create",
            "config.md#createcontainer-hooks",
            "The createContainer hooks MUST be called as part of the create operation",
            |world| called(world, "createContainer", Stage::Create),
        ),
        must(
            "hooks.start_container_comes_before_the_program",
            "config.md#startcontainer-hooks",
            "The startContainer hooks MUST be called before the user-specified process is executed as part of the start operation",
            start_container,
        ),
        must(
            "hooks.poststart_comes_before_start_returns",
            "config.md#poststart",
            "The poststart hooks MUST be called after the user-specified process is executed but before the start operation returns",
            |world| called(world, "poststart", Stage::Start),
        ),
        must(
            "hooks.poststop_comes_before_delete_returns",
            "config.md#poststop",
            "The poststop hooks MUST be called after the container is deleted but before the delete operation returns",
            |world| called(world, "poststop", Stage::Delete),
        ),
        must(
            "hooks.are_called_in_the_listed_order",
            HOOKS,
            "Hooks MUST be called in the listed order",
            listed_order,
        ),
        must(
            "hooks.create_runtime_runs_in_the_runtime_namespace",
            "config.md#createruntime-hooks",
            "The createRuntime hooks MUST be executed in the runtime namespace",
            |world| in_runtime_namespace(world, "createRuntime"),
        ),
        must(
            "hooks.prestart_runs_in_the_runtime_namespace",
            "config.md#prestart",
            "The prestart hooks MUST be executed in the runtime namespace",
            |world| in_runtime_namespace(world, "prestart"),
        ),
        must(
            "hooks.poststart_runs_in_the_runtime_namespace",
            "config.md#poststart",
            "The poststart hooks MUST be executed in the runtime namespace",
            |world| in_runtime_namespace(world, "poststart"),
        ),
        must(
            "hooks.poststop_runs_in_the_runtime_namespace",
            "config.md#poststop",
            "The poststop hooks MUST be executed in the runtime namespace",
            |world| in_runtime_namespace(world, "poststop"),
        ),
        must(
            "hooks.create_container_runs_in_the_container_namespace",
            "config.md#createcontainer-hooks",
            "The createContainer hooks MUST be executed in the container namespace",
            create_container_namespace,
        )
        .on_host(),
        must(
            "hooks.start_container_runs_in_the_container_namespace",
            "config.md#startcontainer-hooks",
            "The startContainer hooks' path MUST resolve in the container namespace; the hooks MUST be executed in the container namespace",
            start_container_namespace,
        ),
    ];
    for (kind, statuses) in STATUS {
        cases.push(must(
            format!("hooks.{kind}_gets_the_state"),
            HOOKS,
            "The state of the container MUST be passed to hooks over stdin so that they may do work appropriate to the current state of the container",
            move |world| gets_the_state(world, kind, statuses),
        ));
        cases.push(must(
            format!("hooks.{kind}_gets_its_arguments_and_environment"),
            HOOKS,
            "args with the same semantics as execv's argv, env with the same semantics as environ",
            move |world| gets_arguments(world, kind),
        ));
    }
    cases
}

/// A hook that writes down what it sees under a name.
pub fn recording(world: &World<'_>, kind: &str, name: &str) -> Value {
    if kind == "startContainer" {
        json!({"path": "/bin/probe", "args": ["hook-program", "hook", "/hook.log", name], "env": ["FIRST=1", "SECOND=two words"]})
    } else {
        let log = world.path().join("hook.log");
        json!({
            "path": world.programs.probe(), "args": ["hook-program", "hook", log, name],
            "env": ["FIRST=1", "SECOND=two words"],
        })
    }
}

/// What the hooks that run on the host wrote down so far.
pub fn recorded(world: &World<'_>) -> Result<Vec<Value>> {
    parsed(world.path().join("hook.log"))
}

fn parsed(path: PathBuf) -> Result<Vec<Value>> {
    let text = fs::read_to_string(path).unwrap_or_default();
    text.lines()
        .map(|line| serde_json::from_str(line).with_context(|| format!("a hook wrote {line:?}")))
        .collect()
}

/// The names under which they wrote.
pub fn names(records: &[Value]) -> Vec<String> {
    records
        .iter()
        .filter_map(|record| record["args"][2].as_str().map(str::to_owned))
        .collect()
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Stage {
    Create,
    Start,
    Delete,
}

/// A bundle with one recording hook of each kind.
fn with_all_hooks(world: &World<'_>) -> Result<Bundle> {
    let mut bundle = world.bundle()?;
    for (kind, _) in STATUS {
        bundle.set(&format!("/hooks/{kind}"), json!([recording(world, kind, kind)]));
    }
    Ok(bundle)
}

/// The hooks on the host that ran until a stage, and the container's id, through a whole life.
fn through_life(world: &World<'_>, bundle: &Bundle) -> Result<(String, [Vec<String>; 3])> {
    let container = world.create(bundle)?;
    let create = names(&recorded(world)?);
    container.start()?;
    let start = names(&recorded(world)?);
    container.wait_stopped()?;
    let stopped = names(&recorded(world)?);
    equal("hooks called between start and delete", &stopped, &start)?;
    container.delete()?;
    Ok((container.id.clone(), [create, start, names(&recorded(world)?)]))
}

fn called(world: &World<'_>, kind: &str, at: Stage) -> Result<()> {
    let (_, stages) = through_life(world, &with_all_hooks(world)?)?;
    for (stage, names) in [Stage::Create, Stage::Start, Stage::Delete]
        .into_iter()
        .zip(&stages)
    {
        let times = names.iter().filter(|name| *name == kind).count();
        equal(
            &format!("how often {kind} was called by the end of {stage:?}"),
            times,
            usize::from(stage >= at),
        )?;
    }
    Ok(())
}

fn order(world: &World<'_>, first: &str, second: &str) -> Result<()> {
    let (_, [create, ..]) = through_life(world, &with_all_hooks(world)?)?;
    let at = |kind: &str| create.iter().position(|name| name == kind);
    let (Some(earlier), Some(later)) = (at(first), at(second)) else {
        anyhow::bail!("called during create: {create:?}");
    };
    ensure!(earlier < later, "called during create: {create:?}");
    Ok(())
}

fn listed_order(world: &World<'_>) -> Result<()> {
    let mut bundle = world.bundle()?;
    let mut wanted: Vec<String> = Vec::new();
    for kind in ON_HOST {
        let hooks: Vec<String> = (1..=3).map(|number| format!("{kind}-{number}")).collect();
        let list: Vec<Value> = hooks.iter().map(|name| recording(world, kind, name)).collect();
        bundle.set(&format!("/hooks/{kind}"), json!(list));
        wanted.extend(hooks);
    }
    let (_, [.., all]) = through_life(world, &bundle)?;
    equal("the hooks", all, wanted)
}

fn start_container(world: &World<'_>) -> Result<()> {
    let mut bundle = with_all_hooks(world)?;
    bundle.probe(&["stat", "/hook.log"]);
    let container = world.create(&bundle)?;
    ensure!(
        !bundle.rootfs("hook.log").exists(),
        "startContainer was called during create"
    );
    container.start()?;
    container.wait_stopped()?;
    equal(
        "the program finds the hook's file: error",
        container.lines()?[0]["errno"].clone(),
        0,
    )
}

fn gets_the_state(world: &World<'_>, kind: &str, statuses: &[&str]) -> Result<()> {
    let mut bundle = with_all_hooks(world)?;
    bundle.set("/annotations", json!({"com.example.key": "value"}));
    let (id, _) = through_life(world, &bundle)?;
    let record = record_of(world, &bundle, kind)?;
    let stdin = record["stdin"].as_str().unwrap_or_default();
    let state: Value =
        serde_json::from_str(stdin).with_context(|| format!("its standard input is {stdin:?}"))?;
    equal("id", state["id"].clone(), id)?;
    equal(
        "bundle",
        state["bundle"].clone(),
        bundle.path().display().to_string(),
    )?;
    equal(
        "annotations",
        state["annotations"]["com.example.key"].clone(),
        "value",
    )?;
    ensure!(
        state["ociVersion"].is_string(),
        "ociVersion is missing in {state}"
    );
    ensure!(
        state["status"]
            .as_str()
            .is_some_and(|status| statuses.contains(&status)),
        "status: found {}, wanted one of {statuses:?}",
        state["status"]
    );
    if kind != "poststop" {
        ensure!(
            state["pid"].as_i64().is_some_and(|pid| pid > 0),
            "pid is missing in {state}"
        );
    }
    Ok(())
}

fn gets_arguments(world: &World<'_>, kind: &str) -> Result<()> {
    let bundle = with_all_hooks(world)?;
    through_life(world, &bundle)?;
    let record = record_of(world, &bundle, kind)?;
    equal("the last argument", record["args"][2].clone(), kind)?;
    equal(
        "the environment",
        record["env"].clone(),
        json!(["FIRST=1", "SECOND=two words"]),
    )
}

fn record_of(world: &World<'_>, bundle: &Bundle, kind: &str) -> Result<Value> {
    let records = if kind == "startContainer" {
        parsed(bundle.rootfs("hook.log"))?
    } else {
        recorded(world)?
    };
    records
        .into_iter()
        .find(|record| record["args"][2] == kind)
        .with_context(|| format!("{kind} was not called"))
}

fn in_runtime_namespace(world: &World<'_>, kind: &str) -> Result<()> {
    let bundle = with_all_hooks(world)?;
    through_life(world, &bundle)?;
    let record = record_of(world, &bundle, kind)?;
    for namespace in ["mnt", "pid", "net", "ipc", "uts"] {
        equal(
            namespace,
            record["namespaces"][namespace].clone(),
            own_namespace(namespace)?,
        )?;
    }
    Ok(())
}

fn create_container_namespace(world: &World<'_>) -> Result<()> {
    let bundle = with_all_hooks(world)?;
    let container = world.create(&bundle)?;
    let record = record_of(world, &bundle, "createContainer")?;
    for namespace in ["mnt", "net", "ipc", "uts"] {
        equal(
            namespace,
            record["namespaces"][namespace].clone(),
            container.namespace(namespace)?,
        )?;
    }
    Ok(())
}

fn start_container_namespace(world: &World<'_>) -> Result<()> {
    let mut bundle = with_all_hooks(world)?;
    let report = world.report(&mut bundle)?;
    let record = record_of(world, &bundle, "startContainer")?;
    for namespace in ["mnt", "pid", "net", "ipc", "uts"] {
        equal(
            namespace,
            record["namespaces"][namespace].clone(),
            report["namespaces"][namespace].clone(),
        )?;
    }
    Ok(())
}
