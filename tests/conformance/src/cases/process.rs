//! config.md, "Process": arguments, environment, folder, and the Linux properties that are no sets or limits.

use std::fs;

use anyhow::{Context, Result, ensure};
use serde_json::json;

use super::{equal, status_line, text};
use crate::case::{Case, must, skip};
use crate::world::World;

const PROCESS: &str = "config.md#process";
const LINUX: &str = "config.md#linux-process";

pub fn cases() -> Vec<Case> {
    vec![
        must(
            "process.args_are_passed_as_they_are",
            PROCESS,
            "args with similar semantics to execvp's argv",
            |world| {
                let mut bundle = world.bundle()?;
                let wanted = [
                    "",
                    " ",
                    "two words",
                    "$HOME",
                    "quote\"'\\",
                    "line\nbreak",
                    "grüße",
                    "--flag=x",
                ];
                let mut operations = vec!["argv"];
                operations.extend(wanted);
                let lines = world.probe(&mut bundle, &operations)?;
                equal("arguments", lines[0]["args"].clone(), json!(wanted))
            },
        ),
        must(
            "process.args_0_is_looked_up_in_path",
            PROCESS,
            "at least one entry is REQUIRED, and that entry is used with the same semantics as execvp's file",
            |world| {
                let mut bundle = world.bundle()?;
                bundle.set("/process/args", json!(["probe", "echo", "found"]));
                bundle.set("/process/env", json!(["PATH=/nowhere:/bin"]));
                equal("the program", world.run(&bundle)?[0]["text"].clone(), "found")
            },
        ),
        must(
            "process.args_0_relative_to_cwd",
            PROCESS,
            "that entry is used with the same semantics as execvp's file: with a slash in it, it is a path",
            |world| {
                let mut bundle = world.bundle()?;
                bundle
                    .set("/process/args", json!(["./probe", "echo", "found"]))
                    .set("/process/cwd", json!("/bin"));
                equal("the program", world.run(&bundle)?[0]["text"].clone(), "found")
            },
        ),
        must(
            "process.empty_args_are_an_error",
            PROCESS,
            "at least one entry is REQUIRED",
            |world| {
                let mut bundle = world.bundle()?;
                bundle.set("/process/args", json!([]));
                world.refused(&bundle).map(drop)
            },
        ),
        must(
            "process.missing_args_are_an_error",
            PROCESS,
            "at least one entry is REQUIRED",
            |world| {
                let mut bundle = world.bundle()?;
                bundle.remove("/process/args");
                world.refused(&bundle).map(drop)
            },
        ),
        must(
            "process.cwd_is_the_working_directory",
            PROCESS,
            "cwd is the working directory that will be set for the executable",
            |world| {
                let mut bundle = world.bundle()?;
                bundle.set("/process/cwd", json!("/var/tmp"));
                equal(
                    "the folder",
                    world.report(&mut bundle)?["cwd"].clone(),
                    "/var/tmp",
                )
            },
        ),
        must(
            "process.relative_cwd_is_an_error",
            PROCESS,
            "cwd: this value MUST be an absolute path",
            |world| {
                let mut bundle = world.bundle()?;
                bundle.set("/process/cwd", json!("var/tmp"));
                world.refused(&bundle).map(drop)
            },
        ),
        must(
            "process.missing_cwd_is_an_error",
            PROCESS,
            "cwd (string, REQUIRED)",
            |world| {
                let mut bundle = world.bundle()?;
                bundle.remove("/process/cwd");
                world.refused(&bundle).map(drop)
            },
        ),
        must(
            "process.cwd_that_is_not_there_is_made",
            PROCESS,
            "as runc does: engines give working directories images lack",
            |world| {
                let mut bundle = world.bundle()?;
                bundle.set("/process/cwd", json!("/srv/app"));
                equal(
                    "the folder",
                    world.report(&mut bundle)?["cwd"].clone(),
                    "/srv/app",
                )
            },
        )
        .practice(),
        must(
            "process.cwd_may_be_in_a_mount",
            PROCESS,
            "cwd is the working directory that will be set for the executable",
            |world| {
                let mut bundle = world.bundle()?;
                bundle
                    .mount("/data", "tmpfs", "tmpfs", &[])
                    .set("/process/cwd", json!("/data"));
                equal("the folder", world.report(&mut bundle)?["cwd"].clone(), "/data")
            },
        ),
        must(
            "process.cwd_behind_a_link_stays_inside",
            PROCESS,
            "cwd is the working directory that will be set for the executable",
            |world| {
                let mut bundle = world.bundle()?;
                std::os::unix::fs::symlink("../../../../../../tmp", bundle.rootfs("link"))?;
                bundle.set("/process/cwd", json!("/link"));
                equal("the folder", world.report(&mut bundle)?["cwd"].clone(), "/tmp")
            },
        ),
        must(
            "process.env_is_what_is_listed",
            PROCESS,
            "env with the same semantics as IEEE Std 1003.1-2008's environ",
            environment,
        ),
        must(
            "process.env_values_are_passed_as_they_are",
            PROCESS,
            "env with the same semantics as IEEE Std 1003.1-2008's environ",
            |world| {
                let mut bundle = world.bundle()?;
                let odd = json!([
                    "PATH=/bin",
                    "EMPTY=",
                    "EQUALS=a=b",
                    "QUOTES='\"",
                    "LINES=one\ntwo",
                    "UMLAUT=ü"
                ]);
                bundle.set("/process/env", odd.clone());
                let found = world.report(&mut bundle)?["env"].clone();
                for wanted in odd.as_array().into_iter().flatten() {
                    ensure!(
                        found.as_array().is_some_and(|list| list.contains(wanted)),
                        "{wanted} is not in {found}"
                    );
                }
                Ok(())
            },
        ),
        must(
            "process.env_may_be_absent",
            PROCESS,
            "env (array of strings, OPTIONAL)",
            |world| {
                let mut bundle = world.bundle()?;
                bundle.remove("/process/env");
                world.report(&mut bundle).map(drop)
            },
        ),
        must(
            "process.no_new_privileges",
            LINUX,
            "setting noNewPrivileges to true prevents the process from gaining additional privileges",
            |world| {
                let mut bundle = world.bundle()?;
                bundle.set("/process/noNewPrivileges", json!(true));
                equal(
                    "NoNewPrivs",
                    status_line(&world.report(&mut bundle)?, "NoNewPrivs")?,
                    "1",
                )
            },
        ),
        must(
            "process.new_privileges_are_possible_otherwise",
            LINUX,
            "setting noNewPrivileges to true prevents the process from gaining additional privileges",
            |world| {
                let mut bundle = world.bundle()?;
                bundle.remove("/process/noNewPrivileges");
                equal(
                    "NoNewPrivs",
                    status_line(&world.report(&mut bundle)?, "NoNewPrivs")?,
                    "0",
                )
            },
        ),
        must(
            "process.oom_score_adj",
            LINUX,
            "If oomScoreAdj is set, the runtime MUST set oom_score_adj to the given value",
            |world| {
                let mut bundle = world.bundle()?;
                bundle.set("/process/oomScoreAdj", json!(321));
                equal(
                    "oom_score_adj",
                    text(&world.report(&mut bundle)?, "oom_score_adj")?.trim(),
                    "321",
                )
            },
        ),
        must(
            "process.oom_score_adj_not_set_is_not_changed",
            LINUX,
            "If oomScoreAdj is not set, the runtime MUST NOT change the value of oom_score_adj",
            |world| {
                let own = fs::read_to_string("/proc/self/oom_score_adj")?;
                let report = world.report(&mut world.bundle()?)?;
                equal(
                    "oom_score_adj",
                    text(&report, "oom_score_adj")?.trim(),
                    own.trim(),
                )
            },
        ),
        must(
            "process.apparmor_profile",
            LINUX,
            "apparmorProfile specifies the name of the AppArmor profile for the process",
            apparmor,
        ),
        must(
            "process.scheduler",
            LINUX,
            "scheduler.policy represents the scheduling policy; nice is the nice value for the process",
            |world| {
                let mut bundle = world.bundle()?;
                bundle.set("/process/scheduler", json!({"policy": "SCHED_BATCH", "nice": 7}));
                let report = world.report(&mut bundle)?;
                equal("policy", report["scheduler"].clone(), 3)?;
                equal("nice", report["nice"].clone(), 7)
            },
        ),
        must(
            "process.io_priority",
            LINUX,
            "ioPriority configures the I/O priority settings for the container's processes",
            |world| {
                let mut bundle = world.bundle()?;
                bundle.set(
                    "/process/ioPriority",
                    json!({"class": "IOPRIO_CLASS_BE", "priority": 6}),
                );
                equal(
                    "I/O priority",
                    world.report(&mut bundle)?["ioprio"].clone(),
                    (2 << 13) | 6,
                )
            },
        ),
        must(
            "process.io_priority_of_an_unknown_class_is_an_error",
            "config.md#valid-values",
            "Runtimes MUST generate an error when invalid or unsupported values are encountered",
            |world| {
                let mut bundle = world.bundle()?;
                bundle.set(
                    "/process/ioPriority",
                    json!({"class": "IOPRIO_CLASS_BEST", "priority": 6}),
                );
                world.refused(&bundle).map(drop)
            },
        ),
        must(
            "process.gets_no_descriptors_but_the_standard_ones",
            PROCESS,
            "as runc does: what engines keep open is not the container's",
            |world| {
                let report = world.report(&mut world.bundle()?)?;
                equal("descriptors", report["fds"].clone(), json!([0, 1, 2]))
            },
        )
        .practice(),
        must(
            "process.is_the_first_of_its_pid_namespace",
            "config-linux.md#namespaces",
            "pid: processes inside the container will only be able to see other processes inside the same container",
            |world| equal("pid", world.report(&mut world.bundle()?)?["pid"].clone(), 1),
        ),
        must(
            "process.leads_a_session",
            PROCESS,
            "as runc does: signals of the engine's terminal don't reach the container",
            |world| {
                let report = world.report(&mut world.bundle()?)?;
                equal("session", report["sid"].clone(), report["pid"].clone())
            },
        )
        .practice(),
    ]
}

fn environment(world: &World<'_>) -> Result<()> {
    let mut bundle = world.bundle()?;
    let wanted = ["PATH=/bin", "ONE=1", "TWO=2", "HOME=/home/user"];
    bundle.set("/process/env", json!(wanted));
    let report = world.report(&mut bundle)?;
    let found = report["env"].as_array().context("no environment")?;
    for variable in wanted {
        ensure!(
            found.iter().any(|one| one == variable),
            "{variable} is not in {found:?}"
        );
    }
    // Nothing of the runtime's or the engine's own; some runtimes add HOME and the like.
    for variable in found.iter().filter_map(|one| one.as_str()) {
        ensure!(
            wanted.contains(&variable) || variable.starts_with("TERM="),
            "{variable} was not listed"
        );
    }
    Ok(())
}

fn apparmor(world: &World<'_>) -> Result<()> {
    let enabled = fs::read_to_string("/sys/module/apparmor/parameters/enabled").unwrap_or_default();
    if enabled.trim() != "Y" {
        return skip("this host has no AppArmor");
    }
    let mut bundle = world.bundle()?;
    bundle.set("/process/apparmorProfile", json!("unconfined"));
    equal(
        "the profile",
        text(&world.report(&mut bundle)?, "apparmor")?.trim(),
        "unconfined",
    )
}
