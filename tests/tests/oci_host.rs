//! What a container of `hull-oci` is on the host: hooks in their order, control groups that count the whole microVM.

use std::fs;
use std::path::PathBuf;

use hull_tests::oci::{OciBundle, hull_oci, message};
use serde_json::{Value, json};

const WAITS: &str = "echo ready; exec sleep 1000";

/// A hook that writes its name and the state it was given.
fn hook(log: &str, name: &str) -> Value {
    json!([{ "path": "/bin/sh", "args": ["sh", "-c", format!("echo {name} $(cat) >> {log}")] }])
}

#[test]
fn hooks_run_in_order_with_the_state() {
    let Some(hull) = hull_oci() else { return };
    let log = hull.dir().join("hooks.log");
    let text = log.to_str().expect("text");
    let bundle = OciBundle::script("echo ran >&2; exec sleep 1000");
    bundle.configure(|config| {
        for kind in [
            "prestart",
            "createRuntime",
            "createContainer",
            "poststart",
            "poststop",
        ] {
            config["hooks"][kind] = hook(text, kind);
        }
    });
    let pid = hull.create(&bundle, "web");
    let seen = || -> Vec<(String, Value)> {
        let text = fs::read_to_string(&log).unwrap_or_default();
        let split = |line: &str| {
            let (name, state) = line.split_once(' ').expect("a name and a state");
            (name.to_owned(), serde_json::from_str(state).expect("JSON"))
        };
        text.lines().map(split).collect()
    };
    let names = || seen().into_iter().map(|(name, _)| name).collect::<Vec<_>>();
    assert_eq!(names(), ["prestart", "createRuntime", "createContainer"]);
    for (name, state) in seen() {
        assert_eq!(
            (&state["status"], &state["pid"], &state["id"]),
            (&json!("creating"), &json!(pid), &json!("web")),
            "{name}"
        );
        assert_eq!(state["bundle"], json!(bundle.path()));
    }
    hull.ok(&["start", "web"]);
    assert_eq!(names()[3..], ["poststart"]);
    assert_eq!(seen()[3].1["status"], "running");
    hull.ok(&["delete", "--force", "web"]);
    assert_eq!(names()[4..], ["poststop"]);
    assert_eq!(seen()[4].1["status"], "stopped");
    assert_eq!(hull.leftovers(), Vec::<String>::new());
}

#[test]
fn what_a_hook_puts_into_the_root_is_in_the_container() {
    let Some(hull) = hull_oci() else { return };
    let bundle = OciBundle::script("cat /from-hook");
    let script = format!("echo hello > {}/rootfs/from-hook", bundle.text());
    bundle.configure(|config| {
        config["hooks"]["createRuntime"] = json!([{ "path": "/bin/sh", "args": ["sh", "-c", script] }]);
    });
    let outcome = hull.run(&["run", "--bundle", bundle.text(), "web"]);
    assert_eq!(
        (outcome.code(), outcome.text().as_str()),
        (0, "hello"),
        "{outcome:?}"
    );
}

#[test]
fn failing_hook_fails_create_and_leaves_nothing() {
    let Some(hull) = hull_oci() else { return };
    for (kind, verb) in [
        ("prestart", "create"),
        ("createRuntime", "create"),
        ("createContainer", "create"),
        ("poststart", "start"),
    ] {
        let bundle = OciBundle::script(WAITS);
        bundle.configure(|config| {
            config["hooks"][kind] =
                json!([{ "path": "/bin/sh", "args": ["sh", "-c", "echo broken >&2; exit 3"] }]);
        });
        let outcome = if verb == "create" {
            hull.run(&["create", "--bundle", bundle.text(), "web"])
        } else {
            hull.create(&bundle, "web");
            hull.run(&["start", "web"])
        };
        assert_eq!(outcome.code(), 1, "{kind}: {outcome:?}");
        let text = message(&outcome);
        assert!(
            text.contains(&format!("{kind} hook #0")) && text.contains("broken"),
            "{text}"
        );
        if verb == "start" {
            hull.expect_stopped("web");
            hull.ok(&["delete", "web"]);
        }
        assert_eq!(hull.leftovers(), Vec::<String>::new(), "{kind}");
    }
}

/// The groups of a process, as the host has them: `(hierarchy, directory)`.
fn groups(pid: i64) -> Vec<(String, PathBuf)> {
    let text = fs::read_to_string(format!("/proc/{pid}/cgroup")).expect("it is there");
    let mounts = fs::read_to_string("/proc/self/mountinfo").expect("always there");
    text.lines()
        .filter_map(|line| {
            let mut parts = line.splitn(3, ':').skip(1);
            let (controllers, path) = (parts.next()?, parts.next()?);
            let mount = mounts.lines().find(|mount| {
                let kind = mount.split(" - ").nth(1).unwrap_or_default();
                if controllers.is_empty() {
                    kind.starts_with("cgroup2 ")
                } else {
                    kind.starts_with("cgroup ") && kind.split(',').any(|option| option == controllers)
                }
            })?;
            let mount = mount.split(' ').nth(4)?;
            Some((controllers.to_owned(), PathBuf::from(format!("{mount}{path}"))))
        })
        .collect()
}

#[test]
fn control_groups_hold_and_bound_the_whole_microvm_and_go_with_it() {
    let Some(hull) = hull_oci() else { return };
    let path = format!("/hull-tests/{}", std::process::id());
    let bundle = OciBundle::script(
        "dd if=/dev/zero of=/dev/shm/x bs=1M count=40 2>/dev/null; echo ready; exec sleep 1000",
    );
    bundle.configure(|config| {
        config["linux"]["cgroupsPath"] = json!(path);
        config["linux"]["resources"] = json!({
            "memory": { "limit": 100 << 20 },
            "cpu": { "shares": 512, "quota": 50_000, "period": 100_000 },
        });
    });
    let pid = hull.start_new(&bundle, "web");
    hull.expect_output("web", "ready");
    let pids: Vec<i64> = serde_json::from_str(&hull.ok(&["ps", "--format", "json", "web"])).expect("JSON");
    let ours = groups(pid.into());
    assert!(!ours.is_empty());
    for (controllers, directory) in &ours {
        assert!(
            directory.ends_with(path.trim_start_matches('/')),
            "{controllers}: {directory:?}"
        );
        let members = fs::read_to_string(directory.join("cgroup.procs")).expect("a group");
        for pid in &pids {
            assert!(
                members.lines().any(|line| line == pid.to_string()),
                "{controllers}: {pid} is not in {members:?}"
            );
        }
    }
    let read = |controller: &str, file: &str| {
        let (_, directory) = ours
            .iter()
            .find(|(name, _)| name.split(',').any(|name| name == controller))?;
        fs::read_to_string(directory.join(file))
            .ok()?
            .trim()
            .parse::<u64>()
            .ok()
    };
    // On a host with version 2 alone, the files have other names; that is tested where such a host boots.
    if let Some(used) = read("memory", "memory.usage_in_bytes") {
        assert!(used > 40 << 20, "{used}");
        let limit = read("memory", "memory.limit_in_bytes").expect("beside it");
        assert!(limit > 100 << 20 && limit < 400 << 20, "{limit}");
        assert_eq!(read("cpu", "cpu.shares"), Some(512));
        assert_eq!(read("cpu", "cpu.cfs_quota_us"), Some(50_000));
        hull.ok(&["update", "--cpu-share", "256", "web"]);
        assert_eq!(read("cpu", "cpu.shares"), Some(256));
    }
    hull.ok(&["delete", "--force", "web"]);
    for (_, directory) in &ours {
        assert!(!directory.exists(), "{directory:?} is left");
        drop(fs::remove_dir(directory.parent().expect("a path")));
    }
    assert_eq!(hull.leftovers(), Vec::<String>::new());
}

#[test]
fn statistics_and_processes_are_those_of_the_guest() {
    let Some(hull) = hull_oci() else { return };
    let bundle = OciBundle::script("sleep 1000 & echo ready; exec sleep 2000");
    hull.start_new(&bundle, "web");
    hull.expect_output("web", "ready");
    let table = hull.ok(&["ps", "web"]);
    assert!(
        table.contains("sleep 1000") && table.contains("sleep 2000"),
        "{table}"
    );
    let event: Value = serde_json::from_str(&hull.ok(&["events", "--stats", "web"])).expect("JSON");
    assert_eq!((&event["type"], &event["id"]), (&json!("stats"), &json!("web")));
    assert!(event["data"]["pids"]["current"].as_u64() >= Some(2), "{event}");
    assert!(
        event["data"]["memory"]["usage"]["usage"].as_u64() > Some(0),
        "{event}"
    );
    hull.ok(&["delete", "--force", "web"]);
}
