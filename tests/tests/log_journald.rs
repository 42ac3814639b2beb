//! `--log-driver journald`: what a container prints arrives in the journal as docker's driver would put it there.
//!
//! The journal is a socket of the test's own, in a mount namespace of its own; so the real one is left alone, and needn't exist.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::net::UnixDatagram;

use hull_tests::hull::{Hull, PATIENCE};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};

/// A `/run` of its own for this thread and what it starts.
fn own_run() {
    let none: Option<&str> = None;
    unshare(CloneFlags::CLONE_NEWNS).expect("a mount namespace");
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).expect("private mounts");
    mount(Some("tmpfs"), "/run", Some("tmpfs"), MsFlags::empty(), none).expect("tmpfs");
}

/// An entry's fields, none of which has a line break in it here.
fn fields(datagram: &[u8]) -> BTreeMap<String, String> {
    let text = String::from_utf8_lossy(datagram).into_owned();
    text.lines()
        .filter_map(|line| line.split_once('='))
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .collect()
}

#[test]
fn output_arrives_in_the_journal_with_dockers_fields() {
    if !nix::unistd::geteuid().is_root() {
        eprintln!("skipped: a /run of one's own needs root");
        return;
    }
    let Some(hull) = Hull::with_images(&["busybox"]) else {
        return;
    };
    own_run();
    let arguments = |name: &'static str| {
        [
            "run",
            "--name",
            name,
            "--log-driver",
            "journald",
            "--log-opt",
            "tag=chosen",
            "busybox",
            "sh",
            "-c",
            "echo to the journal; echo trouble >&2; printf unfinished",
        ]
    };
    // Without a journal nothing is started, as with docker, and what is missing is named.
    let unheard = hull.run(&arguments("unheard"));
    assert_eq!(
        (unheard.code(), unheard.stderr.lines().count()),
        (125, 1),
        "{unheard:?}"
    );
    assert!(
        unheard.stderr.contains("/run/systemd/journal/socket"),
        "{unheard:?}"
    );

    fs::create_dir_all("/run/systemd/journal").expect("our own /run");
    let journal = UnixDatagram::bind("/run/systemd/journal/socket").expect("our own /run");
    journal
        .set_read_timeout(Some(PATIENCE))
        .expect("a socket of ours");
    let heard = hull.run(&arguments("heard"));
    assert_eq!(
        (heard.code(), heard.stderr.as_str()),
        (0, "trouble\n"),
        "{heard:?}"
    );
    let mut buffer = vec![0; 64 << 10];
    let mut entries = BTreeMap::new();
    for _ in 0..3 {
        let length = journal.recv(&mut buffer).expect("an entry of three");
        let entry = fields(&buffer[..length]);
        entries.insert(entry["MESSAGE"].clone(), entry);
    }
    let id = hull
        .run(&["ps", "-aq", "--no-trunc", "--filter", "name=heard"])
        .text();
    let id = id.lines().next().expect("the newest first");
    for (message, priority, partial) in [
        ("to the journal", "6", None),
        ("trouble", "3", None),
        ("unfinished", "6", Some("true")),
    ] {
        let entry = &entries[message];
        let field = |name: &str| entry.get(name).map(String::as_str);
        assert_eq!(field("PRIORITY"), Some(priority), "{entry:?}");
        assert_eq!(field("CONTAINER_PARTIAL_MESSAGE"), partial, "{entry:?}");
        assert_eq!(field("CONTAINER_NAME"), Some("heard"), "{entry:?}");
        assert_eq!(field("CONTAINER_ID_FULL"), Some(id), "{entry:?}");
        assert_eq!(field("CONTAINER_TAG"), Some("chosen"), "{entry:?}");
    }
    let logs = hull.run(&["logs", "heard"]);
    assert_eq!(logs.code(), 1, "{logs:?}");
    assert!(logs.stderr.contains("journalctl"), "{logs:?}");
    assert_eq!(hull.settle(), Vec::<String>::new());
}
