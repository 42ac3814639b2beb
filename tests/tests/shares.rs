//! Directories and files of the host in containers (`--volume`): what passes, what is enforced, and what a hostile guest tries.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use hull_tests::hull::{Hull, Outcome, eventually, finish, signal};
use nix::sys::signal::Signal;
use tempfile::TempDir;

const PATIENCE: Duration = Duration::from_secs(120);

/// A world with a directory to share.
struct World {
    hull: Hull,
    directory: TempDir,
}

impl World {
    fn new(images: &[&str]) -> Option<Self> {
        Some(Self {
            hull: Hull::with_images(images)?,
            directory: tempfile::tempdir().expect("a folder"),
        })
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn volume(&self, options: &str) -> String {
        format!("{}:/data{options}", self.directory.path().display())
    }

    fn shell(&self, options: &[&str], image: &str, script: &str) -> Outcome {
        let volume = self.volume("");
        let mut arguments = vec!["run", "--rm", "--volume", &volume];
        arguments.extend(options);
        arguments.extend([image, "/bin/sh", "-c", script]);
        self.hull.run(&arguments)
    }

    fn python(&self, options: &[&str], script: &str) -> Outcome {
        let volume = self.volume("");
        let mut arguments = vec!["run", "--rm", "--volume", &volume];
        arguments.extend(options);
        arguments.extend(["python", "python3", "-c", script]);
        self.hull.run(&arguments)
    }

    fn settled(self) {
        assert_eq!(self.hull.settle(), Vec::<String>::new());
    }
}

fn good(outcome: &Outcome) -> String {
    assert_eq!(outcome.code(), 0, "{outcome:?}");
    outcome.text()
}

fn digest(path: &Path) -> String {
    let output = Command::new("sha256sum").arg(path).output().expect("sha256sum");
    String::from_utf8_lossy(&output.stdout)
        .split(' ')
        .next()
        .unwrap_or_default()
        .to_owned()
}

#[test]
fn files_pass_both_ways_with_owner_mode_times_and_kind() {
    let Some(world) = World::new(&["busybox"]) else {
        return;
    };
    fs::write(world.path("from-host"), "hello").expect("written");
    fs::set_permissions(world.path("from-host"), fs::Permissions::from_mode(0o2640)).expect("mode");
    std::os::unix::fs::chown(world.path("from-host"), Some(1234), Some(567)).expect("owner");
    symlink("../from-host", world.path("link")).expect("link");
    let script = "set -e; cd /data
        stat -c '%a %u %g %s %F' from-host; readlink link; cat from-host; echo
        echo world > made; chown 77:88 made; chmod 4711 made; touch -d '2001-02-03 04:05:06' made
        mkdir -m 1777 dir; ln -s nowhere dangling; mkfifo fifo; ln made again
        mv again moved; rm from-host; umask 027; echo x > masked
        mknod null c 1 3 2>&1 || true";
    let text = good(&world.shell(&[], "busybox", script));
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(
        lines[..3],
        ["2640 1234 567 5 regular file", "../from-host", "hello"]
    );
    assert!(lines[3].contains("Operation not permitted"), "{text}");
    let made = fs::metadata(world.path("made")).expect("made");
    assert_eq!(
        (made.mode(), made.uid(), made.gid(), made.nlink()),
        (0o104_711, 77, 88, 2)
    );
    assert_eq!((made.mtime(), made.size()), (981_173_106, 6));
    assert_eq!(
        fs::metadata(world.path("moved")).expect("moved").ino(),
        made.ino()
    );
    assert_eq!(fs::metadata(world.path("dir")).expect("dir").mode(), 0o41_777);
    assert_eq!(
        fs::metadata(world.path("masked")).expect("masked").mode(),
        0o100_640
    );
    assert_eq!(
        fs::read_link(world.path("dangling")).expect("link"),
        Path::new("nowhere")
    );
    assert!(!world.path("from-host").exists() && !world.path("null").exists());
    world.settled();
}

#[test]
fn users_of_the_container_own_what_they_make_and_are_held_to_modes() {
    let Some(world) = World::new(&["busybox"]) else {
        return;
    };
    fs::create_dir(world.path("open")).expect("made");
    fs::set_permissions(world.path("open"), fs::Permissions::from_mode(0o2777)).expect("mode");
    std::os::unix::fs::chown(world.path("open"), Some(0), Some(4321)).expect("owner");
    fs::write(world.path("secret"), "secret").expect("written");
    fs::set_permissions(world.path("secret"), fs::Permissions::from_mode(0o600)).expect("mode");
    fs::write(world.path("set-id"), "x").expect("written");
    fs::set_permissions(world.path("set-id"), fs::Permissions::from_mode(0o4777)).expect("mode");
    let script = "cd /data; echo mine > open/file; mkdir open/dir; cat secret; echo x > new; chmod 777 secret; echo y >> set-id; true";
    let outcome = world.shell(&["--user", "1000:2000"], "busybox", script);
    good(&outcome);
    for refused in [
        "can't open 'secret'",
        "can't create new",
        "secret: Operation not permitted",
    ] {
        assert!(outcome.stderr.contains(refused), "{refused}: {outcome:?}");
    }
    let owner = |name: &str| {
        let found = fs::metadata(world.path(name)).expect("metadata");
        (found.uid(), found.gid())
    };
    // The directory's group, by its set-group-id bit.
    assert_eq!(
        (owner("open/file"), owner("open/dir")),
        ((1000, 4321), (1000, 4321))
    );
    let mode = |name: &str| fs::metadata(world.path(name)).expect("metadata").mode() & 0o7777;
    assert_eq!(mode("open/dir") & 0o2000, 0o2000);
    // Written by a user, a program loses its set-user-id bit.
    assert_eq!(mode("set-id"), 0o777);
    world.settled();
}

#[test]
fn read_only_is_enforced_by_the_host_whatever_the_guest_does() {
    let Some(world) = World::new(&["busybox"]) else {
        return;
    };
    fs::write(world.path("file"), "kept").expect("written");
    let volume = world.volume(":ro");
    // All capabilities of the guest's kernel: it can make its own mount writable, and mount the whole device anew.
    let script = "echo x > /data/file; mount -o remount,rw,bind /data && echo remounted
        echo x > /data/file; rm /data/file; chmod 777 /data/file; touch /data/new; mkdir /data/dir; ln /data/file /data/l
        mkdir /m && mount -t virtiofs hull /m && echo x > /m/0/file; mv /data/file /data/other; cat /data/file";
    let outcome = world.hull.run(&[
        "run",
        "--rm",
        "--privileged",
        "-v",
        &volume,
        "busybox",
        "/bin/sh",
        "-c",
        script,
    ]);
    let text = outcome.text();
    assert!(
        text.contains("remounted") && text.ends_with("kept"),
        "{outcome:?}"
    );
    assert!(
        outcome.stderr.matches("Read-only file system").count() >= 8,
        "{outcome:?}"
    );
    assert_eq!(fs::read_to_string(world.path("file")).expect("file"), "kept");
    assert_eq!(fs::read_dir(world.directory.path()).expect("folder").count(), 1);
    world.settled();
}

#[test]
fn a_file_alone_can_be_shared_and_mount_points_are_made() {
    let Some(world) = World::new(&["busybox"]) else {
        return;
    };
    fs::write(world.path("one"), "one").expect("written");
    fs::write(world.path("two"), "two").expect("written");
    let file = format!("{}:/a/b/c:ro", world.path("one").display());
    let below = format!("{}:/data/below/file", world.path("two").display());
    let script = "cat /a/b/c /data/below/file; echo more >> /data/below/file; echo x > /a/b/c";
    let outcome = world.shell(&["-v", &file, "-v", &below], "busybox", script);
    assert_eq!(outcome.text(), "onetwo", "{outcome:?}");
    assert!(outcome.stderr.contains("Read-only"), "{outcome:?}");
    assert_eq!(fs::read_to_string(world.path("two")).expect("file"), "twomore\n");
    // Where the second one is seen lies in the first one, so that is where its place was made.
    assert_eq!(fs::metadata(world.path("below/file")).expect("place").len(), 0);
    world.settled();
}

#[test]
fn options_and_sources_that_cannot_be_are_refused_with_the_reason() {
    let Some(world) = World::new(&["busybox"]) else {
        return;
    };
    let socket = world.path("socket");
    let _listener = std::os::unix::net::UnixListener::bind(&socket).expect("a socket");
    let with = |volume: &str| {
        let outcome = world
            .hull
            .run(&["run", "--rm", "-v", volume, "busybox", "/bin/true"]);
        assert_eq!(outcome.code(), 125, "{outcome:?}");
        outcome.stderr
    };
    let shared = format!("{}:/x", socket.display());
    assert!(
        with(&shared).contains("is a socket of the host"),
        "{}",
        with(&shared)
    );
    for volume in ["/tmp:relative", "/tmp:/", "/tmp:/x:rshared", "/tmp:/x:nonsense"] {
        assert!(with(volume).contains("--volume"), "{volume}");
    }
    let inside = with("/tmp:/proc/sys/kernel");
    assert!(inside.contains("/proc/sys/kernel"), "{inside}");
    let missing = world.path("missing");
    let mount = format!("type=bind,source={},target=/x", missing.display());
    let outcome = world
        .hull
        .run(&["run", "--rm", "--mount", &mount, "busybox", "/bin/true"]);
    assert!(outcome.stderr.contains("does not exist"), "{outcome:?}");
    world.settled();
}

#[test]
fn ten_containers_and_the_host_use_one_directory() {
    let Some(world) = World::new(&["busybox"]) else {
        return;
    };
    fs::write(world.path("log"), "").expect("written");
    // Each waits for all others to have come, sees what the host writes, appends, and renames its own over a common name.
    let script = "cd /data; echo $ME > here-$ME
        while [ $(ls | grep -c here-) -lt 10 ]; do sleep 0.05; done
        until [ \"$(cat go 2>/dev/null)\" = now ]; do sleep 0.05; done
        i=0; while [ $i -lt 40 ]; do echo \"$ME $i\" >> log; echo $ME > tmp-$ME; mv tmp-$ME last; [ -s last ] || echo EMPTY; i=$((i+1)); done";
    let volume = world.volume("");
    let children: Vec<_> = (0..10)
        .map(|index| {
            let me = format!("ME={index}");
            let mut command = world.hull.command(&[
                "run", "--rm", "-m", "96m", "-e", &me, "-v", &volume, "busybox", "/bin/sh", "-c", script,
            ]);
            command.spawn().expect("hull starts")
        })
        .collect();
    let here = || {
        let names = fs::read_dir(world.directory.path()).expect("folder");
        names
            .flatten()
            .filter(|entry| entry.file_name().to_string_lossy().starts_with("here-"))
            .count()
    };
    assert!(eventually(PATIENCE, || here() == 10), "only {} came", here());
    fs::write(world.path("go.new"), "now").expect("written");
    fs::rename(world.path("go.new"), world.path("go")).expect("renamed");
    for child in children {
        let outcome = finish(child);
        assert_eq!((outcome.code(), outcome.text().as_str()), (0, ""), "{outcome:?}");
    }
    let log = fs::read_to_string(world.path("log")).expect("log");
    let mut lines: Vec<&str> = log.lines().collect();
    lines.sort_unstable();
    lines.dedup();
    assert_eq!(lines.len(), 400);
    world.settled();
}

#[test]
fn large_files_and_mapped_ones_arrive_intact() {
    let Some(world) = World::new(&["python"]) else {
        return;
    };
    let source = Command::new("dd")
        .args(["if=/dev/urandom", "bs=1M", "count=96", "status=none"])
        .arg(format!("of={}", world.path("big").display()))
        .status()
        .expect("dd");
    assert!(source.success());
    let script = r#"
import hashlib, mmap, os, shutil
os.chdir("/data")
def digest(name):
    return hashlib.sha256(open(name, "rb").read()).hexdigest()
print(digest("big"))
shutil.copyfile("big", "copy")
with open("mapped", "wb") as f: f.truncate(8 << 20)
with open("mapped", "r+b") as f:
    m = mmap.mmap(f.fileno(), 0)
    m[:] = open("big", "rb").read(8 << 20)
    m.flush(); m.close()
with open("sparse", "wb") as f:
    f.seek(1 << 30); f.write(b"end")
    os.posix_fallocate(f.fileno(), 0, 4096)
fd = os.open("sparse", os.O_RDONLY)
print(os.lseek(fd, 1 << 20, os.SEEK_DATA) >= (1 << 30) - (1 << 20))
fd = os.open("appended", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
for i in range(100): os.write(fd, b"%3d\n" % i)
os.ftruncate(fd, 40); os.fsync(fd)
os.setxattr("copy", "user.note", b"x" * 1000)
print(os.listxattr("copy"), len(os.getxattr("copy", "user.note")))
d = os.open("/data", os.O_RDONLY | os.O_DIRECTORY); os.fsync(d)
"#;
    let text = good(&world.python(&[], script));
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(lines[0], digest(&world.path("big")));
    assert_eq!(lines[1], "True");
    assert_eq!(lines[2], "['user.note'] 1000");
    assert_eq!(digest(&world.path("copy")), lines[0]);
    let mapped = fs::read(world.path("mapped")).expect("mapped");
    let big = fs::read(world.path("big")).expect("big");
    assert!(mapped == big[..8 << 20], "the mapped file differs");
    let sparse = fs::metadata(world.path("sparse")).expect("sparse");
    assert_eq!(sparse.len(), (1 << 30) + 3);
    assert!(sparse.blocks() * 512 < 1 << 24);
    assert_eq!(fs::metadata(world.path("appended")).expect("appended").len(), 40);
    world.settled();
}

#[test]
fn open_files_are_bounded_and_the_container_goes_on() {
    let Some(world) = World::new(&["python"]) else {
        return;
    };
    let script = r#"
import errno, os
os.chdir("/data")
held = []
try:
    for i in range(30000):
        held.append(os.open("f%d" % (i % 5000), os.O_RDWR | os.O_CREAT))
    print("no bound")
except OSError as e:
    print(e.errno in (errno.ENFILE, errno.EMFILE), len(held) > 1000)
for fd in held: os.close(fd)
print(len(os.listdir(".")) > 1000, sum(os.stat(n).st_size for n in os.listdir(".")))
print(os.write(os.open("after", os.O_WRONLY | os.O_CREAT), b"fine"))
"#;
    let text = good(&world.python(&[], script));
    assert_eq!(text, "True True\nTrue 0\n4");
    world.settled();
}

/// A directory that the host replaces by a link, over and over, while the guest opens what is in it.
#[test]
fn a_race_with_renames_on_the_host_leads_nowhere() {
    let Some(world) = World::new(&["busybox"]) else {
        return;
    };
    let outside = tempfile::tempdir().expect("a folder");
    fs::write(outside.path().join("secret"), "SECRET").expect("written");
    fs::create_dir(world.path("real")).expect("made");
    fs::write(world.path("real/secret"), "public").expect("written");
    symlink(outside.path(), world.path("evil")).expect("link");
    symlink("/proc/self/root", world.path("magic")).expect("link");
    fs::rename(world.path("real"), world.path("d")).expect("renamed");
    let volume = world.volume("");
    let script = "cd /data; touch ready; while [ ! -e stop ]; do cat d/secret d/../../secret 2>/dev/null; done; cat magic/etc/hostname evil/secret; true";
    let child = world
        .hull
        .command(&["run", "--rm", "-v", &volume, "busybox", "/bin/sh", "-c", script])
        .spawn()
        .expect("hull starts");
    assert!(eventually(PATIENCE, || world.path("ready").exists()));
    for _ in 0..3000 {
        fs::rename(world.path("d"), world.path("real")).expect("renamed");
        fs::rename(world.path("evil"), world.path("d")).expect("renamed");
        fs::rename(world.path("d"), world.path("evil")).expect("renamed");
        fs::rename(world.path("real"), world.path("d")).expect("renamed");
    }
    fs::write(world.path("stop"), "").expect("written");
    let outcome = finish(child);
    assert_eq!(outcome.code(), 0, "{outcome:?}");
    let text = outcome.text();
    assert!(text.contains("public") && !text.contains("SECRET"), "{text}");
    // The kernel's own link leads to the container's root, as anywhere in it.
    assert!(
        !text.contains(
            &nix::unistd::gethostname()
                .expect("name")
                .to_string_lossy()
                .into_owned()
        )
    );
    world.settled();
}

/// The share that one container is given is all that its VMM, compromised, could reach; its thread shows how little it may do.
#[test]
fn the_thread_that_serves_shares_is_confined_and_kill_leaves_nothing() {
    let Some(world) = World::new(&["busybox"]) else {
        return;
    };
    let mounts = || fs::read_to_string("/proc/self/mountinfo").expect("mounts");
    let before = mounts();
    let volume = world.volume("");
    let script =
        "cd /data; i=0; while :; do echo $i > f$i; mv f$i g$((i % 100)); i=$((i+1)); echo $i > count; done";
    good(&world.hull.run(&[
        "run", "-d", "--name", "busy", "-v", &volume, "busybox", "/bin/sh", "-c", script,
    ]));
    assert!(eventually(PATIENCE, || world.path("count").exists()));
    let vmm = world.hull.vmms()[0];
    let tasks = fs::read_dir(format!("/proc/{vmm}/task")).expect("threads");
    let mut found = false;
    for task in tasks.flatten() {
        let status = fs::read_to_string(task.path().join("status")).expect("status");
        if !status.starts_with("Name:\tshares\n") {
            assert!(status.contains("CapEff:\t0000000000000000"), "{status}");
            continue;
        }
        found = true;
        for line in [
            // CHOWN, DAC_OVERRIDE, FOWNER, FSETID, SETGID, SETUID, SETFCAP.
            "CapPrm:\t00000000800000db",
            "CapInh:\t0000000000000000",
            "CapBnd:\t0000000000000000",
            "CapAmb:\t0000000000000000",
            "Seccomp:\t2",
            "NoNewPrivs:\t1",
        ] {
            assert!(status.contains(line), "{line}: {status}");
        }
        let root = fs::read_dir(task.path().join("root")).expect("root").count();
        assert_eq!(root, 0, "its root is not empty");
        // Shares, events and the VM; no layer of the image, no socket, no /dev/kvm.
        for entry in fs::read_dir(task.path().join("fd"))
            .expect("descriptors")
            .flatten()
        {
            let target = fs::read_link(entry.path()).unwrap_or_default();
            let text = target.display().to_string();
            if entry
                .file_name()
                .to_str()
                .and_then(|number| number.parse().ok())
                .unwrap_or(99)
                < 3
            {
                continue;
            }
            // A share's root is the root of its mount.
            let within_share = text.strip_prefix('/').is_some_and(|name| !name.contains('/'));
            assert!(
                text.is_empty() || text.starts_with("anon_inode:") || within_share,
                "{text}"
            );
        }
    }
    assert!(found, "no thread serves shares");
    assert_eq!(mounts(), before, "a mount shows on the host");
    signal(vmm, Signal::SIGKILL);
    assert_eq!(world.hull.run(&["wait", "busy"]).text(), "137");
    assert_eq!(world.hull.run(&["rm", "busy"]).code(), 0);
    assert_eq!(mounts(), before);
    // It may have been cut short, and not written yet, at that moment; it is there.
    assert!(world.path("count").exists());
    // Nobody holds the directory: it can be shared again at once.
    good(&world.shell(&[], "busybox", "rm -r /data/*"));
    assert_eq!(fs::read_dir(world.directory.path()).expect("folder").count(), 0);
    world.settled();
}

#[test]
fn a_database_keeps_what_it_committed_when_the_vmm_is_killed() {
    let Some(world) = World::new(&["sqlite"]) else {
        return;
    };
    let volume = world.volume("");
    let script = "cd /data; sqlite3 db 'create table t (n int)'; i=0
        while :; do i=$((i+1)); sqlite3 db \"insert into t values ($i)\" && echo $i >> committed; done";
    for round in 0..3 {
        let name = format!("db{round}");
        for file in ["db", "db-journal", "committed"] {
            fs::remove_file(world.path(file)).ok();
        }
        good(&world.hull.run(&[
            "run",
            "-d",
            "--name",
            &name,
            "-v",
            &volume,
            "sqlite",
            "/bin/bash",
            "-c",
            script,
        ]));
        let committed = || {
            fs::read_to_string(world.path("committed"))
                .unwrap_or_default()
                .lines()
                .count()
        };
        assert!(eventually(PATIENCE, || committed() >= 20 + 7 * round));
        signal(world.hull.vmms()[0], Signal::SIGKILL);
        world.hull.run(&["wait", &name]);
        world.hull.run(&["rm", &name]);
        let check = "sqlite3 /data/db 'pragma integrity_check; select count(*), max(n) from t'";
        let text = good(&world.shell(&[], "sqlite", check));
        let (ok, counts) = text.split_once('\n').expect("two lines");
        assert_eq!(ok, "ok");
        let rows: usize = counts
            .split('|')
            .next()
            .and_then(|n| n.parse().ok())
            .expect("a count");
        assert!(rows >= committed(), "{rows} rows, {} committed", committed());
    }
    world.settled();
}

#[test]
fn a_directory_of_the_host_can_be_the_root() {
    let Some(world) = World::new(&["busybox"]) else {
        return;
    };
    // What is in an image, as a directory.
    let root = world.path("root");
    let unpacked = format!("{}:/out", world.directory.path().display());
    good(&world.hull.run(&[
        "run",
        "--rm",
        "-v",
        &unpacked,
        "busybox",
        "/bin/sh",
        "-c",
        "mkdir /out/root && cp -a /bin /out/root/ && mkdir -m 1777 /out/root/tmp",
    ]));
    let root_text = root.display().to_string();
    let run = |extra: &[&str], script: &str| {
        let mut arguments = vec!["run", "--rm", "--rootfs"];
        arguments.extend(extra);
        arguments.extend([root_text.as_str(), "/bin/sh", "-c", script]);
        world.hull.run(&arguments)
    };
    let text = good(&run(
        &[],
        "echo made > /file; mkdir -p /a/b; ls /; hostname | wc -c; mknod /tmp/null c 1 3 || echo none",
    ));
    assert!(text.contains("proc") && text.contains("none"), "{text}");
    assert_eq!(fs::read_to_string(root.join("file")).expect("file"), "made\n");
    let outcome = run(
        &["--read-only"],
        "echo more >> /file; touch /tmp/x; cat /file; mount | head -1",
    );
    assert!(outcome.text().starts_with("made\n"), "{outcome:?}");
    assert_eq!(outcome.stderr.matches("Read-only").count(), 2, "{outcome:?}");
    world.settled();
}

#[test]
fn volumes_outlive_their_containers_and_begin_with_what_the_image_has() {
    let Some(world) = World::new(&["busybox"]) else {
        return;
    };
    let hull = &world.hull;
    assert_eq!(
        good(&hull.run(&["volume", "create", "--label", "a=b", "data"])),
        "data"
    );
    let run = |volume: &str, script: &str| {
        hull.run(&["run", "--rm", "-v", volume, "busybox", "/bin/sh", "-c", script])
    };
    good(&run("data:/srv", "echo kept > /srv/file"));
    assert_eq!(
        good(&run(
            "data:/srv:ro",
            "cat /srv/file; touch /srv/x 2>/dev/null || echo read-only"
        )),
        "kept\nread-only"
    );
    // One that is not there yet, over a directory of the image.
    let text = good(&run(
        "fresh:/bin",
        "ls /bin | head -100 | wc -l; echo more > /bin/of-mine; cat /bin/of-mine",
    ));
    assert!(!text.starts_with('0') && text.ends_with("more"), "{text}");
    assert_eq!(good(&run("empty:/srv:nocopy", "ls -A /srv | wc -l")), "0");
    assert_eq!(good(&hull.run(&["volume", "ls", "-q"])), "data\nempty\nfresh");
    assert_eq!(
        good(&hull.run(&["volume", "ls", "-q", "--filter", "label=a"])),
        "data"
    );
    let data = good(&hull.run(&["volume", "inspect", "-f", "{{.Mountpoint}}", "data"]));
    assert_eq!(
        fs::read_to_string(Path::new(&data).join("file")).expect("file"),
        "kept\n"
    );

    good(&hull.run(&[
        "create",
        "--name",
        "user",
        "--mount",
        "source=data,target=/d",
        "busybox",
        "true",
    ]));
    let refused = hull.run(&["volume", "rm", "data"]);
    assert_eq!(refused.code(), 1);
    assert!(refused.stderr.contains("in use by user"), "{refused:?}");
    let mounts = "{{range .Mounts}}{{.Type}} {{.Name}} {{.Destination}} {{.RW}}{{end}}";
    assert_eq!(
        good(&hull.run(&["inspect", "-f", mounts, "user"])),
        "volume data /d true"
    );
    let pruned = good(&hull.run(&["volume", "prune", "--force"]));
    assert!(pruned.contains("empty\nfresh\n"), "{pruned}");
    good(&hull.run(&["rm", "user"]));
    good(&hull.run(&["volume", "rm", "data"]));
    assert_eq!(hull.run(&["volume", "rm", "data"]).code(), 1);
    good(&hull.run(&["volume", "rm", "--force", "data"]));
    assert!(!Path::new(&data).exists());
    world.settled();
}
