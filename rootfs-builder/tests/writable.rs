//! Writable layers: whole file systems, small on disk, as large as they say, gone without a trace.

mod support;

use std::fs;
use std::path::Path;
use std::process::Command;

use rootfs_builder::Store;
use rootfs_builder::writable::{Size, WritableError, usage};
use support::{Mounted, has, run};

/// Whether file systems can't be made here; says so.
fn cannot_make() -> bool {
    let missing = !Path::new("/usr/sbin/mke2fs").exists() && !Path::new("/sbin/mke2fs").exists();
    if missing {
        println!("skipped: mke2fs is not installed");
    }
    missing
}

fn mounted(image: &Path, at: &Path) -> Mounted {
    fs::create_dir_all(at).expect("scratch directory");
    run(Command::new("mount")
        .args(["-t", "ext4", "-o", "loop,noatime,discard"])
        .arg(image)
        .arg(at));
    Mounted(at.to_path_buf())
}

fn checked(image: &Path) {
    if has("e2fsck") {
        run(Command::new("e2fsck").args(["-f", "-n"]).arg(image));
    }
}

#[test]
fn writable_layers_are_whole_and_take_little() {
    if cannot_make() {
        return;
    }
    let scratch = tempfile::tempdir().expect("scratch directory");
    let root = scratch.path().join("store");
    let store = Store::open(&root).expect("store");
    for (index, bytes) in [16 << 20, (100 << 20) + 1, 1 << 30, 10 << 30, 1 << 40]
        .into_iter()
        .enumerate()
    {
        let path = scratch.path().join(format!("{index}.ext4"));
        let size = Size::new(bytes).expect("size");
        store.create_writable(&path, size).expect("writable layer");
        let used = usage(&path).expect("usage");
        assert_eq!(used.size_bytes, size.bytes());
        // Group descriptors grow with the size; everything else stays a hole.
        let most = (2 << 20) + bytes / 60_000;
        assert!(used.allocated_bytes < most, "{bytes}: {used:?}");
        checked(&path);
        let mode = std::os::unix::fs::PermissionsExt::mode(&fs::metadata(&path).expect("file").permissions());
        assert_eq!(mode & 0o7777, 0o600);
        assert!(matches!(
            store.create_writable(&path, size),
            Err(WritableError::Exists { .. })
        ));
    }
    let left: Vec<_> = fs::read_dir(root.join("images/tmp"))
        .expect("tmp")
        .map(|entry| entry.expect("entry").file_name())
        .filter(|name| !name.to_string_lossy().ends_with(".lock"))
        .collect();
    assert!(left.is_empty(), "{left:?}");
    assert_eq!(
        fs::read_dir(root.join("images/templates"))
            .expect("templates")
            .count(),
        5
    );
}

#[test]
fn the_size_is_a_quota_and_what_is_deleted_is_given_back() {
    if cannot_make() || support::cannot_mount() {
        return;
    }
    let scratch = tempfile::tempdir().expect("scratch directory");
    let store = Store::open(&scratch.path().join("store")).expect("store");
    let path = scratch.path().join("writable.ext4");
    store
        .create_writable(&path, Size::new(64 << 20).expect("size"))
        .expect("writable layer");
    let disk = mounted(&path, &scratch.path().join("mount"));
    let big = disk.0.join("big");
    let error = fs::write(&big, vec![1; 65 << 20]).expect_err("more than the quota");
    assert_eq!(error.kind(), std::io::ErrorKind::StorageFull);
    rustix::fs::sync();
    let full = usage(&path).expect("usage").allocated_bytes;
    assert!(full > 40 << 20, "{full}");
    fs::remove_file(&big).expect("remove");
    drop(disk);
    let emptied = usage(&path).expect("usage").allocated_bytes;
    assert!(emptied < 8 << 20, "{emptied} bytes are still allocated");
    checked(&path);
    // The next container begins with an empty one.
    let other = scratch.path().join("other.ext4");
    store
        .create_writable(&other, Size::new(64 << 20).expect("size"))
        .expect("writable layer");
    let disk = mounted(&other, &scratch.path().join("mount"));
    let names: Vec<_> = fs::read_dir(&disk.0)
        .expect("root")
        .map(|entry| entry.expect("entry").file_name())
        .collect();
    assert_eq!(names, ["lost+found"]);
}

#[test]
fn a_full_disk_leaves_no_half_made_layer() {
    if cannot_make() || support::cannot_mount() {
        return;
    }
    let scratch = tempfile::tempdir().expect("scratch directory");
    let store = Store::open(&scratch.path().join("store")).expect("store");
    let size = Size::new(1 << 30).expect("size");
    let disk = support::small_disk(&scratch.path().join("disk"), "size=64k");
    let error = store
        .create_writable(&disk.0.join("writable.ext4"), size)
        .expect_err("no space");
    assert!(
        matches!(&error, WritableError::Create { source, .. } if source.kind() == std::io::ErrorKind::StorageFull),
        "{error:?}"
    );
    assert_eq!(fs::read_dir(&disk.0).expect("disk").count(), 0);
    // A store on another disk than the containers is fine otherwise.
    drop(disk);
    let disk = support::small_disk(&scratch.path().join("disk"), "size=8m");
    let path = disk.0.join("writable.ext4");
    store.create_writable(&path, size).expect("across file systems");
    checked(&path);
}

#[test]
fn many_creators_at_once_make_one_template() {
    if cannot_make() {
        return;
    }
    let scratch = tempfile::tempdir().expect("scratch directory");
    let root = scratch.path().join("store");
    std::thread::scope(|scope| {
        for index in 0..8 {
            let path = scratch.path().join(format!("{index}.ext4"));
            let root = &root;
            scope.spawn(move || {
                let store = Store::open(root).expect("store");
                store
                    .create_writable(&path, Size::new(32 << 20).expect("size"))
                    .expect("writable layer");
                checked(&path);
            });
        }
    });
    // Sizes nobody asks for any more don't pile up.
    let store = Store::open(&root).expect("store");
    for step in 1..20 {
        let path = scratch.path().join("again.ext4");
        let size = Size::new((32 << 20) + step * 4096).expect("size");
        store.create_writable(&path, size).expect("writable layer");
        fs::remove_file(&path).expect("remove");
    }
    let templates = fs::read_dir(root.join("images/templates"))
        .expect("templates")
        .count();
    assert_eq!(templates, 16);
    let pruned = store
        .prune(&rootfs_builder::PruneOptions::default())
        .expect("prune");
    assert!(pruned.bytes > 0 && !root.join("images/templates").exists());
}
