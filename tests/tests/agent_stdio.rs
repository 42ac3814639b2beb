//! What goes through a container's streams arrives, all of it, in order, and apart; and how its end is told.

use std::io::{Read as _, Write};
use std::process::{Child, Command, Stdio};

use hull_tests::hull::Hull;

const BLOCK_BYTES: usize = 1 << 20;
const GIB_IN_BLOCKS: u64 = 1024;

/// Writes a GiB no two pages of which are alike to all of the writers; an error if one of them ends early.
fn write_gigabyte(writers: &mut [&mut dyn Write]) -> std::io::Result<()> {
    let mut block: Vec<u8> = (0..BLOCK_BYTES)
        .map(|at| u8::try_from(at * 7 % 251).expect("as this test set it up"))
        .collect();
    for index in 0..GIB_IN_BLOCKS {
        for (page, bytes) in (0_u64..).zip(block.chunks_mut(4096)) {
            bytes[..8].copy_from_slice(&(index << 32 | page).to_le_bytes());
        }
        for writer in &mut *writers {
            writer.write_all(&block)?;
        }
    }
    Ok(())
}

/// This host's program, because a digest in an unoptimised test takes minutes.
fn digester() -> Child {
    Command::new("sha256sum")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("as this test set it up")
}

fn digest(mut digester: Child) -> String {
    drop(digester.stdin.take());
    String::from_utf8(
        digester
            .wait_with_output()
            .expect("as this test set it up")
            .stdout,
    )
    .expect("as this test set it up")
}

#[test]
fn gigabyte_arrives_intact_through_stdin() {
    let Some(hull) = Hull::with_images(&["busybox"]) else {
        return;
    };
    let mut child = hull
        .command(&["run", "--rm", "-i", "busybox", "sha256sum"])
        .stdin(Stdio::piped())
        .spawn()
        .expect("as this test set it up");
    let mut here = digester();
    let written = write_gigabyte(&mut [
        &mut child.stdin.take().expect("as this test set it up"),
        here.stdin.as_mut().expect("as this test set it up"),
    ]);
    let outcome = hull_tests::hull::finish(child);
    written.unwrap_or_else(|error| panic!("{error}: {outcome:?}"));
    assert_eq!(outcome.text().trim_end(), digest(here).trim_end(), "{outcome:?}");
}

#[test]
fn gigabyte_comes_back_intact_through_stdout_while_stderr_talks() {
    let Some(hull) = Hull::with_images(&["busybox"]) else {
        return;
    };
    let script =
        "i=0; (while [ $i -lt 300 ]; do echo line $i >&2; i=$((i+1)); done) & cat <&3; wait; echo end >&2";
    let script = format!("exec 3<&0; {script}");
    let mut child = hull
        .command(&["run", "--rm", "-i", "busybox", "/bin/sh", "-c", &script])
        .stdin(Stdio::piped())
        .spawn()
        .expect("as this test set it up");
    let (mut stdin, mut stdout) = (
        child.stdin.take().expect("as this test set it up"),
        child.stdout.take().expect("as this test set it up"),
    );
    let writer = std::thread::spawn(move || {
        let mut sent = digester();
        let written = write_gigabyte(&mut [&mut stdin, sent.stdin.as_mut().expect("as this test set it up")]);
        drop(stdin);
        written.map(|()| digest(sent))
    });
    let mut received = digester();
    let mut buffer = vec![0; BLOCK_BYTES];
    loop {
        let length = stdout.read(&mut buffer).expect("as this test set it up");
        if length == 0 {
            break;
        }
        received
            .stdin
            .as_mut()
            .expect("as this test set it up")
            .write_all(&buffer[..length])
            .expect("as this test set it up");
    }
    let outcome = hull_tests::hull::finish(child);
    let sent = writer.join().expect("as this test set it up");
    let sent = sent.unwrap_or_else(|error| panic!("{error}: {outcome:?}"));
    assert_eq!(digest(received), sent, "{outcome:?}");
    let lines: Vec<&str> = outcome.stderr.lines().collect();
    assert_eq!((lines.len(), lines[0], lines[300]), (301, "line 0", "end"));
}

#[test]
fn output_of_a_process_that_ends_at_once_is_complete() {
    let Some(hull) = Hull::with_images(&["busybox"]) else {
        return;
    };
    assert_eq!(
        hull.run(&["run", "-d", "--name", "c", "busybox", "sleep", "1000"])
            .code(),
        0
    );
    for _ in 0..20 {
        let outcome = hull.run(&[
            "exec",
            "c",
            "/bin/sh",
            "-c",
            "head -c 300000 /dev/zero; head -c 5000 /dev/zero >&2; exit 3",
        ]);
        assert_eq!(
            (outcome.code(), outcome.stdout.len(), outcome.stderr.len()),
            (3, 300_000, 5000)
        );
    }
    assert_eq!(hull.run(&["rm", "-f", "c"]).code(), 0);
    assert_eq!(hull.settle(), Vec::<String>::new());
}

#[test]
fn end_of_stdin_is_seen_while_output_goes_on() {
    let Some(hull) = Hull::with_images(&["busybox"]) else {
        return;
    };
    let script = "cat > /dev/null; echo closed; sleep 1; echo later";
    let outcome = hull.run_with_input(
        &["run", "--rm", "-i", "busybox", "/bin/sh", "-c", script],
        b"x".to_vec(),
    );
    assert_eq!(outcome.text(), "closed\nlater", "{outcome:?}");
}

#[test]
fn want_of_memory_is_told_as_such() {
    let Some(hull) = Hull::with_images(&["busybox"]) else {
        return;
    };
    let outcome = hull.run(&[
        "run",
        "--name",
        "hungry",
        "-m",
        "128m",
        "busybox",
        "/bin/sh",
        "-c",
        "exec tail /dev/zero",
    ]);
    assert_eq!(outcome.code(), 137, "{outcome:?}");
    assert!(outcome.stderr.contains("memory"), "{outcome:?}");
    let inspect = hull.run(&["inspect", "hungry"]);
    assert!(inspect.text().contains("\"OOMKilled\": true"), "{inspect:?}");
    assert_eq!(hull.run(&["rm", "hungry"]).code(), 0);
}
