//! Containers that outlive the command that made them: created, started, stopped, paused, kept and removed.

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use hull_tests::hull::{Hull, Outcome, PATIENCE, eventually, finish};

fn ok(outcome: &Outcome) -> String {
    assert_eq!(outcome.code(), 0, "{outcome:?}");
    outcome.text()
}

/// One field of a container, as `ps` prints it.
fn field(hull: &Hull, name: &str, field: &str) -> String {
    let filter = format!("name={name}");
    let template = format!("{{{{.{field}}}}}");
    ok(&hull.run(&["ps", "-a", "--filter", &filter, "--format", &template]))
}

fn state(hull: &Hull, name: &str) -> String {
    field(hull, name, "State")
}

/// The one home in this world.
fn home(hull: &Hull, id: &str) -> PathBuf {
    hull.store_dir().join("containers").join(id)
}

fn log_lines(hull: &Hull, id: &str) -> Vec<serde_json::Value> {
    let text = fs::read_to_string(home(hull, id).join("container.log")).expect("a log");
    text.lines()
        .map(|line| serde_json::from_str(line).expect("a line of JSON"))
        .collect()
}

#[test]
fn detached_container_runs_on_and_is_stopped_started_and_removed() {
    let Some(hull) = Hull::with_images(&["busybox"]) else {
        return;
    };
    let script = "trap 'exit 3' TERM; echo ready; while :; do sleep 0.1; done";
    let id = ok(&hull.run(&["run", "-d", "--name", "web", "busybox", "/bin/sh", "-c", script]));
    assert_eq!(id.len(), 64);
    assert_eq!(state(&hull, "web"), "running");
    let again = hull.run(&["run", "-d", "--name", "web", "busybox", "/bin/true"]);
    assert_eq!(again.code(), 125, "{again:?}");
    assert!(again.stderr.contains("already in use"), "{again:?}");
    assert!(eventually(PATIENCE, || !log_lines(&hull, &id).is_empty()));
    // It ends by the code it chose, and stays.
    assert_eq!(ok(&hull.run(&["stop", "web"])), "web");
    assert_eq!(state(&hull, "web"), "exited");
    assert!(field(&hull, "web", "Status").starts_with("Exited (3) "));
    assert_eq!(ok(&hull.run(&["wait", "web"])), "3");
    assert_eq!(hull.settle(), Vec::<String>::new());
    // By the beginning of its id.
    assert_eq!(ok(&hull.run(&["start", &id[..8]])), &id[..8]);
    assert_eq!(state(&hull, "web"), "running");
    let refused = hull.run(&["rm", "web"]);
    assert_eq!(refused.code(), 1, "{refused:?}");
    assert!(refused.stderr.contains("--force"), "{refused:?}");
    assert_eq!(ok(&hull.run(&["rm", "--force", "web"])), "web");
    assert!(!home(&hull, &id).exists());
    assert_eq!(hull.settle(), Vec::<String>::new());
}

#[test]
fn created_container_boots_nothing_until_it_is_started() {
    let Some(hull) = Hull::with_images(&["busybox"]) else {
        return;
    };
    let id = ok(&hull.run(&[
        "create",
        "--name",
        "later",
        "busybox",
        "/bin/sh",
        "-c",
        "echo hello; exit 4",
    ]));
    assert_eq!(state(&hull, "later"), "created");
    assert_eq!(hull.leftovers(), Vec::<String>::new());
    let attached = hull.run(&["start", "--attach", "later"]);
    assert_eq!(
        (attached.code(), attached.text().as_str()),
        (4, "hello"),
        "{attached:?}"
    );
    // Every start has the same command in a fresh microVM, and one log.
    let attached = hull.run(&["start", "--attach", "later"]);
    assert_eq!(
        (attached.code(), attached.text().as_str()),
        (4, "hello"),
        "{attached:?}"
    );
    let lines = log_lines(&hull, &id);
    assert_eq!(lines.len(), 2, "{lines:?}");
    assert_eq!(
        (lines[1]["log"].as_str(), lines[1]["stream"].as_str()),
        (Some("hello\n"), Some("stdout"))
    );
    ok(&hull.run(&["rm", "later"]));
}

#[test]
fn files_are_kept_between_starts_where_storage_was_asked_for_and_nowhere_else() {
    let Some(hull) = Hull::with_images(&["busybox"]) else {
        return;
    };
    let script = "cat /data 2>/dev/null; echo more >> /data";
    for (storage, second) in [(true, "more"), (false, "")] {
        let mut arguments = vec!["run", "--name", "box"];
        if storage {
            arguments.extend(["--storage-opt", "size=64m"]);
        }
        arguments.extend(["busybox", "/bin/sh", "-c", script]);
        assert_eq!(ok(&hull.run(&arguments)), "");
        assert_eq!(ok(&hull.run(&["start", "--attach", "box"])), second);
        ok(&hull.run(&["rm", "box"]));
    }
    assert_eq!(hull.settle(), Vec::<String>::new());
}

#[test]
fn paused_container_stands_still_and_can_be_stopped() {
    let Some(hull) = Hull::with_images(&["busybox"]) else {
        return;
    };
    let script = "trap 'exit 0' TERM; while :; do echo tick; sleep 0.05; done";
    let id = ok(&hull.run(&["run", "-d", "--name", "clock", "busybox", "/bin/sh", "-c", script]));
    assert!(eventually(PATIENCE, || !log_lines(&hull, &id).is_empty()));
    assert_eq!(ok(&hull.run(&["pause", "clock"])), "clock");
    assert_eq!(state(&hull, "clock"), "paused");
    // A name is no matter of the guest.
    ok(&hull.run(&["rename", "clock", "stopwatch"]));
    ok(&hull.run(&["rename", "stopwatch", "clock"]));
    // What was under way when the vCPUs stopped may still arrive.
    let mut ticks = log_lines(&hull, &id).len();
    assert!(eventually(PATIENCE, || {
        std::thread::sleep(Duration::from_millis(500));
        let before = std::mem::replace(&mut ticks, log_lines(&hull, &id).len());
        before == ticks
    }));
    std::thread::sleep(Duration::from_millis(500));
    assert_eq!(log_lines(&hull, &id).len(), ticks);
    let refused = hull.run(&["exec", "clock", "/bin/true"]);
    assert_eq!(refused.code(), 1, "{refused:?}");
    assert!(refused.stderr.contains("paused"), "{refused:?}");
    assert_eq!(hull.run(&["pause", "clock"]).code(), 1);
    ok(&hull.run(&["unpause", "clock"]));
    assert!(eventually(PATIENCE, || log_lines(&hull, &id).len() > ticks));
    ok(&hull.run(&["pause", "clock"]));
    ok(&hull.run(&["stop", "clock"]));
    assert!(field(&hull, "clock", "Status").starts_with("Exited (0) "));
    assert_eq!(hull.settle(), Vec::<String>::new());
}

#[test]
fn container_that_does_not_listen_is_killed_after_its_time() {
    let Some(hull) = Hull::with_images(&["busybox"]) else {
        return;
    };
    // The first process of a namespace ignores what it has no handler for.
    ok(&hull.run(&[
        "run",
        "-d",
        "--name",
        "deaf",
        "--stop-timeout",
        "1",
        "busybox",
        "/bin/sleep",
        "1000",
    ]));
    ok(&hull.run(&["stop", "deaf"]));
    assert!(field(&hull, "deaf", "Status").starts_with("Exited (137) "));
    ok(&hull.run(&["start", "deaf"]));
    ok(&hull.run(&["kill", "deaf"]));
    assert_eq!(state(&hull, "deaf"), "exited");
    let refused = hull.run(&["kill", "deaf"]);
    assert_eq!(refused.code(), 1, "{refused:?}");
    assert!(refused.stderr.contains("not running"), "{refused:?}");
    // Stopped is stopped.
    ok(&hull.run(&["stop", "deaf"]));
}

#[test]
fn several_containers_in_one_command_each_have_their_turn() {
    let Some(hull) = Hull::with_images(&["busybox"]) else {
        return;
    };
    for name in ["a", "b"] {
        ok(&hull.run(&["run", "-d", "--name", name, "busybox", "/bin/sleep", "1000"]));
    }
    let outcome = hull.run(&["kill", "a", "nobody", "b"]);
    assert_eq!(
        (outcome.code(), outcome.text().as_str()),
        (1, "a\nb"),
        "{outcome:?}"
    );
    assert!(
        outcome.stderr.contains("no such container: nobody"),
        "{outcome:?}"
    );
    assert_eq!(ok(&hull.run(&["wait", "a", "b"])), "137\n137");
    assert_eq!(ok(&hull.run(&["restart", "a", "b"])), "a\nb");
    assert_eq!(ok(&hull.run(&["ps", "-q"])).lines().count(), 2);
    assert_eq!(ok(&hull.run(&["rm", "-f", "a", "b"])), "a\nb");
    assert_eq!(hull.settle(), Vec::<String>::new());
}

#[test]
fn waiting_command_gets_the_exit_code_when_there_is_one() {
    let Some(hull) = Hull::with_images(&["busybox"]) else {
        return;
    };
    ok(&hull.run(&[
        "run",
        "-d",
        "--name",
        "job",
        "busybox",
        "/bin/sh",
        "-c",
        "sleep 1; exit 9",
    ]));
    assert_eq!(ok(&hull.run(&["wait", "job"])), "9");
    // One that removes itself tells it all the same, to who has asked before.
    let script = "until [ -e /go ]; do sleep 0.05; done; exit 8";
    ok(&hull.run(&[
        "run", "-d", "--rm", "--name", "gone", "busybox", "/bin/sh", "-c", script,
    ]));
    let waiting = hull.command(&["wait", "gone"]).spawn().expect("hull starts");
    // Its only socket is its connection to the monitor.
    let files = PathBuf::from(format!("/proc/{}/fd", waiting.id()));
    let is_socket = |file: fs::DirEntry| {
        fs::read_link(file.path()).is_ok_and(|target| target.to_string_lossy().starts_with("socket:"))
    };
    let asked = || fs::read_dir(&files).is_ok_and(|files| files.flatten().any(is_socket));
    assert!(eventually(PATIENCE, asked));
    ok(&hull.run(&["exec", "gone", "/bin/touch", "/go"]));
    assert_eq!(ok(&finish(waiting)), "8");
    assert_eq!(hull.run(&["wait", "gone"]).code(), 1);
}

#[test]
fn container_that_cannot_be_started_is_kept_with_the_reason_unless_it_removes_itself() {
    let Some(hull) = Hull::with_images(&["busybox"]) else {
        return;
    };
    let outcome = hull.run(&["run", "--name", "kept", "busybox", "/no/such/program"]);
    assert_eq!(outcome.code(), 127, "{outcome:?}");
    assert_eq!(state(&hull, "kept"), "created");
    let outcome = hull.run(&[
        "run",
        "-d",
        "--rm",
        "--name",
        "gone",
        "busybox",
        "/no/such/program",
    ]);
    assert_eq!(outcome.code(), 127, "{outcome:?}");
    assert_eq!(state(&hull, "gone"), "");
    assert_eq!(hull.settle(), Vec::<String>::new());
}

#[test]
fn id_goes_to_a_file_that_must_not_exist() {
    let Some(hull) = Hull::with_images(&["busybox"]) else {
        return;
    };
    let file = hull.temporary_dir().join("id");
    let path = file.to_str().unwrap();
    let id = ok(&hull.run(&["create", "--cidfile", path, "busybox", "/bin/true"]));
    assert_eq!(fs::read_to_string(&file).unwrap(), id);
    let again = hull.run(&["run", "--rm", "--cidfile", path, "busybox", "/bin/true"]);
    assert_eq!(again.code(), 125, "{again:?}");
    assert!(again.stderr.contains("--cidfile"), "{again:?}");
    assert_eq!(ok(&hull.run(&["ps", "-aq", "--no-trunc"])), id);
}

#[test]
fn list_is_filtered_by_what_was_said_about_a_container() {
    let Some(hull) = Hull::with_images(&["busybox"]) else {
        return;
    };
    ok(&hull.run(&[
        "create",
        "--name",
        "a",
        "--label",
        "tier=front",
        "busybox",
        "/bin/true",
    ]));
    ok(&hull.run(&[
        "create",
        "--name",
        "b",
        "--label",
        "tier=back",
        "busybox",
        "/bin/true",
    ]));
    let names = |filter: &str| ok(&hull.run(&["ps", "-a", "--filter", filter, "--format", "{{.Names}}"]));
    assert_eq!(names("label=tier=front"), "a");
    assert_eq!(names("label=tier"), "b\na");
    assert_eq!(names("status=created"), "b\na");
    assert_eq!(names("status=running"), "");
    assert_eq!(ok(&hull.run(&["ps", "-q"])), "");
    let wrong = hull.run(&["ps", "--filter", "state=up"]);
    assert_eq!(wrong.code(), 125, "{wrong:?}");
    ok(&hull.run(&["rename", "a", "c"]));
    let taken = hull.run(&["rename", "b", "c"]);
    assert_eq!(taken.code(), 1, "{taken:?}");
    assert_eq!(names("name=c"), "c");
}

#[test]
fn output_fills_no_more_than_the_log_may_hold() {
    let Some(hull) = Hull::with_images(&["busybox"]) else {
        return;
    };
    let arguments = [
        "run",
        "-d",
        "--name",
        "loud",
        "--log-opt",
        "max-size=100k",
        "--log-opt",
        "max-file=2",
        "busybox",
        "/bin/sh",
        "-c",
        "i=0; while [ $i -lt 20000 ]; do echo line $i of many; i=$((i+1)); done",
    ];
    let id = ok(&hull.run(&arguments));
    assert_eq!(ok(&hull.run(&["wait", "loud"])), "0");
    let mut sizes = Vec::new();
    for entry in fs::read_dir(home(&hull, &id)).unwrap().flatten() {
        if entry.file_name().to_string_lossy().starts_with("container.log") {
            sizes.push(entry.metadata().unwrap().len());
        }
    }
    assert_eq!(sizes.len(), 2, "{sizes:?}");
    assert!(sizes.iter().all(|size| *size <= 100_000), "{sizes:?}");
    let last = log_lines(&hull, &id).pop().unwrap();
    assert_eq!(last["log"], "line 19999 of many\n");
    // Nothing is kept where that was asked for.
    let arguments = [
        "run",
        "--name",
        "mute",
        "--log-driver",
        "none",
        "busybox",
        "/bin/echo",
        "hello",
    ];
    assert_eq!(ok(&hull.run(&arguments)), "hello");
    let id = ok(&hull.run(&["ps", "-aq", "--no-trunc", "--filter", "name=mute"]));
    assert!(!home(&hull, &id).join("container.log").exists());
}

#[test]
fn command_returns_although_its_caller_waits_for_the_end_of_its_output() {
    let Some(hull) = Hull::with_images(&["busybox"]) else {
        return;
    };
    // As in $(hull run -d …): who keeps a pipe open makes this hang. Descriptor 9 stands for what a careless shell leaves.
    let mut command = std::process::Command::new("/bin/sh");
    let inner = hull.command(&["run", "-d", "--name", "web", "busybox", "/bin/sleep", "1000"]);
    command
        .args(["-c", "exec 9>&1; exec \"$0\" \"$@\""])
        .arg(inner.get_program())
        .args(inner.get_args())
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::piped());
    for (key, value) in inner.get_envs() {
        command.env(key, value.unwrap_or_default());
    }
    assert_eq!(ok(&finish(command.spawn().unwrap())).len(), 64);
    assert_eq!(state(&hull, "web"), "running");
    ok(&hull.run(&["rm", "-f", "web"]));
    assert_eq!(hull.settle(), Vec::<String>::new());
}
