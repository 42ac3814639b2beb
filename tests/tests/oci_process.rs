//! What stands for a container on the host: its process, its streams, its terminal, and further processes in it.

use std::fs::{self, File};
use std::io::{IoSliceMut, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::ExitStatusExt;
use std::process::Stdio;

use hull_tests::hull::finish;
use hull_tests::oci::{OciBundle, Runtime, hull_oci, reap};
use nix::sys::signal::{Signal, kill};
use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};
use nix::unistd::Pid;
use rustix::termios::{Winsize, tcsetwinsize};
use serde_json::json;

const WAITS: &str =
    "trap 'echo got; exit 3' TERM; trap 'echo usr' USR1; echo ready; while :; do sleep 0.1; done";

#[test]
fn process_of_the_pid_file_takes_signals_and_ends_as_the_container_does() {
    let Some(hull) = hull_oci() else { return };
    let bundle = OciBundle::script(WAITS);
    let pid = hull.start_new(&bundle, "web");
    hull.expect_output("web", "ready");
    kill(Pid::from_raw(pid), Signal::SIGUSR1).expect("it is there");
    hull.expect_output("web", "usr");
    kill(Pid::from_raw(pid), Signal::SIGTERM).expect("it is there");
    assert_eq!(reap(pid).code(), Some(3));
    assert!(hull.output("web").ends_with("got\n"));
    assert_eq!(hull.status("web"), "stopped");
    hull.ok(&["delete", "web"]);
    // Ended by a signal that nobody caught.
    let bundle = OciBundle::script("echo ready; exec sleep 1000");
    let pid = hull.start_new(&bundle, "web");
    hull.expect_output("web", "ready");
    hull.ok(&["kill", "web", "SIGKILL"]);
    assert_eq!(reap(pid).signal(), Some(9));
    hull.ok(&["delete", "web"]);
    // Who kills the process ends the container.
    let bundle = OciBundle::script(WAITS);
    let pid = hull.start_new(&bundle, "web");
    hull.expect_output("web", "ready");
    kill(Pid::from_raw(pid), Signal::SIGKILL).expect("it is there");
    assert_eq!(reap(pid).signal(), Some(9));
    assert_eq!(hull.status("web"), "stopped");
    hull.ok(&["delete", "web"]);
    assert_eq!(hull.leftovers(), Vec::<String>::new());
}

#[test]
fn real_time_signal_reaches_the_container() {
    let Some(hull) = hull_oci() else { return };
    let script = "trap 'echo real; exit 0' 37; echo ready; while :; do sleep 0.1; done";
    let bundle = OciBundle::script(script);
    let pid = hull.start_new(&bundle, "web");
    hull.expect_output("web", "ready");
    hull.ok(&["kill", "web", "RTMIN+3"]);
    assert_eq!(reap(pid).code(), Some(0));
    assert_eq!(hull.output("web"), "ready\nreal\n");
    hull.ok(&["delete", "web"]);
}

#[test]
fn created_container_is_ended_by_a_signal() {
    let Some(hull) = hull_oci() else { return };
    let bundle = OciBundle::script("true");
    for signal in ["KILL", "TERM"] {
        let pid = hull.create(&bundle, "web");
        hull.ok(&["kill", "web", signal]);
        assert!(reap(pid).signal().is_some());
        assert_eq!(hull.status("web"), "stopped");
        hull.ok(&["delete", "web"]);
    }
    assert_eq!(hull.leftovers(), Vec::<String>::new());
}

#[test]
fn bytes_go_in_and_come_out_whole_and_apart() {
    let Some(hull) = hull_oci() else { return };
    let bundle = OciBundle::script("cat; echo done >&2");
    let bytes: Vec<u8> = (0..3_000_000_u32).flat_map(|i| i.to_le_bytes()).collect();
    let mut child = hull
        .command(&["run", "--bundle", bundle.text(), "pipe"])
        .stdin(Stdio::piped())
        .spawn()
        .expect("it starts");
    let mut stdin = child.stdin.take().expect("piped");
    let input = bytes.clone();
    let writer = std::thread::spawn(move || stdin.write_all(&input).expect("it reads"));
    let outcome = finish(child);
    writer.join().expect("the writer does not panic");
    assert_eq!((outcome.code(), outcome.stderr.as_str()), (0, "done\n"));
    assert!(
        outcome.stdout == bytes,
        "{} of {} bytes",
        outcome.stdout.len(),
        bytes.len()
    );
}

/// The master of a terminal, as the runtime sends it.
fn receive_master(socket: &UnixStream) -> File {
    let mut buffer = [0; 64];
    let mut space = nix::cmsg_space!([i32; 1]);
    let mut slices = [IoSliceMut::new(&mut buffer)];
    let received = recvmsg::<()>(
        socket.as_raw_fd(),
        &mut slices,
        Some(&mut space),
        MsgFlags::empty(),
    )
    .expect("a message");
    let fd = received
        .cmsgs()
        .expect("whole")
        .find_map(|message| match message {
            ControlMessageOwned::ScmRights(fds) => fds.first().copied(),
            _ => None,
        });
    // The kernel has just made it for this process.
    #[expect(unsafe_code, reason = "takes a descriptor over that came with a message")]
    // SAFETY: nobody else has this descriptor.
    let fd = unsafe { OwnedFd::from_raw_fd(fd.expect("a descriptor")) };
    File::from(fd)
}

/// Reads until a text has come.
fn expect(master: &mut File, text: &str) -> String {
    let mut seen = String::new();
    let mut buffer = [0; 1024];
    while !seen.contains(text) {
        let length = master.read(&mut buffer).unwrap_or(0);
        assert!(length > 0, "{text:?} was not printed: {seen:?}");
        seen.push_str(&String::from_utf8_lossy(&buffer[..length]));
    }
    seen
}

fn resize(master: &File, rows: u16, columns: u16) {
    let size = Winsize {
        ws_row: rows,
        ws_col: columns,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    tcsetwinsize(master, size).expect("a terminal has a size");
}

/// Starts something with a terminal that goes to a console socket.
fn with_console(hull: &Runtime, id: &str, arguments: &[&str]) -> File {
    let path = hull.dir().join("console.sock");
    drop(fs::remove_file(&path));
    let listener = UnixListener::bind(&path).expect("a socket");
    let mut all = vec![arguments[0], "--console-socket", path.to_str().expect("text")];
    all.extend(&arguments[1..]);
    let outcome = hull.with_output(id, &all);
    assert!(outcome.status.success(), "{outcome:?}");
    let (socket, _) = listener.accept().expect("the runtime has connected");
    receive_master(&socket)
}

#[test]
fn terminal_goes_to_the_console_socket_and_is_one() {
    let Some(hull) = hull_oci() else { return };
    let script = "trap 'stty size' WINCH; echo size $(stty size); while :; do read line && echo said $line; [ x$line != xquit ] || exit 0; done";
    let bundle = OciBundle::script(script);
    bundle.configure(|config| config["process"]["terminal"] = json!(true));
    let mut master = with_console(&hull, "tty", &["create", "--bundle", bundle.text(), "tty"]);
    resize(&master, 33, 44);
    hull.ok(&["start", "tty"]);
    expect(&mut master, "size 33 44");
    master.write_all(b"hello\n").expect("it reads");
    // The guest's terminal echoes, the host's doesn't: once.
    let seen = expect(&mut master, "said hello\r\n");
    assert_eq!(seen.matches("hello").count(), 2, "{seen:?}");
    resize(&master, 50, 60);
    expect(&mut master, "50 60");
    // Its keys are its own.
    let mut exec = with_console(
        &hull,
        "exec",
        &[
            "exec",
            "--tty",
            "--detach",
            "tty",
            "sh",
            "-c",
            "stty size; exec cat",
        ],
    );
    exec.write_all(b"\x03").expect("it reads");
    master.write_all(b"quit\n").expect("it reads");
    hull.expect_stopped("tty");
    hull.ok(&["delete", "tty"]);
    assert_eq!(hull.leftovers(), Vec::<String>::new());
}

#[test]
fn closed_terminal_hangs_up() {
    let Some(hull) = hull_oci() else { return };
    let bundle = OciBundle::script("trap 'exit 4' HUP; echo ready; while :; do sleep 0.1; done");
    bundle.configure(|config| config["process"]["terminal"] = json!(true));
    let mut master = with_console(&hull, "tty", &["create", "--bundle", bundle.text(), "tty"]);
    let pid = hull.state("tty")["pid"].as_i64().expect("a number");
    hull.ok(&["start", "tty"]);
    expect(&mut master, "ready");
    drop(master);
    assert_eq!(reap(i32::try_from(pid).expect("small")).code(), Some(4));
    hull.ok(&["delete", "tty"]);
}

#[test]
fn exec_is_what_it_is_asked_to_be() {
    let Some(hull) = hull_oci() else { return };
    let bundle = OciBundle::script(WAITS);
    hull.start_new(&bundle, "web");
    hull.expect_output("web", "ready");
    let exec = |arguments: &[&str]| {
        let mut all = vec!["exec"];
        all.extend(arguments);
        let outcome = hull.run(&all);
        assert_eq!(outcome.stderr, "", "{arguments:?}");
        outcome
    };
    assert_eq!(exec(&["--user", "7:8", "web", "id", "-u"]).text(), "7");
    assert_eq!(exec(&["--user", "7:8", "web", "id", "-g"]).text(), "8");
    assert_eq!(exec(&["--cwd", "/tmp", "web", "pwd"]).text(), "/tmp");
    assert_eq!(
        exec(&["--env", "A=b c", "web", "sh", "-c", "echo $A"]).text(),
        "b c"
    );
    assert_eq!(exec(&["web", "sh", "-c", "exit 42"]).code(), 42);
    assert_eq!(exec(&["web", "sh", "-c", "kill -9 $$"]).code(), 137);
    let process = hull.dir().join("process.json");
    let text = json!({ "args": ["sh", "-c", "echo $WORD; exit 5"], "cwd": "/", "env": ["WORD=x", "PATH=/bin"],
        "user": { "uid": 0, "gid": 0 } });
    fs::write(&process, text.to_string()).expect("a file");
    let outcome = exec(&["--process", process.to_str().expect("text"), "web"]);
    assert_eq!((outcome.code(), outcome.text().as_str()), (5, "x"), "{outcome:?}");
    // With an input, which ends.
    let mut child = hull
        .command(&["exec", "web", "wc", "-c"])
        .stdin(Stdio::piped())
        .spawn()
        .expect("it starts");
    child
        .stdin
        .take()
        .expect("piped")
        .write_all(&[b'x'; 100_000])
        .expect("it reads");
    assert_eq!(finish(child).text(), "100000");
    hull.ok(&["delete", "--force", "web"]);
    assert_eq!(hull.leftovers(), Vec::<String>::new());
}

#[test]
fn detached_exec_has_a_process_that_ends_as_it_does() {
    let Some(hull) = hull_oci() else { return };
    let bundle = OciBundle::script(WAITS);
    hull.start_new(&bundle, "web");
    hull.expect_output("web", "ready");
    let file = hull.dir().join("exec.pid");
    let start = |script: &str| {
        let pid_file = file.to_str().expect("text");
        let outcome = hull.with_output(
            "exec",
            &[
                "exec",
                "--detach",
                "--pid-file",
                pid_file,
                "web",
                "sh",
                "-c",
                script,
            ],
        );
        assert!(outcome.status.success(), "{outcome:?}");
        let pid = fs::read_to_string(&file).expect("a pid file");
        pid.parse::<i32>().expect("a number")
    };
    assert_eq!(reap(start("exit 6")).code(), Some(6));
    let pid = start("trap 'echo caught; exit 9' TERM; echo up; while :; do sleep 0.1; done");
    hull.expect_output("exec", "up");
    kill(Pid::from_raw(pid), Signal::SIGTERM).expect("it is there");
    assert_eq!(reap(pid).code(), Some(9));
    assert_eq!(hull.output("exec"), "up\ncaught\n");
    // It ends with its container.
    let pid = start("echo up; exec sleep 1000");
    hull.expect_output("exec", "up");
    hull.ok(&["kill", "web", "KILL"]);
    assert_eq!(reap(pid).signal(), Some(9));
    hull.expect_stopped("web");
    hull.ok(&["delete", "web"]);
    assert_eq!(hull.leftovers(), Vec::<String>::new());
}

#[test]
fn hundreds_of_execs_at_once_each_get_their_own() {
    let Some(hull) = hull_oci() else { return };
    let bundle = OciBundle::script(WAITS);
    hull.start_new(&bundle, "web");
    hull.expect_output("web", "ready");
    let mut running: Vec<_> = (0..200)
        .map(|number| {
            let script = format!("echo {number}; cat; exit {number}");
            hull.command(&["exec", "web", "sh", "-c", &script])
                .stdin(Stdio::piped())
                .spawn()
                .expect("it starts")
        })
        .collect();
    // None gets its input before all have begun.
    for (number, child) in running.iter_mut().enumerate() {
        let expected = format!("{number}\n");
        let mut said = vec![0; expected.len()];
        let stdout = child.stdout.as_mut().expect("piped");
        stdout.read_exact(&mut said).expect("the command speaks");
        assert_eq!(String::from_utf8_lossy(&said), expected);
    }
    for (number, child) in running.iter_mut().enumerate() {
        let mut stdin = child.stdin.take().expect("piped");
        writeln!(stdin, "in {number}").expect("it reads");
    }
    for (number, child) in (0..).zip(running) {
        let outcome = finish(child);
        assert_eq!((outcome.code(), outcome.text()), (number, format!("in {number}")));
    }
    assert_eq!(hull.status("web"), "running");
    hull.ok(&["delete", "--force", "web"]);
    assert_eq!(hull.leftovers(), Vec::<String>::new());
}
