//! Everything of `hull-oci` may be killed at any moment: the next command says `stopped` or cleans up, and nothing is left.

use std::fs;
use std::time::Duration;

use hull_tests::hull::eventually;
use hull_tests::oci::{OciBundle, hull_oci, reap};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

const PATIENCE: Duration = Duration::from_secs(120);
const WAITS: &str = "echo ready; exec sleep 1000";

fn kill_now(pid: i32) {
    kill(Pid::from_raw(pid), Signal::SIGKILL).expect("it is there");
}

#[test]
fn killed_monitor_or_vmm_leaves_a_stopped_container() {
    let Some(hull) = hull_oci() else { return };
    let bundle = OciBundle::script(WAITS);
    for victim in ["monitor", "vmm"] {
        for started in [false, true] {
            let pid = hull.create(&bundle, "web");
            if started {
                hull.ok(&["start", "web"]);
                hull.expect_output("web", "ready");
            }
            let pids: Vec<i32> =
                serde_json::from_str(&hull.ok(&["ps", "--format", "json", "web"])).expect("JSON");
            kill_now(if victim == "monitor" { pid } else { pids[1] });
            reap(pid);
            assert_eq!(hull.status("web"), "stopped", "{victim} started={started}");
            hull.ok(&["delete", "web"]);
            assert_eq!(
                hull.leftovers(),
                Vec::<String>::new(),
                "{victim} started={started}"
            );
        }
    }
}

#[test]
fn create_killed_at_any_moment_is_cleaned_up_by_a_forced_delete() {
    let Some(hull) = hull_oci() else { return };
    let bundle = OciBundle::script(WAITS);
    // Moments until the container is created, and beyond.
    for round in 0..12_u64 {
        let mut child = hull
            .command(&["create", "--bundle", bundle.text(), "web"])
            .stdout(std::process::Stdio::null())
            .stderr(std::process::Stdio::null())
            .spawn()
            .expect("it starts");
        std::thread::sleep(Duration::from_millis(round * 25));
        child.kill().ok();
        child.wait().ok();
        hull.ok(&["delete", "--force", "web"]);
        let gone = eventually(PATIENCE, || hull.leftovers().is_empty());
        assert!(gone, "after {} ms: {:?}", round * 25, hull.leftovers());
    }
    // And it is of use as if nothing had happened.
    hull.create(&bundle, "web");
    hull.ok(&["delete", "web"]);
    assert_eq!(hull.leftovers(), Vec::<String>::new());
}

#[test]
fn forced_delete_ends_what_runs_is_paused_or_can_not_be_read() {
    let Some(hull) = hull_oci() else { return };
    let bundle = OciBundle::script(WAITS).for_several();
    let pids: Vec<i32> = ["oci-running", "oci-paused", "oci-damaged"]
        .map(|id| {
            let pid = hull.start_new(&bundle, id);
            hull.expect_output(id, "ready");
            pid
        })
        .to_vec();
    hull.ok(&["pause", "oci-paused"]);
    fs::write(hull.root().join("oci-damaged/state.json"), "{ half").expect("it is there");
    kill_now(pids[2]);
    for id in ["oci-running", "oci-paused", "oci-damaged", "never-there"] {
        hull.ok(&["delete", "--force", id]);
    }
    for pid in pids {
        reap(pid);
    }
    let gone = eventually(PATIENCE, || hull.leftovers().is_empty());
    assert!(gone, "{:?}", hull.leftovers());
}

#[test]
fn containers_side_by_side_come_and_go_without_a_trace() {
    let Some(hull) = hull_oci() else { return };
    let bundle = OciBundle::script("echo $$; exit 5").for_several();
    std::thread::scope(|scope| {
        for lane in 0..4 {
            let (hull, bundle) = (&hull, &bundle);
            scope.spawn(move || {
                for round in 0..4 {
                    let id = format!("oci-{lane}-{round}");
                    let pid = hull.create(bundle, &id);
                    hull.ok(&["start", &id]);
                    assert_eq!(reap(pid).code(), Some(5));
                    assert_eq!(hull.output(&id), "1\n");
                    hull.ok(&["delete", &id]);
                }
            });
        }
    });
    assert_eq!(hull.leftovers(), Vec::<String>::new());
}
