//! What no document says and every engine relies on: runc's command line beyond the five operations.

use std::fs;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::process::Stdio;

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use nix::sys::wait::WaitStatus;
use serde_json::{Value, json};

use super::equal;
use crate::case::{Case, must};
use crate::console::{ConsoleSocket, read_to_hangup};
use crate::container::Container;
use crate::runtime::finish;
use crate::world::World;

const CLI: &str = "the command line engines use";

pub fn cases() -> Vec<Case> {
    vec![
        must(
            "pid_file.process_ends_with_the_exit_code",
            CLI,
            "conmon and shims wait for the process of the pid file: its status is the container's",
            |world| {
                let mut bundle = world.bundle()?;
                let container = world.create(bundle.probe(&["exit", "42"]))?;
                container.start()?;
                equal("its parent sees", exit_code(container.wait_stopped()?), Some(42))
            },
        ),
        must(
            "pid_file.process_ends_by_the_signal",
            CLI,
            "conmon and shims wait for the process of the pid file: its status is the container's",
            |world| {
                let mut bundle = world.bundle()?;
                let container = world.create(bundle.probe(&["pause"]))?;
                container.start()?;
                container.wait_printed("pause")?;
                container.kill("KILL")?;
                let ended = container.wait_stopped()?;
                ensure!(
                    matches!(ended, WaitStatus::Signaled(_, Signal::SIGKILL, _)),
                    "its parent sees {ended:?}"
                );
                Ok(())
            },
        ),
        must(
            "pid_file.process_takes_signals",
            CLI,
            "systemd and shims send signals to the process of the pid file",
            |world| {
                let mut bundle = world.bundle()?;
                let container = world.create(bundle.probe(&["signal"]))?;
                container.start()?;
                container.wait_printed("waiting")?;
                nix::sys::signal::kill(nix::unistd::Pid::from_raw(container.pid), Signal::SIGTERM)?;
                container.wait_stopped()?;
                equal("the signal", container.lines()?[1]["signal"].clone(), 15)
            },
        ),
        must(
            "pid_file.mount_namespace_has_the_containers_files",
            CLI,
            "podman cp enters the mount namespace of the process of the pid file and takes its root for the container's",
            mount_namespace,
        )
        .on_host(),
        must(
            "delete.force_ends_a_running_container",
            CLI,
            "delete --force",
            |world| {
                let mut bundle = world.bundle()?;
                let container = world.create(bundle.probe(&["pause"]))?;
                container.start()?;
                world.invoke(&["delete", "--force", &container.id])?.expect_ok()?;
                container.invoke("state", &[])?.expect_error()?;
                ensure!(!is_alive(container.pid), "its process is still alive");
                Ok(())
            },
        ),
        must(
            "delete.force_of_a_missing_container_is_no_error",
            CLI,
            "delete --force",
            |world| {
                let id = world.new_id();
                world
                    .invoke(&["delete", &id])?
                    .expect_error()
                    .context("without --force")?;
                world.invoke(&["delete", "--force", &id])?.expect_ok().map(drop)
            },
        ),
        must(
            "run.waits_and_passes_the_exit_code_on",
            CLI,
            "run: create, start, wait, delete in one",
            |world| {
                let mut bundle = world.bundle()?;
                bundle.shell("echo out; echo err >&2; exit 5").write()?;
                let (id, path) = (world.new_id(), bundle.path().display().to_string());
                let output = world.invoke(&["run", "--bundle", &path, &id])?;
                equal("exit code", output.status.code(), Some(5))?;
                equal("standard output", output.stdout.as_str(), "out\n")?;
                ensure!(
                    output.stderr.contains("err\n"),
                    "standard error is {:?}",
                    output.stderr
                );
                world.invoke(&["state", &id])?.expect_error().map(drop)
            },
        ),
        must(
            "run.passes_standard_input",
            CLI,
            "the process inherits the standard streams of run and create",
            standard_input,
        ),
        must("list.shows_all_containers", CLI, "list --format json", |world| {
            let mut bundle = world.bundle()?;
            let container = world.create(bundle.probe(&["pause"]))?;
            container.start()?;
            let text = world.invoke(&["list", "--format", "json"])?.expect_ok()?;
            let list: Vec<Value> =
                serde_json::from_str(&text).with_context(|| format!("it printed {text:?}"))?;
            let entry = list
                .iter()
                .find(|entry| entry["id"] == container.id.as_str())
                .context("it is not listed")?;
            equal("status", entry["status"].clone(), "running")?;
            equal("pid", entry["pid"].clone(), container.pid)?;
            equal(
                "bundle",
                entry["bundle"].clone(),
                bundle.path().display().to_string(),
            )
        }),
        must("pause.freezes_until_resume", CLI, "pause, resume", pause),
        must("ps.lists_the_processes", CLI, "ps --format json", |world| {
            let mut bundle = world.bundle()?;
            let container = world.create(bundle.shell("sleep 1000 & echo ready; wait"))?;
            container.start()?;
            container.wait_printed("ready")?;
            let text = world
                .invoke(&["ps", "--format", "json", &container.id])?
                .expect_ok()?;
            let pids: Vec<i64> =
                serde_json::from_str(&text).with_context(|| format!("it printed {text:?}"))?;
            ensure!(pids.len() >= 2, "it printed {text:?}");
            Ok(())
        }),
        must("exec.runs_in_the_container", CLI, "exec", |world| {
            let container = paused(world)?;
            let output = container.exec(&[], &["/bin/probe", "report"])?;
            let report: Value = serde_json::from_str(&output.expect_ok()?)?;
            let init = container.lines()?[0].clone();
            for kind in ["mnt", "pid", "net", "ipc", "uts"] {
                equal(
                    kind,
                    report["namespaces"][kind].clone(),
                    init["namespaces"][kind].clone(),
                )?;
            }
            equal("hostname", report["hostname"].clone(), "conformance")
        }),
        must("exec.passes_the_exit_code_on", CLI, "exec", |world| {
            let container = paused(world)?;
            let output = container.exec(&[], &["/bin/sh", "-c", "echo out; echo err >&2; exit 9"])?;
            equal("exit code", output.status.code(), Some(9))?;
            equal("standard output", output.stdout.as_str(), "out\n")?;
            ensure!(
                output.stderr.contains("err\n"),
                "standard error is {:?}",
                output.stderr
            );
            Ok(())
        }),
        must("exec.takes_options", CLI, "exec --user --cwd --env", |world| {
            let container = paused(world)?;
            let options = ["--user", "1000:1001", "--cwd", "/var/tmp", "--env", "ADDED=1"];
            let output = container.exec(&options, &["/bin/probe", "report"])?;
            let report: Value = serde_json::from_str(&output.expect_ok()?)?;
            equal("uid", report["uid"].clone(), 1000)?;
            equal("gid", report["gid"].clone(), 1001)?;
            equal("cwd", report["cwd"].clone(), "/var/tmp")?;
            ensure!(
                report["env"].to_string().contains("ADDED=1"),
                "the environment is {}",
                report["env"]
            );
            Ok(())
        }),
        must(
            "exec.takes_a_process_file",
            CLI,
            "exec --process FILE --pid-file FILE --detach, as conmon and shims do",
            process_file,
        ),
        must(
            "exec.on_a_terminal_prints_all",
            CLI,
            "exec --tty --console-socket SOCKET --detach, as conmon and shims do",
            |world| {
                let container = paused(world)?;
                let socket = ConsoleSocket::new(world.path())?;
                let path = socket.path().display().to_string();
                let pid_file = world.path().join("exec.pid").display().to_string();
                let options = [
                    "--detach",
                    "--tty",
                    "--console-socket",
                    &path,
                    "--pid-file",
                    &pid_file,
                ];
                container
                    .exec(&options, &["/bin/sh", "-c", "test -t 0 && echo also a terminal"])?
                    .expect_ok()?;
                let screen = read_to_hangup(socket.receive()?);
                let pid: i32 = fs::read_to_string(&pid_file)
                    .context("there is no pid file")?
                    .trim()
                    .parse()?;
                let status = nix::sys::wait::waitpid(nix::unistd::Pid::from_raw(pid), None)?;
                equal("its parent sees", exit_code(status), Some(0))?;
                equal("the screen", screen.as_str(), "also a terminal\n")
            },
        ),
        must("exec.in_a_stopped_container_is_an_error", CLI, "exec", |world| {
            let mut bundle = world.bundle()?;
            let container = world.create(bundle.probe(&["exit", "0"]))?;
            container.start()?;
            container.wait_stopped()?;
            container.exec(&[], &["/bin/true"])?.expect_error().map(drop)
        }),
        must("exec.of_a_missing_program_is_an_error", CLI, "exec", |world| {
            let container = paused(world)?;
            let output = container.exec(&[], &["/bin/no-such-program"])?;
            ensure!(!output.ok(), "it succeeded");
            equal("status", container.status()?, "running")
        }),
        must("exec.does_not_outlive_the_container", CLI, "exec", |world| {
            let container = paused(world)?;
            let mut command = world.command(&["exec", &container.id, "/bin/sleep", "1000"]);
            let mut child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn()?;
            let listed = || {
                container
                    .exec(&[], &["/bin/sh", "-c", "cat /proc/[0-9]*/cmdline"])
                    .map(|output| output.stdout)
            };
            while !listed()?.contains("/bin/sleep") {
                std::thread::sleep(std::time::Duration::from_millis(10));
            }
            container.kill("KILL")?;
            container.wait_stopped()?;
            let status = crate::runtime::wait(&mut child, "exec")?;
            ensure!(!status.success(), "it ended with {status}");
            Ok(())
        }),
        must("update.changes_limits", CLI, "update --resources FILE", |world| {
            let mut bundle = world.bundle()?;
            bundle.set("/linux/resources/pids", json!({"limit": 20}));
            bundle.shell("echo ready; read line; exec /bin/probe forks 60");
            let fifo = world.path().join("input");
            nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU)?;
            bundle.write()?;
            let (id, out) = (world.new_id(), world.path().join("output"));
            let keyboard = fs::OpenOptions::new()
                .read(true)
                .write(true)
                .custom_flags(nix::libc::O_CLOEXEC)
                .open(&fifo)?;
            let mut command = world.command(&["create", "--bundle"]);
            command
                .arg(bundle.path())
                .arg("--pid-file")
                .arg(world.path().join(format!("{id}.pid")))
                .arg(&id);
            command
                .stdin(keyboard.try_clone()?)
                .stdout(fs::File::create(&out)?)
                .stderr(Stdio::null());
            let status = crate::runtime::wait(&mut command.spawn()?, "create")?;
            ensure!(status.success(), "`create` failed");
            let container = Container::of(world, &id)?;
            container.start()?;
            let resources = world.path().join("resources.json");
            fs::write(&resources, json!({"pids": {"limit": 200}}).to_string())?;
            world
                .invoke(&["update", "--resources", &resources.display().to_string(), &id])?
                .expect_ok()?;
            (&keyboard).write_all(b"go\n")?;
            container.wait_stopped()?;
            let printed = fs::read_to_string(&out)?;
            ensure!(
                printed.contains("\"count\":60"),
                "after raising the limit to 200: {printed:?}"
            );
            Ok(())
        }),
        must("events.stats_are_json", CLI, "events --stats", |world| {
            let container = paused(world)?;
            let text = world.invoke(&["events", "--stats", &container.id])?.expect_ok()?;
            let event: Value = serde_json::from_str(&text).with_context(|| format!("it printed {text:?}"))?;
            equal("type", event["type"].clone(), "stats")?;
            equal("id", event["id"].clone(), container.id.as_str())?;
            let used = event
                .pointer("/data/memory/usage/usage")
                .and_then(Value::as_u64)
                .unwrap_or_default();
            ensure!(used > 0, "no memory is used: {event}");
            Ok(())
        }),
        must("spec.writes_a_configuration_that_runs", CLI, "spec", |world| {
            let bundle = world.bundle()?;
            let path = bundle.path().display().to_string();
            let mut command = world.command(&["spec"]);
            command.current_dir(bundle.path());
            finish(&mut command, &world.scratch())?.expect_ok()?;
            let file = bundle.path().join("config.json");
            let mut config: Value = serde_json::from_slice(&fs::read(&file)?)?;
            config["process"]["terminal"] = json!(false);
            config["process"]["args"] = json!(["/bin/echo", "it runs"]);
            // The template asks for more than every host may give.
            config["process"]["rlimits"] = json!([]);
            fs::write(&file, config.to_string())?;
            let output = world.invoke(&["run", "--bundle", &path, &world.new_id()])?;
            equal("standard output", output.expect_ok()?.as_str(), "it runs\n")
        }),
        must(
            "log.json_lines_say_what_went_wrong",
            CLI,
            "--log FILE --log-format json",
            |world| {
                let mut bundle = world.bundle()?;
                bundle
                    .set("/process/args", json!(["/bin/no-such-program"]))
                    .write()?;
                let log = world.path().join("log.json");
                let mut command = world.command(&["--log"]);
                command
                    .arg(&log)
                    .args(["--log-format", "json", "run", "--bundle"])
                    .arg(bundle.path())
                    .arg(world.new_id());
                finish(&mut command, &world.scratch())?.expect_error()?;
                let text = fs::read_to_string(&log).context("there is no log file")?;
                let last: Value = text
                    .lines()
                    .last()
                    .map(serde_json::from_str)
                    .context("the log is empty")??;
                equal("level", last["level"].clone(), "error")?;
                ensure!(
                    last["msg"]
                        .as_str()
                        .is_some_and(|message| message.contains("no-such-program")),
                    "it says {last}"
                );
                ensure!(last["time"].is_string(), "it has no time: {last}");
                Ok(())
            },
        ),
    ]
    .into_iter()
    .map(Case::practice)
    .collect()
}

fn exit_code(status: WaitStatus) -> Option<i32> {
    match status {
        WaitStatus::Exited(_, code) => Some(code),
        _ => None,
    }
}

/// Whether a process is there and no zombie.
fn is_alive(pid: i32) -> bool {
    fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|line| !line.contains(") Z "))
}

/// A container whose process has reported and waits.
fn paused<'w>(world: &'w World<'_>) -> Result<Container<'w>> {
    let mut bundle = world.bundle()?;
    let container = world.create(bundle.probe(&["report", "pause"]))?;
    container.start()?;
    container.wait_printed("\"pause\"")?;
    Ok(container)
}

fn mount_namespace(world: &World<'_>) -> Result<()> {
    let mut bundle = world.bundle()?;
    let source = super::mounts::folder(world, "bound")?;
    bundle.mount("/data", "bind", &source, &["rbind"]);
    let container = world.create(bundle.probe(&["write", "/written", "inside", "pause"]))?;
    container.start()?;
    container.wait_printed("pause")?;
    let mut command = std::process::Command::new("nsenter");
    command.arg(format!("--mount=/proc/{}/ns/mnt", container.pid));
    // Programs and files are those of the container.
    command.args([
        "/bin/probe",
        "read",
        "/written",
        "read",
        "/data/name",
        "write",
        "/answer",
        "outside",
    ]);
    let text = finish(&mut command, &world.scratch())?.expect_ok()?;
    let lines: Vec<Value> = text.lines().map(serde_json::from_str).collect::<Result<_, _>>()?;
    equal("a file of the root", lines[0]["data"].clone(), "inside")?;
    equal("a file bound into it", lines[1]["data"].clone(), "bound")?;
    let answer = container.exec(&[], &["/bin/cat", "/answer"])?.expect_ok()?;
    equal("what was written there", answer.as_str(), "outside")
}

fn standard_input(world: &World<'_>) -> Result<()> {
    let mut bundle = world.bundle()?;
    bundle.probe(&["stdin"]).write()?;
    let input = world.path().join("input");
    fs::write(&input, "what is typed\n")?;
    let mut command = world.command(&["run", "--bundle"]);
    command
        .arg(bundle.path())
        .arg(world.new_id())
        .stdin(fs::File::open(&input)?);
    let text = finish(&mut command, &world.scratch())?.expect_ok()?;
    let line: Value = serde_json::from_str(&text).with_context(|| format!("it printed {text:?}"))?;
    equal("what the process read", line["data"].clone(), "what is typed\n")
}

fn pause(world: &World<'_>) -> Result<()> {
    let mut bundle = world.bundle()?;
    let container = world.create(bundle.shell("while :; do echo tick; sleep 0.02; done"))?;
    container.start()?;
    container.wait_printed("tick")?;
    container.invoke("pause", &[])?.expect_ok()?;
    equal("status", container.status()?, "paused")?;
    // What was on its way when it was paused may still arrive.
    std::thread::sleep(std::time::Duration::from_millis(200));
    let before = container.stdout().len();
    std::thread::sleep(std::time::Duration::from_millis(300));
    equal("bytes printed while paused", container.stdout().len() - before, 0)?;
    container.invoke("resume", &[])?.expect_ok()?;
    equal("status", container.status()?, "running")?;
    let begin = std::time::Instant::now();
    while container.stdout().len() == before {
        ensure!(
            begin.elapsed() < crate::runtime::PATIENCE,
            "nothing is printed after resume"
        );
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    Ok(())
}

fn process_file(world: &World<'_>) -> Result<()> {
    let container = paused(world)?;
    let process = json!({
        "terminal": false, "user": {"uid": 1000, "gid": 1001}, "args": ["/bin/sh", "-c", "id -u >/tmp/who; exit 11"],
        "env": ["PATH=/bin"], "cwd": "/",
    });
    let (file, pid_file) = (world.path().join("process.json"), world.path().join("exec.pid"));
    fs::write(&file, process.to_string())?;
    container
        .exec(
            &[],
            &["/bin/sh", "-c", "mkdir -p /tmp; /bin/busybox chmod 1777 /tmp"],
        )?
        .expect_ok()?;
    let options = [
        "--detach",
        "--process",
        &file.display().to_string(),
        "--pid-file",
        &pid_file.display().to_string(),
    ];
    container.exec(&options, &[])?.expect_ok()?;
    let pid: i32 = fs::read_to_string(&pid_file)
        .context("there is no pid file")?
        .trim()
        .parse()?;
    let status = nix::sys::wait::waitpid(nix::unistd::Pid::from_raw(pid), None)
        .context("it is no child of the subreaper's")?;
    equal("its parent sees", exit_code(status), Some(11))?;
    let who = container.exec(&[], &["/bin/cat", "/tmp/who"])?.expect_ok()?;
    equal("it ran as", who.trim(), "1000")
}
