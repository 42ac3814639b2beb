//! The root file system a container sees, compared file by file with what `umoci unpack` makes of the same image.
//!
//! Needs root for mounting; says so and passes where it can't.

mod support;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{SystemTime, UNIX_EPOCH};

use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use rootfs_builder::{ImageSource, NoProgress, PreparedImage, Store};
use support::archive::{Layout, Member, archive};
use support::{Described, Mounted, cannot_mount, describe, differences, has, run};

/// What the image becomes in a guest: its layers mounted and joined.
fn ours(image: &PreparedImage, scratch: &Path) -> BTreeMap<String, Described> {
    let layers: Vec<Mounted> = image
        .layers
        .iter()
        .enumerate()
        .map(|(index, layer)| {
            if has("fsck.erofs") {
                run(Command::new("fsck.erofs").arg("--extract").arg(&layer.path));
            }
            Mounted::erofs(&layer.path, &scratch.join(format!("layer-{index}")))
        })
        .collect();
    let overlay = Mounted::overlay(&layers, scratch, &scratch.join("merged"));
    let mut tree = describe(&overlay.0);
    // overlayfs shows its upper directory's root; the store says what that must get.
    if let Some(root) = tree.get_mut(".") {
        root.mode = 0o040_000 | u32::from(image.root.mode);
        (root.uid, root.gid) = (image.root.uid, image.root.gid);
        // umoci doesn't restore the root's time.
        root.mtime = (0, 0);
        root.xattrs.clear();
    }
    tree
}

fn theirs(layout: &Path, scratch: &Path) -> BTreeMap<String, Described> {
    let bundle = scratch.join("bundle");
    run(Command::new("umoci")
        .args(["unpack", "--image", &format!("{}:latest", layout.display())])
        .arg(&bundle));
    described_by_umoci(&bundle)
}

fn described_by_umoci(bundle: &Path) -> BTreeMap<String, Described> {
    let mut tree = describe(&bundle.join("rootfs"));
    if let Some(root) = tree.get_mut(".") {
        root.mtime = (0, 0);
        root.xattrs.clear();
    }
    tree
}

fn import(layout: &Path, scratch: &Path, mounts_max: usize) -> PreparedImage {
    let store = Store::open(&scratch.join("store"))
        .expect("store")
        .with_mounts_max(mounts_max);
    let source = ImageSource::OciLayout {
        dir: layout.to_path_buf(),
        tag: Some("latest".to_owned()),
    };
    store
        .import(&source, Some("test"), &NoProgress)
        .unwrap_or_else(|error| panic!("{error}: {error:?}"))
}

/// umoci leaves the moment of unpacking on directories that have no entry, and on some that have but got others below: there
/// is nothing to compare these times with.
fn forget_unpacking_times(
    ours: &mut BTreeMap<String, Described>,
    theirs: &mut BTreeMap<String, Described>,
    began: SystemTime,
) {
    let began = began
        .duration_since(UNIX_EPOCH)
        .expect("a clock after 1970")
        .as_secs();
    for (name, described) in theirs {
        if described.mode & 0o170_000 == 0o040_000
            && described.mtime.0 >= i64::try_from(began).expect("a sane clock")
        {
            described.mtime = (0, 0);
            if let Some(ours) = ours.get_mut(name) {
                ours.mtime = (0, 0);
            }
        }
    }
}

fn images_dir() -> Option<PathBuf> {
    if let Some(dir) = std::env::var_os("HULL_TEST_IMAGES") {
        return Some(dir.into());
    }
    let cache = std::env::var_os("XDG_CACHE_HOME")
        .map(PathBuf::from)
        .or_else(|| Some(PathBuf::from(std::env::var_os("HOME")?).join(".cache")))?;
    Some(cache.join("hull/images")).filter(|dir| dir.is_dir())
}

#[test]
fn real_images_look_like_umoci_unpacks_them() {
    if cannot_mount() || !has("umoci") {
        return;
    }
    let Some(images) = images_dir() else {
        println!("skipped: no images; `cargo xtask images` makes them");
        return;
    };
    for name in [
        "busybox",
        "debian-minimal",
        "redis",
        "python",
        "node",
        "postgres",
        "nginx",
        "gcc",
    ] {
        let layout = images.join(name);
        if !layout.join("index.json").exists() {
            println!("skipped: no image {name}");
            continue;
        }
        let scratch = tempfile::tempdir().expect("scratch directory");
        let ours = ours(&import(&layout, scratch.path(), 12), scratch.path());
        let theirs = theirs(&layout, scratch.path());
        let differences = differences(&ours, &theirs);
        assert!(differences.is_empty(), "{name}: {}", differences.join("\n"));
        assert!(theirs.len() > 100, "{name} has {} files", theirs.len());
    }
}

/// Compare one image made of these layers.
fn compare(layers: &[Vec<Member>]) -> Result<(), String> {
    let began = SystemTime::now();
    let scratch = tempfile::tempdir().expect("scratch directory");
    let mut layout = Layout::new(&scratch.path().join("layout"));
    for members in layers {
        layout.layer(&archive(members));
    }
    layout.write();
    let mut theirs = theirs(&layout.dir, scratch.path());
    for mounts_max in [12, 2, 1] {
        let scratch = scratch.path().join(mounts_max.to_string());
        let image = import(&layout.dir, &scratch, mounts_max);
        assert!(image.layers.len() <= mounts_max);
        let mut ours = ours(&image, &scratch);
        forget_unpacking_times(&mut ours, &mut theirs, began);
        let differences = differences(&ours, &theirs);
        if !differences.is_empty() {
            return Err(format!("at most {mounts_max} mounts: {}", differences.join("\n")));
        }
    }
    Ok(())
}

#[test]
fn everything_a_layer_can_hold_survives() {
    if cannot_mount() || !has("umoci") {
        return;
    }
    let capability = [1, 0, 0, 2, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, b'\n'];
    // Owner, user 1000, group, mask, others.
    let entries: [(u8, u8, u32); 5] = [
        (1, 7, u32::MAX),
        (2, 6, 1000),
        (4, 5, u32::MAX),
        (16, 5, u32::MAX),
        (32, 5, u32::MAX),
    ];
    let entry =
        |(tag, rights, id): (u8, u8, u32)| [vec![tag, 0, rights, 0], id.to_le_bytes().to_vec()].concat();
    let acl = [vec![2, 0, 0, 0], entries.into_iter().flat_map(entry).collect()].concat();
    let long = "d".repeat(200);
    let mut members = vec![
        Member::dir("./").mode(0o755).mtime(1_600_000_000, 0),
        Member::dir("etc/")
            .mode(0o750)
            .owner(70_000, 4_000_000_000)
            .mtime(1_500_000_000, 123_456_789),
        Member::file("etc/setuid", b"#!/bin/sh\n")
            .mode(0o6755)
            .owner(0, 65_534),
        Member::file("etc/old", b"x").mtime(-1, 500_000_000),
        Member::file("etc/capable", b"elf").xattr("security.capability", capability),
        Member::file("etc/attributes", b"")
            .xattr("user.a", b"1\n2=3\0")
            .xattr("user.empty", b"")
            .xattr("trusted.t", [7; 1000]),
        Member::file("etc/acl", b"acl")
            .xattr("system.posix_acl_access", acl)
            .mode(0o755),
        Member::hard_link("etc/second-name", "etc/capable"),
        Member::symlink("etc/link", "../../../outside")
            .owner(12, 34)
            .mtime(5, 6),
        Member::hard_link("etc/link-to-link", "etc/link"),
        Member::symlink("etc/long-link", "t/".repeat(2047)),
        Member::symlink("etc/middle-link", "m".repeat(2049)),
        Member::dir("dev").mode(0o1777),
        Member::device("dev/null", b'3', (1, 3)).mode(0o666),
        Member::device("dev/loop", b'4', (7, 300)).mode(0o660).owner(0, 6),
        Member::new(b'6', "dev/fifo").mode(0o600),
        Member::dir("odd"),
        Member::file(
            [b"odd/".as_slice(), &[0xff, 0xfe, b'\n', b' ', b'"']].concat(),
            b"odd",
        ),
        Member::file(format!("odd/{}", "n".repeat(255)), b"long"),
        Member::file("odd/-before-dot", b"").mode(0),
        Member::file("odd/...", b"dots"),
        Member::dir(format!("{long}/{long}/{long}/{long}/")),
        Member::file(format!("{long}/{long}/{long}/{long}/deep"), b"deep"),
    ];
    for size in [
        1, 2047, 2048, 2049, 4095, 4096, 4097, 6143, 6144, 6145, 65_535, 65_536, 65_537, 200_000,
    ] {
        let content: Vec<u8> = (0..size).map(|at: u32| at.to_le_bytes()[0] | 1).collect();
        members.push(Member::file(format!("size-{size}"), content).xattr("user.size", vec![b'x'; 40]));
    }
    let holes: Vec<u8> = [
        vec![0; 70_000],
        vec![1; 5],
        vec![0; 300_000],
        vec![2; 70_000],
        vec![0; 65_600],
    ]
    .concat();
    members.push(Member::file("holes", holes));
    members.push(Member::file("zeroes", vec![0; 1 << 20]));
    members.push(Member::dir("many"));
    members.extend((0..3000).map(|index| {
        Member::file(
            format!("many/file-{index:0>width$}", width = index % 40),
            [b'c'; 3],
        )
    }));
    compare(&[members]).unwrap_or_else(|text| panic!("{text}"));
}

#[test]
fn layers_change_what_is_below_as_umoci_does() {
    if cannot_mount() || !has("umoci") {
        return;
    }
    let bottom = vec![
        Member::dir("./"),
        Member::dir("tmp")
            .mode(0o1777)
            .owner(5, 6)
            .xattr("user.kept", b"yes"),
        Member::dir("usr"),
        Member::dir("usr/lib").mode(0o711),
        Member::symlink("lib", "usr/lib"),
        Member::symlink("absolute", "/usr/lib"),
        Member::symlink("up", "../../../usr"),
        Member::file("usr/lib/below", b"below"),
        Member::dir("opaque"),
        Member::file("opaque/hidden", b"hidden"),
        Member::dir("opaque/sub"),
        Member::file("opaque/sub/hidden", b"hidden"),
        Member::dir("gone"),
        Member::file("gone/x", b"x"),
        Member::file("gone-file", b"x"),
        Member::dir("becomes-file"),
        Member::file("becomes-file/x", b"x"),
        Member::file("becomes-dir", b"x"),
        Member::file("linked", vec![3; 9000])
            .mode(0o4755)
            .xattr("user.l", b"1"),
        Member::dir("mixed"),
        Member::file("mixed/a", b"lower a"),
        Member::file("mixed/b", b"lower b"),
        Member::dir("recreated"),
        Member::file("recreated/lower", b"x"),
        Member::file("replaced", b"old"),
    ];
    let middle = vec![
        // Nothing says what /tmp is like: it stays as it was.
        Member::file("tmp/new", b"new"),
        // Through links of the layer below.
        Member::file("lib/through-link", b"1"),
        Member::file("absolute/through-absolute", b"2"),
        Member::file("up/lib/through-up", b"3"),
        // Opaque, with files of this layer before and after the mark.
        Member::file("opaque/before", b"before"),
        Member::file("opaque/.wh..wh..opq", b""),
        Member::file("opaque/after", b"after"),
        Member::file(".wh.gone", b""),
        Member::file(".wh.gone-file", b""),
        Member::file("becomes-file", b"now a file"),
        Member::dir("becomes-dir"),
        Member::file("becomes-dir/inside", b"inside"),
        // A second name for a file of the layer below.
        Member::hard_link("second", "linked"),
        // A whiteout and a file of the same name, in both orders.
        Member::file("mixed/a", b"upper a"),
        Member::file("mixed/.wh.a", b""),
        Member::file("mixed/.wh.b", b""),
        Member::file("mixed/b", b"upper b"),
        // Twice in one archive.
        Member::file("replaced", b"first"),
        Member::file("replaced", b"second").mode(0o600),
        // Removed and made again.
        Member::file(".wh.recreated", b""),
        Member::dir("recreated").mode(0o700),
        Member::file("recreated/upper", b"y"),
        // Nothing to hide.
        Member::file("nowhere/.wh.nothing", b""),
        Member::file("new/implied/parents", b"z"),
    ];
    let top = vec![
        Member::file("recreated/.wh.upper", b""),
        Member::file("tmp/newer", b"newer"),
        Member::dir("gone").mode(0o500),
        Member::symlink("becomes-file", "elsewhere"),
        Member::dir("lib"),
    ];
    for layers in [
        vec![bottom.clone()],
        vec![bottom.clone(), middle.clone()],
        vec![bottom, middle, top],
    ] {
        compare(&layers).unwrap_or_else(|text| panic!("{} layers: {text}", layers.len()));
    }
}

/// A few names, so that members often meet.
/// As many layers as overlayfs, and so other tools, can take.
#[test]
fn an_image_of_127_layers_looks_like_umoci_unpacks_it() {
    if cannot_mount() || !has("umoci") {
        return;
    }
    let layers: Vec<Vec<Member>> = (0..127)
        .map(|layer: usize| {
            let mut members = vec![
                Member::dir("d"),
                Member::dir("e"),
                Member::file(format!("d/{layer}"), vec![1; 50 * layer]).owner(layer as u64, 7),
                Member::file("d/last", layer.to_string()),
            ];
            if layer > 5 {
                // Across layers, merged ones and others.
                members.push(Member::hard_link(
                    format!("d/link-{layer}"),
                    format!("d/{}", layer - 1),
                ));
            }
            if layer % 10 == 9 {
                members.push(Member::file(format!("d/.wh.{}", layer - 5), b""));
            }
            if layer % 40 == 39 {
                members.push(Member::file("e/.wh..wh..opq", b""));
            }
            members.push(Member::file(format!("e/{layer}"), b"e"));
            members
        })
        .collect();
    compare(&layers).unwrap_or_else(|differences| panic!("{differences}"));
}

fn name() -> impl Strategy<Value = String> {
    prop_oneof!["[ab]", "[abc]", Just("-x".to_owned()), Just("n".repeat(120))]
}

fn path() -> impl Strategy<Value = String> {
    proptest::collection::vec(name(), 1..4).prop_map(|names| names.join("/"))
}

fn content() -> impl Strategy<Value = Vec<u8>> {
    prop_oneof![
        Just(Vec::new()),
        proptest::collection::vec(any::<u8>(), 1..5000),
        (1_usize..300_000, any::<u8>()).prop_map(|(len, byte)| vec![byte; len]),
        (0_usize..200_000, 1_usize..100_000).prop_map(|(zeroes, ones)| [
            vec![0; zeroes],
            vec![1; ones],
            vec![0; zeroes]
        ]
        .concat()),
    ]
}

/// Directories mostly come before what is in them, sometimes not at all.
fn member() -> impl Strategy<Value = Member> {
    let kind = prop_oneof![
        4 => (path(), content()).prop_map(|(path, content)| Member::file(path, content)),
        4 => path().prop_map(Member::dir),
        1 => (path(), path()).prop_map(|(path, target)| Member::symlink(path, target)),
        1 => (path(), path()).prop_map(|(path, target)| Member::hard_link(path, target)),
        1 => path().prop_map(|path| Member::new(b'6', path)),
        1 => (path(), 1_u32..200, 0_u32..300).prop_map(|(path, major, minor)| Member::device(path, b'3', (major, minor))),
        1 => (proptest::option::of(path()), name()).prop_map(|(parent, name)| {
            Member::file(parent.map_or_else(|| format!(".wh.{name}"), |parent| format!("{parent}/.wh.{name}")), b"")
        }),
        1 => path().prop_map(|path| Member::file(format!("{path}/.wh..wh..opq"), b"")),
    ];
    let xattrs = proptest::collection::btree_map(
        "user\\.[a-z]{1,12}",
        proptest::collection::vec(any::<u8>(), 0..40),
        0..3,
    );
    (
        kind,
        0_u32..0o10000,
        any::<u16>(),
        0_i64..1_700_000_000,
        0_u32..1_000_000_000,
        xattrs,
    )
        .prop_map(|(mut member, mode, uid, secs, nanos, xattrs)| {
            // Linux has user attributes on files and directories only.
            if matches!(member.kind, b'0' | b'5') {
                member.xattrs = xattrs
                    .into_iter()
                    .map(|(name, value)| (name.into_bytes(), value))
                    .collect();
            }
            member
                .mode(mode)
                .owner(u64::from(uid) * 3, u64::from(uid))
                .mtime(secs, nanos)
        })
}

/// Both must agree on whether an image is acceptable, and on every file of it.
#[test]
fn generated_images_look_like_umoci_unpacks_them() {
    if cannot_mount() || !has("umoci") {
        return;
    }
    let cases = std::env::var("HULL_PROPTEST_CASES")
        .ok()
        .and_then(|text| text.parse().ok())
        .unwrap_or(15);
    let layers = proptest::collection::vec(proptest::collection::vec(member(), 1..14), 1..6);
    let image = (layers, 1_usize..6);
    let config = Config {
        cases,
        failure_persistence: None,
        ..Config::default()
    };
    let result = TestRunner::new(config).run(&image, |(layers, mounts_max)| {
        let began = SystemTime::now();
        let scratch = tempfile::tempdir().expect("scratch directory");
        let mut layout = Layout::new(&scratch.path().join("layout"));
        layers.iter().for_each(|members| {
            layout.layer(&archive(members));
        });
        layout.write();
        let image = format!("{}:latest", layout.dir.display());
        let output = Command::new("umoci")
            .args(["unpack", "--image", &image])
            .arg(scratch.path().join("bundle"))
            .output();
        let accepted = output.expect("umoci").status.success();
        let store = Store::open(&scratch.path().join("store"))
            .expect("store")
            .with_mounts_max(mounts_max);
        let source = ImageSource::OciLayout {
            dir: layout.dir.clone(),
            tag: None,
        };
        let imported = store.import(&source, Some("test"), &NoProgress);
        let image = match imported {
            Ok(image) if accepted => image,
            Err(_) if !accepted => return Ok(()),
            Ok(_) => return Err(TestCaseError::fail("umoci refuses what we accept")),
            Err(error) => {
                return Err(TestCaseError::fail(format!(
                    "we refuse what umoci accepts: {error:?}"
                )));
            }
        };
        let mut ours = ours(&image, scratch.path());
        let mut theirs = described_by_umoci(&scratch.path().join("bundle"));
        forget_unpacking_times(&mut ours, &mut theirs, began);
        // A file of a lower layer that gets one more name is copied up with that name alone, as overlayfs does.
        for described in ours.values_mut().chain(theirs.values_mut()) {
            described.same_as = None;
        }
        let differences = differences(&ours, &theirs);
        if differences.is_empty() {
            Ok(())
        } else {
            Err(TestCaseError::fail(differences.join("\n")))
        }
    });
    if let Err(error) = result {
        panic!("{error}");
    }
}
