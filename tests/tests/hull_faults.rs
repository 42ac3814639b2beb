//! Bad input: one clear error, the right exit code, and nothing left behind.

use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::process::Stdio;

use hull_tests::hull::{Hull, Outcome, finish};

/// One error, in one line, that names what it is about.
fn assert_one_clear_error(outcome: &Outcome, code: i32, named: &str) {
    assert_eq!(outcome.code(), code, "{outcome:?}");
    let lines: Vec<&str> = outcome
        .stderr
        .lines()
        .filter(|line| !line.trim().is_empty())
        .collect();
    assert!(
        !lines.is_empty() && lines.len() <= 2,
        "not one clear error: {outcome:?}"
    );
    assert!(
        outcome.stderr.contains(named),
        "`{named}` is not named: {outcome:?}"
    );
    assert!(!outcome.stderr.contains("panicked"), "{outcome:?}");
}

fn kernel() -> PathBuf {
    PathBuf::from(std::env::var_os("HULL_KERNEL").expect("checked by Hull::with_images"))
}

fn run_with_kernel(hull: &Hull, kernel: &std::path::Path) -> Outcome {
    let mut command = hull.command(&["run", "--rm", "busybox", "/bin/true"]);
    finish(command.env("HULL_KERNEL", kernel).spawn().expect("hull starts"))
}

#[test]
fn missing_kernel_is_named() {
    let Some(hull) = Hull::with_images(&["busybox"]) else {
        return;
    };
    let outcome = run_with_kernel(&hull, std::path::Path::new("/no/such/vmlinux"));
    assert_one_clear_error(&outcome, 125, "/no/such/vmlinux");
    assert_eq!(hull.settle(), Vec::<String>::new());
}

#[test]
fn truncated_kernel_is_refused() {
    let Some(hull) = Hull::with_images(&["busybox"]) else {
        return;
    };
    let whole = fs::read(kernel()).unwrap();
    for keep in [0, 10, 64, 4096, whole.len() / 2] {
        let cut = hull.store_dir().join(format!("vmlinux-{keep}"));
        fs::write(&cut, &whole[..keep]).unwrap();
        let outcome = run_with_kernel(&hull, &cut);
        assert_one_clear_error(&outcome, 125, "kernel");
    }
    assert_eq!(hull.settle(), Vec::<String>::new());
}

#[test]
fn kernel_of_another_architecture_is_refused() {
    let Some(hull) = Hull::with_images(&["busybox"]) else {
        return;
    };
    let mut image = fs::read(kernel()).unwrap();
    // e_machine at offset 18: 183 is AArch64.
    image[18..20].copy_from_slice(&183_u16.to_le_bytes());
    let other = hull.store_dir().join("vmlinux-aarch64");
    fs::write(&other, image).unwrap();
    assert_one_clear_error(&run_with_kernel(&hull, &other), 125, "kernel");
    assert_eq!(hull.settle(), Vec::<String>::new());
}

#[test]
fn impossible_sizes_are_refused() {
    let Some(hull) = Hull::with_images(&["busybox"]) else {
        return;
    };
    for (flag, value) in [
        ("--memory", "1k"),
        ("--memory", "900t"),
        ("--memory", "lots"),
        ("--cpus", "0"),
        ("--cpus", "4000"),
        ("--cpus", "x"),
    ] {
        let outcome = hull.run(&["run", "--rm", flag, value, "busybox", "/bin/true"]);
        assert_eq!(outcome.code(), 125, "{flag} {value}: {outcome:?}");
        assert!(
            outcome.stderr.contains(flag.trim_start_matches('-')),
            "{flag} {value}: {outcome:?}"
        );
    }
    assert_eq!(hull.settle(), Vec::<String>::new());
}

#[test]
fn missing_kvm_device_is_named_with_the_way_out() {
    let Some(hull) = Hull::with_images(&["busybox"]) else {
        return;
    };
    // A /dev without kvm, in a mount namespace of its own.
    let inner = hull.command(&[]);
    let mut command = Command::new("unshare");
    command.args(["--mount", "sh", "-c", "mount -t tmpfs none /dev && mknod /dev/null c 1 3 && chmod 666 /dev/null && mknod /dev/urandom c 1 9 && exec \"$0\" run --rm busybox /bin/true"]);
    command
        .arg(inner.get_program())
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::piped());
    for (key, value) in inner.get_envs() {
        if let Some(value) = value {
            command.env(key, value);
        }
    }
    let outcome = finish(command.spawn().unwrap());
    assert_one_clear_error(&outcome, 125, "/dev/kvm");
    assert_eq!(hull.settle(), Vec::<String>::new());
}

#[test]
fn broken_layout_is_refused_and_leaves_nothing_in_the_store() {
    let Some(hull) = Hull::with_images(&[]) else {
        return;
    };
    let outcome = hull.run(&["import", "oci:/no/such/layout:latest", "x"]);
    assert_eq!(outcome.code(), 1, "{outcome:?}");
    assert!(outcome.stderr.contains("/no/such/layout"), "{outcome:?}");
    let images = hull.run(&["images", "--format", "json"]);
    // One object a line, as docker prints them: none.
    assert_eq!((images.code(), images.text().as_str()), (0, ""), "{images:?}");
}

/// An image layout of our own to break.
fn copied_layout(hull: &Hull, image: &str) -> PathBuf {
    let layout = hull.layout(image);
    let original = layout.trim_start_matches("oci:").trim_end_matches(":latest");
    let copy = hull.temporary_dir().join(image);
    let real = fs::canonicalize(original).expect("the test images are built");
    let status = Command::new("cp")
        .arg("-a")
        .arg(real)
        .arg(&copy)
        .status()
        .expect("cp is there");
    assert!(status.success());
    copy
}

fn files_in_the_store(hull: &Hull) -> Vec<String> {
    let mut found = Vec::new();
    let mut folders = vec![hull.store_dir()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).into_iter().flatten().flatten() {
            let path = entry.path();
            if path.is_dir() {
                folders.push(path);
            } else if fs::metadata(&path).is_ok_and(|data| data.len() > 0) {
                found.push(path.display().to_string());
            }
        }
    }
    found.sort();
    found
}

#[test]
fn corrupt_layer_is_named_and_leaves_nothing() {
    let Some(hull) = Hull::with_images(&["busybox"]) else {
        return;
    };
    let before = files_in_the_store(&hull);
    let copy = copied_layout(&hull, "redis");
    let blobs = copy.join("blobs/sha256");
    let largest = fs::read_dir(&blobs)
        .unwrap()
        .flatten()
        .map(|entry| entry.path())
        .max_by_key(|path| fs::metadata(path).unwrap().len())
        .unwrap();
    let digest = largest.file_name().unwrap().to_string_lossy().into_owned();
    let whole = fs::read(&largest).unwrap();
    let flipped = {
        let mut bytes = whole.clone();
        let middle = bytes.len() / 2;
        bytes[middle] ^= 0x40;
        bytes
    };
    let source = format!("oci:{}:latest", copy.display());
    for bytes in [
        &flipped[..],
        &whole[..whole.len() / 2],
        b"",
        b"not a layer at all",
    ] {
        fs::write(&largest, bytes).unwrap();
        let outcome = hull.run(&["import", &source, "broken"]);
        assert_one_clear_error(&outcome, 1, &digest[..12]);
    }
    fs::remove_file(&largest).unwrap();
    assert_one_clear_error(&hull.run(&["import", &source, "broken"]), 1, &digest[..12]);
    assert_eq!(files_in_the_store(&hull), before);
    // What was there works on.
    assert_eq!(hull.run(&["run", "--rm", "busybox", "true"]).code(), 0);
    fs::remove_dir_all(&copy).unwrap();
    assert_eq!(hull.settle(), Vec::<String>::new());
}

#[test]
fn what_the_image_does_not_have_is_named() {
    let Some(hull) = Hull::with_images(&["busybox"]) else {
        return;
    };
    let cases: &[(&[&str], i32, &str)] = &[
        (&["busybox", "no-such-command"], 127, "no-such-command"),
        (&["busybox", "/no/such/command"], 127, "/no/such/command"),
        (&["busybox", "/etc/passwd"], 126, "/etc/passwd"),
        (&["busybox", "/etc"], 126, "/etc"),
        (&["-u", "nobody-knows", "busybox", "true"], 125, "nobody-knows"),
        (
            &["-u", "root:no-such-group", "busybox", "true"],
            125,
            "no-such-group",
        ),
        (&["-w", "relative", "busybox", "true"], 125, "relative"),
        (&["--entrypoint", "/no/entry", "busybox"], 127, "/no/entry"),
        (
            &["--env-file", "/no/such/file", "busybox", "true"],
            125,
            "/no/such/file",
        ),
        (&["--tmpfs", "relative", "busybox", "true"], 125, "relative"),
        (&["--name", "bad/name", "busybox", "true"], 125, "bad/name"),
        (&["oci:/no/such/layout", "true"], 125, "/no/such/layout"),
    ];
    for (arguments, code, named) in cases {
        let outcome = hull.run(&[&["run", "--rm"], *arguments].concat());
        assert_one_clear_error(&outcome, *code, named);
    }
    assert_eq!(hull.settle(), Vec::<String>::new());
    assert_eq!(hull.run(&["ps", "-aq"]).text(), "");
}

#[test]
fn broken_agent_image_and_missing_vmm_are_refused() {
    let Some(hull) = Hull::with_images(&["busybox"]) else {
        return;
    };
    let garbage = hull.store_dir().join("garbage");
    fs::write(&garbage, vec![7; 65536]).unwrap();
    let empty = hull.store_dir().join("empty");
    fs::write(&empty, b"").unwrap();
    let with = |variable: &str, path: &std::path::Path| {
        let mut command = hull.command(&["run", "--rm", "busybox", "true"]);
        finish(command.env(variable, path).spawn().unwrap())
    };
    let nowhere = std::path::Path::new("/no/such/file");
    assert_one_clear_error(&with("HULL_AGENT_IMAGE", nowhere), 125, "/no/such/file");
    assert_one_clear_error(&with("HULL_VMM", nowhere), 125, "/no/such/file");
    for image in [&garbage, &empty] {
        let outcome = with("HULL_AGENT_IMAGE", image);
        assert_eq!(outcome.code(), 125, "{outcome:?}");
        assert!(!outcome.stderr.trim().is_empty(), "{outcome:?}");
    }
    assert_eq!(hull.settle(), Vec::<String>::new());
    assert_eq!(hull.run(&["run", "--rm", "busybox", "true"]).code(), 0);
}

/// Run a shell script in a mount namespace of its own; `hull` in it is the program under test.
fn in_own_mounts(hull: &Hull, script: &str) -> Outcome {
    let inner = hull.command(&[]);
    let mut command = Command::new("unshare");
    command
        .args(["--mount", "sh", "-c"])
        .arg(format!("hull() {{ \"$HULL_UNDER_TEST\" \"$@\"; }}\n{script}"))
        .env("HULL_UNDER_TEST", inner.get_program())
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    for (key, value) in inner.get_envs() {
        if let Some(value) = value {
            command.env(key, value);
        }
    }
    finish(command.spawn().expect("unshare is there"))
}

#[test]
fn full_disk_is_reported_and_nothing_half_made_is_kept() {
    let Some(hull) = Hull::with_images(&[]) else {
        return;
    };
    let layout = hull.layout("redis");
    let script = format!(
        r#"mkdir -p "$HULL_ROOT"; mount -t tmpfs -o size=4m tmpfs "$HULL_ROOT"
        hull import {layout} redis; echo "import $?"
        find "$HULL_ROOT" -type f -size +4k | wc -l
        hull images -q | wc -l
        mount -t tmpfs -o size=400m tmpfs "$HULL_ROOT"; hull import {layout} redis >/dev/null; echo "again $?"
        head -c 500000000 /dev/zero >"$HULL_ROOT/ballast" 2>/dev/null
        hull run --rm --entrypoint /bin/true redis; echo "run $?"
        hull create --name kept --entrypoint /bin/true redis; echo "create $?"
        rm "$HULL_ROOT/ballast"; hull ps -aq | wc -l
        hull run --rm --entrypoint /bin/true redis; echo "run $?""#
    );
    let outcome = in_own_mounts(&hull, &script);
    let lines: Vec<&str> = outcome
        .stdout
        .split(|byte| *byte == b'\n')
        .filter_map(|line| std::str::from_utf8(line).ok())
        .collect();
    assert_eq!(lines[..4], ["import 1", "0", "0", "again 0"], "{outcome:?}");
    for named in ["not enough space", "No space left on device"] {
        assert!(outcome.stderr.contains(named), "{named}: {outcome:?}");
    }
    assert!(!outcome.stderr.contains("panicked"), "{outcome:?}");
    // What can't be recorded is not started, and leaves nothing in the list.
    assert_eq!(
        lines[4..8],
        ["run 125", "create 125", "0", "run 0"],
        "{outcome:?}"
    );
    assert_eq!(hull.settle(), Vec::<String>::new());
}

#[test]
fn read_only_store_runs_what_it_has_and_refuses_the_rest() {
    let Some(hull) = Hull::with_images(&["busybox"]) else {
        return;
    };
    let layout = hull.layout("redis");
    let script = format!(
        r#"mount --bind "$HULL_ROOT" "$HULL_ROOT" && mount -o remount,ro,bind "$HULL_ROOT"
        hull run --rm busybox echo runs; echo "run $?"
        hull images -q | wc -l
        hull import {layout} redis; echo "import $?"
        hull create busybox true; echo "create $?"
        hull rmi busybox; echo "rmi $?""#
    );
    let outcome = in_own_mounts(&hull, &script);
    let text = outcome.text();
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(
        lines,
        ["runs", "run 0", "1", "import 1", "create 125", "rmi 1"],
        "{outcome:?}"
    );
    let errors = outcome.stderr.lines().filter(|line| !line.trim().is_empty());
    assert_eq!(errors.count(), 3, "one line a refusal: {outcome:?}");
    assert!(
        outcome.stderr.contains("HULL_ROOT"),
        "the way out is not named: {outcome:?}"
    );
    assert_eq!(hull.settle(), Vec::<String>::new());
    assert_eq!(hull.run(&["images", "-q"]).text().lines().count(), 1);
}

#[test]
fn container_that_fills_its_files_is_told_so_and_ends_by_itself() {
    let Some(hull) = Hull::with_images(&["busybox"]) else {
        return;
    };
    let script =
        "dd if=/dev/zero of=/big bs=1M count=1000 2>&1 | tail -n 1; rm /big; echo still here; exit 3";
    let outcome = hull.run(&[
        "run", "--rm", "--memory", "128m", "busybox", "/bin/sh", "-c", script,
    ]);
    assert_eq!(outcome.code(), 3, "{outcome:?}");
    assert!(outcome.text().ends_with("still here"), "{outcome:?}");
    assert_eq!(hull.settle(), Vec::<String>::new());
}
