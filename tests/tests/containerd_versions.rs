//! Other containerds than the distribution's own: 1.7 and 2.x, as its newer suites have them.

use std::time::Duration;

use hull_tests::containerd::{Containerd, HULL, Options, Programs, available, reference};
use hull_tests::hull::eventually;

/// What each version is asked for, with each of the snapshotters named.
fn works(suite: &str, snapshotters: &[&str]) {
    if !available() {
        return;
    }
    let Some(programs) = Programs::of_suite(suite) else {
        return;
    };
    let Some(mut world) = Containerd::start(programs, Options::default()) else {
        return;
    };
    world.import("busybox");
    let image = reference("busybox");
    for snapshotter in snapshotters {
        let outcome = world.run(
            HULL,
            &["--rm", "--snapshotter", snapshotter],
            "busybox",
            snapshotter,
            &["sh", "-c", "echo out; echo err >&2; touch /new && exit 7"],
        );
        assert_eq!(
            (
                outcome.status.code(),
                outcome.text().as_str(),
                outcome.stderr.as_str()
            ),
            (Some(7), "out", "err\n"),
            "{snapshotter}: {}",
            world.log()
        );
    }
    world.run_detached(HULL, "busybox", "c1", &["sleep", "1000"]);
    assert_eq!(world.exec("c1", "e1", &["sh", "-c", "exit 3"]).code(), 3);
    world.ctr(&["tasks", "pause", "c1"]);
    world.ctr(&["tasks", "resume", "c1"]);
    assert!(world.ctr(&["tasks", "metrics", "c1"]).contains("memory"));
    world.restart(nix::sys::signal::Signal::SIGKILL);
    assert_eq!(world.exec("c1", "e2", &["sh", "-c", "exit 4"]).code(), 4);
    world.ctr(&["tasks", "kill", "--signal", "SIGKILL", "c1"]);
    let stopped = eventually(Duration::from_secs(60), || {
        world.task("c1").is_some_and(|(_, status)| status == "STOPPED")
    });
    assert!(stopped, "{}", world.log());
    assert_eq!(world.delete_task("c1"), 137);
    world.ctr(&["containers", "delete", "c1"]);
    assert!(world.ctr(&["images", "ls", "--quiet"]).contains(&image));
    let ids: Vec<&str> = snapshotters.iter().copied().chain(["c1"]).collect();
    assert_eq!(world.settle(&ids), Vec::<String>::new());
}

#[test]
fn containerd_1_6_of_the_distribution_with_two_snapshotters() {
    let Some(world) = Containerd::with_images(&["busybox"]) else {
        return;
    };
    for snapshotter in ["overlayfs", "native"] {
        let options = ["--rm", "--snapshotter", snapshotter];
        let outcome = world.run(
            HULL,
            &options,
            "busybox",
            snapshotter,
            &["sh", "-c", "touch /new; ls /new"],
        );
        assert_eq!(
            (outcome.code(), outcome.text().as_str()),
            (0, "/new"),
            "{}",
            world.log()
        );
    }
    assert_eq!(world.settle(&["overlayfs", "native"]), Vec::<String>::new());
}

#[test]
fn containerd_1_7_of_the_next_suite() {
    works("trixie", &["overlayfs", "native"]);
}

#[test]
fn containerd_2_of_the_newest_suite() {
    works("sid", &["overlayfs", "native", "erofs"]);
}
