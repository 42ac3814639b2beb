//! Whoever is killed, containerd ends up knowing the truth, and nothing is left.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use hull_tests::containerd::{Containerd, HULL};
use hull_tests::hull::{eventually, signal};
use nix::sys::signal::Signal;

const PATIENCE: Duration = Duration::from_secs(60);

fn sleeper(world: &Containerd, id: &str) {
    world.run_detached(HULL, "busybox", id, &["sleep", "1000"]);
}

fn status_of(world: &Containerd, id: &str) -> String {
    world
        .task(id)
        .map_or_else(|| "none".to_owned(), |(_, status)| status)
}

/// A container whose process on the host was killed is stopped for containerd, with SIGKILL's status, and can be removed.
fn is_reported(world: &Containerd, id: &str) {
    let stopped = eventually(PATIENCE, || status_of(world, id) == "STOPPED");
    assert!(stopped, "{} {}", status_of(world, id), world.log());
    assert_eq!(world.delete_task(id), 137);
    world.ctr(&["containers", "delete", id]);
    assert_eq!(world.settle(&[id]), Vec::<String>::new());
}

#[test]
fn containerd_comes_back_to_containers_that_ran_on() {
    let Some(mut world) = Containerd::with_images(&["busybox"]) else {
        return;
    };
    sleeper(&world, "c1");
    world.run_detached(
        HULL,
        "busybox",
        "c2",
        &["sh", "-c", "while [ ! -e /tmp/go ]; do sleep 0.05; done; exit 5"],
    );
    for how in [Signal::SIGTERM, Signal::SIGKILL] {
        world.restart(how);
        assert_eq!(
            (status_of(&world, "c1").as_str(), status_of(&world, "c2").as_str()),
            ("RUNNING", "RUNNING")
        );
        let name = format!("after-{how}");
        assert_eq!(world.exec("c1", &name, &["sh", "-c", "exit 6"]).code(), 6);
    }
    // One ends while nobody is there to hear it.
    assert_eq!(world.exec("c2", "go", &["touch", "/tmp/go"]).code(), 0);
    world.stop_daemon(Signal::SIGKILL);
    world.restart(Signal::SIGKILL);
    let stopped = eventually(PATIENCE, || status_of(&world, "c2") == "STOPPED");
    assert!(stopped, "{}", world.log());
    assert_eq!(world.delete_task("c2"), 5);
    world.ctr(&["containers", "delete", "c2"]);
    world.remove("c1");
    assert_eq!(world.settle(&["c1", "c2"]), Vec::<String>::new());
}

#[test]
fn shim_that_is_killed_takes_its_container_along() {
    let Some(world) = Containerd::with_images(&["busybox"]) else {
        return;
    };
    sleeper(&world, "c1");
    let shims = world.processes_of("containerd-shim-hull-v2");
    let (monitor, _) = world.task("c1").expect("it runs");
    for pid in shims.into_iter().filter(|pid| *pid != monitor) {
        signal(pid, Signal::SIGKILL);
    }
    // containerd has `delete` called, and forgets the task.
    let gone = eventually(PATIENCE, || {
        matches!(status_of(&world, "c1").as_str(), "none" | "STOPPED")
    });
    assert!(gone, "{}", world.log());
    world.try_ctr(&["tasks", "delete", "c1"]);
    world.ctr(&["containers", "delete", "c1"]);
    assert_eq!(world.settle(&["c1"]), Vec::<String>::new());
    sleeper(&world, "c1");
    world.remove("c1");
    assert_eq!(world.settle(&["c1"]), Vec::<String>::new());
}

#[test]
fn microvm_that_is_killed_is_a_container_that_was_killed() {
    let Some(world) = Containerd::with_images(&["busybox"]) else {
        return;
    };
    sleeper(&world, "c1");
    for pid in world.processes_of("hull-vmm") {
        signal(pid, Signal::SIGKILL);
    }
    is_reported(&world, "c1");
}

#[test]
fn monitor_that_is_killed_is_a_container_that_was_killed() {
    let Some(world) = Containerd::with_images(&["busybox"]) else {
        return;
    };
    sleeper(&world, "c1");
    let (pid, _) = world.task("c1").expect("it runs");
    signal(pid, Signal::SIGKILL);
    is_reported(&world, "c1");
}

#[test]
fn everything_killed_at_once_is_cleaned_up_when_containerd_comes_back() {
    let Some(mut world) = Containerd::with_images(&["busybox"]) else {
        return;
    };
    for id in ["c1", "c2"] {
        sleeper(&world, id);
    }
    world.stop_daemon(Signal::SIGKILL);
    for (pid, _) in world.processes() {
        signal(pid, Signal::SIGKILL);
    }
    world.restart(Signal::SIGKILL);
    for id in ["c1", "c2"] {
        let gone = eventually(PATIENCE, || {
            matches!(status_of(&world, id).as_str(), "none" | "STOPPED")
        });
        assert!(gone, "{}", world.log());
        world.try_ctr(&["tasks", "delete", id]);
        world.ctr(&["containers", "delete", id]);
    }
    assert_eq!(world.settle(&["c1", "c2"]), Vec::<String>::new());
}

/// Tries to live a container's life; what becomes of it, while processes are killed, is not asked.
fn life_among_killers(world: &Containerd, id: &str) {
    world.run(HULL, &["--detach"], "busybox", id, &["sleep", "1000"]);
    world.exec(id, "e1", &["true"]);
    world.try_ctr(&["tasks", "kill", "--signal", "SIGKILL", id]);
    world.try_ctr(&["tasks", "delete", id]);
    world.try_ctr(&["containers", "delete", id]);
}

/// A number that differs from call to call.
fn any_number() -> u32 {
    std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .expect("the clock is set")
        .subsec_nanos()
        / 64
}

#[test]
fn nothing_is_left_of_containers_whose_processes_are_killed_at_random() {
    let Some(mut world) = Containerd::with_images(&["busybox"]) else {
        return;
    };
    let ids: Vec<String> = (0..24).map(|number| format!("c{number}")).collect();
    let ids: Vec<&str> = ids.iter().map(String::as_str).collect();
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let killer = scope.spawn(|| {
            let mut killed = 0;
            while !over.load(Ordering::Relaxed) {
                std::thread::sleep(Duration::from_millis(u64::from(any_number() % 200)));
                let mut ours = world.processes_of("containerd-shim-hull-v2");
                ours.extend(world.processes_of("hull-vmm"));
                if !ours.is_empty() {
                    signal(ours[any_number() as usize % ours.len()], Signal::SIGKILL);
                    killed += 1;
                }
            }
            killed
        });
        let lives: Vec<_> = ids
            .chunks(6)
            .map(|ids| {
                let world = &world;
                scope.spawn(move || ids.iter().for_each(|id| life_among_killers(world, id)))
            })
            .collect();
        for life in lives {
            life.join().expect("no panic");
        }
        over.store(true, Ordering::Relaxed);
        assert!(killer.join().expect("no panic") > 0);
    });
    world.restart(Signal::SIGKILL);
    for id in &ids {
        // A task whose shim was killed is forgotten when containerd has called `delete`.
        let gone = eventually(PATIENCE, || {
            world.try_ctr(&["tasks", "delete", "--force", id]);
            status_of(&world, id) == "none"
        });
        assert!(gone, "{id}: {}: {}", status_of(&world, id), world.log());
        world.try_ctr(&["containers", "delete", id]);
    }
    // What was left where containerd's own call of `delete` was killed, the next container's shim removes.
    sleeper(&world, "c1");
    world.remove("c1");
    assert_eq!(world.settle(&ids), Vec::<String>::new());
}

/// Has containerd forget a task, as it does when its call of `delete` fails.
fn forget(world: &Containerd, id: &str) {
    for folder in [
        "state/io.containerd.runtime.v2.task",
        "root/io.containerd.runtime.v2.task",
    ] {
        let bundle = world.path(folder).join(world.namespace()).join(id);
        nix::mount::umount2(&bundle.join("rootfs"), nix::mount::MntFlags::MNT_DETACH).ok();
        std::fs::remove_dir_all(&bundle).expect("the task's own");
    }
}

#[test]
fn container_that_containerd_has_forgotten_goes_with_the_next() {
    let Some(mut world) = Containerd::with_images(&["busybox"]) else {
        return;
    };
    // The next has another id, or the same.
    for next in ["c2", "c1"] {
        sleeper(&world, "c1");
        world.stop_daemon(Signal::SIGKILL);
        for (pid, _) in world.processes() {
            signal(pid, Signal::SIGKILL);
        }
        forget(&world, "c1");
        world.restart(Signal::SIGKILL);
        assert_eq!(status_of(&world, "c1"), "none");
        world.try_ctr(&["containers", "delete", "c1"]);
        assert_ne!(world.leftovers(&["c1"]), Vec::<String>::new());
        sleeper(&world, next);
        world.remove(next);
        assert_eq!(world.settle(&["c1", "c2"]), Vec::<String>::new());
    }
}

#[test]
fn pods_process_ends_with_its_shim() {
    let Some(mut world) = Containerd::with_images(&["busybox"]) else {
        return;
    };
    let options = [
        "--detach",
        "--annotation",
        "io.kubernetes.cri.container-type=sandbox",
    ];
    let outcome = world.run(HULL, &options, "busybox", "pod", &["sleep", "1000"]);
    assert!(outcome.status.success(), "{outcome:?}");
    let (pid, _) = world.task("pod").expect("it runs");
    let lives = || std::fs::read(format!("/proc/{pid}/cmdline")).is_ok_and(|line| !line.is_empty());
    assert!(lives());
    // Nobody is there to call `delete`.
    world.stop_daemon(Signal::SIGKILL);
    for shim in world.processes_of("containerd-shim-hull-v2") {
        signal(shim, Signal::SIGKILL);
    }
    assert!(eventually(PATIENCE, || !lives()));
    world.restart(Signal::SIGKILL);
    let gone = eventually(PATIENCE, || {
        world.try_ctr(&["tasks", "delete", "--force", "pod"]);
        status_of(&world, "pod") == "none"
    });
    assert!(gone, "{}", world.log());
    world.ctr(&["containers", "delete", "pod"]);
    assert_eq!(world.settle(&["pod"]), Vec::<String>::new());
}
