//! Bad input and killed processes: one clear error, the right exit code, and nothing left behind.

use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use hull_tests::hull::{Hull, Outcome, eventually, finish, signal, wait_for};
use nix::sys::signal::Signal;

const SOON: Duration = Duration::from_secs(20);

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
fn ctrl_c_ends_the_container_and_leaves_nothing() {
    let Some(hull) = Hull::with_images(&["busybox"]) else {
        return;
    };
    let mut child = hull
        .command(&["run", "--rm", "busybox", "/bin/sleep", "1000"])
        .spawn()
        .unwrap();
    assert!(
        eventually(SOON, || !hull.vmms().is_empty()),
        "no VMM ever started"
    );
    std::thread::sleep(Duration::from_millis(700));
    signal(i32::try_from(child.id()).unwrap(), Signal::SIGINT);
    // `sleep` is PID 1 of its namespace and ignores SIGINT by the kernel's rule, as under docker; the second one forces.
    if wait_for(&mut child, Duration::from_secs(2)).is_none() {
        signal(i32::try_from(child.id()).unwrap(), Signal::SIGTERM);
        std::thread::sleep(Duration::from_millis(200));
        for _ in 0..3 {
            signal(i32::try_from(child.id()).unwrap(), Signal::SIGINT);
        }
    }
    let outcome = finish(child);
    assert!(
        matches!(outcome.status.code(), Some(130 | 143 | 137)),
        "{outcome:?}"
    );
    assert_eq!(hull.settle(), Vec::<String>::new());
}

#[test]
fn signal_at_any_moment_of_the_start_leaves_nothing() {
    let Some(hull) = Hull::with_images(&["busybox"]) else {
        return;
    };
    for delay_ms in [0, 3, 10, 25, 50, 80, 120, 200, 350] {
        let child = hull
            .command(&["run", "--rm", "busybox", "/bin/true"])
            .spawn()
            .unwrap();
        std::thread::sleep(Duration::from_millis(delay_ms));
        signal(i32::try_from(child.id()).unwrap(), Signal::SIGTERM);
        let outcome = finish(child);
        assert!(!outcome.stderr.contains("panicked"), "{outcome:?}");
        assert_eq!(hull.settle(), Vec::<String>::new(), "after {delay_ms} ms");
    }
}

#[test]
fn killed_vmm_is_reported_and_cleaned_up() {
    let Some(hull) = Hull::with_images(&["busybox"]) else {
        return;
    };
    for delay_ms in [0, 20, 60, 150, 600] {
        let child = hull
            .command(&["run", "--rm", "busybox", "/bin/sleep", "1000"])
            .spawn()
            .unwrap();
        assert!(
            eventually(SOON, || !hull.vmms().is_empty()),
            "no VMM ever started"
        );
        std::thread::sleep(Duration::from_millis(delay_ms));
        for pid in hull.vmms() {
            signal(pid, Signal::SIGKILL);
        }
        let outcome = finish(child);
        assert_ne!(outcome.status.code(), Some(0), "{outcome:?}");
        assert!(
            !outcome.stderr.trim().is_empty(),
            "says nothing after {delay_ms} ms: {outcome:?}"
        );
        assert!(!outcome.stderr.contains("panicked"), "{outcome:?}");
        assert_eq!(hull.settle(), Vec::<String>::new(), "after {delay_ms} ms");
    }
}

#[test]
fn after_a_killed_hull_the_next_command_cleans_up() {
    let Some(hull) = Hull::with_images(&["busybox"]) else {
        return;
    };
    for delay_ms in [0, 15, 40, 90, 150, 600] {
        let mut child = hull
            .command(&["run", "--rm", "busybox", "/bin/sleep", "1000"])
            .spawn()
            .unwrap();
        std::thread::sleep(Duration::from_millis(delay_ms));
        child.kill().unwrap();
        child.wait().unwrap();
        let next = hull.run(&["run", "--rm", "busybox", "/bin/echo", "fine"]);
        assert_eq!(
            (next.code(), next.text().as_str()),
            (0, "fine"),
            "after {delay_ms} ms: {next:?}"
        );
        assert_eq!(hull.settle(), Vec::<String>::new(), "after {delay_ms} ms");
    }
}

#[test]
fn killing_one_container_touches_no_other() {
    let Some(hull) = Hull::with_images(&["busybox"]) else {
        return;
    };
    let script = "i=0; while [ $i -lt 30 ]; do echo $i; i=$((i+1)); sleep 0.1; done";
    let witness = hull
        .command(&["run", "--rm", "busybox", "/bin/sh", "-c", script])
        .spawn()
        .unwrap();
    assert!(eventually(SOON, || !hull.vmms().is_empty()));
    let spared = hull.vmms();
    let victim = hull
        .command(&["run", "--rm", "busybox", "/bin/sleep", "1000"])
        .spawn()
        .unwrap();
    assert!(eventually(SOON, || hull.vmms().len() > spared.len()));
    for pid in hull.vmms().into_iter().filter(|pid| !spared.contains(pid)) {
        signal(pid, Signal::SIGKILL);
    }
    assert_ne!(finish(victim).status.code(), Some(0));
    let outcome = finish(witness);
    assert_eq!(
        (outcome.code(), outcome.text().lines().count()),
        (0, 30),
        "{outcome:?}"
    );
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
