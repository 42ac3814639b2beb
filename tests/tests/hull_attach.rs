//! Attached to containers: several clients, slow ones, those that leave, and the keys to leave by.

use std::io::{Read as _, Write as _};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use hull_tests::hull::{Hull, Outcome, PATIENCE, eventually, finish, signal, wait_for};
use hull_tests::pty::Terminal;
use nix::sys::signal::Signal;

fn ok(outcome: &Outcome) -> String {
    assert_eq!(outcome.code(), 0, "{outcome:?}");
    outcome.text()
}

fn state(hull: &Hull, name: &str) -> String {
    let filter = format!("name={name}");
    ok(&hull.run(&["ps", "-a", "--filter", &filter, "--format", "{{.State}}"]))
}

/// Reads a child's stdout until it says something.
fn read_until(child: &mut Child, expected: &str) {
    let stdout = child.stdout.as_mut().expect("piped");
    let mut got = Vec::new();
    let mut byte = [0];
    while !String::from_utf8_lossy(&got).contains(expected) {
        assert_eq!(
            stdout.read(&mut byte).expect("a pipe can be read"),
            1,
            "ended after {:?}",
            String::from_utf8_lossy(&got)
        );
        got.push(byte[0]);
    }
}

#[test]
fn two_clients_see_the_same_and_both_get_the_exit_code() {
    let Some(hull) = Hull::with_images(&["busybox"]) else {
        return;
    };
    let script = "(while :; do echo waiting; sleep 0.1; done) & read line; kill $!; echo got $line; exit 6";
    ok(&hull.run(&[
        "run", "-d", "-i", "--name", "box", "busybox", "/bin/sh", "-c", script,
    ]));
    let mut writer = hull
        .command(&["attach", "box"])
        .stdin(Stdio::piped())
        .spawn()
        .unwrap();
    let mut reader = hull.command(&["attach", "--no-stdin", "box"]).spawn().unwrap();
    // Both must be there before anything is said.
    for client in [&mut writer, &mut reader] {
        read_until(client, "waiting\n");
    }
    writer.stdin.take().unwrap().write_all(b"hello\n").unwrap();
    for client in [writer, reader] {
        let outcome = finish(client);
        assert_eq!(outcome.code(), 6, "{outcome:?}");
        assert!(outcome.text().ends_with("got hello"), "{outcome:?}");
    }
}

#[test]
fn killed_client_leaves_the_container_running_and_another_can_attach() {
    let Some(hull) = Hull::with_images(&["busybox"]) else {
        return;
    };
    let script = "i=0; while :; do echo $i; i=$((i+1)); sleep 0.05; done";
    let mut client = hull
        .command(&["run", "--name", "box", "busybox", "/bin/sh", "-c", script])
        .spawn()
        .unwrap();
    read_until(&mut client, "3\n");
    client.kill().unwrap();
    client.wait().unwrap();
    assert_eq!(state(&hull, "box"), "running");
    let mut second = hull.command(&["attach", "box"]).spawn().unwrap();
    read_until(&mut second, "\n");
    // Asking goes to the container; whoever insists leaves it. Two signals that come before hull has looked are one.
    assert!(eventually(PATIENCE, || {
        signal(i32::try_from(second.id()).unwrap(), Signal::SIGHUP);
        wait_for(&mut second, Duration::from_millis(200)).is_some()
    }));
    ok(&hull.run(&["rm", "-f", "box"]));
    assert_eq!(hull.settle(), Vec::<String>::new());
}

#[test]
fn client_that_takes_nothing_holds_only_its_own_container_and_lets_go_when_it_leaves() {
    let Some(hull) = Hull::with_images(&["busybox"]) else {
        return;
    };
    let script = "until [ -e /go ]; do echo waiting; sleep 0.1; done; yes | head -c 20000000; echo end";
    ok(&hull.run(&["run", "-d", "--name", "loud", "busybox", "/bin/sh", "-c", script]));
    let mut stalled = hull.command(&["attach", "loud"]).spawn().unwrap();
    read_until(&mut stalled, "waiting\n");
    ok(&hull.run(&["exec", "loud", "/bin/touch", "/go"]));
    // However long it lasts: so much fits into no buffer on the way.
    std::thread::sleep(Duration::from_secs(2));
    assert_eq!(state(&hull, "loud"), "running");
    // Another container is not concerned.
    assert_eq!(
        ok(&hull.run(&["run", "--rm", "busybox", "/bin/echo", "fine"])),
        "fine"
    );
    stalled.kill().unwrap();
    stalled.wait().unwrap();
    assert_eq!(ok(&hull.run(&["wait", "loud"])), "0");
}

#[test]
fn all_output_reaches_a_slow_reader_although_the_container_has_ended() {
    let Some(hull) = Hull::with_images(&["busybox"]) else {
        return;
    };
    let mut child = hull
        .command(&[
            "run",
            "--rm",
            "busybox",
            "/bin/sh",
            "-c",
            "head -c 300000 /dev/zero",
        ])
        .spawn()
        .unwrap();
    std::thread::sleep(Duration::from_secs(2));
    let mut got = Vec::new();
    child.stdout.take().unwrap().read_to_end(&mut got).unwrap();
    assert_eq!(got.len(), 300_000);
    assert_eq!(finish(child).code(), 0);
    assert_eq!(hull.settle(), Vec::<String>::new());
}

#[test]
fn container_that_removes_itself_ends_with_its_reader() {
    let Some(hull) = Hull::with_images(&["busybox"]) else {
        return;
    };
    let mut child = hull.command(&["run", "--rm", "busybox", "yes"]).spawn().unwrap();
    read_until(&mut child, "y\ny\n");
    drop(child.stdout.take());
    assert!(wait_for(&mut child, PATIENCE).is_some());
    assert_eq!(hull.settle(), Vec::<String>::new());
}

#[test]
fn signals_of_a_client_reach_the_command() {
    let Some(hull) = Hull::with_images(&["busybox"]) else {
        return;
    };
    let script = "trap 'echo usr1; exit 0' USR1; echo ready; while :; do sleep 0.05; done";
    let mut child = hull
        .command(&["run", "--rm", "busybox", "/bin/sh", "-c", script])
        .spawn()
        .unwrap();
    read_until(&mut child, "ready\n");
    signal(i32::try_from(child.id()).unwrap(), Signal::SIGUSR1);
    assert_eq!(ok(&finish(child)), "usr1");
}

#[test]
fn keys_detach_from_a_terminal_and_what_is_typed_behind_them_is_for_the_caller() {
    let Some(hull) = Hull::with_images(&["busybox"]) else {
        return;
    };
    // The caller reads a line of its own once hull has gone.
    let mut program = Command::new("/bin/sh");
    let inner = hull.command(&["run", "-it", "--name", "box", "busybox", "/bin/cat"]);
    program.args(["-c", "\"$0\" \"$@\"; read rest; echo \"caller got: $rest\""]);
    program.arg(inner.get_program()).args(inner.get_args());
    for (key, value) in inner.get_envs() {
        program.env(key, value.unwrap_or_default());
    }
    let mut terminal = Terminal::spawn(&program);
    assert!(eventually(PATIENCE, || state(&hull, "box") == "running"));
    terminal.send(b"one\n");
    terminal.expect("one\r\none");
    // A beginning of the keys that goes on otherwise is forwarded: cat's terminal shows ^P.
    terminal.send(b"\x10two\n");
    terminal.expect("two");
    terminal.send(b"\x10\x11three\n");
    terminal.expect("caller got: three");
    assert_eq!(state(&hull, "box"), "running");
    ok(&hull.run(&["rm", "-f", "box"]));
}

#[test]
fn keys_detach_even_from_a_container_that_reads_nothing() {
    let Some(hull) = Hull::with_images(&["busybox"]) else {
        return;
    };
    let mut terminal = Terminal::spawn(&hull.command(&[
        "run",
        "-it",
        "--name",
        "box",
        "--detach-keys",
        "ctrl-a,d",
        "busybox",
        "/bin/sleep",
        "1000",
    ]));
    assert!(eventually(PATIENCE, || state(&hull, "box") == "running"));
    // In line mode the terminal itself throws away what is too long for a line, the keys with it.
    assert!(eventually(PATIENCE, || !terminal.is_cooked()));
    for _ in 0..64 {
        terminal.send([b'x'; 4096]);
    }
    terminal.send(b"\x01d");
    assert!(terminal.wait().success());
    assert_eq!(state(&hull, "box"), "running");
    ok(&hull.run(&["rm", "-f", "box"]));
    assert_eq!(hull.settle(), Vec::<String>::new());
}
