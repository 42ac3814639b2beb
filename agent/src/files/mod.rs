//! Files of a container, for copying: what is at a path, a path as a tar archive, an archive unpacked at a path.
//!
//! Invariant: the container is hostile and can change its files at any moment. Every path is resolved by the kernel
//! beneath the container's root (`RESOLVE_IN_ROOT`, no magic links), a tree is walked by descriptors of its
//! directories without following links, and only what is a regular file once it is open is read.

mod pack;
mod unpack;

use std::{
    fs::File,
    os::fd::{AsFd, OwnedFd},
    path::Path,
};

use agent_protocol::PathStat;
use nix::{
    errno::Errno,
    fcntl::{AtFlags, OFlag, OpenHow, ResolveFlag, openat2, readlinkat},
    libc,
    sys::stat::{FileStat, Mode, fstat, fstatat},
};

pub use pack::pack;
pub use unpack::{Rules, unpack};

use crate::error::AgentError;

/// Deepest directory that is copied: each level holds a descriptor.
const MAX_DEPTH: usize = 200;

/// Opens a path beneath the container's root.
fn open_beneath(root: impl AsFd, path: &Path, flags: OFlag) -> Result<OwnedFd, Errno> {
    let how = OpenHow::new()
        .flags(flags | OFlag::O_CLOEXEC)
        .mode(Mode::empty())
        .resolve(ResolveFlag::RESOLVE_IN_ROOT | ResolveFlag::RESOLVE_NO_MAGICLINKS);
    // Resolution that met a rename is to be tried again.
    for _ in 0..32 {
        match openat2(root.as_fd(), path, how) {
            Err(Errno::EAGAIN) => {}
            result => return result,
        }
    }
    Err(Errno::EAGAIN)
}

/// The root as the container's processes see it, with everything that is mounted in it.
pub fn open_root(pid: i32) -> Result<File, AgentError> {
    File::open(format!("/proc/{pid}/root")).map_err(|error| {
        AgentError::setup("opening the container's root")(
            error.raw_os_error().map_or(Errno::EIO, Errno::from_raw),
        )
    })
}

fn kind(stat: &FileStat) -> libc::mode_t {
    stat.st_mode & libc::S_IFMT
}

fn file_error(path: &str) -> impl FnOnce(Errno) -> AgentError {
    move |errno| AgentError::File {
        path: path.to_owned(),
        errno,
    }
}

/// What is at a path.
pub fn stat(root: &File, path: &str, follow: bool) -> Result<PathStat, AgentError> {
    let (fd, found) = find(root, path, follow)?;
    let target = if kind(&found) == libc::S_IFLNK {
        let target = readlinkat(&fd, "").map_err(file_error(path))?;
        target.to_string_lossy().into_owned()
    } else {
        String::new()
    };
    Ok(describe(path, &found, target))
}

fn find(root: &File, path: &str, follow: bool) -> Result<(OwnedFd, FileStat), AgentError> {
    let flags = if follow {
        OFlag::O_PATH
    } else {
        OFlag::O_PATH | OFlag::O_NOFOLLOW
    };
    let fd = open_beneath(root, Path::new(path), flags).map_err(file_error(path))?;
    let found = fstat(&fd).map_err(file_error(path))?;
    Ok((fd, found))
}

/// Name of a path's last component; the root's is `/`, told as empty.
fn base_name(path: &str) -> String {
    let name = Path::new(path).file_name().unwrap_or_default();
    name.to_string_lossy().into_owned()
}

fn describe(path: &str, stat: &FileStat, link_target: String) -> PathStat {
    PathStat {
        name: base_name(path),
        mode: stat.st_mode,
        size: u64::try_from(stat.st_size).unwrap_or(0),
        mtime_s: stat.st_mtime,
        mtime_ns: u32::try_from(stat.st_mtime_nsec).unwrap_or(0),
        uid: stat.st_uid,
        gid: stat.st_gid,
        link_target,
        ..PathStat::default()
    }
}

fn stat_at(directory: impl AsFd, name: &std::ffi::OsStr) -> Result<FileStat, Errno> {
    fstatat(directory, name, AtFlags::AT_SYMLINK_NOFOLLOW)
}

#[cfg(test)]
mod tests {
    use std::{
        fs,
        os::unix::fs::{PermissionsExt as _, symlink},
    };

    use super::*;

    #[test]
    fn links_are_resolved_in_the_root() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("etc")).unwrap();
        fs::write(dir.path().join("etc/passwd"), "inside").unwrap();
        symlink("/etc/passwd", dir.path().join("link")).unwrap();
        symlink("../../../../etc", dir.path().join("up")).unwrap();
        let root = File::open(dir.path()).unwrap();
        assert_eq!(stat(&root, "/link", true).unwrap().size, 6);
        assert_eq!(stat(&root, "/up/passwd", false).unwrap().size, 6);
        assert_eq!(stat(&root, "/link", false).unwrap().link_target, "/etc/passwd");
        assert!(matches!(
            stat(&root, "/gone", false),
            Err(AgentError::File {
                errno: Errno::ENOENT,
                ..
            })
        ));
    }

    #[test]
    fn tree_survives_packing_and_unpacking() {
        let from = tempfile::tempdir().unwrap();
        let tree = from.path().join("tree");
        fs::create_dir_all(tree.join("a/b")).unwrap();
        fs::write(tree.join("a/file"), vec![7; 100_000]).unwrap();
        fs::set_permissions(tree.join("a/file"), fs::Permissions::from_mode(0o4751)).unwrap();
        fs::hard_link(tree.join("a/file"), tree.join("a/b/same")).unwrap();
        symlink("/nowhere", tree.join("link")).unwrap();
        let long = "n".repeat(200);
        fs::write(tree.join(&long), "long").unwrap();
        let mut archive = Vec::new();
        pack(&File::open(from.path()).unwrap(), "/tree", false, &mut archive).unwrap();

        let to = tempfile::tempdir().unwrap();
        fs::create_dir(to.path().join("in")).unwrap();
        let rules = Rules {
            keep_kinds: true,
            keep_owners: true,
        };
        unpack(&File::open(to.path()).unwrap(), "/in", &rules, archive.as_slice()).unwrap();
        let tree = to.path().join("in/tree");
        let file = fs::metadata(tree.join("a/file")).unwrap();
        assert_eq!(
            (file.len(), file.permissions().mode() & 0o7777),
            (100_000, 0o4751)
        );
        use std::os::unix::fs::MetadataExt as _;
        assert_eq!(file.ino(), fs::metadata(tree.join("a/b/same")).unwrap().ino());
        assert_eq!(fs::read_link(tree.join("link")).unwrap(), Path::new("/nowhere"));
        assert_eq!(fs::read_to_string(tree.join(long)).unwrap(), "long");
    }

    #[test]
    fn archive_that_leads_out_stays_in() {
        let outside = tempfile::tempdir().unwrap();
        let root = tempfile::tempdir().unwrap();
        fs::create_dir(root.path().join("in")).unwrap();
        symlink(outside.path(), root.path().join("in/out")).unwrap();
        let archive = |path: &str| {
            let mut builder = tar::Builder::new(Vec::new());
            let mut header = tar::Header::new_gnu();
            header.set_size(1);
            header.set_mode(0o644);
            let name = &mut header.as_old_mut().name;
            name[..path.len()].copy_from_slice(path.as_bytes());
            header.set_cksum();
            builder.append(&header, &b"x"[..]).unwrap();
            builder.into_inner().unwrap()
        };
        let rules = Rules {
            keep_kinds: false,
            keep_owners: false,
        };
        let root_dir = File::open(root.path()).unwrap();
        assert!(unpack(&root_dir, "/in", &rules, archive("../../x").as_slice()).is_err());
        // The link is followed, in the root.
        let _ = unpack(&root_dir, "/in", &rules, archive("out/x").as_slice());
        assert_eq!(fs::read_dir(outside.path()).unwrap().count(), 0);
    }
}
