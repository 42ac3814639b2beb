//! What a container sees of its image, from inside its microVM, compared file by file with what `umoci unpack` makes of the same
//! image on the host.
//!
//! Types, modes, owners, sizes, times with nanoseconds, link targets, which names share an inode, device numbers, extended
//! attributes and contents. Directories' times are left out: they depend on the order of unpacking. So is what the agent puts into
//! every container.
//!
//! Needs root for unpacking and making devices; says so and passes where it can't.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, lchown, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use hull_tests::hull::Hull;
use nix::sys::stat::{Mode, SFlag, makedev, mknod};

/// Put there by the agent, whatever the image has.
const OF_THE_RUNTIME: &str = r"-path ./proc -prune -o -path ./sys -prune -o -path ./dev -prune -o -path ./run -prune \
    -o -path ./tmp -prune -o -path ./etc/hosts -o -path ./etc/hostname -o -path ./etc/resolv.conf -o -path ./etc/mtab -o";

/// Everything about a tree, by the tools of the image itself: records that end in a zero byte.
fn probe() -> String {
    format!(
        r"cd / && export LC_ALL=C
find . -xdev {OF_THE_RUNTIME} -printf 'stat|%p|%y|%m|%U|%G|%s|%T@|%n|%D:%i|%l\0'
find . -xdev {OF_THE_RUNTIME} \( -type c -o -type b \) -exec stat --printf 'device|%n|%t|%T\0' {{}} +
find . -xdev {OF_THE_RUNTIME} -type f -print0 | xargs -0 -r sha256sum -z
"
    )
}

/// Attributes, with the copy of getfattr that the test put into the image.
const PROBE_ATTRIBUTES: &str =
    r"cd / && LD_LIBRARY_PATH=/probe /probe/getfattr -R -P -h -d -m - -e hex --absolute-names ./odd";

#[derive(Debug, Default, PartialEq, Eq)]
struct Tree {
    /// By path: type, mode, owner, size, time, link's target.
    files: BTreeMap<Vec<u8>, Vec<Vec<u8>>>,
    /// Names of one inode.
    linked: Vec<Vec<Vec<u8>>>,
    devices: BTreeMap<Vec<u8>, Vec<Vec<u8>>>,
    contents: BTreeMap<Vec<u8>, Vec<u8>>,
}

impl Tree {
    fn parse(output: &[u8]) -> Self {
        let mut tree = Self::default();
        let mut inodes: HashMap<Vec<u8>, Vec<Vec<u8>>> = HashMap::new();
        for record in output.split(|byte| *byte == 0) {
            let mut fields = record.split(|byte| *byte == b'|').map(<[u8]>::to_vec);
            match fields.next().as_deref() {
                Some(b"stat") => {
                    let path = fields.next().expect("path");
                    let mut rest: Vec<Vec<u8>> = fields.collect();
                    let links = rest.remove(6);
                    let inode = rest.remove(6);
                    if rest[0] == b"d" {
                        // A directory's size, links and time are the file system's.
                        rest[4].clear();
                        rest[5].clear();
                    } else if links != b"1" {
                        inodes.entry(inode).or_default().push(path.clone());
                    }
                    tree.files.insert(path, rest);
                }
                Some(b"device") => {
                    let path = fields.next().expect("path");
                    tree.devices.insert(path, fields.collect());
                }
                // What sha256sum says: a digest, two spaces, the name.
                _ if record.len() > 66 => {
                    let (digest, path) = record.split_at(64);
                    tree.contents.insert(path[2..].to_vec(), digest.to_vec());
                }
                _ => {}
            }
        }
        tree.linked = inodes
            .into_values()
            .map(|mut names| {
                names.sort();
                names
            })
            .filter(|names| names.len() > 1)
            .collect();
        tree.linked.sort();
        tree
    }

    /// Differences as readable lines.
    fn differences(&self, other: &Self) -> Vec<String> {
        let mut lines = Vec::new();
        compare("file", &self.files, &other.files, &mut lines);
        compare("device", &self.devices, &other.devices, &mut lines);
        compare("content", &self.contents, &other.contents, &mut lines);
        if self.linked != other.linked {
            lines.push("other names share inodes".to_owned());
        }
        lines
    }
}

fn compare<V: PartialEq + std::fmt::Debug>(
    what: &str,
    guest: &BTreeMap<Vec<u8>, V>,
    host: &BTreeMap<Vec<u8>, V>,
    lines: &mut Vec<String>,
) {
    for path in guest
        .keys()
        .chain(host.keys().filter(|path| !guest.contains_key(*path)))
    {
        let (guest, host) = (guest.get(path), host.get(path));
        if guest != host {
            lines.push(format!(
                "{what} {}: guest {guest:?}, host {host:?}",
                path.escape_ascii()
            ));
        }
    }
}

fn run(command: &mut Command) -> Vec<u8> {
    let output = command
        .output()
        .unwrap_or_else(|error| panic!("{command:?}: {error}"));
    assert!(
        output.status.success(),
        "{command:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    output.stdout
}

fn unpack(layout: &Path, to: &Path) -> PathBuf {
    run(Command::new("umoci")
        .args(["unpack", "--image", &format!("{}:latest", layout.display())])
        .arg(to));
    to.join("rootfs")
}

/// The same script on the host, in the unpacked tree.
fn on_the_host(rootfs: &Path, script: &str) -> Vec<u8> {
    run(Command::new("chroot").arg(rootfs).args(["/bin/sh", "-c", script]))
}

fn in_the_guest(hull: &Hull, image: &str, script: &str) -> Vec<u8> {
    let outcome = hull.run(&[
        "run",
        "--rm",
        "--user",
        "0:0",
        "--entrypoint",
        "/bin/sh",
        image,
        "-c",
        script,
    ]);
    assert_eq!(outcome.code(), 0, "{}", outcome.stderr);
    outcome.stdout
}

fn compare_trees(hull: &Hull, image: &str, rootfs: &Path) {
    let host = Tree::parse(&on_the_host(rootfs, &probe()));
    let guest = Tree::parse(&in_the_guest(hull, image, &probe()));
    assert!(
        host.files.len() > 1000 && host.contents.len() > 500,
        "{}",
        host.files.len()
    );
    let differences = guest.differences(&host);
    assert!(
        differences.is_empty(),
        "{image}: {} differences:\n{}",
        differences.len(),
        differences[..differences.len().min(40)].join("\n")
    );
}

/// Whether this machine can unpack and compare; says why where it can't.
fn can_compare() -> bool {
    let root = nix::unistd::geteuid().is_root();
    let umoci = Command::new("umoci").arg("--version").output().is_ok();
    if !root || !umoci {
        eprintln!("skipped: unpacking needs root and umoci");
    }
    root && umoci
}

#[test]
fn a_guest_sees_its_image_as_umoci_unpacks_it() {
    let images = ["debian-minimal", "redis"];
    if !can_compare() {
        return;
    }
    let Some(hull) = Hull::with_images(&images) else {
        return;
    };
    for image in images {
        let layout = PathBuf::from(std::env::var_os("HULL_TEST_IMAGES").expect("checked")).join(image);
        let scratch = tempfile::tempdir().expect("scratch directory");
        let rootfs = unpack(&layout, &scratch.path().join("bundle"));
        compare_trees(&hull, image, &rootfs);
    }
    assert_eq!(hull.settle(), Vec::<String>::new());
}

/// Nothing but zeroes, with something at both ends.
fn sparse(path: &Path, size: u64) {
    let file = fs::File::create(path).expect("file");
    file.set_len(size).expect("length");
    file.write_all_at(b"beginning", 0).expect("write");
    file.write_all_at(b"end", size - 3).expect("write");
}

/// What images rarely have, below `odd` in a tree.
fn make_odd_files(rootfs: &Path) {
    let odd = rootfs.join("odd");
    fs::create_dir(&odd).expect("directory");
    let file = |name: &[u8], content: &[u8]| {
        let path = odd.join(std::ffi::OsStr::from_bytes(name));
        fs::write(&path, content).expect("file");
        path
    };
    file(b"not utf-8 \xff\xfe", b"1");
    file(b"new\nline", b"2");
    file(&[b'n'; 255], b"3");
    // A path almost as long as one may be.
    let mut deep = odd.clone();
    for _ in 0..14 {
        deep = deep.join("d".repeat(250));
        fs::create_dir(&deep).expect("directory");
    }
    fs::write(deep.join("bottom"), b"4").expect("file");
    for (name, mode) in [
        ("setuid", 0o4755),
        ("setgid", 0o2711),
        ("sticky", 0o1600),
        ("none", 0),
    ] {
        let path = file(name.as_bytes(), b"5");
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).expect("mode");
    }
    let owned = file(b"owned", b"6");
    lchown(&owned, Some(70_000), Some(4_000_000_000)).expect("owner");
    symlink("../no/such/file", odd.join("dangling")).expect("link");
    symlink("t".repeat(4000), odd.join("long link")).expect("link");
    lchown(odd.join("dangling"), Some(123_456), Some(7)).expect("owner");
    fs::hard_link(odd.join("owned"), odd.join("second name")).expect("hard link");
    let device = |name: &str, kind, major, minor| {
        let mode = Mode::from_bits_truncate(0o640);
        mknod(&odd.join(name), kind, mode, makedev(major, minor)).expect("device");
    };
    device("character", SFlag::S_IFCHR, 1, 3);
    device("block", SFlag::S_IFBLK, 259, 1_000_000);
    device("fifo", SFlag::S_IFIFO, 0, 0);
    sparse(&odd.join("sparse"), 32 << 20);
    let empty = file(b"empty", b"");
    run(Command::new("setfattr")
        .args(["-n", "user.colour", "-v", "0x0a0d00ff"])
        .arg(&empty));
    run(Command::new("setfattr").args(["-n", "user.empty"]).arg(&empty));
    run(Command::new("setfattr")
        .args(["-n", "user.of-a-directory", "-v", "x"])
        .arg(&odd));
    run(Command::new("setcap")
        .arg("cap_net_raw,cap_setuid+ep")
        .arg(file(b"capable", b"7")));
    for (seconds, name) in [
        (1, "setuid"),
        (4_000_000_000_u64, "sticky"),
        (1_234_567_890, "new\nline"),
    ] {
        let time = std::time::UNIX_EPOCH + std::time::Duration::new(seconds, 123_456_789);
        // As root even where the mode forbids it.
        let file = fs::OpenOptions::new()
            .write(true)
            .open(odd.join(name))
            .expect("file");
        file.set_modified(time).expect("time");
    }
}

/// The tools to read attributes, into a tree.
fn add_getfattr(rootfs: &Path) -> bool {
    let tools = ["/usr/bin/getfattr", "/lib/x86_64-linux-gnu/libattr.so.1"];
    if tools.iter().any(|tool| !Path::new(tool).exists()) {
        return false;
    }
    let probe = rootfs.join("probe");
    fs::create_dir(&probe).expect("directory");
    for tool in tools {
        let tool = Path::new(tool);
        fs::copy(tool, probe.join(tool.file_name().expect("name"))).expect("copy");
    }
    true
}

/// Blocks of `# file: NAME` and attributes, sorted; without those only the host's root may see.
fn attributes(output: &[u8]) -> Vec<String> {
    let text = String::from_utf8_lossy(output);
    let mut blocks: Vec<String> = text
        .split("\n\n")
        .map(|block| {
            let lines = block.lines().filter(|line| !line.starts_with("trusted."));
            lines.collect::<Vec<_>>().join("\n")
        })
        .filter(|block| block.contains('='))
        .collect();
    blocks.sort();
    blocks
}

#[test]
fn a_guest_sees_everything_a_layer_can_hold() {
    if !can_compare() {
        return;
    }
    if ["setfattr", "setcap"]
        .iter()
        .any(|tool| Command::new(tool).output().is_err())
    {
        eprintln!("skipped: setfattr and setcap are not installed");
        return;
    }
    let Some(hull) = Hull::with_images(&[]) else {
        return;
    };
    let scratch = tempfile::tempdir().expect("scratch directory");
    let base = PathBuf::from(std::env::var_os("HULL_TEST_IMAGES").expect("checked")).join("debian-minimal");
    let layout = scratch.path().join("layout");
    run(Command::new("cp").args(["-aL"]).arg(&base).arg(&layout));
    // A layer with odd things, and one that changes some of them and of what is below.
    let bundle = scratch.path().join("first");
    let rootfs = unpack(&layout, &bundle);
    make_odd_files(&rootfs);
    let has_getfattr = add_getfattr(&rootfs);
    let image = format!("{}:latest", layout.display());
    let repack = |bundle: &Path| {
        run(Command::new("umoci")
            .args(["repack", "--refresh-bundle", "--image", &image])
            .arg(bundle));
    };
    repack(&bundle);
    fs::remove_dir_all(rootfs.join("usr/share/doc")).expect("whiteout");
    fs::remove_file(rootfs.join("odd/sticky")).expect("whiteout");
    fs::remove_dir_all(rootfs.join("var/cache")).expect("opaque");
    fs::create_dir_all(rootfs.join("var/cache/new")).expect("opaque");
    fs::remove_file(rootfs.join("odd/dangling")).expect("link");
    fs::create_dir(rootfs.join("odd/dangling")).expect("a directory in place of a link");
    fs::hard_link(rootfs.join("odd/capable"), rootfs.join("odd/capable too")).expect("hard link");
    repack(&bundle);

    let rootfs = unpack(&layout, &scratch.path().join("second"));
    let outcome = hull.run(&["import", &format!("oci:{image}"), "odd"]);
    assert_eq!(outcome.code(), 0, "{outcome:?}");
    compare_trees(&hull, "odd", &rootfs);
    if has_getfattr {
        let guest = attributes(&in_the_guest(&hull, "odd", PROBE_ATTRIBUTES));
        let host = attributes(&on_the_host(&rootfs, PROBE_ATTRIBUTES));
        assert!(host.len() >= 3, "{host:?}");
        assert_eq!(guest, host);
    }
    assert_eq!(hull.settle(), Vec::<String>::new());
}

#[test]
fn a_guest_reads_a_file_of_more_than_four_gigabytes_of_holes() {
    if !can_compare() {
        return;
    }
    let Some(hull) = Hull::with_images(&[]) else {
        return;
    };
    let scratch = tempfile::tempdir().expect("scratch directory");
    let base = PathBuf::from(std::env::var_os("HULL_TEST_IMAGES").expect("checked")).join("busybox");
    let layout = scratch.path().join("layout");
    run(Command::new("cp").args(["-aL"]).arg(&base).arg(&layout));
    let size = (5_u64 << 30) + 12_345;
    sparse(&scratch.path().join("huge"), size);
    let tar = scratch.path().join("layer.tar");
    run(Command::new("tar")
        .args(["--sparse", "--format=pax", "-cf"])
        .arg(&tar)
        .arg("-C")
        .arg(scratch.path())
        .arg("huge"));
    assert!(
        fs::metadata(&tar).expect("archive").size() < 1 << 20,
        "tar found no holes"
    );
    let image = format!("{}:latest", layout.display());
    run(Command::new("umoci")
        .args(["raw", "add-layer", "--image", &image])
        .arg(&tar));
    let outcome = hull.run(&["import", &format!("oci:{image}"), "huge"]);
    assert_eq!(outcome.code(), 0, "{outcome:?}");
    let script = format!(
        "cd /; stat -c %s huge; head -c 9 huge; echo; tail -c 3 huge; echo; dd if=huge bs=1 skip={} count=100 2>/dev/null | tr '\\0' z",
        size - 100_000_000
    );
    let text = in_the_guest(&hull, "huge", &script);
    let expected = format!("{size}\nbeginning\nend\n{}", "z".repeat(100));
    assert_eq!(String::from_utf8_lossy(&text), expected);
}
