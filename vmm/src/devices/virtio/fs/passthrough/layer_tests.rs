use std::ffi::CString;
use std::fs;
use std::os::fd::AsFd;

use fuse_backend_rs::api::filesystem::{FileSystem, GetxattrReply, SetattrValid};
use rustix::fs::{
    AtFlags, FileType, Mode, RenameFlags, mkdirat, mknodat, openat, renameat_with, symlinkat, unlinkat,
};
use rustix::io::Errno;
use rustix::net::{AddressFamily, RecvFlags, SocketFlags, SocketType, recv, send, socketpair};
use vmm_api::marks::{MAX_REQUEST_BYTES, answer_to_bytes};

use super::layer::confine;
use super::*;
use crate::devices::virtio::fs::tests::{World, open_path};

fn name(text: &str) -> CString {
    CString::new(text).unwrap()
}

fn number(result: io::Result<impl Sized>) -> i32 {
    result.err().and_then(|error| error.raw_os_error()).unwrap_or(0)
}

fn snapshot() -> World {
    let world = World::new();
    for directory in ["fs", "fs/d", "work", "work/work"] {
        fs::create_dir(world.share().join(directory)).unwrap();
    }
    fs::write(world.share().join("fs/f"), "f").unwrap();
    world
}

/// A layer's file system, its context, its root, and the other end of its marks' socket.
fn shared(world: &World) -> (Passthrough, Context, u64, OwnedFd) {
    let (ours, theirs) = socketpair(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        SocketFlags::CLOEXEC,
        None,
    )
    .unwrap();
    let share = Share {
        root: world.root(),
        exclusive: true,
        marks: Some(theirs),
    };
    let surroundings = Surroundings {
        descriptor_prefix: "/proc/thread-self/fd/",
        changes_user: false,
        limits: Limits {
            inodes: 64,
            descriptors: 16,
        },
        handles: 8,
    };
    let fs = Passthrough::new(vec![share], surroundings, Arc::default()).unwrap();
    let context = Context::new();
    let root = fs.lookup(&context, ROOT, &name("0")).unwrap().inode;
    (fs, context, root, ours)
}

#[test]
fn nothing_is_changed_in_the_root_of_a_layer() {
    let world = snapshot();
    let (fs, context, root, _marks) = shared(&world);
    let upper = fs.lookup(&context, root, &name("fs")).unwrap().inode;
    let file = fs.lookup(&context, upper, &name("f")).unwrap().inode;
    let refused = [
        number(fs.mkdir(&context, root, &name("x"), 0o755, 0)),
        number(fs.symlink(&context, &name("/etc"), root, &name("x"))),
        number(fs.mknod(&context, root, &name("x"), libc::S_IFREG, 0, 0)),
        number(fs.link(&context, file, root, &name("x"))),
        number(fs.rename(&context, root, &name("fs"), upper, &name("x"), 0)),
        number(fs.rename(
            &context,
            root,
            &name("fs"),
            root,
            &name("work"),
            libc::RENAME_EXCHANGE,
        )),
        number(fs.rename(&context, upper, &name("d"), root, &name("x"), 0)),
        number(fs.rmdir(&context, root, &name("work"))),
        number(fs.unlink(&context, root, &name("fs"))),
        number(fs.setattr(&context, root, to_stat_of(&world), None, SetattrValid::MODE)),
        number(fs.setxattr(&context, root, &name("user.x"), b"x", 0)),
        number(fs.setxattr(&context, root, &name("trusted.overlay.opaque"), b"y", 0)),
        number(fs.removexattr(&context, root, &name("user.x"))),
    ];
    assert!(
        refused.iter().all(|refused| *refused == libc::EPERM),
        "{refused:?}"
    );
    // In the two directories everything goes as in any share, and between them.
    fs.mknod(&context, upper, &name("whiteout"), libc::S_IFCHR, 0, 0)
        .unwrap();
    let work = fs.lookup(&context, root, &name("work")).unwrap().inode;
    fs.rename(&context, upper, &name("f"), work, &name("f"), 0)
        .unwrap();
    assert_eq!(
        number(fs.mknod(&context, upper, &name("null"), libc::S_IFCHR, 0x103, 0)),
        libc::EPERM
    );
}

fn to_stat_of(world: &World) -> libc::stat64 {
    let found = stat_open(open_path(&world.share()).as_fd()).unwrap();
    to_stat(&found, &mut Devices::default())
}

#[test]
fn only_the_one_mark_of_a_directory_is_asked_for() {
    let world = snapshot();
    let (fs, context, root, marks) = shared(&world);
    let upper = fs.lookup(&context, root, &name("fs")).unwrap().inode;
    let file = fs.lookup(&context, upper, &name("f")).unwrap().inode;
    let opaque = name("trusted.overlay.opaque");
    for (mark, of, value, expected) in [
        ("trusted.overlay.origin", upper, &b"handle"[..], libc::EPERM),
        ("trusted.overlay.redirect", upper, b"/etc", libc::EPERM),
        ("trusted.overlay.metacopy", file, b"", libc::EPERM),
        ("trusted.overlay.opaque", file, b"y", libc::EPERM),
        ("trusted.overlay.opaque", upper, b"yes", libc::EPERM),
        ("trusted.overlay.impure", upper, b"y", 0),
    ] {
        assert_eq!(
            number(fs.setxattr(&context, of, &name(mark), value, 0)),
            expected,
            "{mark}"
        );
        assert_eq!(
            number(fs.getxattr(&context, file, &name(mark), 64)),
            libc::ENODATA,
            "{mark}"
        );
    }
    // Nothing of that was asked; what follows is.
    let asked = |answer: io::Result<&[u8]>| {
        let answer = answer
            .map(<[u8]>::to_vec)
            .map_err(|error| error.raw_os_error().unwrap());
        send(&marks, &answer_to_bytes(&answer), rustix::net::SendFlags::empty()).unwrap();
    };
    let request = || {
        let mut bytes = [0; MAX_REQUEST_BYTES];
        let (length, _) = recv(&marks, &mut bytes, RecvFlags::DONTWAIT).unwrap();
        bytes[..length].to_vec()
    };
    asked(Ok(b""));
    fs.setxattr(&context, upper, &opaque, b"y", 0).unwrap();
    assert_eq!(request(), b"\x02y");
    asked(Ok(b"y"));
    assert!(
        matches!(fs.getxattr(&context, upper, &opaque, 8).unwrap(), GetxattrReply::Value(value) if value == b"y")
    );
    assert_eq!(request(), b"\x01");
    asked(Err(errno(libc::ENODATA)));
    assert_eq!(number(fs.removexattr(&context, upper, &opaque)), libc::ENODATA);
    assert_eq!(request(), b"\x03");
    // Whoever answers has gone.
    drop(marks);
    assert_ne!(number(fs.getxattr(&context, upper, &opaque, 8)), 0);
}

#[test]
fn the_kernel_forbids_the_thread_what_the_requests_are_refused() {
    let world = snapshot();
    let other = World::new();
    let (root, beside) = (world.root(), other.root());
    let work = || {
        if let Err(error) = confine([(root.as_fd(), true), (beside.as_fd(), false)].into_iter()) {
            assert!(error.contains("Landlock"), "{error}");
            eprintln!("skipped: this kernel's Landlock is too old");
            return;
        }
        let open = |path: &str| openat(&root, path, OFlags::PATH, Mode::empty()).unwrap();
        let (upper, work) = (open("fs"), open("work"));
        let mode = Mode::from_raw_mode(0o700);
        let none = RenameFlags::empty();
        let denied = [
            mkdirat(&root, "x", mode),
            symlinkat("/etc", &root, "x"),
            mkdirat(&upper, "../x", mode),
            openat(&upper, "../x", OFlags::CREATE | OFlags::WRONLY, mode).map(drop),
            renameat_with(&root, "fs", &root, "x", none),
            renameat_with(&root, "fs", &root, "work", RenameFlags::EXCHANGE),
            renameat_with(&upper, "d", &root, "x", none),
            renameat_with(&root, "fs", &beside, "x", none),
            unlinkat(&root, "work", AtFlags::REMOVEDIR),
        ];
        for (index, result) in denied.iter().enumerate() {
            assert!(
                matches!(result, Err(Errno::ACCESS | Errno::PERM | Errno::XDEV)),
                "{index}: {result:?}"
            );
        }
        mknodat(&work, "whiteout", FileType::CharacterDevice, mode, 0).unwrap();
        renameat_with(&work, "whiteout", &upper, "f", RenameFlags::EXCHANGE).unwrap();
        renameat_with(&upper, "d", &work, "d", none).unwrap();
        mkdirat(&beside, "x", mode).unwrap();
    };
    // It is the thread's for good.
    std::thread::scope(|scope| scope.spawn(work).join().unwrap());
}
