//! runtime.md, "Kill".

use anyhow::{Result, ensure};
use nix::sys::wait::WaitStatus;

use super::equal;
use crate::case::{Case, must};
use crate::world::World;

const KILL: &str = "runtime.md#kill";

pub fn cases() -> Vec<Case> {
    let mut cases = vec![
        must(
            "kill.without_id_is_an_error",
            KILL,
            "This operation MUST generate an error if it is not provided the container ID",
            |world| world.invoke(&["kill"])?.expect_error().map(drop),
        ),
        must(
            "kill.of_a_missing_container_is_an_error",
            KILL,
            "Attempting to send a signal to a container that is neither created nor running MUST generate an error",
            |world| {
                world
                    .invoke(&["kill", &world.new_id(), "TERM"])?
                    .expect_error()
                    .map(drop)
            },
        ),
        must(
            "kill.of_a_stopped_container_is_an_error",
            KILL,
            "Attempting to send a signal to a container that is neither created nor running MUST have no effect on the container and MUST generate an error",
            |world| {
                let mut bundle = world.bundle()?;
                let container = world.create(bundle.probe(&["exit", "0"]))?;
                container.start()?;
                container.wait_stopped()?;
                container.invoke("kill", &["TERM"])?.expect_error()?;
                equal("status", container.status()?, "stopped")
            },
        ),
        must(
            "kill.of_a_created_container_stops_it",
            KILL,
            "This operation MUST send the specified signal to the container process",
            |world| {
                let container = world.create(&world.bundle()?)?;
                container.kill("KILL")?;
                container.wait_stopped()?;
                ensure!(
                    container.stdout().is_empty(),
                    "the program ran: {:?}",
                    container.stdout()
                );
                Ok(())
            },
        ),
        must(
            "kill.by_sigkill_stops_a_program_that_ignores_all_else",
            KILL,
            "This operation MUST send the specified signal to the container process",
            |world| {
                let mut bundle = world.bundle()?;
                let container = world.create(bundle.probe(&["pause"]))?;
                container.start()?;
                container.wait_printed("pause")?;
                container.kill("KILL")?;
                let ended = container.wait_stopped()?;
                ensure!(
                    matches!(
                        ended,
                        WaitStatus::Signaled(_, nix::sys::signal::Signal::SIGKILL, _)
                    ),
                    "its parent sees {ended:?}"
                );
                Ok(())
            },
        ),
        must(
            "kill.of_an_unknown_signal_is_an_error_without_effect",
            "runtime.md#errors",
            "Unless otherwise stated, generating an error MUST leave the state of the environment as if the operation were never attempted",
            |world| {
                let mut bundle = world.bundle()?;
                let container = world.create(bundle.probe(&["pause"]))?;
                container.start()?;
                container.invoke("kill", &["NONSENSE"])?.expect_error()?;
                equal("status", container.status()?, "running")
            },
        ),
        must(
            "kill.ends_other_processes_with_the_first",
            KILL,
            "When the container process has exited, for whatever reason, the status property MUST be stopped",
            |world| {
                let mut bundle = world.bundle()?;
                let container = world.create(bundle.shell("sleep 1000 & echo ready; wait"))?;
                container.start()?;
                container.wait_printed("ready")?;
                container.kill("KILL")?;
                container.wait_stopped()?;
                container.delete()
            },
        ),
    ];
    for (name, number) in [
        ("TERM", 15),
        ("SIGHUP", 1),
        ("USR1", 10),
        ("SIGINT", 2),
        ("QUIT", 3),
        ("37", 37),
    ] {
        cases.push(must(
            format!("kill.sends_{}", name.to_lowercase()),
            KILL,
            "This operation MUST send the specified signal to the container process",
            move |world| arrives(world, name, number),
        ));
    }
    cases
}

fn arrives(world: &World<'_>, signal: &str, number: i64) -> Result<()> {
    let mut bundle = world.bundle()?;
    let container = world.create(bundle.probe(&["signal"]))?;
    container.start()?;
    container.wait_printed("waiting")?;
    container.kill(signal)?;
    container.wait_stopped()?;
    equal(
        "the signal the process got",
        container.lines()?[1]["signal"].clone(),
        number,
    )
}
