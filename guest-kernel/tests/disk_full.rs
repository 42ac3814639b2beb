//! A cache on a full disk: one clear error, nothing left behind. Needs the right to mount a tmpfs in a namespace of its own.

#![expect(clippy::unwrap_used, reason = "a test may panic")]

use std::process::Command;

/// Runs a shell script in its own mount namespace; `None` where that is not allowed.
fn in_mount_namespace(script: &str) -> Option<std::process::Output> {
    let allowed = Command::new("unshare")
        .args(["--mount", "true"])
        .status()
        .is_ok_and(|status| status.success());
    if !allowed {
        eprintln!("skipped: no right to make a mount namespace");
        return None;
    }
    Some(
        Command::new("unshare")
            .args(["--mount", "sh", "-euc", script])
            .output()
            .unwrap(),
    )
}

#[test]
fn build_on_a_full_disk_is_one_error_and_leaves_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let script = format!(
        "mount -t tmpfs -o size=4m none {folder}; XDG_CACHE_HOME={folder} {tool} build || code=$?; \
         find {folder} -type f | grep -v tree.lock >&2 || true; exit ${{code:-0}}",
        folder = folder.path().display(),
        tool = env!("CARGO_BIN_EXE_hull-guest-kernel"),
    );
    let Some(output) = in_mount_namespace(&script) else {
        return;
    };
    let text = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{text}");
    assert_eq!(text.trim().lines().count(), 1, "{text}");
    assert!(
        text.contains("is full") && text.contains("XDG_CACHE_HOME"),
        "{text}"
    );
}
