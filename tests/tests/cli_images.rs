//! Images and containers looked at and removed: `image …`, `inspect`, `prune`, `--format`.

use hull_tests::hull::{Hull, Outcome, PATIENCE, eventually, finish};
use serde_json::Value;

fn one_line(outcome: &Outcome) -> &str {
    let text = outcome.stderr.trim_end();
    assert!(!text.contains('\n') && text.starts_with("hull: "), "{outcome:?}");
    text
}

fn json(outcome: &Outcome) -> Value {
    serde_json::from_slice(&outcome.stdout).unwrap_or_else(|error| panic!("{error}: {outcome:?}"))
}

#[test]
fn image_is_listed_tagged_inspected_and_removed_with_its_last_name() {
    let Some(hull) = Hull::with_images(&["busybox"]) else {
        return;
    };
    let id = hull.run(&["images", "-q", "--no-trunc"]).text();
    assert_eq!(hull.run(&["tag", "busybox", "box:2"]).code(), 0);
    let names = hull
        .run(&["image", "ls", "--format", "{{.Repository}}:{{.Tag}}"])
        .text();
    assert_eq!(names, "box:2\nbusybox:latest");
    assert_eq!(hull.run(&["images", "--format", "{{.Tag}}", "box"]).text(), "2");
    assert_eq!(
        hull.run(&["images", "-q", "-f", "reference=b*x"]).text(),
        id[7..19]
    );

    let inspected = json(&hull.run(&["image", "inspect", "box:2"]));
    assert_eq!(inspected[0]["Id"], id.as_str());
    assert_eq!(inspected[0]["Os"], "linux");
    assert_eq!(inspected[0]["RepoTags"][1], "busybox:latest");
    let history = hull.run(&["image", "history", "--format", "json", "busybox"]);
    assert_eq!(history.code(), 0, "{history:?}");

    // An id with several names is not removed by accident.
    let several = hull.run(&["rmi", &id]);
    assert_eq!(several.code(), 1);
    one_line(&several);
    assert_eq!(hull.run(&["rmi", "busybox"]).text(), "Untagged: busybox:latest");
    let last = hull.run(&["rmi", "box:2"]).text();
    assert!(last.starts_with("Untagged: box:2\nDeleted: sha256:"), "{last}");
    assert_eq!(hull.run(&["images", "-q"]).text(), "");
}

#[test]
fn image_of_a_container_is_kept_until_the_container_goes() {
    let Some(hull) = Hull::with_images(&["busybox"]) else {
        return;
    };
    assert_eq!(
        hull.run(&["create", "--name", "user", "busybox", "true"]).code(),
        0
    );
    let refused = hull.run(&["rmi", "busybox"]);
    assert_eq!(refused.code(), 1);
    assert!(one_line(&refused).contains("container user"), "{refused:?}");
    assert_eq!(hull.run(&["image", "prune", "-af"]).code(), 0);
    assert_eq!(hull.run(&["start", "-a", "user"]).code(), 0);

    // Unless told otherwise it asks, and no answer is a no.
    let asked = hull.run(&["prune", "-a"]);
    assert!(asked.stderr.contains("[y/N]"), "{asked:?}");
    assert_eq!(hull.run(&["ps", "-aq"]).text().lines().count(), 1);
    let dry = hull.run(&["prune", "-a", "--dry-run"]).text();
    assert!(
        dry.contains("Deleted Containers") && dry.contains("untagged: busybox"),
        "{dry}"
    );
    assert_eq!(hull.run(&["ps", "-aq"]).text().lines().count(), 1);
    let pruned = hull.run(&["prune", "-af"]).text();
    assert!(
        pruned.contains("Deleted Images") && pruned.contains("Total reclaimed space"),
        "{pruned}"
    );
    assert_eq!(hull.run(&["ps", "-aq"]).text(), "");
    assert_eq!(hull.run(&["images", "-q"]).text(), "");
}

#[test]
fn container_is_described_as_docker_does() {
    let Some(hull) = Hull::with_images(&["busybox"]) else {
        return;
    };
    let created = hull.run(&[
        "create",
        "--name",
        "described",
        "--memory",
        "128m",
        "-l",
        "purpose=test",
        "-e",
        "A=b",
        "-w",
        "/tmp",
        "busybox",
        "sh",
        "-c",
        "exit 7",
    ]);
    let id = created.text();
    let described = json(&hull.run(&["inspect", "described"]));
    let container = &described[0];
    assert_eq!(container["Id"], id.as_str());
    assert_eq!(container["Name"], "/described");
    assert_eq!(container["State"]["Status"], "created");
    assert_eq!(container["Path"], "sh");
    assert_eq!(container["Args"][1], "exit 7");
    assert_eq!(container["Config"]["Labels"]["purpose"], "test");
    assert_eq!(container["Config"]["WorkingDir"], "/tmp");
    assert_eq!(container["HostConfig"]["Memory"], 128 << 20);
    assert_eq!(hull.run(&["start", "-a", "described"]).code(), 7);
    let state = hull.run(&[
        "inspect",
        "-f",
        "{{.State.Status}} {{.State.ExitCode}}",
        "described",
    ]);
    assert_eq!(state.text(), "exited 7");
    let labels = hull.run(&["inspect", "-f", "{{index .Config.Labels \"purpose\"}}", &id[..12]]);
    assert_eq!(labels.text(), "test");

    // What is found is shown, what isn't is said.
    let partly = hull.run(&["inspect", "described", "nobody"]);
    assert_eq!(
        (partly.code(), json(&partly).as_array().map(Vec::len)),
        (1, Some(1))
    );
    assert!(one_line(&partly).contains("nobody"), "{partly:?}");
    let wrong = hull.run(&["inspect", "-f", "{{.State.Status", "described"]);
    assert_eq!(wrong.code(), 1);
    assert!(one_line(&wrong).contains("--format"), "{wrong:?}");
}

#[test]
fn figures_of_a_running_container_are_shown_and_without_a_terminal_only_once() {
    let Some(hull) = Hull::with_images(&["busybox"]) else {
        return;
    };
    let busy = "while :; do :; done";
    assert_eq!(
        hull.run(&["run", "-d", "--rm", "--name", "busy", "busybox", "sh", "-c", busy])
            .code(),
        0
    );
    let stats = json(&hull.run(&["stats", "--no-stream", "--format", "json"]));
    assert_eq!(stats["Name"], "busy");
    assert!(stats["MemoryCurrentBytes"].as_u64() > Some(0), "{stats}");
    assert!(stats["HostMemoryBytes"].as_u64() > Some(1 << 20), "{stats}");
    let percent: f64 = stats["CPUPerc"]
        .as_str()
        .and_then(|text| text.trim_end_matches('%').parse().ok())
        .unwrap_or_default();
    assert!(percent > 0.0, "{stats}");
    let top = json(&hull.run(&["top", "--format", "json"]));
    assert_eq!(
        (top["Name"].as_str(), top["Answers"].as_bool()),
        (Some("busy"), Some(true))
    );
    assert!(hull.run(&["top"]).text().starts_with("NAME"));
    assert_eq!(hull.run(&["rm", "-f", "busy"]).code(), 0);
    assert_eq!(hull.settle(), Vec::<String>::new());
}

#[test]
fn everything_that_lists_or_describes_can_say_it_as_json() {
    let Some(hull) = Hull::with_images(&["busybox"]) else {
        return;
    };
    let run = ["run", "-d", "--name", "listed", "busybox", "sleep", "1000"];
    assert_eq!(hull.run(&run).code(), 0);
    for verb in [
        &["ps"][..],
        &["images"],
        &["image", "ls"],
        &["image", "history", "busybox"],
        &["image", "inspect", "busybox"],
        &["inspect", "listed"],
        &["stats", "--no-stream"],
        &["top"],
        &["top", "listed"],
        &["doctor"],
        &["version"],
    ] {
        let outcome = hull.run(&[verb, &["--format", "json"]].concat());
        assert_eq!(outcome.code(), 0, "{verb:?}: {outcome:?}");
        // One value, or one a line.
        let values = serde_json::Deserializer::from_slice(&outcome.stdout).into_iter::<Value>();
        let values: Vec<Value> = values
            .collect::<Result<_, _>>()
            .unwrap_or_else(|error| panic!("{verb:?}: {error}: {outcome:?}"));
        assert!(
            !values.is_empty() && values.iter().all(|value| value.is_object() || value.is_array()),
            "{verb:?}: {outcome:?}"
        );
    }
    assert_eq!(hull.run(&["rm", "-f", "listed"]).code(), 0);
}

/// The processor time of a process, in microseconds, as its `/proc/PID/stat` has it.
fn processor_time_us(stat: &str) -> u64 {
    let (_, rest) = stat.rsplit_once(')').expect("a name in parentheses");
    let ticks = |field: &str| field.parse::<u64>().expect("a number");
    let fields: Vec<&str> = rest.split_whitespace().collect();
    // The 14th and 15th of all, in hundredths of a second.
    (ticks(fields[11]) + ticks(fields[12])) * 10_000
}

#[test]
fn figures_follow_what_a_container_does() {
    let Some(hull) = Hull::with_images(&["busybox"]) else {
        return;
    };
    let script = "sleep 1000 & sleep 1000 & exec sleep 1000";
    let options = ["run", "-d", "--name", "counted", "--storage-opt", "size=64m"];
    let started = hull.run(&[&options[..], &["busybox", "sh", "-c", script]].concat());
    assert_eq!(started.code(), 0, "{started:?}");
    let figure = |name: &str| {
        let stats = json(&hull.run(&["stats", "--no-stream", "--format", "json", "counted"]));
        stats[name]
            .as_u64()
            .unwrap_or_else(|| panic!("no {name} in {stats}"))
    };
    let exec = |script: &str| {
        let outcome = hull.run(&["exec", "counted", "sh", "-c", script]);
        assert_eq!(outcome.code(), 0, "{outcome:?}");
        outcome.text()
    };
    assert!(eventually(PATIENCE, || figure("PIDs") == 3));

    let before = figure("MemoryCurrentBytes");
    exec("dd if=/dev/zero of=/dev/shm/held bs=1M count=20 2>/dev/null");
    let grown = figure("MemoryCurrentBytes").saturating_sub(before);
    assert!((18 << 20..40 << 20).contains(&grown), "20 MiB are {grown}");

    let before = figure("IoWriteBytes");
    exec("dd if=/dev/zero of=/written bs=1M count=8 conv=fsync 2>/dev/null");
    let grown = figure("IoWriteBytes") - before;
    assert!((8 << 20..24 << 20).contains(&grown), "8 MiB are {grown}");

    let before = figure("CpuUsageUs");
    let stat = exec("i=0; while [ $i -lt 300000 ]; do i=$((i+1)); done; cat /proc/$$/stat");
    let (used, grown) = (processor_time_us(&stat), figure("CpuUsageUs") - before);
    // What the shell says, to a tick, and what it took to start it.
    assert!(
        (used.saturating_sub(20_000)..used + used / 2 + 1_000_000).contains(&grown),
        "{used} us are {grown}"
    );
    assert_eq!(hull.run(&["rm", "-f", "counted"]).code(), 0);
    assert_eq!(hull.settle(), Vec::<String>::new());
}

#[test]
fn shells_complete_verbs_and_names() {
    let Some(hull) = Hull::with_images(&["busybox"]) else {
        return;
    };
    for shell in ["bash", "zsh", "fish"] {
        let script = hull.run(&["completion", shell]);
        assert!(script.code() == 0 && script.text().contains("hull"), "{script:?}");
    }
    assert_eq!(hull.run(&["create", "--name", "completed", "busybox"]).code(), 0);
    // What the script of bash asks for when the tabulator is pressed after these words.
    let answers = |words: &[&str]| {
        let mut command = hull.command(&[&["--", "hull"], words].concat());
        command
            .env("COMPLETE", "bash")
            .env("_CLAP_IFS", "\n")
            .env("_CLAP_COMPLETE_INDEX", words.len().to_string());
        finish(command.spawn().expect("hull starts")).text()
    };
    assert_eq!(answers(&["rena"]), "rename");
    assert_eq!(answers(&["logs", "comp"]), "completed");
    assert_eq!(answers(&["image", "inspect", "bus"]), "busybox:latest");
    assert_eq!(answers(&["logs", "--foll"]), "--follow");
}
