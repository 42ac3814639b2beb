use std::{
    fs,
    os::unix::fs::{MetadataExt as _, PermissionsExt as _, symlink},
};

use tar::{Builder, Header};

use super::*;

/// A header with any name at all: the crate's own setters refuse the hostile ones.
fn header(name: &str, kind: EntryType, size: u64) -> Header {
    let mut header = Header::new_gnu();
    header.as_gnu_mut().unwrap().name[..name.len()].copy_from_slice(name.as_bytes());
    header.set_entry_type(kind);
    header.set_size(size);
    header.set_mode(if kind == EntryType::Directory {
        0o750
    } else {
        0o4640
    });
    header.set_uid(12_345);
    header.set_gid(12_345);
    header.set_mtime(1_000_000_000);
    header
}

fn file(builder: &mut Builder<Vec<u8>>, name: &str, content: &str) {
    let mut header = header(name, EntryType::Regular, content.len() as u64);
    header.set_cksum();
    builder.append(&header, content.as_bytes()).unwrap();
}

fn other(builder: &mut Builder<Vec<u8>>, name: &str, kind: EntryType, link: &str) {
    let mut header = header(name, kind, 0);
    header.as_gnu_mut().unwrap().linkname[..link.len()].copy_from_slice(link.as_bytes());
    header.set_cksum();
    builder.append(&header, io::empty()).unwrap();
}

struct World {
    scratch: tempfile::TempDir,
}

impl World {
    fn new() -> Self {
        let scratch = tempfile::tempdir().unwrap();
        fs::create_dir(scratch.path().join("in")).unwrap();
        fs::create_dir(scratch.path().join("outside")).unwrap();
        fs::write(scratch.path().join("outside/secret"), "untouched").unwrap();
        Self { scratch }
    }

    fn inside(&self, path: &str) -> PathBuf {
        self.scratch.path().join("in").join(path)
    }

    fn unpack(&self, name: Option<&str>, archive: Builder<Vec<u8>>) -> Result<Vec<PathBuf>, UnpackError> {
        let bytes = archive.into_inner().unwrap();
        let destination = Destination::open(&self.inside(""), name.map(OsString::from), false).unwrap();
        let result = destination.unpack(bytes.as_slice());
        let outside: Vec<_> = fs::read_dir(self.scratch.path().join("outside"))
            .unwrap()
            .flatten()
            .map(|entry| entry.file_name())
            .collect();
        assert_eq!(outside, ["secret"], "something was made outside");
        assert_eq!(
            fs::read_to_string(self.scratch.path().join("outside/secret")).unwrap(),
            "untouched"
        );
        let top: Vec<_> = fs::read_dir(self.scratch.path()).unwrap().collect();
        assert_eq!(top.len(), 2, "something was made outside");
        result
    }
}

#[test]
fn tree_arrives_under_its_new_name_as_the_callers_own() {
    let world = World::new();
    let mut archive = Builder::new(Vec::new());
    other(&mut archive, "etc/", EntryType::Directory, "");
    file(&mut archive, "etc/conf", "text");
    other(&mut archive, "etc/sub/", EntryType::Directory, "");
    other(&mut archive, "etc/link", EntryType::Symlink, "conf");
    other(&mut archive, "etc/hard", EntryType::Link, "etc/conf");
    other(&mut archive, "etc/pipe", EntryType::Fifo, "");
    let skipped = world.unpack(Some("copy"), archive).unwrap();
    assert!(skipped.is_empty());
    assert_eq!(fs::read_to_string(world.inside("copy/conf")).unwrap(), "text");
    assert_eq!(fs::read_to_string(world.inside("copy/link")).unwrap(), "text");
    let conf = fs::metadata(world.inside("copy/conf")).unwrap();
    let hard = fs::metadata(world.inside("copy/hard")).unwrap();
    assert_eq!(conf.ino(), hard.ino());
    // Neither set-id bits nor foreign owners.
    assert_eq!(conf.permissions().mode() & 0o7777, 0o640);
    assert_eq!(conf.uid(), rustix::process::getuid().as_raw());
    assert_eq!(conf.mtime(), 1_000_000_000);
    let directory = fs::metadata(world.inside("copy")).unwrap();
    assert_eq!(
        (directory.permissions().mode() & 0o7777, directory.mtime()),
        (0o750, 1_000_000_000)
    );
}

#[test]
fn content_goes_into_the_directory_itself_and_leaves_its_mode_alone() {
    let world = World::new();
    let before = fs::metadata(world.inside("")).unwrap().permissions().mode();
    let mut archive = Builder::new(Vec::new());
    other(&mut archive, "etc/", EntryType::Directory, "");
    file(&mut archive, "etc/conf", "text");
    world.unpack(None, archive).unwrap();
    assert_eq!(fs::read_to_string(world.inside("conf")).unwrap(), "text");
    assert_eq!(
        fs::metadata(world.inside("")).unwrap().permissions().mode(),
        before
    );
}

#[test]
fn names_that_lead_out_are_refused() {
    for name in ["../escape", "a/../../escape", "a/.."] {
        let world = World::new();
        let mut archive = Builder::new(Vec::new());
        other(&mut archive, "a/", EntryType::Directory, "");
        file(&mut archive, name, "x");
        assert!(
            matches!(world.unpack(Some("a"), archive), Err(UnpackError::Escape { .. })),
            "{name}"
        );
    }
    // An absolute name is one beside the archive's root.
    let world = World::new();
    let mut archive = Builder::new(Vec::new());
    other(&mut archive, "a/", EntryType::Directory, "");
    file(&mut archive, "/etc/escape", "x");
    assert!(world.unpack(Some("a"), archive).is_err());
}

#[test]
fn nothing_is_written_through_a_link_of_the_archive() {
    for target in ["../../outside", "/", "..", "."] {
        let world = World::new();
        let mut archive = Builder::new(Vec::new());
        other(&mut archive, "a/", EntryType::Directory, "");
        other(&mut archive, "a/link", EntryType::Symlink, target);
        file(&mut archive, "a/link/secret", "changed");
        assert!(
            matches!(world.unpack(Some("a"), archive), Err(UnpackError::Link { .. })),
            "{target}"
        );
    }
}

#[test]
fn link_in_the_place_of_a_file_is_replaced_and_not_followed() {
    let world = World::new();
    let mut archive = Builder::new(Vec::new());
    other(&mut archive, "a/", EntryType::Directory, "");
    other(&mut archive, "a/file", EntryType::Symlink, "../../outside/secret");
    file(&mut archive, "a/file", "changed");
    world.unpack(Some("a"), archive).unwrap();
    assert_eq!(fs::read_to_string(world.inside("a/file")).unwrap(), "changed");
}

#[test]
fn link_that_was_there_before_is_not_followed_either() {
    let world = World::new();
    symlink("../outside", world.inside("a")).unwrap();
    let mut archive = Builder::new(Vec::new());
    other(&mut archive, "a/", EntryType::Directory, "");
    file(&mut archive, "a/secret", "changed");
    assert!(world.unpack(Some("a"), archive).is_err());
}

#[test]
fn hard_links_stay_inside_and_are_never_written_into() {
    let world = World::new();
    let mut archive = Builder::new(Vec::new());
    other(&mut archive, "a/", EntryType::Directory, "");
    other(&mut archive, "a/link", EntryType::Symlink, "../../outside");
    other(&mut archive, "a/hard", EntryType::Link, "a/link/secret");
    assert!(world.unpack(Some("a"), archive).is_err());

    let world = World::new();
    fs::create_dir(world.inside("a")).unwrap();
    fs::write(world.inside("a/mine"), "mine").unwrap();
    let mut archive = Builder::new(Vec::new());
    other(&mut archive, "a/", EntryType::Directory, "");
    other(&mut archive, "a/hard", EntryType::Link, "a/mine");
    file(&mut archive, "a/hard", "changed");
    world.unpack(Some("a"), archive).unwrap();
    assert_eq!(fs::read_to_string(world.inside("a/mine")).unwrap(), "mine");
}

#[test]
fn device_nodes_are_left_out_and_told() {
    let world = World::new();
    let mut archive = Builder::new(Vec::new());
    other(&mut archive, "dev/", EntryType::Directory, "");
    other(&mut archive, "dev/sda", EntryType::Block, "");
    other(&mut archive, "dev/null", EntryType::Char, "");
    let skipped = world.unpack(Some("dev"), archive).unwrap();
    assert_eq!(skipped, [PathBuf::from("dev/sda"), PathBuf::from("dev/null")]);
    assert!(!world.inside("dev/sda").exists());
}

#[test]
fn directory_and_file_do_not_replace_each_other() {
    let world = World::new();
    fs::create_dir(world.inside("x")).unwrap();
    let mut archive = Builder::new(Vec::new());
    file(&mut archive, "x", "file");
    let error = world.unpack(Some("x"), archive).unwrap_err();
    assert!(matches!(error, UnpackError::DirectoryInTheWay { .. }), "{error}");

    let world = World::new();
    fs::write(world.inside("x"), "file").unwrap();
    let mut archive = Builder::new(Vec::new());
    other(&mut archive, "x/", EntryType::Directory, "");
    let error = world.unpack(Some("x"), archive).unwrap_err();
    assert!(matches!(error, UnpackError::FileInTheWay { .. }), "{error}");
}

#[test]
fn archive_cut_short_is_an_error() {
    let world = World::new();
    let mut archive = Builder::new(Vec::new());
    file(&mut archive, "x", &"y".repeat(100_000));
    let bytes = archive.into_inner().unwrap();
    let destination = Destination::open(&world.inside(""), Some("x".into()), false).unwrap();
    assert!(destination.unpack(&bytes[..50_000]).is_err());
}
