use std::ffi::CString;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::{fs, path::PathBuf};

use fuse_backend_rs::abi::fuse_abi::CreateIn;
use fuse_backend_rs::api::filesystem::{FileSystem, GetxattrReply, ListxattrReply, SetattrValid};

use super::*;
use crate::devices::virtio::fs::tests::{World, open_path};

fn name(text: &str) -> CString {
    CString::new(text).unwrap()
}

fn small() -> Surroundings {
    Surroundings {
        descriptor_prefix: "/proc/thread-self/fd/",
        changes_user: false,
        limits: Limits {
            inodes: 64,
            descriptors: 4,
        },
        handles: 4,
    }
}

struct Shared {
    world: World,
    fs: Passthrough,
    context: Context,
    root: u64,
}

impl Shared {
    fn new(surroundings: Surroundings) -> Self {
        Self::with(surroundings, false)
    }

    fn with(surroundings: Surroundings, exclusive: bool) -> Self {
        let world = World::new();
        let share = Share {
            root: world.root(),
            exclusive,
            marks: None,
        };
        let fs = Passthrough::new(vec![share], surroundings, Arc::default()).unwrap();
        let context = Context::new();
        let root = fs.lookup(&context, ROOT, &name("0")).unwrap().inode;
        Self {
            world,
            fs,
            context,
            root,
        }
    }

    fn look_up(&self, parent: u64, text: &str) -> io::Result<Entry> {
        self.fs.lookup(&self.context, parent, &name(text))
    }

    fn open(&self, inode: u64, flags: i32) -> io::Result<u64> {
        let opened = self.fs.open(&self.context, inode, flags.unsigned_abs(), 0)?;
        Ok(opened.0.unwrap())
    }

    fn path(&self, text: &str) -> PathBuf {
        self.world.share().join(text)
    }
}

fn number(result: io::Result<impl Sized>) -> i32 {
    result.err().and_then(|error| error.raw_os_error()).unwrap_or(0)
}

#[test]
fn descriptors_are_bounded_and_closed_ones_are_opened_again() {
    let shared = Shared::new(small());
    let mut inodes = Vec::new();
    for index in 0..20 {
        let text = format!("d{index}");
        fs::create_dir(shared.path(&text)).unwrap();
        fs::write(shared.path(&text).join("inner"), text.as_bytes()).unwrap();
        inodes.push(shared.look_up(shared.root, &text).unwrap().inode);
    }
    for _ in 0..3 {
        for inode in &inodes {
            let inner = shared.look_up(*inode, "inner").unwrap();
            let (stat, _) = shared.fs.getattr(&shared.context, inner.inode, None).unwrap();
            assert!(stat.st_size >= 2);
            assert!(shared.fs.state().inodes.counts().1 <= 4);
        }
    }
}

#[test]
fn inodes_and_handles_are_bounded_with_an_error_for_the_guest() {
    let shared = Shared::new(small());
    let file = shared.look_up(shared.root, "file").unwrap().inode;
    let handles: Vec<u64> = (0..4)
        .map(|_| shared.open(file, libc::O_RDONLY).unwrap())
        .collect();
    assert_eq!(number(shared.open(file, libc::O_RDONLY)), libc::ENFILE);
    assert_eq!(
        number(shared.fs.opendir(&shared.context, shared.root, 0)),
        libc::ENFILE
    );
    shared
        .fs
        .release(&shared.context, file, 0, handles[0], false, false, None)
        .unwrap();
    shared.open(file, libc::O_RDONLY).unwrap();
    let mut last = 0;
    for index in 0..80 {
        fs::write(shared.path(&format!("f{index}")), "").unwrap();
        last = number(shared.look_up(shared.root, &format!("f{index}")));
    }
    assert_eq!(last, libc::ENFILE);
    // What is forgotten makes room.
    let known = shared.look_up(shared.root, "f0").unwrap().inode;
    shared.fs.forget(&shared.context, known, 2);
    shared.look_up(shared.root, "f79").unwrap();
}

#[test]
fn forgotten_inodes_are_gone_and_their_directories_after_them() {
    let shared = Shared::new(small());
    fs::create_dir_all(shared.path("a/b/c")).unwrap();
    let a = shared.look_up(shared.root, "a").unwrap().inode;
    let b = shared.look_up(a, "b").unwrap().inode;
    let c = shared.look_up(b, "c").unwrap().inode;
    shared.fs.batch_forget(&shared.context, vec![(a, 1), (b, 1)]);
    // They are still needed to find what is below them.
    shared.fs.getattr(&shared.context, c, None).unwrap();
    shared.fs.forget(&shared.context, c, u64::MAX);
    assert_eq!(shared.fs.state().inodes.counts().0, 1);
    assert_eq!(number(shared.fs.getattr(&shared.context, c, None)), libc::ESTALE);
    assert_eq!(number(shared.fs.getattr(&shared.context, a, None)), libc::ESTALE);
    // The share's root stays, whatever a guest forgets.
    shared.fs.forget(&shared.context, shared.root, u64::MAX);
    shared.look_up(shared.root, "a").unwrap();
}

#[test]
fn what_was_looked_up_is_held_for_a_moment_while_others_replace_it() {
    let shared = Shared::new(small());
    let file = shared.look_up(shared.root, "file").unwrap().inode;
    fs::write(shared.path("new"), "another").unwrap();
    fs::rename(shared.path("new"), shared.path("file")).unwrap();
    let (stat, _) = shared.fs.getattr(&shared.context, file, None).unwrap();
    assert_eq!((stat.st_nlink, stat.st_size), (0, 5));
    let now = shared.look_up(shared.root, "file").unwrap();
    assert!(now.inode != file && now.attr.st_size == 7);
}

#[test]
fn what_was_replaced_behind_the_guests_back_is_stale() {
    // Nothing is held of a share that is the guest's alone.
    let shared = Shared::with(small(), true);
    fs::create_dir(shared.path("moved")).unwrap();
    fs::write(shared.path("moved/x"), "x").unwrap();
    let moved = shared.look_up(shared.root, "moved").unwrap().inode;
    let file = shared.look_up(shared.root, "file").unwrap().inode;
    fs::rename(shared.path("moved"), shared.path("elsewhere")).unwrap();
    symlink("../outside", shared.path("moved")).unwrap();
    fs::remove_file(shared.path("file")).unwrap();
    fs::write(shared.path("file"), "another").unwrap();
    for inode in [moved, file] {
        assert_eq!(
            number(shared.fs.getattr(&shared.context, inode, None)),
            libc::ESTALE
        );
    }
    assert_eq!(number(shared.look_up(moved, "x")), libc::ESTALE);
    assert_eq!(number(shared.look_up(moved, "secret")), libc::ESTALE);
    assert_eq!(number(shared.open(file, libc::O_RDWR)), libc::ESTALE);
    // Found again where it is now, under its old number.
    assert_eq!(shared.look_up(shared.root, "elsewhere").unwrap().inode, moved);
    shared.look_up(moved, "x").unwrap();
    shared.world.assert_untouched();
}

#[test]
fn an_open_file_outlives_its_name() {
    let shared = Shared::new(small());
    let file = shared.look_up(shared.root, "file").unwrap().inode;
    let handle = shared.open(file, libc::O_RDWR).unwrap();
    shared
        .fs
        .unlink(&shared.context, shared.root, &name("file"))
        .unwrap();
    for index in 0..10 {
        // Whatever descriptors are needed for meanwhile.
        fs::create_dir(shared.path(&format!("d{index}"))).unwrap();
        let other = shared.look_up(shared.root, &format!("d{index}")).unwrap().inode;
        assert_eq!(number(shared.look_up(other, "x")), libc::ENOENT);
    }
    let (stat, _) = shared.fs.getattr(&shared.context, file, None).unwrap();
    assert_eq!((stat.st_nlink, stat.st_size), (0, 5));
    let mut wanted = attributes::root(1);
    wanted.st_mode = 0o600;
    shared
        .fs
        .setattr(&shared.context, file, wanted, None, SetattrValid::MODE)
        .unwrap();
    shared
        .fs
        .fallocate(&shared.context, file, handle, 0, 0, 4096)
        .unwrap();
    let (stat, _) = shared.fs.getattr(&shared.context, file, Some(handle)).unwrap();
    assert_eq!(stat.st_size, 4096);
}

#[test]
fn handles_serve_only_what_they_were_made_for() {
    let shared = Shared::new(small());
    let file = shared.look_up(shared.root, "file").unwrap().inode;
    let dir = shared.look_up(shared.root, "dir").unwrap().inode;
    let handle = shared.open(file, libc::O_RDWR).unwrap();
    let directory = shared.fs.opendir(&shared.context, dir, 0).unwrap().0.unwrap();
    let fsync = |inode, handle| number(shared.fs.fsync(&shared.context, inode, false, handle));
    assert_eq!(fsync(file, handle), 0);
    for (inode, handle) in [(dir, handle), (file, directory), (file, 99), (ROOT, handle)] {
        assert_eq!(fsync(inode, handle), libc::EBADF);
        let released = shared
            .fs
            .release(&shared.context, inode, 0, handle, false, false, None);
        assert_eq!(number(released), libc::EBADF);
    }
    assert_eq!(number(shared.open(dir, libc::O_RDONLY)), libc::ENXIO);
}

#[test]
fn devices_are_made_by_nobody_and_other_kinds_are() {
    let shared = Shared::new(small());
    let mknod = |text: &str, mode: u32, device: u32| {
        number(
            shared
                .fs
                .mknod(&shared.context, shared.root, &name(text), mode, device, 0),
        )
    };
    assert_eq!(mknod("null", libc::S_IFCHR | 0o666, 0x103), libc::EPERM);
    assert_eq!(mknod("disk", libc::S_IFBLK | 0o666, 0), libc::EPERM);
    assert_eq!(mknod("dir2", libc::S_IFDIR | 0o777, 0), libc::EPERM);
    for (text, kind) in [
        ("fifo", libc::S_IFIFO),
        ("socket", libc::S_IFSOCK),
        ("plain", libc::S_IFREG),
    ] {
        assert_eq!(mknod(text, kind | 0o640, 0), 0, "{text}");
        let found = fs::symlink_metadata(shared.path(text)).unwrap();
        assert_eq!(found.mode() & libc::S_IFMT, kind);
    }
    let fifo = shared.look_up(shared.root, "fifo").unwrap().inode;
    assert_eq!(number(shared.open(fifo, libc::O_RDWR)), libc::ENXIO);
}

#[test]
fn links_are_made_and_read_and_never_followed() {
    let shared = Shared::new(small());
    let made = shared
        .fs
        .symlink(
            &shared.context,
            &name("../outside/secret"),
            shared.root,
            &name("link"),
        )
        .unwrap();
    let target = shared.fs.readlink(&shared.context, made.inode).unwrap();
    assert_eq!(target, b"../outside/secret");
    assert_eq!(number(shared.open(made.inode, libc::O_RDWR)), libc::ENXIO);
    let mut attributes = attributes::root(1);
    attributes.st_mode = 0o777;
    for valid in [SetattrValid::MODE, SetattrValid::SIZE] {
        let result = shared
            .fs
            .setattr(&shared.context, made.inode, attributes, None, valid);
        assert!(number(result) != 0, "{valid:?}");
    }
    // A second name for the link itself.
    let again = shared
        .fs
        .link(&shared.context, made.inode, shared.root, &name("link2"))
        .unwrap();
    assert_eq!((again.inode, again.attr.st_nlink), (made.inode, 2));
    assert!(fs::symlink_metadata(shared.path("link2")).unwrap().is_symlink());
    // To create over a link opens nothing behind it.
    let create = CreateIn {
        flags: (libc::O_CREAT | libc::O_TRUNC | libc::O_WRONLY).unsigned_abs(),
        mode: 0o644,
        ..CreateIn::default()
    };
    let result = shared
        .fs
        .create(&shared.context, shared.root, &name("link"), create);
    assert_eq!(number(result), libc::ENXIO);
    shared.world.assert_untouched();
}

#[test]
fn attributes_are_set_exactly() {
    let shared = Shared::new(small());
    let file = shared.look_up(shared.root, "file").unwrap().inode;
    let mut wanted = attributes::root(1);
    wanted.st_mode = 0o4751;
    wanted.st_size = 3;
    (wanted.st_mtime, wanted.st_mtime_nsec) = (1_000_000_000, 123_456_789);
    (wanted.st_atime, wanted.st_atime_nsec) = (-5, 7);
    let valid = SetattrValid::MODE | SetattrValid::SIZE | SetattrValid::MTIME | SetattrValid::ATIME;
    let (stat, _) = shared
        .fs
        .setattr(&shared.context, file, wanted, None, valid)
        .unwrap();
    assert_eq!(stat.st_mode, libc::S_IFREG | 0o4751);
    assert_eq!(
        (stat.st_size, stat.st_mtime, stat.st_mtime_nsec),
        (3, 1_000_000_000, 123_456_789)
    );
    assert_eq!((stat.st_atime, stat.st_atime_nsec), (-5, 7));
    let found = fs::metadata(shared.path("file")).unwrap();
    assert_eq!((found.mode(), found.len()), (stat.st_mode, 3));
}

#[test]
fn extended_attributes_pass_but_access_control_lists_do_not() {
    let shared = Shared::new(small());
    let file = shared.look_up(shared.root, "file").unwrap().inode;
    let set = |text: &str| {
        number(
            shared
                .fs
                .setxattr(&shared.context, file, &name(text), b"value", 0),
        )
    };
    if set("user.colour") == libc::EOPNOTSUPP {
        eprintln!("skipped: the temporary folder's filesystem has no user attributes");
        return;
    }
    assert_eq!(set("system.posix_acl_access"), libc::EOPNOTSUPP);
    let GetxattrReply::Count(5) = shared
        .fs
        .getxattr(&shared.context, file, &name("user.colour"), 0)
        .unwrap()
    else {
        panic!("another size")
    };
    let small = shared.fs.getxattr(&shared.context, file, &name("user.colour"), 2);
    assert_eq!(number(small), libc::ERANGE);
    let ListxattrReply::Names(names) = shared.fs.listxattr(&shared.context, file, 4096).unwrap() else {
        panic!("no names")
    };
    assert!(names.split(|byte| *byte == 0).any(|text| text == b"user.colour"));
}

#[test]
fn directories_are_listed_whole_in_any_number_of_pieces() {
    let shared = Shared::new(small());
    for index in 0..500 {
        fs::write(shared.path(&format!("entry-{index:03}")), "").unwrap();
    }
    let handle = shared
        .fs
        .opendir(&shared.context, shared.root, 0)
        .unwrap()
        .0
        .unwrap();
    let mut names = Vec::new();
    let mut offset = 0;
    loop {
        let mut left = 7;
        let before = names.len();
        shared
            .fs
            .readdir(&shared.context, shared.root, handle, 4096, offset, &mut |entry| {
                if left == 0 {
                    return Ok(0);
                }
                left -= 1;
                offset = entry.offset;
                names.push(String::from_utf8(entry.name.to_vec()).unwrap());
                Ok(1)
            })
            .unwrap();
        if names.len() == before {
            break;
        }
    }
    names.sort();
    // With `.`, `..`, `dir` and `file`.
    assert_eq!(names.len(), 504);
    names.dedup();
    assert_eq!(names.len(), 504);
}

#[test]
fn renames_keep_what_is_known_together() {
    let shared = Shared::new(small());
    fs::create_dir_all(shared.path("a/deep")).unwrap();
    fs::write(shared.path("a/deep/file"), "deep").unwrap();
    let a = shared.look_up(shared.root, "a").unwrap().inode;
    let deep = shared.look_up(a, "deep").unwrap().inode;
    let file = shared.look_up(deep, "file").unwrap().inode;
    shared
        .fs
        .rename(
            &shared.context,
            shared.root,
            &name("a"),
            shared.root,
            &name("b"),
            0,
        )
        .unwrap();
    for index in 0..20 {
        // Others need the descriptors meanwhile.
        let text = format!("other{index}");
        fs::create_dir(shared.path(&text)).unwrap();
        let other = shared.look_up(shared.root, &text).unwrap().inode;
        assert_eq!(number(shared.look_up(other, "x")), libc::ENOENT);
    }
    let (stat, _) = shared.fs.getattr(&shared.context, file, None).unwrap();
    assert_eq!(stat.st_size, 4);
    let exclusive = libc::RENAME_NOREPLACE;
    let result = shared.fs.rename(
        &shared.context,
        shared.root,
        &name("b"),
        shared.root,
        &name("file"),
        exclusive,
    );
    assert_eq!(number(result), libc::EEXIST);
    let result = shared
        .fs
        .rename(&shared.context, shared.root, &name("b"), ROOT, &name("1"), 0);
    assert_eq!(number(result), libc::EROFS);
}

#[test]
fn a_file_can_be_a_share() {
    let world = World::new();
    fs::set_permissions(world.share().join("file"), fs::Permissions::from_mode(0o600)).unwrap();
    let share = Share {
        root: open_path(&world.share().join("file")),
        exclusive: true,
        marks: None,
    };
    let fs = Passthrough::new(vec![share], small(), Arc::default()).unwrap();
    let context = Context::new();
    let entry = fs.lookup(&context, ROOT, &name("0")).unwrap();
    assert_eq!(entry.attr.st_mode, libc::S_IFREG | 0o600);
    assert_eq!(entry.entry_timeout, EXCLUSIVE_TIMEOUT);
    let opened = fs
        .open(&context, entry.inode, libc::O_RDWR.unsigned_abs(), 0)
        .unwrap();
    assert_eq!(opened.1, OpenOptions::KEEP_CACHE);
    assert_eq!(
        number(fs.lookup(&context, entry.inode, &name("x"))),
        libc::ENOTDIR
    );
    assert_eq!(number(fs.opendir(&context, entry.inode, 0)), libc::ENOTDIR);
}

/// Descriptors of this process that lead beneath a directory.
fn descriptors_beneath(directory: &std::path::Path) -> usize {
    let entries = fs::read_dir("/proc/self/fd").unwrap();
    let targets = entries.filter_map(|entry| fs::read_link(entry.unwrap().path()).ok());
    targets.filter(|target| target.starts_with(directory)).count()
}

#[test]
fn share_that_goes_takes_its_descriptors_along_and_leaves_the_others() {
    let shared = Shared::new(small());
    let second = World::new();
    let share = || Share {
        root: second.root(),
        exclusive: false,
        marks: None,
    };
    assert_eq!(number(shared.fs.remove(9)), libc::ENOENT);
    shared.fs.add(9, share()).unwrap();
    assert_eq!(number(shared.fs.add(9, share())), libc::EEXIST);
    let root = shared.look_up(ROOT, "9").unwrap().inode;
    let file = shared.look_up(root, "file").unwrap().inode;
    let directory = shared.look_up(root, "dir").unwrap().inode;
    let handle = shared.open(file, libc::O_RDWR).unwrap();
    assert!(descriptors_beneath(&second.share()) >= 3);
    let own = shared.look_up(shared.root, "file").unwrap().inode;

    shared.fs.remove(9).unwrap();
    assert_eq!(descriptors_beneath(&second.share()), 0);
    for gone in [root, file, directory] {
        let asked = shared.fs.getattr(&shared.context, gone, Some(handle));
        assert_eq!(number(asked), libc::ESTALE);
    }
    assert_eq!(number(shared.look_up(ROOT, "9")), libc::ENOENT);
    let released = shared
        .fs
        .release(&shared.context, file, 0, handle, false, false, None);
    assert_eq!(number(released), libc::EBADF);
    // The guest's kernel forgets it when it gets to it.
    shared.fs.forget(&shared.context, file, 1);
    assert!(shared.fs.getattr(&shared.context, own, None).is_ok());
    shared.open(own, libc::O_RDONLY).unwrap();

    // What comes later is another file, whatever it is called.
    shared.fs.add(9, share()).unwrap();
    assert_ne!(shared.look_up(ROOT, "9").unwrap().inode, root);
    shared.fs.remove(9).unwrap();
}

#[test]
fn shares_are_bounded_and_listed_by_index() {
    let shared = Shared::new(small());
    let share = || Share {
        root: shared.world.root(),
        exclusive: false,
        marks: None,
    };
    for index in 1..u32::try_from(MAX_LIVE_SHARES).unwrap() {
        shared.fs.add(index * 3, share()).unwrap();
    }
    assert_eq!(number(shared.fs.add(7, share())), libc::ENFILE);
    shared.fs.remove(3).unwrap();
    let mut names = Vec::new();
    let mut add = |entry: DirEntry<'_>, _: &CStr| {
        names.push(String::from_utf8(entry.name.to_vec()).unwrap());
        Ok(1)
    };
    shared.fs.entries(ROOT, 0, 0, &mut add).unwrap();
    assert_eq!(names.len(), MAX_LIVE_SHARES - 1);
    assert_eq!(names[..3], ["0", "6", "9"]);
}
