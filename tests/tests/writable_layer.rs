//! A container's writable layer on disk (`--storage-opt size=`): a quota inside, a sparse file outside, and nobody else's problem.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use hull_tests::hull::{Hull, Outcome, PATIENCE, eventually};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};

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

/// A disk of its own for everything a world keeps, seen by this thread and what it starts only.
struct SmallDisk(PathBuf);

impl SmallDisk {
    fn mount(at: &Path, size: &str) -> Self {
        unshare(CloneFlags::CLONE_NEWNS).expect("a mount namespace");
        let none: Option<&str> = None;
        mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).expect("private mounts");
        fs::create_dir_all(at).expect("directory");
        let options = format!("size={size}");
        mount(
            Some("tmpfs"),
            at,
            Some("tmpfs"),
            MsFlags::empty(),
            Some(options.as_str()),
        )
        .expect("tmpfs");
        Self(at.to_path_buf())
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        // Else the temporary folder around it can't go.
        let _ = umount2(&self.0, MntFlags::MNT_DETACH);
    }
}

#[test]
fn a_full_disk_of_the_host_is_an_error_inside_and_no_more() {
    if !nix::unistd::geteuid().is_root() {
        eprintln!("skipped: a small disk needs root");
        return;
    }
    let Some(hull) = Hull::with_images(&[]) else {
        return;
    };
    let disk = SmallDisk::mount(&hull.store_dir(), "100m");
    let outcome = hull.run(&["import", &hull.layout("busybox"), "busybox"]);
    assert_eq!(outcome.code(), 0, "{outcome:?}");
    // More than the host has, but not more than the container was promised.
    let script = "dd if=/dev/zero of=/big bs=1M count=300 conv=fsync; echo wrote: $?; exit 9";
    let outcome = shell(&hull, "greedy", "1g", script);
    assert_eq!(outcome.code(), 9, "the container itself goes on: {outcome:?}");
    assert!(outcome.text().contains("wrote: 1"), "{outcome:?}");
    // Everything else works as ever, and what it took can be had back.
    let outcome = hull.run(&["ps", "-a", "--format", "{{.Names}}"]);
    assert_eq!(
        (outcome.code(), outcome.text().as_str()),
        (0, "greedy"),
        "{outcome:?}"
    );
    let outcome = hull.run(&["rm", "greedy"]);
    assert_eq!(outcome.code(), 0, "{outcome:?}");
    // Its VMM may still be closing the file.
    let has_space = || {
        let status = nix::sys::statvfs::statvfs(&disk.0).expect("statvfs");
        status.blocks_available() * status.fragment_size() > 90 << 20
    };
    assert!(eventually(PATIENCE, has_space), "the space isn't given back");
    let outcome = shell(&hull, "modest", "64m", "echo fine > /file; sync; cat /file");
    assert_eq!(
        (outcome.code(), outcome.text().as_str()),
        (0, "fine"),
        "{outcome:?}"
    );
    assert_eq!(hull.run(&["rm", "modest"]).code(), 0);
    drop(disk);
    assert_eq!(hull.settle(), Vec::<String>::new());
}
