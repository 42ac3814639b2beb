//! What the fields of an OCI configuration become in a microVM: each is asked for, and looked at from inside.

use hull_tests::oci_guest::{OciGuest, shell};
use serde_json::{Value, json};

/// The configuration of a shell script with one value replaced, by its JSON pointer; missing objects are made.
fn with(mut config: Value, pointer: &str, value: Value) -> Value {
    let mut at = &mut config;
    for key in pointer.split('/').skip(1) {
        at = match at {
            Value::Array(list) => &mut list[key.parse::<usize>().expect("an index")],
            other => {
                if other.is_null() {
                    *other = json!({});
                }
                &mut other[key]
            }
        };
    }
    *at = value;
    config
}

fn lines(text: &str) -> Vec<&str> {
    text.lines().collect()
}

#[test]
fn process_has_the_identity_rights_and_limits_it_asks_for() {
    let Some(guest) = OciGuest::start() else { return };
    let script = "id -u; id -g; id -G; umask; pwd; ulimit -Sn; ulimit -Hn; ulimit -c; cat /proc/self/oom_score_adj; \
                  grep -E 'Cap(Inh|Prm|Eff|Bnd|Amb)|NoNewPrivs' /proc/self/status | cut -f2";
    let mut config = shell(script);
    config["process"]["user"] = json!({"uid": 1000, "gid": 1001, "umask": 63, "additionalGids": [7, 8]});
    config["process"]["cwd"] = json!("/made/for/it");
    config["process"]["noNewPrivileges"] = json!(true);
    config["process"]["oomScoreAdj"] = json!(-500);
    config["process"]["rlimits"] = json!([
        {"type": "RLIMIT_NOFILE", "soft": 100, "hard": 200}, {"type": "RLIMIT_CORE", "soft": 0, "hard": 0}
    ]);
    config["process"]["capabilities"] = json!({
        "bounding": ["CAP_KILL", "CAP_NET_RAW", "CAP_CHOWN", "CAP_NO_SUCH_THING"],
        "permitted": ["CAP_KILL", "CAP_NET_RAW"],
        "effective": ["CAP_KILL"],
        "inheritable": ["CAP_KILL"],
        "ambient": ["CAP_KILL"]
    });
    let said = guest.says(&config);
    // KILL is 5, NET_RAW 13, CHOWN 0. What a program without file capabilities has is the ambient set.
    let expected = [
        "1000",
        "1001",
        "1001 7 8",
        "0077",
        "/made/for/it",
        "100",
        "200",
        "0",
        "-500",
        "0000000000000020",
        "0000000000000020",
        "0000000000000020",
        "0000000000002021",
        "0000000000000020",
        "1",
    ];
    assert_eq!(lines(&said), expected);
    // Nothing asked for, nothing had.
    let bare = with(
        shell("grep CapEff /proc/self/status | cut -f2; umask"),
        "/process/capabilities",
        Value::Null,
    );
    assert_eq!(lines(&guest.says(&bare)), ["0000000000000000", "0022"]);
    guest.end();
}

#[test]
fn process_is_scheduled_as_it_asks() {
    let Some(guest) = OciGuest::start() else { return };
    // Of /proc/PID/stat: nice is field 19, the real-time priority 40, the policy 41.
    let script =
        "set -- $(cat /proc/$$/stat); shift 18; echo $1; shift 21; echo $1 $2; ionice -p $$; uname -m";
    let mut config = shell(script);
    config["process"]["scheduler"] =
        json!({"policy": "SCHED_RR", "priority": 7, "flags": ["SCHED_RESET_ON_FORK"]});
    config["process"]["ioPriority"] = json!({"class": "IOPRIO_CLASS_IDLE", "priority": 0});
    config["linux"]["personality"] = json!({"domain": "LINUX32"});
    let said = guest.says(&config);
    assert_eq!(lines(&said), ["0", "7 2", "idle", "i686"]);
    let nice = with(
        shell(script),
        "/process/scheduler",
        json!({"policy": "SCHED_BATCH", "nice": 5}),
    );
    assert_eq!(lines(&guest.says(&nice))[..2], ["5", "0 3"]);

    let mut container = guest.begin_running(&shell("sleep 1000"));
    let affinity = |affinity: Value| {
        json!({"cwd": "/", "user": {"uid": 0, "gid": 0}, "args": ["/bin/grep", "Cpus_allowed_list", "/proc/self/status"],
               "execCPUAffinity": affinity})
    };
    let ran = guest
        .exec(&mut container, &affinity(json!({"initial": "0", "final": "1"})))
        .expect("runs");
    assert_eq!(ran.stdout, "Cpus_allowed_list:\t1\n", "{ran:?}");
    let ran = guest
        .exec(&mut container, &affinity(json!({"initial": "0"})))
        .expect("runs");
    assert_eq!(ran.stdout, "Cpus_allowed_list:\t0\n", "{ran:?}");
    let error = guest
        .exec(&mut container, &affinity(json!({"final": "77"})))
        .expect_err("no such CPU");
    assert!(error.contains("execCPUAffinity.final"), "{error}");
    guest.end();
}

#[test]
fn mounts_have_the_options_they_ask_for() {
    let Some(guest) = OciGuest::start() else { return };
    let options = |target: &str| format!("grep ' {target} ' /proc/self/mountinfo | cut -d' ' -f6-");
    let tmpfs =
        |options: Value| json!({"destination": "/t", "type": "tmpfs", "source": "tmpfs", "options": options});
    let mounted = |mount: Value, script: &str| {
        let mut config = shell(script);
        config["mounts"].as_array_mut().expect("a list").push(mount);
        config
    };
    for (given, wanted) in [
        (
            json!(["ro", "nosuid", "noexec", "size=1m", "mode=0711"]),
            "ro,nosuid,nodev,noexec,relatime",
        ),
        (json!(["rro", "rnoexec", "noatime"]), "ro,nodev,noexec,noatime"),
        (
            json!(["ro", "rw", "exec", "nodiratime", "nosymfollow"]),
            "rw,nodev,nodiratime,nosymfollow",
        ),
    ] {
        let said = guest.says(&mounted(tmpfs(given.clone()), &options("/t")));
        let have: Vec<&str> = said.split([' ', ',']).collect();
        for option in wanted.split(',').filter(|option| *option != "relatime") {
            assert!(have.contains(&option), "{given}: {said:?} lacks {option}");
        }
    }
    // Mount points are made below what is to be read-only.
    let mut nested = mounted(
        tmpfs(json!(["ro"])),
        "ls /t; touch /t/x; touch /t/deeper/y && echo written",
    );
    let deeper = json!({"destination": "/t/deeper", "type": "tmpfs", "source": "tmpfs", "options": []});
    nested["mounts"].as_array_mut().expect("a list").push(deeper);
    let ran = guest.run(&nested).expect("runs");
    assert_eq!(ran.stdout, "deeper\nwritten\n", "{ran:?}");
    assert!(ran.stderr.contains("Read-only"), "{ran:?}");
    // What is below is copied up.
    let mut copied = mounted(
        tmpfs(json!(["tmpcopyup"])),
        "cat /etc/passwd | head -1; ls -ld /etc; touch /etc/new && echo new",
    );
    copied["mounts"][7]["destination"] = json!("/etc");
    let said = guest.says(&copied);
    assert!(said.starts_with("root:x:0:0") && said.ends_with("new"), "{said}");
    // How mounts spread, of one and of the root.
    let shared = mounted(tmpfs(json!(["rshared"])), &options("/t"));
    assert!(guest.says(&shared).contains("shared:"));
    let root = with(shell(&options("/")), "/linux/rootfsPropagation", json!("shared"));
    assert!(guest.says(&root).contains("shared:"));
    assert!(!guest.says(&shell(&options("/"))).contains("shared:"));
    guest.end();
}

#[test]
fn paths_and_names_are_as_asked() {
    let Some(guest) = OciGuest::start() else { return };
    let script = "hostname; cat /proc/sys/kernel/domainname; cat /proc/sys/kernel/msgmax; cat /proc/sys/net/ipv4/ip_forward; \
                  touch /root/x 2>/dev/null || echo sealed; ls /sys/firmware | wc -l; head -c1 /proc/kcore | wc -c; \
                  echo 1 2>/dev/null >/proc/sysrq-trigger || echo refused; grep ' / / ' /proc/self/mountinfo | cut -d' ' -f6";
    let mut config = shell(script);
    config["domainname"] = json!("example.org");
    config["root"]["readonly"] = json!(true);
    config["linux"]["sysctl"] = json!({"kernel.msgmax": "4711", "net/ipv4/ip_forward": "1"});
    let said = guest.says(&config);
    let said = lines(&said);
    assert_eq!(
        said[..8],
        ["box", "example.org", "4711", "1", "sealed", "0", "0", "refused"],
        "{said:?}"
    );
    // A node on a root that is sealed still opens nothing.
    assert!(said[8].contains("ro") && said[8].contains("nodev"), "{said:?}");
    guest.end();
}

#[test]
fn limits_are_files_of_the_containers_group() {
    let Some(guest) = OciGuest::start() else { return };
    let script = "cd /sys/fs/cgroup; for file in memory.max memory.low memory.high memory.swap.max cpu.weight cpu.max pids.max \
                  hugetlb.2MB.max; do cat $file; done; cat /proc/self/cgroup";
    let mut config = shell(script);
    let resources = &mut config["linux"]["resources"];
    resources["memory"] = json!({"limit": 33_554_432, "reservation": 1_048_576, "swap": 67_108_864});
    resources["cpu"] = json!({"shares": 1024, "quota": 25_000, "period": 50_000});
    resources["pids"] = json!({"limit": 17});
    resources["hugepageLimits"] =
        json!([{"pageSize": "2MB", "limit": 4_194_304}, {"pageSize": "7TB", "limit": 0}]);
    resources["unified"] = json!({"memory.high": "31457280"});
    let said = guest.says(&config);
    let expected = [
        "33554432",
        "1048576",
        "31457280",
        "33554432",
        "39",
        "25000 50000",
        "17",
        "4194304",
        "0::/",
    ];
    assert_eq!(lines(&said), expected);
    // The limit is one: what goes beyond it is ended.
    let script = "head -c 60m /dev/zero | tail -c 50m | wc -c; echo after";
    let mut config = shell(script);
    config["linux"]["resources"]["memory"] = json!({"limit": 16_777_216});
    let ran = guest.run(&config).expect("runs");
    assert!(!ran.stdout.contains("52428800"), "{ran:?}");
    let wrong = with(
        shell("true"),
        "/linux/resources/unified",
        json!({"memory.no_such_file": "1"}),
    );
    let error = guest.run(&wrong).expect_err("no such file");
    assert!(error.contains("memory.no_such_file"), "{error}");
    guest.end();
}

#[test]
fn devices_are_those_the_microvm_has() {
    let Some(guest) = OciGuest::start() else { return };
    let script = "stat -c '%n %a %u %g %t:%T' /dev/full2 /dev/null; stat -c '%n %a %F' /dev/pipe; \
                  head -c1 /dev/full2 | wc -c; for name in zero random tty; do test -c /dev/$name && echo $name; done";
    let mut config = shell(script);
    config["linux"]["devices"] = json!([
        {"path": "/dev/full2", "type": "c", "major": 1, "minor": 7, "fileMode": 438, "uid": 3, "gid": 4},
        {"path": "/dev/null", "type": "c", "major": 1, "minor": 3, "fileMode": 438},
        {"path": "/dev/pipe", "type": "p", "fileMode": 384}
    ]);
    let said = guest.says(&config);
    let expected = [
        "/dev/full2 666 3 4 1:7",
        "/dev/null 666 0 0 1:3",
        "/dev/pipe 600 fifo",
        "1",
        "zero",
        "random",
        "tty",
    ];
    assert_eq!(lines(&said), expected);
    // A number that the microVM doesn't have.
    let missing = with(
        shell("true"),
        "/linux/devices",
        json!([{"path": "/dev/x", "type": "c", "major": 10, "minor": 254}]),
    );
    let error = guest.run(&missing).expect_err("no such device");
    assert!(error.contains("/dev/x (10:254)"), "{error}");
    // Rules that take a node's device back are checked at each opening.
    let mut config = shell("head -c1 /dev/kmsg >/dev/null 2>&1 || echo refused; head -c2 /dev/zero | wc -c");
    config["linux"]["devices"] = json!([{"path": "/dev/kmsg", "type": "c", "major": 1, "minor": 11}]);
    assert_eq!(lines(&guest.says(&config)), ["refused", "2"]);
    config["linux"]["resources"]["devices"] =
        json!([{"allow": false}, {"allow": true, "type": "c", "major": 1, "minor": 11, "access": "r"}]);
    config["process"]["args"][2] =
        json!("exec 3</dev/kmsg && echo reads; (exec 3>/dev/kmsg) 2>/dev/null || echo 'does not write'");
    assert_eq!(lines(&guest.says(&config)), ["reads", "does not write"]);
    guest.end();
}

#[test]
fn seccomp_profile_is_installed_with_its_answers() {
    let Some(guest) = OciGuest::start() else { return };
    let mut config = shell("mkdir /x; chmod 700 /tmp && echo changed");
    config["linux"]["seccomp"] = json!({
        "defaultAction": "SCMP_ACT_ALLOW",
        "architectures": ["SCMP_ARCH_X86_64"],
        "flags": ["SECCOMP_FILTER_FLAG_LOG"],
        "syscalls": [{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 28}]
    });
    for no_new_privileges in [false, true] {
        config["process"]["noNewPrivileges"] = json!(no_new_privileges);
        let ran = guest.run(&config).expect("runs");
        assert!(
            ran.stderr.contains("No space left") && ran.stdout == "changed\n",
            "{ran:?}"
        );
    }
    guest.end();
}

#[test]
fn user_namespace_maps_its_ids() {
    let Some(guest) = OciGuest::start() else { return };
    let script = "id -u; cat /proc/self/uid_map /proc/self/gid_map | tr -s ' '; ulimit -Hn; cat /proc/self/oom_score_adj; \
                  hostname; grep -c . /proc/self/mountinfo >/dev/null && echo proc; ls /sys/kernel >/dev/null && echo sys; \
                  echo x >/dev/null && echo null; ls -ln /made/y | cut -d' ' -f5; stat -c %u /proc/self";
    let mut config = shell(script);
    let namespaces = config["linux"]["namespaces"].as_array_mut().expect("a list");
    namespaces.push(json!({"type": "user"}));
    config["linux"]["uidMappings"] = json!([{"containerID": 0, "hostID": 0, "size": 1}, {"containerID": 1, "hostID": 100_000, "size": 1000}]);
    config["linux"]["gidMappings"] = json!([{"containerID": 0, "hostID": 0, "size": 1}, {"containerID": 1, "hostID": 200_000, "size": 1000}]);
    config["process"]["rlimits"] = json!([{"type": "RLIMIT_NOFILE", "soft": 3000, "hard": 300_000}]);
    config["process"]["oomScoreAdj"] = json!(-100);
    config["process"]["args"][2] = json!(format!("mkdir /made; touch /made/y; chown 5 /made/y; {script}"));
    let said = guest.says(&config);
    let expected = [
        "0",
        " 0 0 1",
        " 1 100000 1000",
        " 0 0 1",
        " 1 200000 1000",
        "300000",
        "-100",
        "box",
        "proc",
        "sys",
        "null",
    ];
    assert_eq!(lines(&said)[..11], expected, "{said}");
    // As another user in it, and an exec that joins it.
    let mut config = with(config, "/process/user", json!({"uid": 7, "gid": 8}));
    config["process"]["args"][2] = json!("id -u; cat /proc/self/loginuid >/dev/null; sleep 1000");
    let mut container = guest.begin_running(&config);
    let process = json!({"cwd": "/", "user": {"uid": 9, "gid": 9}, "args": ["/bin/sh", "-c", "id -u; tail -1 /proc/self/uid_map | tr -s ' '"]});
    let ran = guest.exec(&mut container, &process).expect("runs");
    assert_eq!(ran.stdout, "9\n 1 100000 1000\n", "{ran:?}");
    guest.end();
}

#[test]
fn time_namespace_has_its_offsets_for_the_first_process_and_execs() {
    let Some(guest) = OciGuest::start() else { return };
    let mut config = shell("cut -d. -f1 /proc/uptime; sleep 1000");
    let namespaces = config["linux"]["namespaces"].as_array_mut().expect("a list");
    namespaces.push(json!({"type": "time"}));
    config["linux"]["timeOffsets"] =
        json!({"boottime": {"secs": 1_000_000}, "monotonic": {"secs": 5, "nanosecs": 6}});
    let mut container = guest.begin_running(&config);
    let exec = |args: Value| json!({"cwd": "/", "user": {"uid": 0, "gid": 0}, "args": args});
    let ran = guest
        .exec(
            &mut container,
            &exec(json!([
                "/bin/sh",
                "-c",
                "cut -d. -f1 /proc/uptime; tr -s ' ' </proc/self/timens_offsets"
            ])),
        )
        .expect("runs");
    let uptime: u64 = ran
        .stdout
        .lines()
        .next()
        .and_then(|line| line.parse().ok())
        .expect("a number");
    assert!(uptime >= 1_000_000, "{ran:?}");
    assert!(
        ran.stdout.contains("monotonic 5 6") && ran.stdout.contains("boottime 1000000 0"),
        "{ran:?}"
    );
    // What goes wrong in a process with memory of its own is told, too.
    let error = guest
        .exec(&mut container, &exec(json!(["/no/such/program"])))
        .expect_err("no such program");
    assert!(error.contains("/no/such/program"), "{error}");
    config["process"]["args"][2] = json!("cut -d. -f1 /proc/uptime");
    let uptime: u64 = guest.says(&config).parse().expect("a number");
    assert!(uptime >= 1_000_000);
    guest.end();
}

#[test]
fn start_container_hooks_run_in_the_container_before_its_program() {
    let Some(guest) = OciGuest::start() else { return };
    let hook = |script: &str| json!({"path": "/bin/sh", "args": ["sh", "-c", script], "env": ["PATH=/bin", "WORD=first"]});
    let mut config = shell("cat /root/trace");
    config["hooks"] = json!({"startContainer": [
        hook("read -r state; echo $WORD $$ $(hostname) $state >>/root/trace"),
        hook("echo second >>/root/trace"),
    ]});
    let said = guest.says(&config);
    let said = lines(&said);
    assert!(
        said[0].starts_with("first 2 box {") && said[0].contains("\"status\":\"created\""),
        "{said:?}"
    );
    assert_eq!(said[1], "second");
    config["hooks"]["startContainer"][1] = hook("exit 9");
    let error = guest.run(&config).expect_err("the hook fails");
    assert!(
        error.contains("startContainer hook /bin/sh: exited with status 9"),
        "{error}"
    );
    config["hooks"]["startContainer"] =
        json!([{"path": "/bin/sleep", "args": ["sleep", "1000"], "timeout": 1}]);
    let error = guest.run(&config).expect_err("the hook takes too long");
    assert!(error.contains("timeout"), "{error}");
    guest.end();
}
