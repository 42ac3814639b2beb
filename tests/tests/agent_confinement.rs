//! A container, root in it included, tries to cross what confines it inside its microVM: capabilities, seccomp, devices, masked
//! paths, the agent's binary, its memory and its sockets.

use std::io::{BufRead as _, BufReader};
use std::process::Child;

use hull_tests::hull::{Hull, Outcome, PATIENCE, eventually, finish};

/// Has a `mount`.
const SMALL: &str = "busybox";
/// It has the C library that the probe is linked with.
const IMAGE: &str = "debian-minimal";

/// Runs a script with the probe at /tmp/probe.
fn probes(hull: &Hull, options: &[&str], script: &str) -> String {
    let probe = std::fs::read(env!("CARGO_BIN_EXE_container_probe")).expect("as this test set it up");
    let script = format!("cat > /tmp/probe && chmod 755 /tmp/probe && {script}");
    let mut arguments = vec!["run", "--rm", "-i"];
    arguments.extend(options);
    arguments.extend([IMAGE, "/bin/sh", "-c", &script]);
    let outcome = hull.run_with_input(&arguments, probe);
    assert_eq!(outcome.code(), 0, "{options:?} {script}: {outcome:?}");
    outcome.text()
}

fn world() -> Option<Hull> {
    Hull::with_images(&[IMAGE, SMALL])
}

fn shell(hull: &Hull, options: &[&str], script: &str) -> Outcome {
    shell_in(hull, IMAGE, options, script)
}

fn shell_in(hull: &Hull, image: &str, options: &[&str], script: &str) -> Outcome {
    let mut arguments = vec!["run", "--rm"];
    arguments.extend(options);
    arguments.extend([image, "/bin/sh", "-c", script]);
    hull.run(&arguments)
}

/// What the script prints, which must succeed.
fn says(hull: &Hull, options: &[&str], script: &str) -> String {
    let outcome = shell(hull, options, script);
    assert_eq!(outcome.code(), 0, "{options:?} {script}: {outcome:?}");
    outcome.text()
}

const STATUS: &str =
    "grep -E '^(Cap(Prm|Eff|Bnd|Amb)|NoNewPrivs|Seccomp):' /proc/self/status | tr -d '\\t ' | xargs";

#[test]
fn capabilities_are_dockers_and_change_as_asked() {
    let Some(hull) = world() else { return };
    assert_eq!(
        says(&hull, &[], STATUS),
        "CapPrm:00000000a80425fb CapEff:00000000a80425fb CapBnd:00000000a80425fb CapAmb:0000000000000000 NoNewPrivs:0 Seccomp:2"
    );
    // Another user has the bounding set alone.
    let user = says(&hull, &["--user", "1000:1000"], STATUS);
    assert!(
        user.contains("CapPrm:0000000000000000 CapEff:0000000000000000 CapBnd:00000000a80425fb"),
        "{user}"
    );
    let dropped = says(&hull, &["--cap-drop", "ALL", "--cap-add", "chown"], STATUS);
    assert!(
        dropped.contains("CapEff:0000000000000001 CapBnd:0000000000000001"),
        "{dropped}"
    );
    let added = says(
        &hull,
        &[
            "--cap-add",
            "CAP_NET_ADMIN",
            "--security-opt",
            "no-new-privileges",
            "--security-opt",
            "seccomp=unconfined",
        ],
        STATUS,
    );
    assert!(added.contains("CapEff:00000000a80435fb"), "{added}");
    assert!(added.contains("NoNewPrivs:1 Seccomp:0"), "{added}");
    let refused = shell(&hull, &["--cap-add", "FLY"], "true");
    assert_eq!(refused.code(), 125);
    assert!(
        refused.stderr.contains("--cap-add") && refused.stderr.contains("FLY"),
        "{refused:?}"
    );
}

#[test]
fn default_profile_refuses_what_dockers_refuses() {
    let Some(hull) = world() else { return };
    // unshare(CLONE_NEWUSER), add_key, io_uring_setup, clone3, one beyond all, getpid.
    let script = "/tmp/probe syscalls 272:268435456 248 425:1 435 500 39";
    assert_eq!(probes(&hull, &[], script), "1 1 1 38 38 0 done");
    let open = probes(&hull, &["--security-opt", "seccomp=unconfined"], script);
    assert!(open.starts_with("0 "), "{open}");
}

#[test]
fn profile_of_a_file_is_followed_and_an_exec_has_it_too() {
    let Some(hull) = world() else { return };
    let path = hull.temporary_dir().join("profile.json");
    std::fs::write(
        &path,
        r#"{"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 28}]}"#,
    )
    .expect("as this test set it up");
    let option = format!("seccomp={}", path.display());
    let refused = shell(&hull, &["--security-opt", &option], "mkdir /x");
    assert!(refused.stderr.contains("No space left"), "{refused:?}");
    let mut child = sleeping(&hull, "profiled", &["--security-opt", &option]);
    let exec = hull.run(&["exec", "profiled", "/bin/mkdir", "/x"]);
    assert!(exec.stderr.contains("No space left"), "{exec:?}");
    end(&hull, &mut child, "profiled");
    let missing = shell(&hull, &["--security-opt", "seccomp=/no/such.json"], "true");
    assert_eq!(missing.code(), 125);
    assert!(missing.stderr.contains("/no/such.json"), "{missing:?}");
}

#[test]
fn nodes_of_disks_can_be_made_and_open_nothing() {
    let Some(hull) = world() else { return };
    let probe = "for place in /probe /dev/probe /dev/shm/probe /run/probe; do \
         for number in 'b 254 0' 'b 254 1' 'b 254 16' 'c 1 1' 'c 1 2' 'c 10 1'; do \
         mknod $place $number || echo no-node; \
         dd if=$place of=/dev/null bs=512 count=1 2>/dev/null && echo OPENED $place $number; rm -f $place; done; done; \
         echo x > /dev/null && head -c 3 /dev/zero | wc -c";
    assert_eq!(says(&hull, &["--tmpfs", "/run:dev"], probe), "3");
    // Every capability, and so the right to mount: the kernel's filter is what refuses.
    let mounting = format!(
        "mkdir /m && mount -t tmpfs -o dev none /m && echo mounted; mount -o remount,dev /; cd /m; {probe}; \
         mknod /m/b b 254 0 && dd if=/m/b of=/dev/null bs=512 count=1 2>/dev/null && echo OPENED; \
         mknod /m/n c 1 3 && echo x > /m/n && echo null; echo done"
    );
    let all = shell_in(
        &hull,
        SMALL,
        &["--cap-add", "ALL", "--tmpfs", "/run:dev"],
        &mounting,
    )
    .text();
    assert!(!all.contains("OPENED"), "{all}");
    assert!(
        all.contains("mounted") && all.contains("null") && all.ends_with("done"),
        "{all}"
    );
}

#[test]
fn kernel_interfaces_are_masked_or_read_only() {
    let Some(hull) = world() else { return };
    let script = "cat /proc/keys /proc/timer_list | wc -c; ls /sys/firmware | wc -l; \
         for path in /proc/sysrq-trigger /proc/sys/kernel/core_pattern /sys/kernel/uevent_helper; do \
         (echo b > $path) 2>/dev/null && echo WRITTEN $path; done; ls /dev/mem /dev/kmsg /dev/vda /dev/kcore 2>/dev/null; true";
    assert_eq!(says(&hull, &[], script), "0\n0");
}

#[test]
fn agent_is_out_of_reach() {
    let Some(hull) = world() else { return };
    // Its binary: by no path. Its process: not in the container's PID namespace. Its sockets: vsock is not a family the profile
    // allows; without the profile the agent turns a peer inside the microVM away, and the VMM knows no port of the host's but the
    // agent's own.
    let script = "ls /hull-agent /proc/1/root/hull-agent /run/hull /run/l 2>/dev/null; \
         readlink /proc/1/exe | grep hull-agent; grep -l hull-agent /proc/[0-9]*/comm 2>/dev/null; \
         /tmp/probe vsock && /tmp/probe trace";
    for options in [
        &[][..],
        &["--security-opt", "seccomp=unconfined"],
        &["--cap-add", "SYS_PTRACE", "--security-opt", "seccomp=unconfined"],
    ] {
        assert_eq!(probes(&hull, options, script), "done\ndone", "{options:?}");
    }
}

#[test]
fn process_that_is_being_made_shows_nothing_of_the_agent() {
    let Some(hull) = world() else { return };
    // Between its birth in the container and its program an exec's process has the agent's memory.
    for options in [&["--cap-add", "SYS_PTRACE"][..], &["--privileged"]] {
        let mut child = sleeping(&hull, "watched", options);
        let probe = std::fs::read(env!("CARGO_BIN_EXE_container_probe")).expect("as this test set it up");
        let put = hull.run_with_input(
            &[
                "exec",
                "-i",
                "watched",
                "/bin/sh",
                "-c",
                "cat > /tmp/probe && chmod 755 /tmp/probe",
            ],
            probe,
        );
        assert_eq!(put.code(), 0, "{put:?}");
        let watcher = hull
            .command(&["exec", "watched", "/tmp/probe", "trace"])
            .spawn()
            .expect("as this test set it up");
        for _ in 0..30 {
            assert_eq!(hull.run(&["exec", "watched", "/bin/true"]).code(), 0);
        }
        let seen = finish(watcher);
        assert_eq!(seen.text(), "done", "{options:?}: {seen:?}");
        end(&hull, &mut child, "watched");
    }
}

#[test]
fn limits_groups_and_sysctls_reach_the_command() {
    let Some(hull) = world() else { return };
    let options = [
        "--ulimit",
        "nofile=100:200",
        "--ulimit",
        "core=0",
        "--group-add",
        "daemon",
        "--group-add",
        "4711",
        "--shm-size",
        "1m",
        "--sysctl",
        "net.core.somaxconn=77",
        "--umask",
        "0027",
        "--oom-score-adj",
        "300",
        "--pids-limit",
        "50",
    ];
    let script = "ulimit -n; ulimit -Hn; ulimit -c; id -G; df -k /dev/shm | tail -1 | awk '{print $2}'; \
         cat /proc/sys/net/core/somaxconn; umask; cat /proc/self/oom_score_adj; cat /sys/fs/cgroup/pids.max";
    assert_eq!(
        says(&hull, &options, script)
            .split_whitespace()
            .collect::<Vec<_>>(),
        [
            "100", "200", "0", "0", "1", "4711", "1024", "77", "0027", "300", "50"
        ]
    );
    // None of them ends before the last was tried.
    let script = "for i in 1 2 3 4 5 6 7 8 9 10 11 12; do sleep 100 & done; exit 3";
    let bomb = shell(&hull, &["--pids-limit", "10"], script);
    assert!(format!("{bomb:?}").contains("fork"), "{bomb:?}");
    let unknown = shell(&hull, &["--group-add", "nosuchgroup"], "true");
    assert!(unknown.stderr.contains("nosuchgroup"), "{unknown:?}");
}

#[test]
fn privileged_container_has_all_of_its_microvm_and_nothing_of_the_host() {
    let Some(hull) = world() else { return };
    let script = "grep CapEff /proc/self/status; test -b /dev/vda && echo disk; mkdir -p /mnt && mount -t tmpfs none /mnt && echo mounted; \
         dd if=/dev/zero of=/dev/vda bs=512 count=1 2>&1 | grep -q -i 'read-only\\|not permitted\\|error' && echo disk-is-read-only";
    let said = shell_in(&hull, SMALL, &["--privileged"], script).text();
    for expected in ["000001ffffffffff", "disk", "mounted", "disk-is-read-only"] {
        assert!(said.contains(expected), "{expected}: {said}");
    }
}

fn sleeping(hull: &Hull, name: &str, options: &[&str]) -> Child {
    let mut arguments = vec!["run", "--rm", "--name", name];
    arguments.extend(options);
    arguments.extend([IMAGE, "/bin/sh", "-c", "echo up; exec sleep 1000"]);
    let mut child = hull.command(&arguments).spawn().expect("as this test set it up");
    let mut line = String::new();
    BufReader::new(child.stdout.as_mut().expect("as this test set it up"))
        .read_line(&mut line)
        .expect("as this test set it up");
    assert_eq!(line, "up\n");
    child
}

fn end(hull: &Hull, child: &mut Child, name: &str) {
    hull.run(&["kill", name]);
    assert!(
        eventually(PATIENCE, || child
            .try_wait()
            .expect("as this test set it up")
            .is_some()),
        "{name} does not end"
    );
}

#[test]
fn exec_has_the_containers_confinement_and_takes_no_more() {
    let Some(hull) = world() else { return };
    let mut child = sleeping(
        &hull,
        "confined",
        &["--cap-drop", "CHOWN", "--ulimit", "nofile=99:99"],
    );
    let script = format!("{STATUS}; ulimit -n; chown 1 /tmp 2>&1 || true");
    let outcome = finish(
        hull.command(&["exec", "confined", "/bin/sh", "-c", &script])
            .spawn()
            .expect("as this test set it up"),
    );
    let said = outcome.text();
    assert!(
        said.contains("CapEff:00000000a80425fa") && said.contains("Seccomp:2"),
        "{outcome:?}"
    );
    assert!(
        said.contains("99") && said.contains("not permitted"),
        "{outcome:?}"
    );
    end(&hull, &mut child, "confined");
    assert_eq!(hull.settle(), Vec::<String>::new());
}
