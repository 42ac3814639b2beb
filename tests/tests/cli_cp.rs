//! `hull cp`: files go in and out by docker's rules, and never anywhere else.

use std::fs;
use std::os::unix::fs::{MetadataExt, symlink};

use hull_tests::hull::{Hull, Outcome};

struct World {
    hull: Hull,
    here: tempfile::TempDir,
}

impl World {
    fn new(script: &str) -> Option<Self> {
        let hull = Hull::with_images(&["busybox"])?;
        let script = format!("{script}; touch /ready; sleep 1000");
        let started = hull.run(&[
            "run", "-d", "--rm", "--name", "box", "busybox", "sh", "-c", &script,
        ]);
        assert_eq!(started.code(), 0, "{started:?}");
        let waiting = "until [ -e /ready ]; do sleep 0.05; done";
        assert_eq!(hull.run(&["exec", "box", "sh", "-c", waiting]).code(), 0);
        let here = tempfile::tempdir().expect("a temporary folder");
        Some(Self { hull, here })
    }

    fn path(&self, name: &str) -> String {
        self.here.path().join(name).display().to_string()
    }

    fn cp(&self, from: &str, to: &str) -> Outcome {
        self.hull.run(&["cp", from, to])
    }

    fn inside(&self, script: &str) -> String {
        let outcome = self.hull.run(&["exec", "box", "sh", "-c", script]);
        assert_eq!(outcome.code(), 0, "{outcome:?}");
        outcome.text()
    }

    fn end(self) {
        assert_eq!(self.hull.run(&["rm", "-f", "box"]).code(), 0);
        assert_eq!(self.hull.settle(), Vec::<String>::new());
    }
}

#[test]
fn tree_goes_in_and_comes_out_as_it_was() {
    let Some(world) = World::new("true") else { return };
    let source = world.here.path().join("tree");
    fs::create_dir_all(source.join("deep/er")).unwrap();
    // A period that is no power of two shows lost, doubled or swapped blocks.
    let bytes: Vec<u8> = (0..20_u32 << 20).map(|i| (i % 251).to_le_bytes()[0]).collect();
    fs::write(source.join("large"), &bytes).unwrap();
    fs::write(source.join("deep/er/file"), "text").unwrap();
    symlink("large", source.join("link")).unwrap();

    assert_eq!(world.cp(&world.path("tree"), "box:/tmp").code(), 0);
    assert_eq!(
        world.inside("cat /tmp/tree/deep/er/file; readlink /tmp/tree/link"),
        "textlarge"
    );
    assert_eq!(world.inside("stat -c %u:%g /tmp/tree/large"), "0:0");
    assert_eq!(world.cp("box:/tmp/tree", &world.path("back")).code(), 0);
    let back = world.here.path().join("back");
    assert!(fs::read(back.join("large")).unwrap() == bytes, "the bytes differ");
    assert_eq!(fs::read_to_string(back.join("deep/er/file")).unwrap(), "text");
    assert_eq!(fs::read_link(back.join("link")).unwrap().to_str(), Some("large"));
    world.end();
}

#[test]
fn destination_is_what_docker_makes_of_it() {
    let Some(world) =
        World::new("mkdir -p /data/sub; echo f > /data/f; echo g > /data/sub/g; ln -s f /data/l")
    else {
        return;
    };
    let read = |name: &str| fs::read_to_string(world.here.path().join(name)).unwrap_or_default();
    // Into a directory, to a new name, over a file.
    assert_eq!(world.cp("box:/data", &world.path("")).code(), 0);
    assert_eq!(read("data/sub/g"), "g\n");
    assert_eq!(world.cp("box:/data/.", &world.path("new")).code(), 0);
    assert_eq!(read("new/sub/g"), "g\n");
    assert_eq!(world.cp("box:/data/sub/g", &world.path("new/f")).code(), 0);
    assert_eq!(read("new/f"), "g\n");
    // A link is one, unless what it points to is asked for.
    assert_eq!(world.cp("box:/data/l", &world.path("l")).code(), 0);
    assert!(fs::symlink_metadata(world.path("l")).unwrap().is_symlink());
    assert_eq!(
        world
            .hull
            .run(&["cp", "-L", "box:/data/l", &world.path("followed")])
            .code(),
        0
    );
    assert_eq!(read("followed"), "f\n");
    // Content into a directory that is there, and a new name, in the container.
    assert_eq!(world.cp(&world.path("data/."), "box:/tmp").code(), 0);
    assert_eq!(world.cp(&world.path("data"), "box:/tmp/renamed").code(), 0);
    assert_eq!(world.inside("cat /tmp/f /tmp/renamed/sub/g"), "f\ng");
    // An archive on stdout, and back from stdin.
    let archive = world.cp("box:/data", "-");
    assert_eq!(archive.code(), 0, "{}", archive.stderr);
    let unpacked = world
        .hull
        .run_with_input(&["cp", "-", "box:/root"], archive.stdout);
    assert_eq!(unpacked.code(), 0, "{unpacked:?}");
    assert_eq!(world.inside("cat /root/data/sub/g"), "g");
    world.end();
}

#[test]
fn what_cannot_be_copied_is_said_in_one_line_and_changes_nothing() {
    let Some(world) = World::new("mkdir /data") else {
        return;
    };
    fs::write(world.here.path().join("file"), "mine").unwrap();
    fs::create_dir(world.here.path().join("dir")).unwrap();
    let (file, dir) = (world.path("file"), world.path("dir"));
    let new = world.path("no/new");
    for (from, to) in [
        ("box:/nothing", file.as_str()),
        ("box:/data", file.as_str()),
        ("box:/data", new.as_str()),
        (file.as_str(), "box:/nothing/new"),
        (file.as_str(), "box:/nothing/"),
        (dir.as_str(), "box:/etc/passwd"),
        (new.as_str(), "box:/tmp"),
        ("nobody:/etc", dir.as_str()),
        (file.as_str(), dir.as_str()),
        ("box:/etc", "box:/tmp"),
    ] {
        let outcome = world.cp(from, to);
        assert_eq!(
            (outcome.code(), outcome.stderr.lines().count()),
            (1, 1),
            "{from} {to}: {outcome:?}"
        );
    }
    assert_eq!(
        fs::read_to_string(world.here.path().join("file")).unwrap(),
        "mine"
    );
    assert_eq!(fs::read_dir(world.here.path()).unwrap().count(), 2);
    world.end();
}

#[test]
fn container_cannot_make_its_files_leave_the_destination() {
    let script = "mkdir -p /evil/dir; ln -s ../../outside /evil/dir/link; ln -s /etc /evil/abs; mknod /evil/disk b 8 0; \
                  echo x > /evil/suid; chmod 4755 /evil/suid; chown 7:7 /evil/suid";
    let Some(world) = World::new(script) else { return };
    fs::create_dir_all(world.here.path().join("in")).unwrap();
    fs::create_dir_all(world.here.path().join("outside")).unwrap();
    let outcome = world.cp("box:/evil", &world.path("in"));
    assert_eq!(outcome.code(), 0, "{outcome:?}");
    let evil = world.here.path().join("in/evil");
    assert!(!evil.join("disk").exists(), "a device node was made on this host");
    let suid = fs::metadata(evil.join("suid")).unwrap();
    assert_eq!(
        (suid.mode() & 0o7777, suid.uid()),
        (0o755, nix::unistd::geteuid().as_raw())
    );
    assert_eq!(fs::read_link(evil.join("abs")).unwrap().to_str(), Some("/etc"));

    // Copied again after the container has put a directory where the link was: this host's link is not gone through.
    world.inside("rm /evil/dir/link; mkdir /evil/dir/link; echo x > /evil/dir/link/escaped");
    let again = world.cp("box:/evil", &world.path("in"));
    assert_eq!(again.code(), 1, "{again:?}");
    assert_eq!(
        fs::read_dir(world.path("outside")).unwrap().count(),
        0,
        "something left"
    );
    world.end();
}

#[test]
fn host_cannot_be_led_out_of_the_containers_root() {
    let Some(world) = World::new("ln -s /proc/1/root/etc /tmp/link; ln -s ../../../../etc /tmp/up") else {
        return;
    };
    fs::write(world.here.path().join("file"), "x").unwrap();
    // Resolved in the container's root, wherever the links lead.
    for to in ["box:/tmp/up/from-here", "box:/../../etc/from-here"] {
        assert_eq!(world.cp(&world.path("file"), to).code(), 0, "{to}");
        assert_eq!(world.inside("cat /etc/from-here && rm /etc/from-here"), "x");
    }
    world.end();
}
