//! Podman, with runc and with `hull-oci`: the same commands, the same answers.
//!
//! Each scenario is one function that says what podman has to answer. With runc it is a record of what everybody's runtime
//! does; with `hull-oci` the same has to come out.

use std::fs;
use std::path::Path;

use hull_tests::enclosure::EngineRuntime;
use hull_tests::hull::{PATIENCE, eventually, finish};
use hull_tests::podman::Podman;
use hull_tests::pty::Terminal;

/// A test of each scenario with each runtime; what stands behind a reason waits for something with `hull-oci`.
macro_rules! with_both {
    ($($scenario:ident($($image:literal),*) $(waits $why:literal)?;)*) => {
        mod with_runc {
            use super::*;
            $(#[test] fn $scenario() {
                if let Some(podman) = Podman::with(EngineRuntime::Runc, &[$($image),*]) { super::$scenario(&podman); }
            })*
        }
        mod with_hull_oci {
            use super::*;
            $(#[test] $(#[ignore = $why])? fn $scenario() {
                if let Some(podman) = Podman::with(EngineRuntime::HullOci, &[$($image),*]) { super::$scenario(&podman); }
            })*
        }
    };
}

with_both! {
    run_passes_streams_and_exit_codes("busybox");
    run_takes_options_of_the_process("busybox");
    run_takes_options_of_the_filesystem("busybox");
    run_takes_capabilities_and_limits("busybox");
    a_container_lives_through_its_states("busybox");
    a_container_is_looked_into("busybox");
    files_are_copied("busybox");
    a_terminal_is_a_terminal("busybox");
    a_pod_is_one_network("busybox") waits "several microVMs at one interface";
    containers_reach_each_other("busybox");
    redis_serves("redis");
    nginx_serves("nginx");
}

const RUN: [&str; 4] = ["run", "--rm", "--network", "none"];

/// `podman run --rm --network none OPTIONS… busybox COMMAND…`
fn run(podman: &Podman, options: &[&str], command: &[&str]) -> hull_tests::hull::Outcome {
    podman.run(&[&RUN, options, &["localhost/busybox"], command].concat())
}

fn answers(podman: &Podman, options: &[&str], command: &[&str], wanted: &str) {
    let outcome = run(podman, options, command);
    assert_eq!(
        (outcome.code(), outcome.text().as_str()),
        (0, wanted),
        "{options:?} {command:?}: {outcome:?}"
    );
}

fn run_passes_streams_and_exit_codes(podman: &Podman) {
    let outcome = run(podman, &[], &["sh", "-c", "echo out; echo err >&2; exit 7"]);
    assert_eq!(
        (outcome.code(), outcome.text().as_str()),
        (7, "out"),
        "{outcome:?}"
    );
    assert_eq!(outcome.stderr.trim(), "err");
    let outcome = podman.run_with_input(
        &[&RUN[..], &["-i", "localhost/busybox", "tr", "a-z", "A-Z"]].concat(),
        "typed\n",
    );
    assert_eq!(
        (outcome.code(), outcome.text().as_str()),
        (0, "TYPED"),
        "{outcome:?}"
    );
    let outcome = run(podman, &[], &["/bin/no-such-program"]);
    assert_eq!(outcome.code(), 127, "{outcome:?}");
    let outcome = run(podman, &[], &["/etc"]);
    assert_eq!(outcome.code(), 126, "{outcome:?}");
    let handled = ["sh", "-c", "trap 'exit 9' TERM; kill -TERM $$; sleep 1"];
    assert_eq!(run(podman, &[], &handled).code(), 9);
}

fn run_takes_options_of_the_process(podman: &Podman) {
    answers(
        podman,
        &["--user", "1000:1001"],
        &["sh", "-c", "id -u; id -g"],
        "1000\n1001",
    );
    answers(
        podman,
        &["--user", "1000", "--group-add", "77"],
        &["sh", "-c", "id -G | tr ' ' '\\n' | grep -c '^77$'"],
        "1",
    );
    answers(
        podman,
        &["-e", "ONE=1", "--env", "TWO=two words"],
        &["sh", "-c", "echo $ONE $TWO"],
        "1 two words",
    );
    answers(podman, &["-w", "/tmp"], &["pwd"], "/tmp");
    answers(podman, &["--hostname", "named"], &["hostname"], "named");
    answers(
        podman,
        &["--entrypoint", "/bin/echo"],
        &["as", "entrypoint"],
        "as entrypoint",
    );
    answers(podman, &["--umask", "0077"], &["sh", "-c", "umask"], "0077");
    answers(
        podman,
        &["--sysctl", "net.core.somaxconn=321"],
        &["cat", "/proc/sys/net/core/somaxconn"],
        "321",
    );
    answers(
        podman,
        &["--security-opt", "no-new-privileges"],
        &["grep", "NoNewPrivs", "/proc/self/status"],
        "NoNewPrivs:\t1",
    );
    answers(
        podman,
        // One limit given takes podman's defaults away, and its own wish for processes is more than some hosts allow.
        &["--ulimit", "nofile=100:200", "--ulimit", "nproc=32768:32768"],
        &["sh", "-c", "ulimit -Sn; ulimit -Hn"],
        "100\n200",
    );
}

fn run_takes_options_of_the_filesystem(podman: &Podman) {
    let outcome = run(
        podman,
        &["--read-only", "--read-only-tmpfs=false"],
        &["touch", "/new"],
    );
    assert_ne!(outcome.code(), 0, "{outcome:?}");
    assert!(outcome.stderr.contains("Read-only file system"), "{outcome:?}");
    answers(
        podman,
        &["--tmpfs", "/scratch:size=1m,mode=1770"],
        &["sh", "-c", "touch /scratch/x && stat -c %a /scratch"],
        "1770",
    );
    let data = podman.dir().join("data");
    fs::create_dir(&data).expect("the folder is ours");
    fs::write(data.join("name"), "from the host\n").expect("the folder is ours");
    let volume = format!("{}:/data", data.display());
    answers(
        podman,
        &["-v", &volume],
        &["sh", "-c", "cat /data/name; echo from inside >/data/new"],
        "from the host",
    );
    assert_eq!(
        fs::read_to_string(data.join("new")).expect("the container wrote it"),
        "from inside\n"
    );
    let outcome = run(
        podman,
        &["-v", &format!("{volume}:ro")],
        &["touch", "/data/other"],
    );
    assert!(
        outcome.code() != 0 && outcome.stderr.contains("Read-only file system"),
        "{outcome:?}"
    );
    podman.ok(&["volume", "create", "kept"]);
    answers(
        podman,
        &["-v", "kept:/kept"],
        &["sh", "-c", "echo first >/kept/file"],
        "",
    );
    answers(podman, &["-v", "kept:/kept"], &["cat", "/kept/file"], "first");
    answers(
        podman,
        &["--shm-size", "2m"],
        &["sh", "-c", "df -k /dev/shm | tail -1 | awk '{print $2}'"],
        "2048",
    );
}

fn run_takes_capabilities_and_limits(podman: &Podman) {
    let effective = ["grep", "CapEff", "/proc/self/status"];
    answers(
        podman,
        &["--cap-drop", "all"],
        &effective,
        "CapEff:\t0000000000000000",
    );
    answers(
        podman,
        &["--cap-drop", "all", "--cap-add", "net_raw", "--cap-add", "chown"],
        &effective,
        "CapEff:\t0000000000002001",
    );
    let outcome = run(podman, &["--cap-drop", "chown"], &["chown", "1", "/etc/passwd"]);
    assert!(
        outcome.code() != 0 && outcome.stderr.contains("not permitted"),
        "{outcome:?}"
    );
    let outcome = run(
        podman,
        &["--pids-limit", "8"],
        &[
            "sh",
            "-c",
            "for i in 1 2 3 4 5 6 7 8 9 10; do sleep 5 & done; wait",
        ],
    );
    assert!(
        outcome.stderr.contains("Resource temporarily unavailable") || outcome.stderr.contains("can't fork"),
        "{outcome:?}"
    );
    let outcome = run(
        podman,
        &["--memory", "64m", "--memory-swap", "64m"],
        &["sh", "-c", "x=0123456789abcdef; while :; do x=$x$x; done"],
    );
    assert_ne!(outcome.code(), 0, "{outcome:?}");
    answers(
        podman,
        &["--cpus", "0.5", "--cpu-shares", "512", "--memory", "200m"],
        &["echo", "limited"],
        "limited",
    );
}

fn a_container_lives_through_its_states(podman: &Podman) {
    let script = "trap 'echo asked; exit 3' TERM; echo begun; while :; do sleep 0.05; done";
    let state = |wanted: &str| {
        assert_eq!(
            podman.ok(&["inspect", "--format", "{{.State.Status}}", "life"]),
            wanted
        )
    };
    podman.ok(&[
        "create",
        "--name",
        "life",
        "--network",
        "none",
        "localhost/busybox",
        "sh",
        "-c",
        script,
    ]);
    state("created");
    podman.ok(&["start", "life"]);
    state("running");
    assert!(eventually(PATIENCE, || podman.ok(&["logs", "life"]) == "begun"));
    assert_eq!(
        podman.ok(&["ps", "--format", "{{.Names}} {{.Image}}"]),
        "life localhost/busybox:latest"
    );
    podman.ok(&["pause", "life"]);
    state("paused");
    podman.ok(&["unpause", "life"]);
    state("running");
    podman.ok(&["stop", "--time", "100", "life"]);
    state("exited");
    assert_eq!(podman.ok(&["logs", "life"]), "begun\nasked");
    assert_eq!(
        podman.ok(&["inspect", "--format", "{{.State.ExitCode}}", "life"]),
        "3"
    );
    assert_eq!(podman.ok(&["ps", "--quiet"]), "");
    podman.ok(&["start", "life"]);
    state("running");
    podman.ok(&["kill", "--signal", "KILL", "life"]);
    assert_eq!(podman.ok(&["wait", "life"]), "137");
    podman.ok(&["rm", "life"]);
    assert_ne!(podman.run(&["inspect", "life"]).code(), 0);
    podman.ok(&[
        "run",
        "--detach",
        "--name",
        "other",
        "--network",
        "none",
        "localhost/busybox",
        "sleep",
        "1000",
    ]);
    assert_ne!(
        podman.run(&["rm", "other"]).code(),
        0,
        "a running container is not removed without --force"
    );
    podman.ok(&["rm", "--force", "--time", "0", "other"]);
    assert_eq!(podman.ok(&["ps", "--all", "--quiet"]), "");
}

fn a_container_is_looked_into(podman: &Podman) {
    podman.ok(&[
        "run",
        "--detach",
        "--name",
        "one",
        "--network",
        "none",
        "-e",
        "KEPT=1",
        "localhost/busybox",
        "sleep",
        "1000",
    ]);
    assert_eq!(
        podman.ok(&["exec", "one", "sh", "-c", "echo $KEPT; hostname | wc -c"]),
        "1\n13"
    );
    let outcome = podman.run(&["exec", "one", "sh", "-c", "echo out; echo err >&2; exit 5"]);
    assert_eq!(
        (outcome.code(), outcome.text().as_str()),
        (5, "out"),
        "{outcome:?}"
    );
    assert!(outcome.stderr.contains("err"), "{outcome:?}");
    let outcome = podman.run_with_input(&["exec", "-i", "one", "tr", "a-z", "A-Z"], "typed\n");
    assert_eq!(
        (outcome.code(), outcome.text().as_str()),
        (0, "TYPED"),
        "{outcome:?}"
    );
    assert_eq!(
        podman.ok(&[
            "exec",
            "--user",
            "1000:1001",
            "--workdir",
            "/tmp",
            "-e",
            "ADDED=2",
            "one",
            "sh",
            "-c",
            "id -u; pwd; echo $ADDED"
        ]),
        "1000\n/tmp\n2"
    );
    assert_eq!(podman.run(&["exec", "one", "/bin/no-such-program"]).code(), 127);
    podman.ok(&["exec", "--detach", "one", "sh", "-c", "echo done >/tmp/detached"]);
    assert!(eventually(PATIENCE, || podman
        .run(&["exec", "one", "cat", "/tmp/detached"])
        .text()
        == "done"));
    // With arguments of `ps`, podman runs that inside; without, it reads the host's /proc, where a microVM's processes aren't.
    let top = podman.ok(&["top", "one", "-o", "pid,args"]);
    assert!(top.contains("sleep 1000"), "{top}");
    let top = podman.ok(&["top", "one"]);
    assert!(
        !top.contains("podman"),
        "the host's processes are none of the container's: {top}"
    );
    let stats = podman.ok(&["stats", "--no-stream", "--format", "{{.Name}} {{.PIDs}}", "one"]);
    assert!(stats.starts_with("one "), "{stats}");
    let inspected = podman.ok(&["inspect", "--format", "{{.State.Pid}} {{.OCIRuntime}}", "one"]);
    assert!(!inspected.starts_with("0 "), "{inspected}");
}

fn files_are_copied(podman: &Podman) {
    let data = podman.dir().join("bound");
    fs::create_dir(&data).expect("the folder is ours");
    let volume = format!("{}:/data", data.display());
    podman.ok(&[
        "run",
        "--detach",
        "--name",
        "one",
        "--network",
        "none",
        "-v",
        &volume,
        "localhost/busybox",
        "sleep",
        "1000",
    ]);
    podman.ok(&[
        "exec",
        "one",
        "sh",
        "-c",
        "echo copied >/tmp/file; echo bound >/data/file",
    ]);
    let copy = podman.dir().join("copy").display().to_string();
    podman.ok(&["cp", "one:/tmp/file", &copy]);
    assert_eq!(fs::read_to_string(&copy).expect("podman wrote it"), "copied\n");
    let other = podman.dir().join("other").display().to_string();
    podman.ok(&["cp", "one:/data/file", &other]);
    assert_eq!(fs::read_to_string(&other).expect("podman wrote it"), "bound\n");
    // A name that would tell if it were the host that is written to.
    let name = format!("/tmp/copied-back-{}", std::process::id());
    podman.ok(&["cp", &copy, &format!("one:{name}")]);
    assert!(!Path::new(&name).exists(), "podman wrote to the host");
    assert_eq!(podman.ok(&["exec", "one", "cat", &name]), "copied");
    podman.ok(&["cp", &copy, "one:/data/back"]);
    assert_eq!(podman.ok(&["exec", "one", "cat", "/data/back"]), "copied");
    assert_eq!(
        fs::read_to_string(data.join("back")).expect("podman wrote it"),
        "copied\n"
    );
}

fn a_terminal_is_a_terminal(podman: &Podman) {
    let command = podman.command(&[
        "run",
        "--rm",
        "-it",
        "--network",
        "none",
        "--name",
        "screen",
        "localhost/busybox",
        "sh",
    ]);
    let mut terminal = Terminal::spawn(&command);
    terminal.expect("/ # ");
    terminal.send("stty size; tty\n");
    terminal.expect("24 80");
    terminal.expect("/dev/pts/0");
    terminal.resize(40, 132);
    terminal.send("while [ \"$(stty size)\" != '40 132' ]; do sleep 0.1; done; echo re''sized\n");
    terminal.expect("resized");
    // A shell that itself reads: a signal meant for a command between its fork and its exec is lost, with every runtime.
    terminal.send("sh -c 'trap \"echo inter\"\"rupted\" INT; echo re\"\"ady; while :; do read line; done'\n");
    terminal.expect("ready");
    let second = podman.command(&[
        "exec",
        "-it",
        "screen",
        "sh",
        "-c",
        "test -t 0 && echo also a terminal; exit 4",
    ]);
    let mut second = Terminal::spawn(&second);
    second.expect("also a terminal");
    assert_eq!(second.wait().code(), Some(4));
    terminal.send("\x03");
    terminal.expect("interrupted");
    podman.ok(&["rm", "--force", "--time", "0", "screen"]);
    terminal.wait();
}

fn a_pod_is_one_network(podman: &Podman) {
    podman.ok(&[
        "pod",
        "create",
        "--name",
        "pod",
        "--infra-image",
        "localhost/busybox",
        "--infra-command",
        "sleep 100000",
    ]);
    podman.ok(&[
        "run",
        "--detach",
        "--pod",
        "pod",
        "--name",
        "server",
        "localhost/busybox",
        "sh",
        "-c",
        "mkdir /www && echo served >/www/index.html && exec httpd -f -p 8000 -h /www",
    ]);
    // The pod's address is that of each of its containers.
    let address = podman.ok(&[
        "exec",
        "server",
        "sh",
        "-c",
        "ip -o -4 addr show dev eth0 | awk '{print $4}'",
    ]);
    let other = podman.ok(&[
        "run",
        "--rm",
        "--pod",
        "pod",
        "localhost/busybox",
        "sh",
        "-c",
        "ip -o -4 addr show dev eth0 | awk '{print $4}'",
    ]);
    assert_eq!(address, other);
    let host = address.split('/').next().expect("an address").to_owned();
    let fetched = || {
        finish(
            podman
                .beside("busybox")
                .args(["wget", "-q", "-O", "-", &format!("http://{host}:8000/")])
                .spawn()
                .expect("busybox"),
        )
    };
    assert!(
        eventually(PATIENCE, || fetched().text() == "served"),
        "{:?}",
        fetched()
    );
    let listed = podman.ok(&[
        "pod",
        "ps",
        "--format",
        "{{.Name}} {{.Status}} {{.NumberOfContainers}}",
    ]);
    assert_eq!(listed, "pod Running 2");
    podman.ok(&["pod", "stop", "--time", "0", "pod"]);
    podman.ok(&["pod", "rm", "pod"]);
    assert_eq!(podman.ok(&["ps", "--all", "--quiet"]), "");
}

fn containers_reach_each_other(podman: &Podman) {
    podman.ok(&[
        "run",
        "--detach",
        "--name",
        "server",
        "-p",
        "18080:8000",
        "localhost/busybox",
        "sh",
        "-c",
        "mkdir /www && echo served >/www/index.html && exec httpd -f -p 8000 -h /www",
    ]);
    let address = podman.ok(&["inspect", "--format", "{{.NetworkSettings.IPAddress}}", "server"]);
    let url = format!("http://{address}:8000/");
    let fetched = || podman.run(&["run", "--rm", "localhost/busybox", "wget", "-q", "-O", "-", &url]);
    assert!(
        eventually(PATIENCE, || fetched().text() == "served"),
        "{:?}",
        fetched()
    );
    let outcome = finish(
        podman
            .beside("busybox")
            .args(["wget", "-q", "-O", "-", &url])
            .spawn()
            .expect("busybox"),
    );
    assert_eq!(outcome.text(), "served", "from the host: {outcome:?}");
    let own = podman.ok(&[
        "exec",
        "server",
        "sh",
        "-c",
        "ip -o -4 addr show dev eth0 | awk '{print $4}' | cut -d/ -f1",
    ]);
    assert_eq!(own, address);
    let route = podman.ok(&["exec", "server", "ip", "route"]);
    assert!(route.contains("default via"), "{route}");
}

fn redis_serves(podman: &Podman) {
    podman.ok(&[
        "run",
        "--detach",
        "--name",
        "cache",
        "--network",
        "none",
        "localhost/redis",
    ]);
    let ping = || podman.run(&["exec", "cache", "redis-cli", "ping"]).text();
    assert!(
        eventually(PATIENCE, || ping() == "PONG"),
        "{}",
        podman.ok(&["logs", "cache"])
    );
    assert_eq!(
        podman.ok(&["exec", "cache", "redis-cli", "set", "answer", "42"]),
        "OK"
    );
    let measured = podman.ok(&[
        "exec",
        "cache",
        "redis-benchmark",
        "-q",
        "-n",
        "2000",
        "-t",
        "set,get",
    ]);
    assert!(measured.contains("requests per second"), "{measured}");
    assert!(
        podman
            .ok(&["logs", "cache"])
            .contains("Ready to accept connections")
    );
    podman.ok(&["restart", "--time", "100", "cache"]);
    assert!(
        eventually(PATIENCE, || ping() == "PONG"),
        "{}",
        podman.ok(&["logs", "cache"])
    );
    assert_eq!(
        podman.ok(&["exec", "cache", "redis-cli", "get", "answer"]),
        "42",
        "it was saved when it was asked to stop"
    );
    podman.ok(&["stop", "--time", "100", "cache"]);
    assert_eq!(
        podman.ok(&["inspect", "--format", "{{.State.ExitCode}}", "cache"]),
        "0"
    );
}

fn nginx_serves(podman: &Podman) {
    podman.ok(&["run", "--detach", "--name", "web", "localhost/nginx"]);
    let requests = [
        "exec",
        "web",
        "ab",
        "-q",
        "-n",
        "200",
        "-c",
        "8",
        "http://127.0.0.1/",
    ];
    assert!(eventually(PATIENCE, || podman
        .run(&requests)
        .text()
        .contains("Failed requests:        0")));
    let address = podman.ok(&["inspect", "--format", "{{.NetworkSettings.IPAddress}}", "web"]);
    let url = format!("http://{address}/");
    let outcome = finish(
        podman
            .beside("busybox")
            .args(["wget", "-q", "-O", "-", &url])
            .spawn()
            .expect("busybox"),
    );
    assert!(outcome.text().contains("Welcome to nginx"), "{outcome:?}");
    assert!(
        podman.ok(&["logs", "web"]).contains("GET / HTTP"),
        "the access log is the container's output"
    );
    podman.ok(&["stop", "--time", "100", "web"]);
    assert_eq!(
        podman.ok(&["inspect", "--format", "{{.State.ExitCode}}", "web"]),
        "0"
    );
}
