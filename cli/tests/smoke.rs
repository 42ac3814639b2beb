//! One real microVM through the library's front door. The whole of the command line is tested in `tests/`.

use std::{path::PathBuf, process::Command};

/// The products, or `None` where they or KVM are missing; `HULL_REQUIRE_KVM=1` makes that a failure.
fn products() -> Option<PathBuf> {
    let names = [
        "HULL_BIN",
        "HULL_VMM",
        "HULL_KERNEL",
        "HULL_AGENT_IMAGE",
        "HULL_TEST_IMAGES",
    ];
    let missing = names.iter().find(|name| std::env::var_os(name).is_none());
    let why = match missing {
        Some(name) => format!("{name} is not set; `cargo xtask test` builds everything and sets it"),
        None if !std::path::Path::new("/dev/kvm").exists() => "/dev/kvm is not there".to_owned(),
        None => return std::env::var_os("HULL_BIN").map(PathBuf::from),
    };
    assert!(
        std::env::var_os("HULL_REQUIRE_KVM").is_none_or(|value| value != "1"),
        "a microVM is required: {why}"
    );
    eprintln!("skipped: {why}");
    None
}

#[test]
fn container_created_run_and_removed_leaves_nothing_behind() {
    let Some(hull) = products() else { return };
    let world = tempfile::tempdir().unwrap();
    let images = PathBuf::from(std::env::var_os("HULL_TEST_IMAGES").unwrap());
    let image = format!("oci:{}:latest", images.join("busybox").display());
    let output = Command::new(hull)
        .env("HULL_ROOT", world.path().join("root"))
        .env("HULL_RUNTIME_DIR", world.path().join("run"))
        .args([
            "run",
            "--rm",
            &image,
            "/bin/sh",
            "-c",
            "echo to-stdout; echo to-stderr >&2; exit 42",
        ])
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(42), "{output:?}");
    assert_eq!(String::from_utf8_lossy(&output.stdout), "to-stdout\n");
    assert_eq!(String::from_utf8_lossy(&output.stderr), "to-stderr\n");
    let left = std::fs::read_dir(world.path().join("run/sandboxes"))
        .unwrap()
        .count();
    assert_eq!(left, 0, "a sandbox was left behind");
}
