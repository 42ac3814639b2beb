//! The suite on the runtimes everybody has: it is right about them, or it is wrong. Known failures are in `expectations/`.

use std::process::Command;

fn conforms(runtime: &str) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_hull-conformance"));
    let output = command
        .args(["--runtime", runtime])
        .output()
        .expect("the suite starts");
    let text = String::from_utf8_lossy(&output.stdout);
    let verdict: Vec<&str> = text
        .lines()
        .skip_while(|line| !line.contains(" cases: "))
        .collect();
    println!("{}", verdict.join("\n"));
    let failures: Vec<&str> = text
        .split_inclusive('\n')
        .filter(|line| !line.starts_with("ok "))
        .collect();
    assert!(
        output.status.success(),
        "{runtime} does not conform:\n{}{}",
        failures.concat(),
        String::from_utf8_lossy(&output.stderr)
    );
}

#[test]
fn runc_conforms_but_for_known_failures() {
    conforms("runc");
}

#[test]
fn crun_conforms_but_for_known_failures() {
    conforms("crun");
}

#[test]
fn hull_oci_conforms_but_for_what_cannot_hold() {
    let kvm = std::path::Path::new("/dev/kvm").exists();
    match std::env::var("HULL_OCI") {
        Ok(runtime) if kvm => conforms(&runtime),
        _ => {
            let required = std::env::var("HULL_REQUIRE_KVM").is_ok_and(|value| value == "1");
            assert!(
                !required,
                "a microVM is required; `cargo xtask test` builds hull-oci and sets HULL_OCI"
            );
            eprintln!("skipped: /dev/kvm or hull-oci is not there");
        }
    }
}

#[test]
fn expectations_that_are_wrong_either_way_fail_the_run() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let file = folder.path().join("expect.toml");
    let run = |list: &str, filter: &str| {
        std::fs::write(&file, list).expect("the folder is writable");
        let mut command = Command::new(env!("CARGO_BIN_EXE_hull-conformance"));
        command
            .args(["--runtime", "runc", "--filter", filter, "--expect"])
            .arg(&file);
        command.output().expect("the suite starts").status.code()
    };
    // It passes, and is said to fail.
    let pass = "state.id_is_the_containers";
    assert_eq!(
        run(&format!("[fails]\n\"{pass}\" = \"for a reason\""), pass),
        Some(1)
    );
    assert_eq!(run("", pass), Some(0));
    // It fails, and is not said to.
    assert_eq!(
        run("", "delete.of_a_created_container_is_an_error_without_effect"),
        Some(1)
    );
    // There is no such case; there is no reason.
    assert_eq!(run("[fails]\n\"no.such.case\" = \"for a reason\"", pass), Some(2));
    assert_eq!(run(&format!("[fails]\n\"{pass}\" = \" \""), pass), Some(2));
}

#[test]
fn a_runtime_that_does_nothing_passes_no_case_about_what_happens() {
    let mut command = Command::new(env!("CARGO_BIN_EXE_hull-conformance"));
    let output = command
        .args(["--runtime", "/bin/true", "--format", "json", "--expect", "none"])
        .output();
    let output = output.expect("the suite starts");
    let passed: Vec<String> = String::from_utf8_lossy(&output.stdout)
        .lines()
        .map(|line| serde_json::from_str::<serde_json::Value>(line).expect("JSON lines"))
        .filter(|line| line["outcome"] == "passed")
        .map(|line| line["name"].to_string())
        .collect();
    assert!(passed.is_empty(), "these can't fail: {passed:?}");
}

#[test]
fn a_runtime_that_refuses_everything_passes_only_cases_about_refusing() {
    let mut command = Command::new(env!("CARGO_BIN_EXE_hull-conformance"));
    let output = command
        .args(["--runtime", "/bin/false", "--format", "json", "--expect", "none"])
        .output();
    let output = output.expect("the suite starts");
    for line in String::from_utf8_lossy(&output.stdout).lines() {
        let line: serde_json::Value = serde_json::from_str(line).expect("JSON lines");
        let name = line["name"].as_str().unwrap_or_default();
        let refusing = ["error", "fails", "aborted", "lead_out", "valid_values", "must"];
        assert!(
            line["outcome"] != "passed" || refusing.iter().any(|word| name.contains(word)),
            "{name} can't fail"
        );
    }
}
