//! A new volume begins with what the image has where it is mounted, as docker's do.
//!
//! Done before the container has a process, so nothing in its root moves meanwhile; what the image says is bounded by the image.

use std::{
    fs, io,
    os::{
        fd::{AsRawFd as _, OwnedFd},
        unix::fs::{MetadataExt as _, PermissionsExt as _, chown, lchown, symlink},
    },
    path::{Path, PathBuf},
};

use nix::{
    errno::Errno,
    fcntl::{OFlag, OpenHow, ResolveFlag, openat2},
    sys::{
        stat::{Mode, UtimensatFlags, utimensat},
        time::TimeSpec,
    },
};

fn errno(error: &io::Error) -> Errno {
    error.raw_os_error().map_or(Errno::EIO, Errno::from_raw)
}

/// A path that leads to an open directory.
fn path_of(directory: &OwnedFd) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", directory.as_raw_fd()))
}

/// Copies what `root` has at `destination` into `volume`, a directory, if that is empty.
pub fn copy_up(root: &fs::File, destination: &Path, volume: &Path) -> Result<(), Errno> {
    let is_empty = fs::read_dir(volume)
        .map_err(|error| errno(&error))?
        .next()
        .is_none();
    if !is_empty {
        return Ok(());
    }
    let how = OpenHow::new()
        .flags(OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC)
        .mode(Mode::empty())
        .resolve(ResolveFlag::RESOLVE_IN_ROOT | ResolveFlag::RESOLVE_NO_MAGICLINKS);
    let source = match openat2(root, destination, how) {
        // The image has nothing there, or a file.
        Err(Errno::ENOENT | Errno::ENOTDIR) => return Ok(()),
        source => source?,
    };
    let source = path_of(&source);
    let metadata = fs::metadata(&source).map_err(|error| errno(&error))?;
    copy_entries(&source, volume)
        .and_then(|()| copy_metadata(&metadata, volume))
        .map_err(|error| errno(&error))
}

fn copy_entries(from: &Path, to: &Path) -> io::Result<()> {
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        let (source, target) = (entry.path(), to.join(entry.file_name()));
        let metadata = fs::symlink_metadata(&source)?;
        let kind = metadata.file_type();
        if kind.is_symlink() {
            symlink(fs::read_link(&source)?, &target)?;
            lchown(&target, Some(metadata.uid()), Some(metadata.gid()))?;
            continue;
        }
        if kind.is_dir() {
            fs::create_dir(&target)?;
            copy_entries(&source, &target)?;
        } else if kind.is_file() {
            fs::copy(&source, &target)?;
        } else {
            // A device, socket or FIFO of an image is nothing that a volume begins with.
            continue;
        }
        copy_metadata(&metadata, &target)?;
    }
    Ok(())
}

/// Owner first, since that takes bits off the mode; the time last.
fn copy_metadata(metadata: &fs::Metadata, to: &Path) -> io::Result<()> {
    chown(to, Some(metadata.uid()), Some(metadata.gid()))?;
    fs::set_permissions(to, fs::Permissions::from_mode(metadata.mode() & 0o7777))?;
    let time = |seconds, nanoseconds| TimeSpec::new(seconds, nanoseconds);
    utimensat(
        nix::fcntl::AT_FDCWD,
        to,
        &time(metadata.atime(), metadata.atime_nsec()),
        &time(metadata.mtime(), metadata.mtime_nsec()),
        UtimensatFlags::FollowSymlink,
    )?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_empty_volume_begins_as_the_image_has_it_and_a_used_one_stays() {
        let dir = tempfile::tempdir().unwrap();
        let (root, volume) = (dir.path().join("root"), dir.path().join("volume"));
        fs::create_dir_all(root.join("var/lib/data/deep")).unwrap();
        fs::create_dir(&volume).unwrap();
        fs::write(root.join("var/lib/data/deep/file"), "x").unwrap();
        fs::set_permissions(root.join("var/lib/data"), fs::Permissions::from_mode(0o1750)).unwrap();
        symlink("/etc/passwd", root.join("var/lib/data/link")).unwrap();
        // As images have it: an absolute link, meant in the image.
        symlink("/var/lib/data", root.join("data")).unwrap();
        let open = fs::File::open(&root).unwrap();
        copy_up(&open, Path::new("/data"), &volume).unwrap();
        assert_eq!(fs::read(volume.join("deep/file")).unwrap(), b"x");
        assert_eq!(
            fs::read_link(volume.join("link")).unwrap(),
            Path::new("/etc/passwd")
        );
        assert_eq!(fs::metadata(&volume).unwrap().mode() & 0o7777, 0o1750);
        fs::write(root.join("var/lib/data/later"), "y").unwrap();
        copy_up(&open, Path::new("/data"), &volume).unwrap();
        assert!(!volume.join("later").exists());
        copy_up(&open, Path::new("/nothing"), &dir.path().join("root/var")).unwrap();
    }
}
