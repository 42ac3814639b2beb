//! Many containers, many at once: none fails, and none leaves anything.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use hull_tests::containerd::{Containerd, HULL};

/// Create, start, execute in, kill, delete; so many in all, so many at once.
fn churn(world: &Containerd, count: usize, at_once: usize) {
    let next = AtomicUsize::new(0);
    thread::scope(|scope| {
        for _ in 0..at_once {
            scope.spawn(|| {
                loop {
                    let number = next.fetch_add(1, Ordering::Relaxed);
                    if number >= count {
                        break;
                    }
                    one(world, number);
                }
            });
        }
    });
    let ids: Vec<String> = (0..count).map(|number| format!("c{number}")).collect();
    let ids: Vec<&str> = ids.iter().map(String::as_str).collect();
    assert_eq!(world.settle(&ids), Vec::<String>::new());
    assert_eq!(world.ctr(&["tasks", "ls", "--quiet"]), "");
}

fn one(world: &Containerd, number: usize) {
    let id = format!("c{number}");
    if number.is_multiple_of(3) {
        let outcome = world.run(
            HULL,
            &["--rm"],
            "busybox",
            &id,
            &["sh", "-c", &format!("echo {id}; exit {}", number % 100)],
        );
        assert_eq!(
            (outcome.status.code(), outcome.text()),
            (i32::try_from(number % 100).ok(), id),
            "{}",
            world.log()
        );
        return;
    }
    world.run_detached(HULL, "busybox", &id, &["sleep", "1000"]);
    let outcome = world.exec(&id, "e1", &["sh", "-c", "echo $((6*7))"]);
    assert_eq!(
        (outcome.code(), outcome.text().as_str()),
        (0, "42"),
        "{}",
        world.log()
    );
    world.remove(&id);
}

#[test]
fn twenty_containers_at_a_time_of_six() {
    let Some(world) = Containerd::with_images(&["busybox"]) else {
        return;
    };
    churn(&world, 20, 6);
}

#[test]
#[ignore = "takes minutes; `cargo xtask test -p hull-tests -- --ignored three_hundred`"]
fn three_hundred_containers_at_a_time_of_twenty() {
    let Some(world) = Containerd::with_images(&["busybox"]) else {
        return;
    };
    churn(&world, 300, 20);
}

#[test]
fn fifty_processes_at_once_in_one_container() {
    let Some(world) = Containerd::with_images(&["busybox"]) else {
        return;
    };
    world.run_detached(HULL, "busybox", "c1", &["sleep", "1000"]);
    let failures: Vec<String> = thread::scope(|scope| {
        let tasks: Vec<_> = (0..50)
            .map(|number| {
                let world = &world;
                scope.spawn(move || {
                    let script = format!("read word; echo {number}-$word; exit {number}");
                    let mut command = world.ctr_command(&[
                        "tasks",
                        "exec",
                        "--exec-id",
                        &format!("e{number}"),
                        "c1",
                        "sh",
                        "-c",
                        &script,
                    ]);
                    let mut child = command
                        .stdin(std::process::Stdio::piped())
                        .spawn()
                        .expect("ctr is installed");
                    let mut stdin = child.stdin.take().expect("piped");
                    std::io::Write::write_all(&mut stdin, b"word\n").expect("ctr reads it");
                    drop(stdin);
                    let outcome = hull_tests::hull::finish_within(child, std::time::Duration::from_secs(300));
                    let good = outcome.status.code() == Some(number % 50)
                        && outcome.text() == format!("{number}-word");
                    (!good).then(|| format!("{number}: {outcome:?}"))
                })
            })
            .collect();
        tasks
            .into_iter()
            .filter_map(|task| task.join().expect("no panic"))
            .collect()
    });
    assert_eq!(failures, Vec::<String>::new(), "{}", world.log());
    world.remove("c1");
    assert_eq!(world.settle(&["c1"]), Vec::<String>::new());
}

#[test]
fn input_that_ends_before_the_process_runs_ends() {
    let Some(world) = Containerd::with_images(&["busybox"]) else {
        return;
    };
    world.run_detached(HULL, "busybox", "c1", &["sleep", "1000"]);
    // The same name again and again: containerd may use it again once the process is deleted.
    for round in 0..5 {
        let mut command = world.ctr_command(&["tasks", "exec", "--exec-id", "e", "c1", "cat"]);
        let mut child = command
            .stdin(std::process::Stdio::piped())
            .spawn()
            .expect("ctr is installed");
        let mut stdin = child.stdin.take().expect("piped");
        std::io::Write::write_all(&mut stdin, b"word\n").expect("ctr reads it");
        drop(stdin);
        let outcome = hull_tests::hull::finish_within(child, std::time::Duration::from_secs(120));
        assert_eq!(
            (outcome.code(), outcome.text().as_str()),
            (0, "word"),
            "round {round}"
        );
    }
    world.remove("c1");
    assert_eq!(world.settle(&["c1"]), Vec::<String>::new());
}
