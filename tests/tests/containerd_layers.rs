//! Root filesystems whose layers are disks of the microVM: the container, its snapshot and who uses that later see what they see
//! where the host mounts the same layers.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use hull_tests::containerd::{Containerd, HULL, Options, Programs, RUNC, available, reference};
use hull_tests::hull::{Outcome, eventually};

const PATIENCE: Duration = Duration::from_secs(60);
const IMAGE: &str = "layered";
/// Root filesystems are shared as they are mounted.
const SHARED: [&str; 2] = ["--annotation", "io.hull.rootfs=shared"];

/// What a container does to its root filesystem, and says of it. Nothing depends on the time.
const WORK: &str = r#"
cd /data
list() { find . | sort | while read f; do stat -c '%n %F %a %u:%g %h' "$f"; [ ! -f "$f" ] || md5sum "$f"; done; }
echo "-- as it came"; list
echo more >> a/text; cat a/text
chmod 0640 a/mode; chown 7:8 a/owner; touch a/touched
rm a/gone; ls a
ln a/one a/two-more; echo x >> a/two-more; cat a/one; ls -l a | wc -l
mv a/name a/renamed; cat a/renamed
mv dir moved && cat moved/inside
rm -rf b && mkdir b && echo fresh > b/new && ls b
mkdir -p deep/er/est; echo d > deep/er/est/f; rm -rf deep/er
rm -r c && echo file > c
rm link; ln -s a/text link; readlink link
mkfifo fifo
ls was-hidden 2>/dev/null || echo hidden
mkdir was-hidden; ls -a was-hidden
echo 12345678 > a/size; dd if=/dev/zero of=a/size bs=1 count=1 seek=4096 conv=notrunc 2>/dev/null; wc -c < a/size
echo "-- as it is"; list
"#;

fn run(command: &mut Command) {
    let output = command.output().expect("umoci, cp and the like are installed");
    assert!(output.status.success(), "{command:?}: {output:?}");
}

fn sh(script: &str, directory: &Path) {
    run(Command::new("sh").args(["-ec", script]).current_dir(directory));
}

/// An image of three layers, the topmost of which hides some of what is below.
fn build(world: &Containerd) -> PathBuf {
    let images = PathBuf::from(std::env::var_os("HULL_TEST_IMAGES").expect("checked by available()"));
    let folder = world.path("image");
    fs::create_dir(&folder).expect("a folder of our own");
    run(Command::new("cp")
        .arg("-a")
        .arg(images.join("busybox/."))
        .arg(folder.join("layout")));
    sh(
        "tag=latest
         umoci unpack --image layout:$tag bundle
         mkdir -p bundle/rootfs/data && cd bundle/rootfs/data
         mkdir a b c dir was-hidden
         for name in text mode owner touched gone one name size; do echo $name > a/$name; done
         ln a/one a/two; chmod 4755 a/mode; mkfifo a/fifo
         echo inside > dir/inside; echo old > b/old; echo c > c/c; echo secret > was-hidden/secret
         ln -s /data/dir link
         cd ../../..
         umoci repack --refresh-bundle --image layout:$tag bundle
         cd bundle/rootfs/data
         rm -rf was-hidden b a/touched; mkdir b; echo newer > b/newer; echo again > a/touched
         cd ../../..
         umoci repack --image layout:$tag bundle",
        &folder,
    );
    folder.join("layout")
}

fn blobs(world: &Containerd) -> Vec<PathBuf> {
    let entries = fs::read_dir(world.path("store/snapshot-layers"))
        .into_iter()
        .flatten();
    let paths = entries.flatten().map(|entry| entry.path());
    let mut blobs: Vec<PathBuf> = paths
        .filter(|path| path.extension().is_some_and(|end| end == "erofs"))
        .collect();
    blobs.sort();
    blobs
}

fn run_in(world: &Containerd, runtime: &str, options: &[&str], id: &str, script: &str) -> Outcome {
    world.run(runtime, options, IMAGE, id, &["sh", "-c", script])
}

/// What a container's root is mounted from.
fn root_of(world: &Containerd, snapshotter: &str, id: &str) -> String {
    let options = ["--rm", "--snapshotter", snapshotter];
    let script =
        "while read what where kind rest; do [ $where = / ] && echo $kind; done < /proc/mounts; true";
    let outcome = run_in(world, HULL, &options, id, script);
    assert_eq!(outcome.code(), 0, "{outcome:?}\n{}", world.log());
    outcome.text().lines().last().unwrap_or_default().to_owned()
}

/// Names, kinds, owners and modes of what a snapshot differs in from the layers below; the bytes are compared by who reads it.
fn difference(world: &Containerd, snapshotter: &str, id: &str) -> BTreeSet<String> {
    let tar = world.path("diff.tar");
    let output = world
        .ctr_command(&["snapshots", "--snapshotter", snapshotter, "diff", id])
        .stdout(fs::File::create(&tar).expect("the folder is writable"))
        .output()
        .expect("ctr is installed");
    assert!(output.status.success(), "{output:?}\n{}", world.log());
    let listed = Command::new("tar")
        .args(["--numeric-owner", "-tvf"])
        .arg(&tar)
        .output()
        .expect("tar");
    assert!(listed.status.success(), "{listed:?}");
    let text = String::from_utf8_lossy(&listed.stdout).into_owned();
    // Mode, owner, size, date, time, name and what it links to.
    let entry = |line: &str| {
        let words: Vec<&str> = line.split_whitespace().collect();
        [&words[..3], &words[5..]].concat().join(" ")
    };
    // Places of mounts, which a runtime makes in its own way.
    let ours = |line: &&str| line.contains(" data/");
    text.lines().filter(ours).map(entry).collect()
}

/// Does the work in a container and gives what it said, what its snapshot differs in, and what a container of runc's says of
/// the committed snapshot.
fn work(world: &Containerd, snapshotter: &str, runtime: &str, id: &str) -> [String; 3] {
    let options = ["--snapshotter", snapshotter];
    let outcome = run_in(world, runtime, &options, id, WORK);
    let text = String::from_utf8_lossy(&outcome.stdout).into_owned();
    assert_eq!((outcome.code(), outcome.stderr.as_str()), (0, ""), "{id}: {text}");
    let said = outcome.text();
    let differs = difference(world, snapshotter, id);
    let (committed, view) = (format!("{id}-committed"), format!("{id}-view"));
    let snapshots =
        |arguments: &[&str]| world.ctr(&[&["snapshots", "--snapshotter", snapshotter], arguments].concat());
    world.try_ctr(&["tasks", "delete", id]);
    snapshots(&["commit", &committed, id]);
    let place = world.path(&view);
    fs::create_dir(&place).expect("a folder of our own");
    let mount = snapshots(&[
        "prepare",
        "--target",
        &place.display().to_string(),
        &view,
        &committed,
    ]);
    sh(&mount, world.root_dir());
    let list = WORK
        .lines()
        .find(|line| line.starts_with("list()"))
        .expect("it is there");
    let later = world.try_ctr(&[
        "run",
        "--rm",
        "--runtime",
        RUNC,
        "--env",
        "PATH=/bin",
        "--rootfs",
        &place.display().to_string(),
        &format!("{id}-later"),
        "/bin/sh",
        "-c",
        &format!("cd /data; {list}; list"),
    ]);
    run(Command::new("umount").arg(&place));
    assert_eq!(later.code(), 0, "{later:?}\n{}", world.log());
    world.ctr(&["containers", "delete", "--keep-snapshot", id]);
    let differs: Vec<String> = differs.into_iter().collect();
    [said, differs.join("\n"), later.text()]
}

fn behaves_equally(world: &Containerd, snapshotter: &str) {
    let expected = work(world, snapshotter, RUNC, "by-runc");
    assert!(
        expected[0].contains("hidden") && expected[1].contains("data/b/new"),
        "{expected:?}"
    );
    let layered = work(world, snapshotter, HULL, "layered");
    for (index, what) in ["said", "snapshot", "committed"].iter().enumerate() {
        assert_eq!(layered[index], expected[index], "{snapshotter} {what}");
    }
}

#[test]
fn layers_are_converted_after_the_first_start_and_behave_as_mounted_ones() {
    let Some(world) = Containerd::with_images(&[]) else {
        return;
    };
    world.import_layout(&build(&world), IMAGE);
    assert_eq!(root_of(&world, "overlayfs", "first"), "virtiofs");
    let converted = eventually(PATIENCE, || blobs(&world).len() == 3);
    assert!(converted, "{}", world.log());
    assert_eq!(root_of(&world, "overlayfs", "second"), "overlay");
    behaves_equally(&world, "overlayfs");

    // Two containers of an image have the same files open.
    for id in ["one", "two"] {
        world.run_detached(HULL, IMAGE, id, &["sleep", "1000"]);
    }
    let open = |pid: &i32| -> Vec<PathBuf> {
        let entries = fs::read_dir(format!("/proc/{pid}/fd"))
            .into_iter()
            .flatten()
            .flatten();
        let targets = entries.filter_map(|entry| fs::read_link(entry.path()).ok());
        let mut blobs: Vec<PathBuf> = targets
            .filter(|path| path.starts_with(world.path("store")))
            .collect();
        blobs.sort();
        blobs
    };
    let vmms = world.processes_of("hull-vmm");
    assert_eq!(vmms.len(), 2);
    assert!(
        vmms.iter().all(|pid| open(pid) == blobs(&world)),
        "{:?}",
        open(&vmms[0])
    );
    // They are the host's to give, and gone from the cache they stay in use.
    fs::remove_dir_all(world.path("store/snapshot-layers")).expect("it is there");
    assert_eq!(world.exec("one", "e", &["cat", "/data/a/text"]).text(), "text");
    for id in ["one", "two"] {
        world.remove(id);
    }
    assert_eq!(root_of(&world, "overlayfs", "again"), "virtiofs");
    let ids = ["first", "second", "layered", "one", "two", "again"];
    assert_eq!(world.settle(&ids), Vec::<String>::new());
}

#[test]
fn layer_that_is_not_what_it_was_is_not_used() {
    let Some(world) = Containerd::with_images(&[]) else {
        return;
    };
    world.import_layout(&build(&world), IMAGE);
    root_of(&world, "overlayfs", "first");
    assert!(
        eventually(PATIENCE, || blobs(&world).len() == 3),
        "{}",
        world.log()
    );
    let snapshots = world.path("root/io.containerd.snapshotter.v1.overlayfs/snapshots");
    let layer = fs::read_dir(&snapshots)
        .expect("the snapshotter's")
        .flatten()
        .map(|entry| entry.path().join("fs"))
        .find(|layer| layer.join("bin").exists())
        .expect("the layer with the programs");
    fs::write(layer.join("by-hand"), "edited").expect("the test is root");
    assert_eq!(root_of(&world, "overlayfs", "second"), "virtiofs");
    let outcome = run_in(&world, HULL, &["--rm"], "third", "cat /by-hand");
    assert_eq!(outcome.text(), "edited");

    // A converter that was killed, and a blob that is cut short under its name: the microVM says so, and nothing is left.
    let cache = world.path("store/snapshot-layers");
    assert!(
        eventually(PATIENCE, || blobs(&world).len() == 4),
        "{}",
        world.log()
    );
    assert_eq!(root_of(&world, "overlayfs", "fourth"), "overlay");
    fs::write(cache.join(".erofs-left"), "half").expect("the test is root");
    for blob in blobs(&world) {
        fs::remove_file(&blob).expect("the test is root");
        fs::write(&blob, vec![0; 8192]).expect("the test is root");
    }
    let outcome = run_in(&world, HULL, &["--rm"], "fifth", "true");
    assert!(!outcome.status.success());
    assert!(outcome.stderr.contains("erofs"), "{}", outcome.stderr);
    fs::remove_dir_all(&cache).expect("it is there");
    let options = [&["--rm"], &SHARED[..]].concat();
    assert_eq!(
        run_in(&world, HULL, &options, "sixth", "cat /by-hand").text(),
        "edited"
    );
    let ids = ["first", "second", "third", "fourth", "fifth", "sixth"];
    assert_eq!(world.settle(&ids), Vec::<String>::new());
}

#[test]
fn blobs_of_the_erofs_snapshotter_are_attached_as_they_are() {
    if !available() {
        return;
    }
    let Some(programs) = Programs::of_suite("sid") else {
        return;
    };
    let options = Options {
        snapshotter: Some("erofs"),
        ..Options::default()
    };
    let Some(world) = Containerd::start(programs, options) else {
        return;
    };
    world.import_layout(&build(&world), IMAGE);
    assert!(
        world
            .ctr(&["images", "ls", "--quiet"])
            .contains(&reference(IMAGE))
    );
    assert_eq!(root_of(&world, "erofs", "first"), "overlay");
    behaves_equally(&world, "erofs");
    assert_eq!(blobs(&world), Vec::<PathBuf>::new());
    assert_eq!(world.settle(&["first", "layered"]), Vec::<String>::new());
}
