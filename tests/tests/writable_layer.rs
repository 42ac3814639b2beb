//! A container's writable layer on disk (`--storage-opt size=`): a quota inside, a sparse file outside, and nobody else's problem.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use hull_tests::hull::{Hull, Outcome};

/// Where the only container's layer is.
fn layer(hull: &Hull) -> PathBuf {
    let containers = fs::read_dir(hull.store_dir().join("containers")).expect("containers");
    containers
        .map(|entry| entry.expect("entry").path().join("writable.ext4"))
        .find(|path| path.exists())
        .expect("a writable layer")
}

fn allocated(path: &Path) -> u64 {
    fs::metadata(path).expect("file").blocks() * 512
}

fn shell(hull: &Hull, name: &str, size: &str, script: &str) -> Outcome {
    let size = format!("size={size}");
    hull.run(&[
        "run",
        "--name",
        name,
        "--storage-opt",
        &size,
        "busybox",
        "/bin/sh",
        "-c",
        script,
    ])
}

#[test]
fn the_size_is_a_quota_and_deleted_files_are_given_back() {
    let Some(hull) = Hull::with_images(&["busybox"]) else {
        return;
    };
    // The first time it fills its disk, the second time it finds what it wrote and deletes it.
    let script = "if [ -e /big ]; then rm /big && sync && echo deleted; \
        else dd if=/dev/zero of=/big bs=1M count=100 2>&1 | grep -o 'No space left on device'; sync; fi; df -k / | tail -1 | awk '{print $2}'";
    let outcome = shell(&hull, "one", "64m", script);
    assert_eq!(outcome.code(), 0, "{outcome:?}");
    let text = outcome.text();
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(lines[0], "No space left on device", "{outcome:?}");
    let size_kib: u64 = lines[1].parse().expect("a size");
    assert!((50 << 10..64 << 10).contains(&size_kib), "{size_kib} KiB");
    let path = layer(&hull);
    assert_eq!(fs::metadata(&path).expect("file").len(), 64 << 20);
    assert!(allocated(&path) > 40 << 20, "{}", allocated(&path));

    let outcome = hull.run(&["start", "-a", "one"]);
    assert_eq!(outcome.code(), 0, "{outcome:?}");
    assert!(outcome.text().contains("deleted"), "{outcome:?}");
    assert!(
        allocated(&path) < 16 << 20,
        "{} bytes are still there",
        allocated(&path)
    );
    assert_eq!(hull.run(&["rm", "one"]).code(), 0);
    assert!(!path.exists());
    let outcome = shell(&hull, "small", "1m", "true");
    assert_ne!(outcome.code(), 0);
    assert!(outcome.stderr.contains("--storage-opt size="), "{outcome:?}");
    assert_eq!(hull.settle(), Vec::<String>::new());
}
