//! `hull run` as people use it: what goes in arrives, what comes out is what the container said.

use hull_tests::hull::{Hull, PATIENCE, eventually};

#[test]
fn command_runs_in_its_own_kernel_and_its_exit_code_comes_back() {
    let Some(hull) = Hull::with_images(&["busybox"]) else {
        return;
    };
    let host = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    let outcome = hull.run(&["run", "--rm", "busybox", "/bin/sh", "-c", "uname -r; exit 7"]);
    assert_eq!(outcome.code(), 7, "{outcome:?}");
    assert!(
        !outcome.text().is_empty() && outcome.text() != host.trim(),
        "{outcome:?}"
    );
    assert_eq!(hull.settle(), Vec::<String>::new());
}

#[test]
fn stdout_and_stderr_come_back_apart_and_complete() {
    let Some(hull) = Hull::with_images(&["busybox"]) else {
        return;
    };
    let outcome = hull.run(&[
        "run",
        "--rm",
        "busybox",
        "/bin/sh",
        "-c",
        "echo out; echo err >&2; echo out2",
    ]);
    assert_eq!(
        (outcome.code(), outcome.text().as_str()),
        (0, "out\nout2"),
        "{outcome:?}"
    );
    assert_eq!(outcome.stderr.trim_end(), "err");
}

#[test]
fn stdin_reaches_the_command_and_its_end_too() {
    let Some(hull) = Hull::with_images(&["busybox"]) else {
        return;
    };
    let outcome = hull.run_with_input(
        &["run", "--rm", "-i", "busybox", "tr", "a-z", "A-Z"],
        b"hello\n".to_vec(),
    );
    assert_eq!(
        (outcome.code(), outcome.text().as_str()),
        (0, "HELLO"),
        "{outcome:?}"
    );
}

#[test]
fn bytes_through_a_pipe_arrive_intact_in_both_directions() {
    let Some(hull) = Hull::with_images(&["busybox"]) else {
        return;
    };
    // A period that is no power of two shows lost, doubled or swapped blocks.
    let input: Vec<u8> = (0..64_u32 << 20).map(|i| (i % 251).to_le_bytes()[0]).collect();
    let outcome = hull.run_with_input(&["run", "--rm", "-i", "busybox", "/bin/cat"], input.clone());
    assert_eq!(outcome.code(), 0, "{}", outcome.stderr);
    assert_eq!(outcome.stdout.len(), input.len());
    assert!(outcome.stdout == input, "the bytes differ");
}

#[test]
fn a_reader_that_stops_early_ends_the_writer_in_the_container() {
    let Some(hull) = Hull::with_images(&["busybox"]) else {
        return;
    };
    let outcome = hull.run(&["run", "--rm", "busybox", "/bin/sh", "-c", "yes | head -n 3"]);
    assert_eq!(
        (outcome.code(), outcome.text().as_str()),
        (0, "y\ny\ny"),
        "{outcome:?}"
    );
}

#[test]
fn environment_folder_user_and_host_name_are_as_asked() {
    let Some(hull) = Hull::with_images(&["debian-minimal"]) else {
        return;
    };
    let script = "echo $GREETING; pwd; id -u; id -g; hostname";
    let outcome = hull.run(&[
        "run",
        "--rm",
        "-e",
        "GREETING=hi there",
        "-w",
        "/tmp",
        "-u",
        "daemon",
        "--hostname",
        "box",
        "debian-minimal",
        "/bin/sh",
        "-c",
        script,
    ]);
    assert_eq!(
        (outcome.code(), outcome.text().as_str()),
        (0, "hi there\n/tmp\n1\n1\nbox"),
        "{outcome:?}"
    );
}

#[test]
fn image_configuration_is_the_default() {
    let Some(hull) = Hull::with_images(&["redis"]) else {
        return;
    };
    // The image says: user redis, folder /data.
    let outcome = hull.run(&[
        "run",
        "--rm",
        "--entrypoint",
        "/bin/sh",
        "redis",
        "-c",
        "id -un; pwd",
    ]);
    assert_eq!(
        (outcome.code(), outcome.text().as_str()),
        (0, "redis\n/data"),
        "{outcome:?}"
    );
}

#[test]
fn exit_codes_are_those_of_docker() {
    let Some(hull) = Hull::with_images(&["busybox"]) else {
        return;
    };
    for (arguments, code) in [
        (&["run", "--rm", "no-such-image", "/bin/true"][..], 125),
        (&["run", "--no-such-flag", "busybox"], 125),
        (&["run", "--rm", "busybox", "/etc"], 126),
        (&["run", "--rm", "busybox", "no-such-command"], 127),
        (&["run", "--rm", "busybox", "/bin/sh", "-c", "exit 255"], 255),
    ] {
        let outcome = hull.run(arguments);
        assert_eq!(outcome.code(), code, "{arguments:?}: {outcome:?}");
        if (125..=127).contains(&code) {
            assert!(!outcome.stderr.trim().is_empty(), "{arguments:?} says nothing");
        }
    }
    assert_eq!(hull.settle(), Vec::<String>::new());
}

#[test]
fn files_a_container_writes_are_gone_in_the_next() {
    let Some(hull) = Hull::with_images(&["busybox"]) else {
        return;
    };
    let write = hull.run(&[
        "run",
        "--rm",
        "busybox",
        "/bin/sh",
        "-c",
        "echo x > /bin/mark && cat /bin/mark",
    ]);
    assert_eq!((write.code(), write.text().as_str()), (0, "x"), "{write:?}");
    assert_eq!(
        hull.run(&["run", "--rm", "busybox", "test", "-e", "/bin/mark"])
            .code(),
        1
    );
}

#[test]
fn container_sees_neither_the_agent_nor_its_root() {
    let Some(hull) = Hull::with_images(&["busybox"]) else {
        return;
    };
    let script = "ls / | grep hull; ls -l /proc/1/exe; cat /proc/1/comm; ls /proc | grep -c '^[0-9]'; \
                  grep -c erofs /proc/self/mountinfo";
    let outcome = hull.run(&["run", "--rm", "busybox", "/bin/sh", "-c", script]);
    assert!(!outcome.text().contains("hull"), "{outcome:?}");
}

#[test]
fn memory_and_cpus_are_what_was_asked_for() {
    let Some(hull) = Hull::with_images(&["busybox"]) else {
        return;
    };
    let script = "nproc; awk '/MemTotal/ {print ($2 > 400000) ($2 < 524288)}' /proc/meminfo";
    let outcome = hull.run(&[
        "run", "--rm", "--memory", "512m", "--cpus", "2", "busybox", "/bin/sh", "-c", script,
    ]);
    assert_eq!(
        (outcome.code(), outcome.text().as_str()),
        (0, "2\n11"),
        "{outcome:?}"
    );
}

#[test]
fn half_a_cpu_is_one_that_is_held_back() {
    let Some(hull) = Hull::with_images(&["busybox"]) else {
        return;
    };
    // It ends only if the kernel does hold it back.
    let script = "nproc; cat /sys/fs/cgroup/cpu.max; until grep -q '^nr_throttled [1-9]' /sys/fs/cgroup/cpu.stat; do :; done";
    let outcome = hull.run(&[
        "run", "--name", "half", "--cpus", "0.5", "busybox", "/bin/sh", "-c", script,
    ]);
    assert_eq!(
        (outcome.code(), outcome.text().as_str()),
        (0, "1\n50000 100000"),
        "{outcome:?}"
    );
    let inspected = hull.run(&["inspect", "-f", "{{.HostConfig.NanoCpus}}", "half"]);
    assert_eq!(inspected.text(), "500000000", "{inspected:?}");
}

#[test]
fn ten_at_once_do_not_disturb_each_other() {
    let Some(hull) = Hull::with_images(&["busybox"]) else {
        return;
    };
    let children: Vec<_> = (0..10)
        .map(|n: i32| {
            let script = format!("echo {n}; exit {n}");
            hull.command(&["run", "--rm", "busybox", "/bin/sh", "-c", &script])
                .spawn()
                .unwrap()
        })
        .collect();
    for (n, child) in (0..).zip(children) {
        let outcome = hull_tests::hull::finish(child);
        assert_eq!(
            (outcome.code(), outcome.text()),
            (n, n.to_string()),
            "{outcome:?}"
        );
    }
    assert_eq!(hull.settle(), Vec::<String>::new());
}

#[test]
fn redis_answers_ping_and_keeps_a_value() {
    let Some(hull) = Hull::with_images(&["redis"]) else {
        return;
    };
    let mut server = hull
        .command(&["run", "--rm", "--name", "r", "redis"])
        .spawn()
        .unwrap();
    let client = |arguments: &[&str]| hull.run(&[&["exec", "r", "redis-cli"], arguments].concat());
    let up = eventually(PATIENCE, || client(&["ping"]).text() == "PONG");
    assert!(up, "redis never answered");
    assert_eq!(client(&["set", "k", "kept"]).text(), "OK");
    assert_eq!(client(&["get", "k"]).text(), "kept");
    hull_tests::hull::signal(
        i32::try_from(server.id()).unwrap(),
        nix::sys::signal::Signal::SIGTERM,
    );
    let status = hull_tests::hull::wait_for(&mut server, PATIENCE);
    // redis ends by itself on SIGTERM, with 0.
    assert_eq!(status.and_then(|status| status.code()), Some(0));
    assert_eq!(hull.settle(), Vec::<String>::new());
}
