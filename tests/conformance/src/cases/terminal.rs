//! config.md, "Process": `terminal` and `consoleSize`; config-linux.md's `/dev/console`.

use std::fs::File;
use std::io::Write;
use std::thread;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::{equal, worked};
use crate::bundle::Bundle;
use crate::case::{Case, must};
use crate::console::{ConsoleSocket, read_to_hangup};
use crate::container::Container;
use crate::world::World;

const PROCESS: &str = "config.md#process";

pub fn cases() -> Vec<Case> {
    vec![
        must(
            "terminal.is_attached_to_the_standard_streams",
            PROCESS,
            "terminal: a pseudoterminal pair is allocated for the process and the pseudoterminal pty is duplicated on the process's standard streams",
            |world| {
                let mut bundle = world.bundle()?;
                let lines = on_terminal(world, bundle.probe(&["report"]), &[])?;
                equal(
                    "the standard streams are terminals",
                    lines[0]["tty"].clone(),
                    json!([true, true, true]),
                )
            },
        ),
        must(
            "terminal.controls_the_process",
            PROCESS,
            "terminal specifies whether a terminal is attached to the process",
            |world| {
                let mut bundle = world.bundle()?;
                let lines = on_terminal(world, bundle.probe(&["report", "open", "/dev/tty"]), &[])?;
                equal(
                    "the foreground group",
                    lines[0]["foreground"].clone(),
                    lines[0]["pgid"].clone(),
                )?;
                worked(&lines[1])
            },
        ),
        must(
            "terminal.is_at_dev_console",
            "config-linux.md#default-devices",
            "/dev/console is set up if terminal is enabled in the config by bind mounting the pseudoterminal pty to /dev/console",
            |world| {
                let mut bundle = world.bundle()?;
                let lines = on_terminal(
                    world,
                    bundle.probe(&["stat", "/dev/console", "stat", "/proc/self/fd/0"]),
                    &[],
                )?;
                equal("type", lines[0]["type"].clone(), "char")?;
                equal("major", lines[0]["major"].clone(), lines[1]["major"].clone())?;
                equal("minor", lines[0]["minor"].clone(), lines[1]["minor"].clone())
            },
        ),
        must(
            "terminal.has_the_console_size",
            PROCESS,
            "consoleSize specifies the console size in characters of the terminal",
            |world| {
                let mut bundle = world.bundle()?;
                bundle.set("/process/consoleSize", json!({"height": 37, "width": 91}));
                let lines = on_terminal(world, bundle.probe(&["report"]), &[])?;
                equal(
                    "rows and columns",
                    [lines[0]["rows"].clone(), lines[0]["columns"].clone()],
                    [json!(37), json!(91)],
                )
            },
        ),
        must(
            "terminal.console_size_is_ignored_without",
            PROCESS,
            "Runtimes MUST ignore consoleSize if terminal is false or unset",
            |world| {
                let mut bundle = world.bundle()?;
                bundle.set("/process/consoleSize", json!({"height": 37, "width": 91}));
                let report = world.report(&mut bundle)?;
                equal(
                    "the standard streams are terminals",
                    report["tty"].clone(),
                    json!([false, false, false]),
                )
            },
        ),
        must(
            "terminal.is_off_by_default",
            PROCESS,
            "terminal … defaults to false",
            |world| {
                let mut bundle = world.bundle()?;
                bundle.remove("/process/terminal");
                let report = world.report(&mut bundle)?;
                equal(
                    "the standard streams are terminals",
                    report["tty"].clone(),
                    json!([false, false, false]),
                )
            },
        ),
        must(
            "terminal.takes_what_is_typed",
            PROCESS,
            "terminal specifies whether a terminal is attached to the process",
            |world| {
                let mut bundle = world.bundle()?;
                bundle.shell("read line; echo \"got <$line>\"");
                let (container, terminal) = create(world, &bundle)?;
                let mut keyboard = terminal.try_clone()?;
                container.start()?;
                keyboard
                    .write_all(b"hello there\n")
                    .context("the terminal takes nothing")?;
                let screen = thread::spawn(move || read_to_hangup(terminal));
                container.wait_stopped()?;
                drop(keyboard);
                let screen = screen.join().unwrap_or_default();
                ensure!(
                    screen.contains("got <hello there>"),
                    "the screen shows {screen:?}"
                );
                Ok(())
            },
        ),
        must(
            "terminal.interrupts_the_foreground",
            PROCESS,
            "terminal specifies whether a terminal is attached to the process",
            |world| {
                let mut bundle = world.bundle()?;
                bundle.shell("trap 'echo interrupted; exit 7' INT; echo ready; while :; do sleep 0.1; done");
                let (container, mut terminal) = create(world, &bundle)?;
                container.start()?;
                let mut screen = String::new();
                let mut buffer = [0; 256];
                while !screen.contains("ready") {
                    let count =
                        std::io::Read::read(&mut terminal, &mut buffer).context("the terminal was closed")?;
                    screen.push_str(&String::from_utf8_lossy(&buffer[..count]));
                }
                terminal
                    .write_all(b"\x03")
                    .context("the terminal takes nothing")?;
                let rest = thread::spawn(move || read_to_hangup(terminal));
                container.wait_stopped()?;
                let rest = rest.join().unwrap_or_default();
                ensure!(
                    rest.contains("interrupted"),
                    "the screen shows {screen:?} and {rest:?}"
                );
                Ok(())
            },
        ),
        must(
            "terminal.without_console_socket_is_an_error",
            PROCESS,
            "as runc does: create has no terminal to give away",
            |world| {
                let mut bundle = world.bundle()?;
                bundle.set("/process/terminal", json!(true));
                world.refused(&bundle).map(drop)
            },
        )
        .practice(),
    ]
}

fn create<'w>(world: &'w World<'_>, bundle: &Bundle) -> Result<(Container<'w>, File)> {
    let mut bundle = bundle.clone();
    bundle.set("/process/terminal", json!(true));
    let socket = ConsoleSocket::new(world.path())?;
    let path = socket.path().display().to_string();
    let container = Container::create(world, &bundle, &["--console-socket", &path])?;
    Ok((container, socket.receive()?))
}

/// What the probe says on a terminal.
fn on_terminal(world: &World<'_>, bundle: &Bundle, typed: &[u8]) -> Result<Vec<Value>> {
    let (container, mut terminal) = create(world, bundle)?;
    terminal.write_all(typed)?;
    container.start()?;
    let screen = thread::spawn(move || read_to_hangup(terminal));
    container.wait_stopped()?;
    let screen = screen.join().unwrap_or_default();
    screen
        .lines()
        .map(|line| serde_json::from_str(line).with_context(|| format!("the screen shows {line:?}")))
        .collect()
}
