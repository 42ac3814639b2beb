//! The life of a container under `hull-oci`, step by step beside runc: the same states, exit codes and words.

use std::fs;
use std::os::unix::fs::PermissionsExt;

use hull_tests::oci::{OciBundle, Runtime, hull_oci, message};
use serde_json::json;

const WAITS: &str = "trap 'exit 3' TERM; echo ready; while :; do sleep 0.1; done";

/// What a runtime says to a command: the exit code, and the message without its own name.
fn said(runtime: &Runtime, arguments: &[&str]) -> String {
    let outcome = runtime.run(arguments);
    let text = message(&outcome).replace("hull-oci ", "runc ");
    format!("{}: {} {text}", arguments.join(" "), outcome.code())
}

/// One container from nothing to nothing.
fn life(runtime: &Runtime, bundle: &OciBundle) -> Vec<String> {
    let mut transcript = Vec::new();
    let mut step = |arguments: &[&str]| transcript.push(said(runtime, arguments));
    step(&["state", "web"]);
    step(&["start", "web"]);
    step(&["kill", "web", "TERM"]);
    step(&["delete", "web"]);
    step(&["delete", "--force", "web"]);
    runtime.create(bundle, "web");
    assert_eq!(runtime.status("web"), "created");
    step(&["create", "--bundle", bundle.text(), "web"]);
    step(&["resume", "web"]);
    step(&["start", "web"]);
    runtime.expect_output("web", "ready");
    assert_eq!(runtime.status("web"), "running");
    step(&["start", "web"]);
    step(&["delete", "web"]);
    step(&["resume", "web"]);
    step(&["pause", "web"]);
    assert_eq!(runtime.status("web"), "paused");
    step(&["exec", "web", "true"]);
    step(&["delete", "web"]);
    step(&["resume", "web"]);
    assert_eq!(runtime.status("web"), "running");
    step(&["exec", "web", "sh", "-c", "exit 7"]);
    step(&["exec", "web", "no-such-program"]);
    step(&["exec", "web", "/no/such/program"]);
    step(&["kill", "web", "NOSUCH"]);
    step(&["kill", "web", "0"]);
    step(&["kill", "web", "SIGTERM"]);
    runtime.expect_stopped("web");
    step(&["start", "web"]);
    step(&["kill", "web", "KILL"]);
    step(&["kill", "--all", "web", "KILL"]);
    step(&["exec", "web", "true"]);
    step(&["delete", "web"]);
    step(&["state", "web"]);
    transcript
}

#[test]
fn every_step_answers_as_runc_does() {
    let Some(hull) = hull_oci() else { return };
    let bundle = OciBundle::script(WAITS);
    let runc = Runtime::of("runc");
    let (ours, theirs) = (life(&hull, &bundle), life(&runc, &bundle));
    for (ours, theirs) in ours.iter().zip(&theirs) {
        assert_eq!(ours, theirs);
    }
    assert_eq!(hull.leftovers(), Vec::<String>::new());
}

#[test]
fn program_that_cannot_run_fails_create_in_the_words_of_runc() {
    let Some(hull) = hull_oci() else { return };
    let runc = Runtime::of("runc");
    let bundle = OciBundle::of("busybox");
    let data = bundle.path().join("rootfs/data");
    fs::write(&data, "no program").expect("the root is writable");
    fs::set_permissions(&data, fs::Permissions::from_mode(0o644)).expect("it is ours");
    for program in ["no-such-program", "/no/such/program", "/data"] {
        bundle.configure(|config| config["process"]["args"] = json!([program]));
        let create = ["create", "--bundle", bundle.text(), "web"];
        assert_eq!(said(&hull, &create), said(&runc, &create));
        assert_eq!(hull.leftovers(), Vec::<String>::new());
    }
}

#[test]
fn run_ends_with_the_containers_code_and_leaves_nothing() {
    let Some(hull) = hull_oci() else { return };
    let runc = Runtime::of("runc");
    for (script, code) in [
        ("echo out; echo err >&2; exit 7", 7),
        ("kill -TERM $$; sleep 9", 143),
    ] {
        let bundle = OciBundle::script(&format!("/bin/sh -c '{script}'; exit $?"));
        for runtime in [&hull, &runc] {
            let outcome = runtime.run(&["run", "--bundle", bundle.text(), "once"]);
            assert_eq!(outcome.code(), code, "{outcome:?}");
            if code == 7 {
                assert_eq!(
                    (outcome.text().as_str(), outcome.stderr.as_str()),
                    ("out", "err\n")
                );
            }
        }
    }
    assert_eq!(hull.leftovers(), Vec::<String>::new());
}

#[test]
fn bad_input_is_one_clear_error_and_leaves_nothing() {
    let Some(hull) = hull_oci() else { return };
    let bundle = OciBundle::script("true");
    let create = |id: &str| hull.run(&["create", "--bundle", bundle.text(), id]);
    for id in ["..", "a/b", "a b"] {
        let outcome = create(id);
        assert_eq!(outcome.code(), 1);
        assert!(message(&outcome).contains("invalid container ID"), "{outcome:?}");
    }
    for (change, word) in [
        (json!({"process": {"terminal": true}}), "console socket"),
        (json!({"ociVersion": "3.0.0"}), "ociVersion"),
        (json!({"root": {"path": "nowhere"}}), "nowhere"),
        (
            json!({"linux": {"sysctl": {"kernel.core_pattern": "x"}}}),
            "sysctl",
        ),
    ] {
        let bundle = OciBundle::script("true");
        bundle.configure(|config| merge(config, &change));
        let outcome = hull.run(&["create", "--bundle", bundle.text(), "bad"]);
        assert_eq!(outcome.code(), 1, "{change}: {outcome:?}");
        assert!(message(&outcome).contains(word), "{change}: {outcome:?}");
    }
    fs::write(bundle.path().join("config.json"), "{ half").expect("it is ours");
    assert_eq!(create("bad").code(), 1);
    let missing = hull.run(&["create", "--bundle", "/nonexistent", "bad"]);
    assert!(message(&missing).contains("/nonexistent"), "{missing:?}");
    assert_eq!(hull.leftovers(), Vec::<String>::new());
}

fn merge(into: &mut serde_json::Value, change: &serde_json::Value) {
    match change.as_object() {
        Some(fields) => fields
            .iter()
            .for_each(|(name, value)| merge(&mut into[name], value)),
        None => *into = change.clone(),
    }
}

#[test]
fn state_list_and_log_have_what_engines_read() {
    let Some(hull) = hull_oci() else { return };
    let bundle = OciBundle::script(WAITS);
    bundle.configure(|config| config["annotations"]["a.b"] = json!("c"));
    let pid = hull.create(&bundle, "web");
    let state = hull.state("web");
    assert_eq!(
        (
            &state["id"],
            &state["pid"],
            &state["bundle"],
            &state["annotations"]["a.b"]
        ),
        (&json!("web"), &json!(pid), &json!(bundle.path()), &json!("c"))
    );
    assert!(state["ociVersion"].is_string() && state["created"].is_string());
    let listed: serde_json::Value =
        serde_json::from_str(&hull.ok(&["list", "--format", "json"])).expect("JSON");
    assert_eq!(listed[0]["id"], "web");
    assert!(hull.ok(&["list"]).starts_with("ID "));
    let pids: Vec<i32> = serde_json::from_str(&hull.ok(&["ps", "--format", "json", "web"])).expect("JSON");
    assert_eq!(pids[0], pid);
    let log = hull.dir().join("log.json");
    let log_text = log.to_str().expect("text");
    let outcome = hull
        .command(&["--log", log_text, "--log-format", "json", "start", "nothing"])
        .output()
        .expect("it starts");
    assert_eq!(outcome.status.code(), Some(1));
    let line: serde_json::Value =
        serde_json::from_str(fs::read_to_string(&log).expect("a log").trim()).expect("JSON");
    assert_eq!(
        (&line["level"], &line["msg"]),
        (&json!("error"), &json!("container does not exist"))
    );
    assert!(line["time"].is_string());
    // A container that was never started goes without force, as with runc.
    hull.ok(&["delete", "web"]);
    assert_eq!(hull.leftovers(), Vec::<String>::new());
}
