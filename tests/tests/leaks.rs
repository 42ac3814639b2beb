//! Many runs, one after the other and at once: none fails, and the machine holds nothing afterwards that it didn't hold before.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use hull_tests::footprint::{Footprint, open_files};
use hull_tests::hull::{Hull, PATIENCE, eventually, finish};

/// The counts of one test must not see another's containers come and go in shared places.
static ALONE: Mutex<()> = Mutex::new(());

fn alone() -> MutexGuard<'static, ()> {
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What is more than before once everything had time to go.
fn grown(hull: &Hull, before: &Footprint) -> Vec<String> {
    let mut more = Vec::new();
    eventually(PATIENCE, || {
        more = Footprint::of(hull).beyond(before);
        more.is_empty()
    });
    more
}

fn own_files() -> usize {
    open_files(i32::try_from(std::process::id()).expect("pids are small"))
}

fn run_in_sequence(count: u32) {
    let _alone = alone();
    let Some(hull) = Hull::with_images(&["busybox"]) else {
        return;
    };
    // The first run makes what stays: the folders of the run-time state.
    assert_eq!(hull.run(&["run", "--rm", "busybox", "true"]).code(), 0);
    assert_eq!(hull.settle(), Vec::<String>::new());
    let before = Footprint::of(&hull);
    let own = own_files();
    for n in 0..count {
        let code = i32::try_from(n % 100).expect("it is small");
        let script = format!("cat; echo {n}; exit {code}");
        let name = format!("run-{n}");
        // Every kind of run by turns: plain, with input, with a name, ended by a failure of its own.
        let outcome = match n % 4 {
            0 => hull.run(&["run", "--rm", "busybox", "/bin/sh", "-c", &script]),
            1 => hull.run_with_input(
                &["run", "--rm", "-i", "busybox", "/bin/sh", "-c", &script],
                b"in\n".to_vec(),
            ),
            2 => hull.run(&[
                "run", "--rm", "--name", &name, "busybox", "/bin/sh", "-c", &script,
            ]),
            _ => hull.run(&["run", "--rm", "--cpus", "2", "busybox", "/bin/sh", "-c", &script]),
        };
        let expected = if n % 4 == 1 {
            format!("in\n{n}")
        } else {
            n.to_string()
        };
        assert_eq!(
            (outcome.code(), outcome.text()),
            (code, expected),
            "run {n}: {outcome:?}"
        );
        if n % 25 == 0 {
            let failed = hull.run(&["run", "--rm", "busybox", "no-such-command"]);
            assert_eq!(failed.code(), 127, "{failed:?}");
        }
    }
    assert_eq!(grown(&hull, &before), Vec::<String>::new(), "after {count} runs");
    assert_eq!(own_files(), own);
}

#[test]
fn a_hundred_runs_in_sequence_leave_nothing() {
    run_in_sequence(100);
}

#[test]
#[ignore = "takes minutes; the hundred of the ordinary run find the same leaks"]
fn five_hundred_runs_in_sequence_leave_nothing() {
    run_in_sequence(500);
}

#[test]
fn thirty_runs_at_once_leave_nothing() {
    let _alone = alone();
    let Some(hull) = Hull::with_images(&["busybox"]) else {
        return;
    };
    assert_eq!(hull.run(&["run", "--rm", "busybox", "true"]).code(), 0);
    assert_eq!(hull.settle(), Vec::<String>::new());
    let before = Footprint::of(&hull);
    let children: Vec<_> = (0..30)
        .map(|n: i32| {
            let script = format!("echo out {n}; echo err {n} >&2; exit {n}");
            let arguments = [
                "run", "--rm", "--memory", "128m", "busybox", "/bin/sh", "-c", &script,
            ];
            (n, hull.command(&arguments).spawn().expect("hull starts"))
        })
        .collect();
    for (n, child) in children {
        let outcome = finish(child);
        assert_eq!(
            (outcome.code(), outcome.text(), outcome.stderr.trim()),
            (n, format!("out {n}"), format!("err {n}").as_str()),
            "{outcome:?}"
        );
    }
    assert_eq!(grown(&hull, &before), Vec::<String>::new());
}

#[test]
fn thirty_containers_living_at_once_answer_and_leave_nothing() {
    let _alone = alone();
    let Some(hull) = Hull::with_images(&["busybox"]) else {
        return;
    };
    assert_eq!(hull.run(&["run", "--rm", "busybox", "true"]).code(), 0);
    assert_eq!(hull.settle(), Vec::<String>::new());
    let before = Footprint::of(&hull);
    let names: Vec<String> = (0..30).map(|n| format!("box-{n}")).collect();
    for name in &names {
        let outcome = hull.run(&[
            "run", "-d", "--rm", "--memory", "128m", "--name", name, "busybox", "sleep", "1000",
        ]);
        assert_eq!(outcome.code(), 0, "{name}: {outcome:?}");
    }
    assert_eq!((hull.vmms().len(), hull.monitors().len()), (30, 30));
    for name in &names {
        let outcome = hull.run(&["exec", name, "hostname"]);
        assert_eq!(outcome.code(), 0, "{name}: {outcome:?}");
    }
    let all: Vec<&str> = names.iter().map(String::as_str).collect();
    let outcome = hull.run(&[&["kill"], &all[..]].concat());
    assert_eq!(outcome.code(), 0, "{outcome:?}");
    assert_eq!(grown(&hull, &before), Vec::<String>::new());
}

#[test]
fn what_lives_opens_no_more_files_from_exec_to_exec() {
    let _alone = alone();
    let Some(hull) = Hull::with_images(&["busybox"]) else {
        return;
    };
    let witness = [
        "run", "-d", "--rm", "--name", "witness", "busybox", "sleep", "1000",
    ];
    let outcome = hull.run(&witness);
    assert_eq!(outcome.code(), 0, "{outcome:?}");
    let exec = |n: usize| {
        let script = format!("echo {n}; echo e >&2");
        let outcome = hull.run_with_input(&["exec", "-i", "witness", "sh", "-c", &script], b"x".to_vec());
        assert_eq!(
            (outcome.code(), outcome.text()),
            (0, n.to_string()),
            "{outcome:?}"
        );
    };
    // Where the process counts live in the guest: its own and the agent's.
    let guest = || {
        hull.run(&["exec", "witness", "sh", "-c", "ls /proc | grep -c '^[0-9]'"])
            .text()
    };
    exec(0);
    let processes = guest();
    let living: Vec<i32> = [hull.vmms(), hull.monitors()].concat();
    assert_eq!(living.len(), 2);
    let count = || living.iter().map(|pid| open_files(*pid)).collect::<Vec<_>>();
    let before = count();
    for round in 0..10 {
        std::thread::scope(|scope| {
            for n in 0..4 {
                scope.spawn(move || exec(round * 4 + n));
            }
        });
        let interrupted = hull.command(&["exec", "witness", "sleep", "1000"]).spawn();
        let mut interrupted = interrupted.expect("hull starts");
        std::thread::sleep(Duration::from_millis(10));
        interrupted.kill().ok();
        interrupted.wait().ok();
    }
    assert!(
        eventually(PATIENCE, || count() == before),
        "{before:?} became {:?}",
        count()
    );
    // The processes of killed clients end with them, or are those clients' own business, but the last ones of exec do.
    let processes_now = || guest().parse::<usize>().unwrap();
    let (before, mut after) = (processes.parse::<usize>().unwrap(), processes_now());
    // One that has ended is there until it has been waited for.
    eventually(PATIENCE, || {
        after = processes_now();
        after <= before + 10
    });
    assert!(
        after <= before + 10,
        "{before} processes in the guest became {after}"
    );
    assert_eq!(hull.run(&["kill", "witness"]).code(), 0);
    assert_eq!(hull.settle(), Vec::<String>::new());
}
