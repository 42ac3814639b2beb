//! An interactive container on a real terminal: it has to feel native.

use hull_tests::hull::{Hull, PATIENCE, eventually};
use hull_tests::pty::Terminal;
use sha2::{Digest, Sha256};

/// A prompt that can't be mistaken for anything that is typed.
const PROMPT: &str = "ready> ";

fn shell(hull: &Hull, options: &[&str]) -> Terminal {
    let prompt = format!("PS1={PROMPT}");
    let mut arguments = vec!["run", "-it", "-e", &prompt];
    arguments.extend(options);
    arguments.extend(["busybox", "sh"]);
    let mut terminal = Terminal::spawn(&hull.command(&arguments));
    terminal.expect(PROMPT);
    terminal
}

/// Types a line and waits until the shell asks for the next one.
fn type_line(terminal: &mut Terminal, line: &str) {
    terminal.send(format!("{line}\r"));
    terminal.expect("\r\n");
}

#[test]
fn line_is_edited_with_the_arrow_keys_and_history_comes_back() {
    let Some(hull) = Hull::with_images(&["busybox"]) else {
        return;
    };
    let mut terminal = shell(&hull, &["--rm"]);
    // "ac", one to the left, "b".
    terminal.send("echo ac\x1b[Db\r");
    terminal.expect("\r\nabc\r\n");
    terminal.expect(PROMPT);
    // Up: the line again.
    terminal.send("\x1b[A\r");
    terminal.expect("\r\nabc\r\n");
    terminal.expect(PROMPT);
    // Backspace.
    terminal.send("echo xz\x7fy\r");
    terminal.expect("\r\nxy\r\n");
    terminal.expect(PROMPT);
    terminal.send("exit 3\r");
    assert_eq!(terminal.wait().code(), Some(3), "{}", terminal.screen());
    assert_eq!(hull.settle(), Vec::<String>::new());
}

#[test]
fn colours_arrive_and_the_terminal_is_named() {
    let Some(hull) = Hull::with_images(&["busybox"]) else {
        return;
    };
    let mut terminal = shell(&hull, &["--rm"]);
    terminal.send("printf '\\033[31m%s\\033[0m\\n' red; echo term=$TERM; tty\r");
    terminal.expect("\x1b[31mred\x1b[0m\r\n");
    terminal.expect("term=xterm");
    terminal.expect("/dev/pts/0\r\n");
    terminal.expect(PROMPT);
    terminal.send("\x04");
    assert_eq!(terminal.wait().code(), Some(0), "{}", terminal.screen());
}

#[test]
fn control_c_ends_the_command_and_not_the_shell() {
    let Some(hull) = Hull::with_images(&["busybox"]) else {
        return;
    };
    let mut terminal = shell(&hull, &["--rm"]);
    // Said by the command itself: a key that comes while the shell is still starting it is the shell's.
    terminal.send("sh -c 'echo go; exec sleep 1000'\r");
    terminal.expect("\r\ngo\r\n");
    terminal.send("\x03");
    terminal.expect(PROMPT);
    terminal.send("echo still $((1 + 1))\r");
    terminal.expect("\r\nstill 2\r\n");
    terminal.send("exit\r");
    terminal.wait();
}

#[test]
fn control_z_suspends_the_command_and_fg_resumes_it() {
    let Some(hull) = Hull::with_images(&["busybox"]) else {
        return;
    };
    let mut terminal = shell(&hull, &["--rm"]);
    // What is typed before the shell has given the terminal back to line mode is not a line.
    terminal.send("echo go; cat\r");
    terminal.expect("\r\ngo\r\n");
    terminal.send("one\r");
    terminal.expect("one\r\none\r\n");
    terminal.send("\x1a");
    terminal.expect("Stopped");
    terminal.expect(PROMPT);
    terminal.send("echo on; fg\r");
    terminal.expect("\r\non\r\n");
    // The shell names what it resumes.
    terminal.expect("cat\r\n");
    terminal.send("two\r");
    terminal.expect("two\r\ntwo\r\n");
    terminal.send("\x04");
    terminal.expect(PROMPT);
    terminal.send("exit\r");
    assert_eq!(terminal.wait().code(), Some(0), "{}", terminal.screen());
}

#[test]
fn detaching_leaves_the_container_running_and_attaching_goes_on() {
    let Some(hull) = Hull::with_images(&["busybox"]) else {
        return;
    };
    let mut terminal = shell(&hull, &["--name", "detached"]);
    terminal.send("variable=kept\r");
    terminal.expect(PROMPT);
    terminal.send("\x10\x11");
    assert_eq!(terminal.wait().code(), Some(0), "{}", terminal.screen());
    assert!(terminal.is_cooked(), "raw mode was left on");
    let status = hull.run(&["inspect", "-f", "{{.State.Status}}", "detached"]);
    assert_eq!(status.text(), "running");

    let mut terminal = Terminal::spawn(&hull.command(&["attach", "detached"]));
    terminal.send("\r");
    terminal.expect(PROMPT);
    terminal.send("echo variable=$variable\r");
    terminal.expect("\r\nvariable=kept\r\n");
    terminal.send("exit 5\r");
    assert_eq!(terminal.wait().code(), Some(5), "{}", terminal.screen());
    assert_eq!(hull.run(&["rm", "detached"]).code(), 0);
    assert_eq!(hull.settle(), Vec::<String>::new());
}

#[test]
fn size_of_the_terminal_is_the_containers_from_the_start_and_when_it_changes() {
    let Some(hull) = Hull::with_images(&["busybox"]) else {
        return;
    };
    let mut terminal = shell(&hull, &["--rm"]);
    terminal.send("stty size\r");
    terminal.expect("\r\n24 80\r\n");
    terminal.expect(PROMPT);
    terminal.resize(50, 132);
    // The change travels beside the keys: asked until it has arrived.
    let mut asked = 0;
    assert!(
        eventually(PATIENCE, || {
            asked += 1;
            terminal.send(format!("stty size; echo asked {asked}\r"));
            terminal.expect(&format!("\r\nasked {asked}\r\n"));
            terminal.screen().contains("\r\n50 132\r\n")
        }),
        "{}",
        terminal.screen()
    );
    terminal.send("exit\r");
    terminal.wait();
}

#[test]
fn paste_of_64_kib_arrives_intact() {
    let Some(hull) = Hull::with_images(&["busybox"]) else {
        return;
    };
    let mut terminal = shell(&hull, &["--rm"]);
    // Lines as long as people paste them; a terminal in line mode takes no more than 4095 bytes at a time.
    let text: String = (0..1024)
        .map(|line| format!("{line:08}{:x<55}\n", line % 7))
        .collect();
    assert_eq!(text.len(), 64 << 10);
    terminal.send("stty -echo; echo go; cat > /tmp/paste; echo end; sha256sum < /tmp/paste\r");
    terminal.expect("\r\ngo\r\n");
    terminal.send(text.replace('\n', "\r"));
    terminal.send("\x04");
    terminal.expect("end\r\n");
    let digest = Sha256::digest(text.as_bytes());
    let hex: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
    terminal.expect(&hex);
    terminal.send("exit\r");
    terminal.wait();
}

#[test]
fn terminal_is_as_it_was_when_the_container_has_ended() {
    let Some(hull) = Hull::with_images(&["busybox"]) else {
        return;
    };
    let mut terminal = shell(&hull, &["--rm"]);
    assert!(!terminal.is_cooked(), "keys don't reach the container one by one");
    terminal.send("exit\r");
    terminal.wait();
    assert!(terminal.is_cooked(), "raw mode was left on");

    // A command that isn't there must not leave it on either.
    let mut terminal = Terminal::spawn(&hull.command(&["run", "--rm", "-it", "busybox", "/nothing"]));
    assert_eq!(terminal.wait().code(), Some(127), "{}", terminal.screen());
    assert!(terminal.is_cooked(), "raw mode was left on");
}

#[test]
fn exec_has_a_terminal_of_its_own() {
    let Some(hull) = Hull::with_images(&["busybox"]) else {
        return;
    };
    let started = hull.run(&["run", "-d", "--rm", "--name", "host", "busybox", "sleep", "1000"]);
    assert_eq!(started.code(), 0, "{started:?}");
    let command = hull.command(&["exec", "-it", "-e", "PS1=ready> ", "host", "sh"]);
    let mut terminal = Terminal::spawn(&command);
    terminal.expect(PROMPT);
    terminal.send("stty size; tty\r");
    terminal.expect("\r\n24 80\r\n");
    terminal.expect("/dev/pts/");
    terminal.expect(PROMPT);
    type_line(&mut terminal, "exit 4");
    assert_eq!(terminal.wait().code(), Some(4), "{}", terminal.screen());
    assert!(terminal.is_cooked(), "raw mode was left on");
    assert_eq!(hull.run(&["rm", "-f", "host"]).code(), 0);
    assert_eq!(hull.settle(), Vec::<String>::new());
}

#[test]
fn live_view_shows_microvms_and_leaves_the_terminal_as_it_was() {
    let Some(hull) = Hull::with_images(&["busybox"]) else {
        return;
    };
    let started = hull.run(&["run", "-d", "--rm", "--name", "seen", "busybox", "sleep", "1000"]);
    assert_eq!(started.code(), 0, "{started:?}");
    let mut terminal = Terminal::spawn(&hull.command(&["top"]));
    // The alternate screen, then the container's line.
    terminal.expect("\x1b[?1049h");
    terminal.expect("seen");
    assert!(!terminal.is_cooked(), "keys would wait for the end of a line");
    terminal.resize(10, 20);
    terminal.send("mrq");
    assert_eq!(terminal.wait().code(), Some(0), "{}", terminal.screen());
    terminal.expect("\x1b[?1049l");
    assert!(terminal.is_cooked(), "raw mode was left on");
    assert_eq!(hull.run(&["rm", "-f", "seen"]).code(), 0);
    assert_eq!(hull.settle(), Vec::<String>::new());
}
