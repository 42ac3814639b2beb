//! `ctr` on a containerd of the test's own: whatever a script sees of a container under runc's shim it sees of one under ours.
//!
//! Each script runs once for either shim on the same daemon, and the two records are compared. What runc's gives isn't written
//! down here, so a newer runc is no reason to change a test.

use std::io::{BufRead as _, Write as _};
use std::process::{Command, Stdio};
use std::time::Duration;

use hull_tests::containerd::{Containerd, HULL, RUNC, reference};
use hull_tests::hull::{eventually, finish_within};
use hull_tests::pty::Terminal;

/// Until something that is waited for has happened; on a busy machine too.
const PATIENCE: Duration = Duration::from_secs(60);

/// What a script saw, in order.
type Record = Vec<String>;

/// Run a script under both shims; what they leave is nothing.
fn compare(images: &[&str], ids: &[&str], script: impl Fn(&Containerd, &str) -> Record) {
    let Some(world) = Containerd::with_images(images) else {
        return;
    };
    let expected = script(&world, RUNC);
    let found = script(&world, HULL);
    assert_eq!(found, expected, "{}", world.log());
    assert!(!expected.is_empty(), "the script saw nothing");
    assert_eq!(world.settle(ids), Vec::<String>::new());
}

fn status_of(world: &Containerd, id: &str) -> String {
    world
        .task(id)
        .map_or_else(|| "none".to_owned(), |(_, status)| status)
}

/// Wait until a task has a status.
fn becomes(world: &Containerd, id: &str, status: &str) -> String {
    eventually(PATIENCE, || status_of(world, id) == status);
    status_of(world, id)
}

#[test]
fn run_prints_and_ends_as_under_runc() {
    compare(&["busybox"], &["c1", "c2", "c3"], |world, runtime| {
        let mut record = Record::new();
        for (id, script) in [
            ("c1", "echo out; echo err >&2; exit 7"),
            ("c2", "trap 'exit 9' TERM; kill -TERM $$; sleep 10"),
            (
                "c3",
                "cat /etc/passwd; pwd; id; echo $PATH; echo $HOSTNAME; ls /; ls /dev; cat /proc/self/status | grep -E 'Cap|NoNew'",
            ),
        ] {
            let outcome = world.run(runtime, &["--rm"], "busybox", id, &["sh", "-c", script]);
            record.push(format!("{:?} {}", outcome.status.code(), outcome.text()));
            record.push(outcome.stderr);
        }
        record
    });
}

#[test]
fn command_that_is_not_there_fails_and_leaves_nothing() {
    compare(&["busybox"], &["c1"], |world, runtime| {
        let outcome = world.run(runtime, &["--rm"], "busybox", "c1", &["/no/such/program"]);
        let says = outcome.stderr.contains("/no/such/program");
        world.try_ctr(&["containers", "delete", "c1"]);
        vec![
            format!("failed: {}", !outcome.status.success()),
            format!("named: {says}"),
        ]
    });
}

#[test]
fn standard_input_reaches_the_container_and_ends() {
    compare(&["busybox"], &["c1"], |world, runtime| {
        let image = reference("busybox");
        let mut command = world.ctr_command(&[
            "run",
            "--rm",
            "--runtime",
            runtime,
            &image,
            "c1",
            "sh",
            "-c",
            "wc -c",
        ]);
        let mut child = command.stdin(Stdio::piped()).spawn().expect("ctr is installed");
        let mut stdin = child.stdin.take().expect("piped");
        let writer = std::thread::spawn(move || stdin.write_all(&vec![b'x'; 300_000]));
        let outcome = finish_within(child, PATIENCE * 3);
        writer
            .join()
            .expect("no panic")
            .expect("the container reads it all");
        vec![format!("{:?} {}", outcome.status.code(), outcome.text())]
    });
}

#[test]
fn task_is_listed_executed_in_paused_killed_and_removed() {
    compare(&["busybox"], &["c1"], |world, runtime| {
        let mut record = Record::new();
        world.run_detached(runtime, "busybox", "c1", &["sleep", "1000"]);
        record.push(status_of(world, "c1"));
        for (name, script) in [
            ("e1", "echo in; echo oops >&2; exit 3"),
            ("e2", "kill -9 $$"),
            // Under runc, a task that runs may still have to become its program.
            (
                "e3",
                "until grep -q sleep /proc/1/cmdline; do sleep 0.05; done; tr '\\0' ' ' </proc/1/cmdline",
            ),
        ] {
            let outcome = world.exec("c1", name, &["sh", "-c", script]);
            record.push(format!(
                "{:?} {} {}",
                outcome.status.code(),
                outcome.text(),
                outcome.stderr
            ));
        }
        let missing = world.exec("c1", "e4", &["/no/such/program"]);
        record.push(format!("missing: {}", missing.status.success()));
        world.ctr(&["tasks", "pause", "c1"]);
        record.push(status_of(world, "c1"));
        record.push(format!(
            "in pause: {}",
            world.exec("c1", "e5", &["true"]).status.success()
        ));
        world.ctr(&["tasks", "resume", "c1"]);
        record.push(status_of(world, "c1"));
        record.push(format!("{:?}", world.exec("c1", "e6", &["true"]).status.code()));
        record.push(format!(
            "running removed: {}",
            world.try_ctr(&["tasks", "delete", "c1"]).status.success()
        ));
        world.ctr(&["tasks", "kill", "--signal", "SIGKILL", "c1"]);
        record.push(becomes(world, "c1", "STOPPED"));
        let deleted = world.try_ctr(&["tasks", "delete", "c1"]);
        record.push(format!("deleted: {:?}", deleted.status.code()));
        world.ctr(&["containers", "delete", "c1"]);
        record.push(status_of(world, "c1"));
        record
    });
}

#[test]
fn metrics_count_memory_processors_and_processes() {
    let Some(world) = Containerd::with_images(&["busybox"]) else {
        return;
    };
    let script = "i=0; while [ $i -lt 200000 ]; do i=$((i+1)); done; sleep 1000";
    world.run_detached(HULL, "busybox", "c1", &["sh", "-c", script]);
    let value = |names: [&str; 2]| {
        let text = world.ctr(&["tasks", "metrics", "c1"]);
        let line = text
            .lines()
            .find(|line| names.iter().any(|name| line.starts_with(name)));
        let number = line.and_then(|line| line.split_whitespace().nth(1)?.parse::<u64>().ok());
        number.unwrap_or(0)
    };
    // In the form of the host's control groups: version 1 counts nanoseconds, version 2 microseconds.
    let counted = eventually(PATIENCE, || value(["cpuacct.usage ", "cpu.usage_usec "]) > 1000);
    assert!(counted, "{}", world.ctr(&["tasks", "metrics", "c1"]));
    assert!(value(["memory.usage_in_bytes", "memory.usage"]) > 0);
    assert!(value(["pids.current", "pids.current"]) >= 1);
    world.remove("c1");
    assert_eq!(world.settle(&["c1"]), Vec::<String>::new());
}

#[test]
fn terminal_has_a_size_and_takes_what_is_typed() {
    compare(&["busybox"], &["c1"], |world, runtime| {
        let image = reference("busybox");
        let command = world.ctr_command(&["run", "--rm", "--tty", "--runtime", runtime, &image, "c1", "sh"]);
        let mut terminal = Terminal::spawn(&command);
        terminal.expect("/ #");
        terminal.send("stty size; tty; echo done-$((6*7))\n");
        terminal.expect("24 80");
        terminal.expect("done-42");
        terminal.send("exit 5\n");
        vec![format!("{:?}", terminal.wait().code())]
    });
}

#[test]
fn checkpoint_is_refused_by_ours_and_the_container_goes_on() {
    let Some(world) = Containerd::with_images(&["busybox"]) else {
        return;
    };
    world.run_detached(HULL, "busybox", "c1", &["sleep", "1000"]);
    let outcome = world.try_ctr(&["tasks", "checkpoint", "c1"]);
    assert!(!outcome.status.success());
    assert!(outcome.stderr.contains("not supported yet"), "{outcome:?}");
    assert_eq!(world.exec("c1", "e1", &["true"]).code(), 0);
    world.remove("c1");
    assert_eq!(world.settle(&["c1"]), Vec::<String>::new());
}

#[test]
fn events_come_in_the_order_of_runcs() {
    compare(&["busybox"], &["c1"], |world, runtime| {
        let mut events = world.ctr_command(&["events"]).spawn().expect("ctr is installed");
        // It must listen before something happens: a namespace event of our own making is its sign.
        let mut output = std::io::BufReader::new(events.stdout.take().expect("piped"));
        let listens = listening(world, &mut output);
        world.run_detached(runtime, "busybox", "c1", &["sleep", "1000"]);
        world.exec("c1", "e1", &["true"]);
        world.ctr(&["tasks", "pause", "c1"]);
        world.ctr(&["tasks", "resume", "c1"]);
        world.remove("c1");
        let record = topics_until(&mut output, "/containers/delete");
        events.kill().expect("it is ours");
        events.wait().expect("it is ours");
        assert!(listens, "no event came");
        record
    });
}

/// Labels a namespace until the listener has heard of it.
fn listening(world: &Containerd, output: &mut impl std::io::BufRead) -> bool {
    let done = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut round = 0;
            while !done.load(std::sync::atomic::Ordering::Relaxed) {
                round += 1;
                world.ctr(&[
                    "namespaces",
                    "label",
                    &world.namespace(),
                    &format!("round={round}"),
                ]);
                std::thread::sleep(Duration::from_millis(50));
            }
        });
        let mut line = String::new();
        let heard = output.read_line(&mut line).is_ok_and(|length| length > 0);
        done.store(true, std::sync::atomic::Ordering::Relaxed);
        heard
    })
}

/// The topics of tasks' events, until one of another kind has come.
fn topics_until(output: &mut impl std::io::BufRead, last: &str) -> Record {
    let mut record = Record::new();
    for line in output.by_ref().lines() {
        let line = line.expect("text");
        let Some(topic) = line.split_whitespace().find(|word| word.starts_with('/')) else {
            continue;
        };
        if topic == last {
            break;
        }
        if topic.starts_with("/tasks/") {
            record.push(topic.to_owned());
        }
    }
    record
}

#[test]
fn both_kinds_live_beside_each_other() {
    let Some(world) = Containerd::with_images(&["busybox"]) else {
        return;
    };
    for (runtime, id) in [(HULL, "h1"), (RUNC, "r1"), (HULL, "h2"), (RUNC, "r2")] {
        world.run_detached(runtime, "busybox", id, &["sleep", "1000"]);
    }
    let kernel = |id: &str| world.exec(id, "e", &["uname", "-r"]).text();
    let host = Command::new("uname")
        .arg("-r")
        .output()
        .expect("uname is installed");
    let host = String::from_utf8_lossy(&host.stdout).trim().to_owned();
    assert_eq!((kernel("r1"), kernel("r2")), (host.clone(), host.clone()));
    assert!(kernel("h1") != host && kernel("h1") == kernel("h2"));
    for id in ["r1", "h1"] {
        world.remove(id);
    }
    assert_eq!(
        (
            world.exec("h2", "f", &["true"]).code(),
            world.exec("r2", "f", &["true"]).code()
        ),
        (0, 0)
    );
    for id in ["h2", "r2"] {
        world.remove(id);
    }
    assert_eq!(world.settle(&["h1", "h2", "r1", "r2"]), Vec::<String>::new());
}
