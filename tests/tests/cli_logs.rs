//! `hull logs`: everything a container printed, in order, for as long as it prints.

use std::process::Stdio;

use hull_tests::hull::{Hull, PATIENCE, eventually, finish, signal};
use nix::sys::signal::Signal;

/// Prints numbered lines.
fn counting(from: u32, to: u32) -> String {
    format!("i={from}; while [ $i -lt {to} ]; do echo line $i; i=$((i+1)); done")
}

fn start(hull: &Hull, name: &str, options: &[&str], script: &str) {
    let mut arguments = vec!["run", "-d", "--name", name];
    arguments.extend(options);
    arguments.extend(["busybox", "sh", "-c", script]);
    let outcome = hull.run(&arguments);
    assert_eq!(outcome.code(), 0, "{outcome:?}");
}

fn lines(from: u32, to: u32) -> String {
    let lines: Vec<String> = (from..to).map(|line| format!("line {line}")).collect();
    lines.join("\n")
}

#[test]
fn streams_stay_apart_and_last_lines_and_times_can_be_chosen() {
    let Some(hull) = Hull::with_images(&["busybox"]) else {
        return;
    };
    // Lines that are read at once have one time: the second half waits until the first is kept.
    let script = format!(
        "{}; until [ -e /go ]; do sleep 0.05; done; {}; echo oops >&2",
        counting(0, 5),
        counting(5, 10)
    );
    start(&hull, "talker", &[], &script);
    assert!(eventually(PATIENCE, || {
        hull.run(&["logs", "talker"]).text() == lines(0, 5)
    }));
    assert_eq!(hull.run(&["exec", "talker", "touch", "/go"]).code(), 0);
    assert_eq!(hull.run(&["wait", "talker"]).text(), "0");

    let all = hull.run(&["logs", "talker"]);
    assert_eq!((all.text(), all.stderr.as_str()), (lines(0, 10), "oops\n"));
    let last = hull.run(&["logs", "-n", "3", "talker"]);
    // Which of the two streams was last is the container's affair.
    assert_eq!(last.text().lines().count() + last.stderr.lines().count(), 3);
    assert_eq!(hull.run(&["logs", "--tail", "0", "talker"]).text(), "");

    let timed = hull.run(&["logs", "-t", "talker"]).text();
    let times: Vec<&str> = timed
        .lines()
        .filter_map(|line| line.split_once(' '))
        .map(|(time, _)| time)
        .collect();
    assert!(times.is_sorted() && times.len() == 10, "{timed}");
    assert!(
        times.iter().all(|time| time.len() == 30 && time.ends_with('Z')),
        "{timed}"
    );
    let since = hull.run(&["logs", "--since", times[5], "talker"]);
    assert_eq!(since.text(), lines(5, 10), "{timed}");
    let until = hull.run(&["logs", "--until", times[4], "talker"]);
    assert_eq!(until.text(), lines(0, 5), "{timed}");
    assert_eq!(
        hull.run(&["logs", "--since", "1h", "talker"]).text(),
        lines(0, 10)
    );
    assert_eq!(hull.run(&["logs", "--until", "1h", "talker"]).text(), "");
}

#[test]
fn following_shows_what_comes_and_ends_with_the_container() {
    let Some(hull) = Hull::with_images(&["busybox"]) else {
        return;
    };
    start(
        &hull,
        "talker",
        &["-i"],
        "echo ready; while read line && [ $line != end ]; do echo got $line; done; echo over",
    );
    let following = hull
        .command(&["logs", "-f", "talker"])
        .spawn()
        .expect("hull starts");
    let attached = hull.run_with_input(&["attach", "talker"], b"one\ntwo\nend\n".to_vec());
    assert_eq!(attached.code(), 0, "{attached:?}");
    let followed = finish(following);
    assert_eq!(followed.code(), 0, "{followed:?}");
    assert_eq!(followed.text(), "ready\ngot one\ngot two\nover");
}

#[test]
fn following_ends_when_the_monitor_is_killed() {
    let Some(hull) = Hull::with_images(&["busybox"]) else {
        return;
    };
    start(&hull, "talker", &[], "echo ready; sleep 1000");
    let following = hull
        .command(&["logs", "-f", "talker"])
        .spawn()
        .expect("hull starts");
    assert!(eventually(PATIENCE, || {
        hull.run(&["logs", "talker"]).text() == "ready"
    }));
    let monitor = hull.run(&["inspect", "-f", "{{.MicroVM.MonitorPid}}", "talker"]);
    signal(monitor.text().parse().expect("a pid"), Signal::SIGKILL);
    let followed = finish(following);
    assert_eq!(
        (followed.code(), followed.text().as_str()),
        (0, "ready"),
        "{followed:?}"
    );
    assert!(eventually(PATIENCE, || hull.vmms().is_empty()));
}

#[test]
fn following_misses_nothing_while_files_are_rotated() {
    const LINES: u32 = 20_000;
    let Some(hull) = Hull::with_images(&["busybox"]) else {
        return;
    };
    // The script waits for a line before it begins, so that it is followed from the first on.
    let script = format!("read go; {}", counting(0, LINES));
    let options = ["-i", "--log-opt", "max-size=100k", "--log-opt", "max-file=1000"];
    start(&hull, "talker", &options, &script);
    let following = hull
        .command(&["logs", "-f", "talker"])
        .stderr(Stdio::inherit())
        .spawn()
        .expect("hull starts");
    let attached = hull.run_with_input(&["attach", "talker"], b"go\n".to_vec());
    assert_eq!(attached.code(), 0, "{}", attached.stderr);
    let followed = finish(following);
    assert!(followed.text() == lines(0, LINES), "lines are missing or doubled");
    // So does reading it afterwards, file by file.
    assert!(hull.run(&["logs", "talker"]).text() == lines(0, LINES));
}

#[test]
fn log_that_was_rotated_away_begins_later_and_stays_small() {
    let Some(hull) = Hull::with_images(&["busybox"]) else {
        return;
    };
    let options = ["--log-opt", "max-size=20k", "--log-opt", "max-file=2"];
    start(&hull, "talker", &options, &counting(0, 5000));
    assert_eq!(hull.run(&["wait", "talker"]).text(), "0");
    let text = hull.run(&["logs", "talker"]).text();
    assert!(
        text.ends_with(&lines(4990, 5000)) && !text.contains("line 0\n"),
        "{text}"
    );
    assert_eq!(
        hull.run(&["logs", "-n", "100", "talker"]).text(),
        lines(4900, 5000)
    );
}

#[test]
fn what_is_not_kept_is_said_in_one_line() {
    let Some(hull) = Hull::with_images(&["busybox"]) else {
        return;
    };
    start(&hull, "silent", &["--log-driver", "none"], "echo x");
    for (name, says) in [("silent", "--log-driver none"), ("nobody", "nobody")] {
        let outcome = hull.run(&["logs", name]);
        assert_eq!(
            (outcome.code(), outcome.stderr.lines().count()),
            (1, 1),
            "{outcome:?}"
        );
        assert!(outcome.stderr.contains(says), "{outcome:?}");
    }
}
