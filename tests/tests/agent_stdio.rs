//! What goes through a container's streams arrives, all of it, in order, and apart; and how its end is told.

use std::io::{Read as _, Write as _};
use std::process::Stdio;

use hull_tests::hull::Hull;
use sha2::{Digest as _, Sha256};

/// Bytes that repeat only after 4 GiB.
fn block(index: u64) -> Vec<u8> {
    (0..1 << 17)
        .flat_map(|word: u64| {
            (index << 32 | word)
                .wrapping_mul(0x9e37_79b9_7f4a_7c15)
                .to_le_bytes()
        })
        .collect()
}

const GIB_IN_BLOCKS: u64 = 1024;

fn hex(digest: impl IntoIterator<Item = u8>) -> String {
    digest.into_iter().map(|byte| format!("{byte:02x}")).collect()
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
        .unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let mut digest = Sha256::new();
    for index in 0..GIB_IN_BLOCKS {
        let block = block(index);
        digest.update(&block);
        stdin.write_all(&block).unwrap();
    }
    drop(stdin);
    let outcome = hull_tests::hull::finish(child);
    assert!(outcome.text().starts_with(&hex(digest.finalize())), "{outcome:?}");
}

#[test]
fn gigabyte_comes_back_intact_through_stdout_while_stderr_talks() {
    let Some(hull) = Hull::with_images(&["busybox"]) else {
        return;
    };
    let script =
        "i=0; (while [ $i -lt 300 ]; do echo line $i >&2; i=$((i+1)); done) & cat; wait; echo end >&2";
    let mut child = hull
        .command(&["run", "--rm", "-i", "busybox", "/bin/sh", "-c", script])
        .stdin(Stdio::piped())
        .spawn()
        .unwrap();
    let (mut stdin, mut stdout) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
    let writer = std::thread::spawn(move || {
        let mut digest = Sha256::new();
        for index in 0..GIB_IN_BLOCKS {
            let block = block(index);
            digest.update(&block);
            stdin.write_all(&block).unwrap();
        }
        hex(digest.finalize())
    });
    let (mut digest, mut buffer) = (Sha256::new(), vec![0; 1 << 20]);
    loop {
        let length = stdout.read(&mut buffer).unwrap();
        if length == 0 {
            break;
        }
        digest.update(&buffer[..length]);
    }
    assert_eq!(hex(digest.finalize()), writer.join().unwrap());
    let outcome = hull_tests::hull::finish(child);
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
