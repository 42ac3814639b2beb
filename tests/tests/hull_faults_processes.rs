//! Signals and killed processes at any moment, and commands that meet at one container: the next command finds order.

use std::collections::BTreeSet;
use std::os::unix::process::ExitStatusExt;
use std::process::Child;
use std::time::Duration;

use hull_tests::hull::{Hull, Outcome, PATIENCE, eventually, finish, signal, wait_for};
use nix::sys::signal::Signal;

/// Moments of a start, which takes some 200 ms on an idle machine and more on a busy one.
const MOMENTS_MS: [u64; 8] = [0, 5, 20, 50, 90, 150, 300, 700];

fn pid(child: &Child) -> i32 {
    i32::try_from(child.id()).expect("pids are small")
}

fn sleeper(hull: &Hull, options: &[&str]) -> Child {
    let arguments = [&["run"], options, &["busybox", "sleep", "1000"]].concat();
    hull.command(&arguments).spawn().expect("hull starts")
}

/// A container whose script says "up" when it is where it is wanted; its client is returned then.
fn speaker(hull: &Hull, options: &[&str], script: &str) -> Child {
    use std::io::Read;
    let arguments = [&["run"], options, &["busybox", "sh", "-c", script]].concat();
    let mut child = hull.command(&arguments).spawn().expect("hull starts");
    let mut said = [0; 3];
    child
        .stdout
        .as_mut()
        .expect("piped")
        .read_exact(&mut said)
        .expect("the container speaks");
    assert_eq!(&said, b"up\n");
    child
}

/// What is wrong with an outcome that may be a failure: nothing, if it says one thing and no more.
fn assert_orderly(outcome: &Outcome) {
    assert!(!outcome.stderr.contains("panicked"), "{outcome:?}");
    let lines = outcome
        .stderr
        .lines()
        .filter(|line| !line.trim().is_empty())
        .count();
    assert!(lines <= 2, "not one clear error: {outcome:?}");
    // A process of the container that its end met has the code of that end, and nothing to say.
    let killed = outcome.status.code() == Some(137);
    assert!(
        outcome.status.success() || lines > 0 || killed || outcome.status.signal().is_some(),
        "fails silently: {outcome:?}"
    );
}

/// Remove whatever containers there are, and see that nothing else is.
fn clean_up(hull: &Hull, when: &str) {
    let all = hull.run(&["ps", "-aq"]);
    assert_eq!(all.code(), 0, "{when}: {all:?}");
    for id in all.text().lines() {
        let mut outcome = hull.run(&["rm", "-f", id]);
        // One that is just being started says so; one that was just going by itself is no failure.
        eventually(PATIENCE, || {
            if outcome.stderr.contains("try again") {
                outcome = hull.run(&["rm", "-f", id]);
            }
            !outcome.stderr.contains("try again")
        });
        assert!(
            outcome.code() == 0 || outcome.stderr.contains("no such container"),
            "{when}: {outcome:?}"
        );
    }
    let next = hull.run(&["run", "--rm", "busybox", "echo", "fine"]);
    assert_eq!(
        (next.code(), next.text().as_str()),
        (0, "fine"),
        "{when}: {next:?}"
    );
    assert_eq!(hull.settle(), Vec::<String>::new(), "{when}");
    assert_eq!(hull.run(&["ps", "-aq"]).text(), "", "{when}");
}

#[test]
fn ctrl_c_reaches_a_command_that_listens() {
    let Some(hull) = Hull::with_images(&["busybox"]) else {
        return;
    };
    let listens = "trap 'exit 42' INT; echo up; while :; do sleep 0.05; done";
    let child = speaker(&hull, &["--rm"], listens);
    signal(pid(&child), Signal::SIGINT);
    let outcome = finish(child);
    assert_eq!(outcome.code(), 42, "{outcome:?}");
    assert_eq!(hull.settle(), Vec::<String>::new());
}

#[test]
fn third_ctrl_c_kills_a_command_that_does_not_listen() {
    let Some(hull) = Hull::with_images(&["busybox"]) else {
        return;
    };
    // A shell with -c listens until its exec.
    let mut child = speaker(&hull, &["--rm"], "trap '' INT; echo up; exec sleep 1000");
    signal(pid(&child), Signal::SIGINT);
    assert!(
        wait_for(&mut child, Duration::from_millis(500)).is_none(),
        "one SIGINT was enough"
    );
    // Two that come before hull has looked are one: asked until it has counted three.
    let ended = eventually(PATIENCE, || {
        signal(pid(&child), Signal::SIGINT);
        wait_for(&mut child, Duration::from_millis(200)).is_some()
    });
    assert!(ended, "it was never ended");
    let outcome = finish(child);
    assert_eq!(outcome.code(), 137, "{outcome:?}");
    assert_eq!(hull.settle(), Vec::<String>::new());
}

#[test]
fn signal_at_any_moment_of_the_start_gives_up_with_its_code() {
    let Some(hull) = Hull::with_images(&["busybox"]) else {
        return;
    };
    for (asked, code) in [(Signal::SIGINT, 130), (Signal::SIGTERM, 143)] {
        for delay_ms in MOMENTS_MS {
            let child = hull
                .command(&["run", "--rm", "busybox", "true"])
                .spawn()
                .expect("hull starts");
            std::thread::sleep(Duration::from_millis(delay_ms));
            signal(pid(&child), asked);
            let outcome = finish(child);
            assert_orderly(&outcome);
            // Before hull looks after signals it dies of them; `true` may have ended before.
            let died = outcome.status.signal() == Some(asked as i32);
            assert!(
                died || matches!(outcome.status.code(), Some(0)) || outcome.status.code() == Some(code),
                "{asked} after {delay_ms} ms: {outcome:?}"
            );
            assert_eq!(hull.settle(), Vec::<String>::new(), "{asked} after {delay_ms} ms");
        }
    }
    clean_up(&hull, "after signals during the start");
}

#[test]
fn killed_vmm_is_reported_and_cleaned_up() {
    let Some(hull) = Hull::with_images(&["busybox"]) else {
        return;
    };
    for delay_ms in [0, 20, 60, 150, 600] {
        let child = sleeper(&hull, &["--rm"]);
        assert!(
            eventually(PATIENCE, || !hull.vmms().is_empty()),
            "no VMM ever started"
        );
        std::thread::sleep(Duration::from_millis(delay_ms));
        for vmm in hull.vmms() {
            signal(vmm, Signal::SIGKILL);
        }
        let outcome = finish(child);
        // Before the container ran it is a failure of ours, then it is a container that was killed.
        assert!(
            matches!(outcome.code(), 125 | 137),
            "after {delay_ms} ms: {outcome:?}"
        );
        assert!(
            !outcome.stderr.trim().is_empty(),
            "says nothing after {delay_ms} ms: {outcome:?}"
        );
        assert_orderly(&outcome);
        assert_eq!(hull.settle(), Vec::<String>::new(), "after {delay_ms} ms");
    }
}

#[test]
fn killed_vmm_of_a_running_kept_container_leaves_it_exited_and_startable() {
    let Some(hull) = Hull::with_images(&["busybox"]) else {
        return;
    };
    let child = speaker(&hull, &["--name", "kept"], "echo up; exec sleep 1000");
    for vmm in hull.vmms() {
        signal(vmm, Signal::SIGKILL);
    }
    let outcome = finish(child);
    assert_eq!(outcome.code(), 137, "{outcome:?}");
    let status = hull.run(&["ps", "-a", "--format", "{{.Names}} {{.Status}}"]);
    assert!(status.text().starts_with("kept Exited (137)"), "{status:?}");
    assert_eq!(hull.settle(), Vec::<String>::new());
    assert_eq!(hull.run(&["start", "kept"]).code(), 0);
    assert_eq!(hull.run(&["exec", "kept", "true"]).code(), 0);
    clean_up(&hull, "after a killed VMM");
}

#[test]
fn container_outlives_its_killed_client() {
    let Some(hull) = Hull::with_images(&["busybox"]) else {
        return;
    };
    let mut child = speaker(&hull, &["--rm", "--name", "orphan"], "echo up; exec sleep 1000");
    child.kill().expect("it is ours");
    child.wait().expect("it is ours");
    let outcome = hull.run(&["exec", "orphan", "echo", "alive"]);
    assert_eq!(
        (outcome.code(), outcome.text().as_str()),
        (0, "alive"),
        "{outcome:?}"
    );
    assert_eq!(hull.run(&["kill", "orphan"]).code(), 0);
    // `--rm` is the monitor's to keep, whoever is left to see it.
    assert_eq!(hull.settle(), Vec::<String>::new());
    assert_eq!(hull.run(&["ps", "-aq"]).text(), "");
}

#[test]
fn client_killed_at_any_moment_leaves_a_container_or_nothing() {
    let Some(hull) = Hull::with_images(&["busybox"]) else {
        return;
    };
    for options in [&["--rm"][..], &[], &["-d"]] {
        for delay_ms in MOMENTS_MS {
            let mut child = sleeper(&hull, options);
            std::thread::sleep(Duration::from_millis(delay_ms));
            child.kill().ok();
            child.wait().expect("it is ours");
            drop(child);
            clean_up(
                &hull,
                &format!("client of {options:?} killed after {delay_ms} ms"),
            );
        }
    }
}

#[test]
fn monitor_killed_at_any_moment_takes_its_microvm_along() {
    let Some(hull) = Hull::with_images(&["busybox"]) else {
        return;
    };
    for options in [&["--rm"][..], &["--name", "kept"]] {
        for delay_ms in [0, 10, 40, 100, 250, 700] {
            let when = format!("monitor of {options:?} killed after {delay_ms} ms");
            let child = sleeper(&hull, options);
            assert!(
                eventually(PATIENCE, || !hull.monitors().is_empty()),
                "no monitor ever started"
            );
            std::thread::sleep(Duration::from_millis(delay_ms));
            for monitor in hull.monitors() {
                signal(monitor, Signal::SIGKILL);
            }
            let outcome = finish(child);
            assert!(matches!(outcome.code(), 125 | 137), "{when}: {outcome:?}");
            assert_orderly(&outcome);
            assert!(
                eventually(PATIENCE, || hull.vmms().is_empty()),
                "{when}: the VMM lives on"
            );
            clean_up(&hull, &when);
        }
    }
}

#[test]
fn everything_killed_at_once_is_found_and_cleaned_up() {
    let Some(hull) = Hull::with_images(&["busybox"]) else {
        return;
    };
    for name in ["a", "b"] {
        let outcome = hull.run(&["run", "-d", "--name", name, "busybox", "sleep", "1000"]);
        assert_eq!(outcome.code(), 0, "{outcome:?}");
    }
    let child = speaker(&hull, &["--rm"], "echo up; exec sleep 1000");
    // As a host that loses its power does to all of them, but for the reboot.
    for (process, _) in hull.processes() {
        signal(process, Signal::SIGKILL);
    }
    assert_eq!(finish(child).status.signal(), Some(9));
    let list = hull.run(&["ps", "-a", "--format", "{{.Names}} {{.Status}}"]);
    let text = list.text();
    let states: Vec<&str> = text.lines().collect();
    assert_eq!(states.len(), 2, "{list:?}");
    assert!(
        states.iter().all(|state| state.contains("Exited (137)")),
        "{list:?}"
    );
    assert_eq!(hull.run(&["start", "a", "b"]).code(), 0);
    clean_up(&hull, "after everything was killed");
}

#[test]
fn killing_one_container_touches_no_other() {
    let Some(hull) = Hull::with_images(&["busybox"]) else {
        return;
    };
    let script = "echo up; i=0; while [ $i -lt 30 ]; do echo $i; i=$((i+1)); sleep 0.1; done";
    let witness = speaker(&hull, &["--rm"], script);
    let spared: BTreeSet<i32> = [hull.vmms(), hull.monitors()].concat().into_iter().collect();
    for victims in [Hull::vmms, Hull::monitors] {
        let victim = sleeper(&hull, &["--rm"]);
        assert!(eventually(PATIENCE, || victims(&hull)
            .iter()
            .any(|pid| !spared.contains(pid))));
        for pid in victims(&hull).into_iter().filter(|pid| !spared.contains(pid)) {
            signal(pid, Signal::SIGKILL);
        }
        assert_ne!(finish(victim).status.code(), Some(0));
    }
    let outcome = finish(witness);
    assert_eq!(
        (outcome.code(), outcome.text().lines().count()),
        (0, 30),
        "{outcome:?}"
    );
    clean_up(&hull, "after others were killed");
}

/// Start the same commands all at once and wait for all of them.
fn at_once(hull: &Hull, commands: &[&[&str]]) -> Vec<Outcome> {
    let children: Vec<Child> = commands
        .iter()
        .map(|arguments| hull.command(arguments).spawn().expect("hull starts"))
        .collect();
    children.into_iter().map(finish).collect()
}

#[test]
fn one_name_is_given_to_one_of_many() {
    let Some(hull) = Hull::with_images(&["busybox"]) else {
        return;
    };
    let run: &[&str] = &["run", "-d", "--name", "wanted", "busybox", "sleep", "1000"];
    let outcomes = at_once(&hull, &[run; 5]);
    let codes: Vec<i32> = outcomes.iter().map(Outcome::code).collect();
    assert_eq!(codes.iter().filter(|code| **code == 0).count(), 1, "{outcomes:?}");
    for outcome in outcomes.iter().filter(|outcome| outcome.code() != 0) {
        assert_eq!(outcome.code(), 125, "{outcome:?}");
        assert!(outcome.stderr.contains("wanted"), "{outcome:?}");
        assert_orderly(outcome);
    }
    assert_eq!(hull.vmms().len(), 1);
    clean_up(&hull, "one name, many runs");
}

#[test]
fn commands_that_meet_at_one_container_leave_it_in_one_piece() {
    let Some(hull) = Hull::with_images(&["busybox"]) else {
        return;
    };
    let created = hull.run(&["create", "--name", "c", "busybox", "sleep", "1000"]);
    assert_eq!(created.code(), 0, "{created:?}");
    let start: &[&str] = &["start", "c"];
    let rounds: &[(&[&[&str]], &[usize])] = &[
        (&[start; 4], &[1]),
        (
            &[
                &["stop", "-t", "0", "c"],
                &["stop", "-t", "0", "c"],
                &["kill", "c"],
                &["exec", "c", "true"],
            ],
            &[0],
        ),
        (
            &[
                &["start", "c"],
                &["stop", "-t", "0", "c"],
                &["start", "c"],
                &["restart", "-t", "0", "c"],
            ],
            &[0, 1],
        ),
        (
            &[&["start", "c"], &["pause", "c"], &["resume", "c"], &["kill", "c"]],
            &[0, 1],
        ),
    ];
    for (commands, living) in rounds {
        let outcomes = at_once(&hull, commands);
        for outcome in &outcomes {
            assert_orderly(outcome);
        }
        // One that was killed may not have gone yet.
        assert!(
            eventually(PATIENCE, || living.contains(&hull.vmms().len())),
            "{} VMMs after {commands:?}: {outcomes:?}",
            hull.vmms().len()
        );
        let listed = hull.run(&["ps", "-aq"]);
        assert_eq!(listed.text().lines().count(), 1, "{listed:?}");
    }
    let outcomes = at_once(
        &hull,
        &[
            &["rm", "-f", "c"],
            &["rm", "-f", "c"],
            &["stop", "-t", "0", "c"],
            &["start", "c"],
        ],
    );
    for outcome in &outcomes {
        assert_orderly(outcome);
    }
    clean_up(&hull, "commands at one container");
}

#[test]
fn interrupted_removal_is_finished_by_the_next() {
    let Some(hull) = Hull::with_images(&["busybox"]) else {
        return;
    };
    for how in [Signal::SIGINT, Signal::SIGKILL] {
        for delay_ms in [0, 3, 10, 30, 80] {
            let outcome = hull.run(&["run", "-d", "--name", "doomed", "busybox", "sleep", "1000"]);
            assert_eq!(outcome.code(), 0, "{outcome:?}");
            let child = hull
                .command(&["rm", "-f", "doomed"])
                .spawn()
                .expect("hull starts");
            std::thread::sleep(Duration::from_millis(delay_ms));
            signal(pid(&child), how);
            assert_orderly(&finish(child));
            clean_up(&hull, &format!("removal ended by {how} after {delay_ms} ms"));
        }
    }
}

#[test]
fn interrupted_import_leaves_nothing_and_the_next_one_works() {
    let Some(hull) = Hull::with_images(&["busybox"]) else {
        return;
    };
    let layout = hull.layout("openssl");
    for how in [Signal::SIGINT, Signal::SIGKILL] {
        for delay_ms in [0, 10, 40, 120, 300] {
            let child = hull
                .command(&["import", &layout, "half"])
                .spawn()
                .expect("hull starts");
            std::thread::sleep(Duration::from_millis(delay_ms));
            signal(pid(&child), how);
            assert_orderly(&finish(child));
            clean_up(&hull, &format!("import ended by {how} after {delay_ms} ms"));
        }
    }
    assert_eq!(hull.run(&["import", &layout, "whole"]).code(), 0);
    let outcome = hull.run(&["run", "--rm", "whole"]);
    assert!(
        outcome.code() == 0 && outcome.text().starts_with("OpenSSL"),
        "{outcome:?}"
    );
}
