//! Docker, with runc and with `hull-oci` as a runtime of the daemon: the same commands, the same answers.

use std::fs;

use hull_tests::docker::Docker;
use hull_tests::enclosure::EngineRuntime;
use hull_tests::hull::{PATIENCE, eventually, finish};
use hull_tests::pty::Terminal;

/// Starting a daemon takes long: all scenarios on one of each runtime.
#[test]
fn docker_with_runc() {
    if let Some(docker) = Docker::with(EngineRuntime::Runc, &["busybox", "redis"]) {
        all(&docker);
    }
}

#[test]
fn docker_with_hull_oci() {
    if let Some(docker) = Docker::with(EngineRuntime::HullOci, &["busybox", "redis"]) {
        all(&docker);
    }
}

fn all(docker: &Docker) {
    run_passes_streams_and_exit_codes(docker);
    run_takes_options(docker);
    a_container_lives_through_its_states(docker);
    a_container_is_looked_into(docker);
    a_terminal_is_a_terminal(docker);
    a_bridge_connects(docker);
    redis_serves(docker);
}

/// `docker run --rm --network none OPTIONS… busybox COMMAND…`
fn run(docker: &Docker, options: &[&str], command: &[&str]) -> hull_tests::hull::Outcome {
    docker.run(
        &[
            &["run", "--rm", "--network", "none"],
            options,
            &["busybox"],
            command,
        ]
        .concat(),
    )
}

fn answers(docker: &Docker, options: &[&str], command: &[&str], wanted: &str) {
    let outcome = run(docker, options, command);
    assert_eq!(
        (outcome.code(), outcome.text().as_str()),
        (0, wanted),
        "{options:?} {command:?}: {outcome:?}"
    );
}

fn run_passes_streams_and_exit_codes(docker: &Docker) {
    let outcome = run(docker, &[], &["sh", "-c", "echo out; echo err >&2; exit 7"]);
    assert_eq!(
        (outcome.code(), outcome.text().as_str(), outcome.stderr.trim()),
        (7, "out", "err"),
        "{outcome:?}"
    );
    let outcome = docker.run_with_input(
        &[
            "run",
            "--rm",
            "-i",
            "--network",
            "none",
            "busybox",
            "tr",
            "a-z",
            "A-Z",
        ],
        "typed\n",
    );
    assert_eq!(
        (outcome.code(), outcome.text().as_str()),
        (0, "TYPED"),
        "{outcome:?}"
    );
    let outcome = run(docker, &[], &["/bin/no-such-program"]);
    assert_eq!(outcome.code(), 127, "{outcome:?}");
    let outcome = run(docker, &[], &["/etc"]);
    assert_eq!(outcome.code(), 126, "{outcome:?}");
}

fn run_takes_options(docker: &Docker) {
    answers(
        docker,
        &["--user", "1000:1001"],
        &["sh", "-c", "id -u; id -g"],
        "1000\n1001",
    );
    answers(docker, &["-e", "ONE=1"], &["sh", "-c", "echo $ONE"], "1");
    answers(docker, &["-w", "/var/new"], &["pwd"], "/var/new");
    answers(docker, &["--hostname", "named"], &["hostname"], "named");
    answers(
        docker,
        &["--tmpfs", "/scratch:size=1m"],
        &["sh", "-c", "touch /scratch/x && echo written"],
        "written",
    );
    answers(
        docker,
        &["--cap-drop", "all"],
        &["grep", "CapEff", "/proc/self/status"],
        "CapEff:\t0000000000000000",
    );
    answers(
        docker,
        &["--memory", "64m", "--cpus", "0.5"],
        &["echo", "limited"],
        "limited",
    );
    let outcome = run(
        docker,
        &["--memory", "64m"],
        &["sh", "-c", "x=0123456789abcdef; while :; do x=$x$x; done"],
    );
    assert_ne!(outcome.code(), 0, "{outcome:?}");
    let outcome = run(docker, &["--read-only"], &["touch", "/new"]);
    assert!(
        outcome.code() != 0 && outcome.stderr.contains("Read-only file system"),
        "{outcome:?}"
    );
    let data = docker.dir().join("shared");
    fs::create_dir(&data).expect("the folder is ours");
    fs::write(data.join("name"), "from the host\n").expect("the folder is ours");
    let volume = format!("{}:/data", data.display());
    answers(
        docker,
        &["-v", &volume],
        &["sh", "-c", "cat /data/name; echo from inside >/data/new"],
        "from the host",
    );
    assert_eq!(
        fs::read_to_string(data.join("new")).expect("the container wrote it"),
        "from inside\n"
    );
}

fn a_container_lives_through_its_states(docker: &Docker) {
    let script = "trap 'echo asked; exit 3' TERM; echo begun; while :; do sleep 0.05; done";
    let state = |wanted: &str| {
        assert_eq!(
            docker.ok(&["inspect", "--format", "{{.State.Status}}", "life"]),
            wanted
        )
    };
    docker.ok(&[
        "create",
        "--name",
        "life",
        "--network",
        "none",
        "busybox",
        "sh",
        "-c",
        script,
    ]);
    state("created");
    docker.ok(&["start", "life"]);
    state("running");
    assert!(eventually(PATIENCE, || docker.ok(&["logs", "life"]) == "begun"));
    assert_eq!(
        docker.ok(&["ps", "--format", "{{.Names}} {{.Image}}"]),
        "life busybox"
    );
    docker.ok(&["pause", "life"]);
    state("paused");
    docker.ok(&["unpause", "life"]);
    state("running");
    docker.ok(&["stop", "--time", "100", "life"]);
    state("exited");
    assert_eq!(docker.ok(&["logs", "life"]), "begun\nasked");
    assert_eq!(
        docker.ok(&["inspect", "--format", "{{.State.ExitCode}}", "life"]),
        "3"
    );
    docker.ok(&["start", "life"]);
    state("running");
    docker.ok(&["kill", "life"]);
    assert_eq!(docker.ok(&["wait", "life"]), "137");
    docker.ok(&["rm", "life"]);
    assert_eq!(docker.ok(&["ps", "--all", "--quiet"]), "");
}

fn a_container_is_looked_into(docker: &Docker) {
    docker.ok(&[
        "run",
        "--detach",
        "--name",
        "one",
        "--network",
        "none",
        "-e",
        "KEPT=1",
        "busybox",
        "sleep",
        "1000",
    ]);
    assert_eq!(docker.ok(&["exec", "one", "sh", "-c", "echo $KEPT"]), "1");
    let outcome = docker.run(&["exec", "one", "sh", "-c", "echo out; echo err >&2; exit 5"]);
    assert_eq!(
        (outcome.code(), outcome.text().as_str(), outcome.stderr.trim()),
        (5, "out", "err"),
        "{outcome:?}"
    );
    let outcome = docker.run_with_input(&["exec", "-i", "one", "tr", "a-z", "A-Z"], "typed\n");
    assert_eq!(
        (outcome.code(), outcome.text().as_str()),
        (0, "TYPED"),
        "{outcome:?}"
    );
    assert_eq!(
        docker.ok(&[
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
    let top = docker.ok(&["top", "one"]);
    assert!(top.lines().count() >= 2, "{top}");
    let file = docker.dir().join("file").display().to_string();
    docker.ok(&["exec", "one", "sh", "-c", "echo copied >/root/file"]);
    docker.ok(&["cp", "one:/root/file", &file]);
    assert_eq!(fs::read_to_string(&file).expect("docker wrote it"), "copied\n");
    docker.ok(&["cp", &file, "one:/root/back"]);
    assert_eq!(docker.ok(&["exec", "one", "cat", "/root/back"]), "copied");
    docker.ok(&["rm", "--force", "one"]);
}

fn a_terminal_is_a_terminal(docker: &Docker) {
    let command = docker.command(&[
        "run",
        "--rm",
        "-it",
        "--network",
        "none",
        "--name",
        "screen",
        "busybox",
        "sh",
    ]);
    let mut terminal = Terminal::spawn(&command);
    terminal.expect("/ # ");
    terminal.send("while [ \"$(stty size)\" != '24 80' ]; do sleep 0.1; done; echo si''zed; tty\n");
    terminal.expect("sized");
    terminal.expect("/dev/pts/0");
    terminal.resize(40, 132);
    terminal.send("while [ \"$(stty size)\" != '40 132' ]; do sleep 0.1; done; echo re''sized\n");
    terminal.expect("resized");
    let second = docker.command(&[
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
    terminal.send("exit 6\n");
    assert_eq!(terminal.wait().code(), Some(6));
}

fn a_bridge_connects(docker: &Docker) {
    docker.ok(&[
        "run",
        "--detach",
        "--name",
        "server",
        "--network",
        "bridge",
        "busybox",
        "sh",
        "-c",
        "mkdir /www && echo served >/www/index.html && exec httpd -f -p 8000 -h /www",
    ]);
    let address = docker.ok(&["inspect", "--format", "{{.NetworkSettings.IPAddress}}", "server"]);
    let url = format!("http://{address}:8000/");
    let fetched = || docker.run(&["run", "--rm", "busybox", "wget", "-q", "-O", "-", &url]);
    assert!(
        eventually(PATIENCE, || fetched().text() == "served"),
        "{:?}",
        fetched()
    );
    let outcome = finish(
        docker
            .beside("busybox")
            .args(["wget", "-q", "-O", "-", &url])
            .spawn()
            .expect("busybox"),
    );
    assert_eq!(outcome.text(), "served", "from the host: {outcome:?}");
    docker.ok(&["rm", "--force", "server"]);
}

fn redis_serves(docker: &Docker) {
    docker.ok(&["run", "--detach", "--name", "cache", "--network", "none", "redis"]);
    let ping = || docker.run(&["exec", "cache", "redis-cli", "ping"]).text();
    assert!(
        eventually(PATIENCE, || ping() == "PONG"),
        "{}",
        docker.ok(&["logs", "cache"])
    );
    assert_eq!(
        docker.ok(&["exec", "cache", "redis-cli", "set", "answer", "42"]),
        "OK"
    );
    let measured = docker.ok(&[
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
    docker.ok(&["stop", "--time", "100", "cache"]);
    assert_eq!(
        docker.ok(&["inspect", "--format", "{{.State.ExitCode}}", "cache"]),
        "0"
    );
}
