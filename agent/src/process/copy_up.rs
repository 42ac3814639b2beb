//! Copies what is below a new tmpfs into it (`tmpcopyup`), as podman wants it for its `/run`s and users for volumes in
//! memory. Runs in a container's first process, before anything of the container does.
//!
//! What is copied are files, directories and links, with owner, mode and time; a device or socket isn't.

use std::{
    fs::{self, File, Metadata},
    io,
    os::unix::fs::{MetadataExt as _, PermissionsExt as _, chown, lchown, symlink},
    path::Path,
};

/// How deep directories may be nested.
const MAX_DEPTH: usize = 128;

/// Copies what is in the directory `from` into the directory `to`, which becomes like it too unless its own mode was asked for.
pub(super) fn copy(from: &Path, to: &Path, own_mode: bool) -> io::Result<()> {
    let metadata = fs::metadata(from)?;
    copy_entries(from, to, 0)?;
    if own_mode {
        return Ok(());
    }
    keep(to, &metadata)
}

fn copy_entries(from: &Path, to: &Path, depth: usize) -> io::Result<()> {
    if depth > MAX_DEPTH {
        return Err(io::Error::from_raw_os_error(libc::ELOOP));
    }
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        let (source, target) = (entry.path(), to.join(entry.file_name()));
        let metadata = fs::symlink_metadata(&source)?;
        let kind = metadata.file_type();
        if kind.is_symlink() {
            symlink(fs::read_link(&source)?, &target)?;
            lchown(&target, Some(metadata.uid()), Some(metadata.gid()))?;
        } else if kind.is_dir() {
            fs::create_dir(&target)?;
            copy_entries(&source, &target, depth + 1)?;
            keep(&target, &metadata)?;
        } else if kind.is_file() {
            fs::copy(&source, &target)?;
            keep(&target, &metadata)?;
        }
    }
    Ok(())
}

fn keep(path: &Path, metadata: &Metadata) -> io::Result<()> {
    chown(path, Some(metadata.uid()), Some(metadata.gid()))?;
    fs::set_permissions(path, fs::Permissions::from_mode(metadata.mode() & 0o7777))?;
    File::open(path)?.set_modified(metadata.modified()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_directories_and_links_come_with_their_modes() {
        let (from, to) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        fs::create_dir(from.path().join("d")).unwrap();
        fs::write(from.path().join("d/f"), "text").unwrap();
        fs::set_permissions(from.path().join("d/f"), fs::Permissions::from_mode(0o4750)).unwrap();
        symlink("/nowhere", from.path().join("l")).unwrap();
        copy(from.path(), to.path(), false).unwrap();
        assert_eq!(fs::read(to.path().join("d/f")).unwrap(), b"text");
        assert_eq!(
            fs::metadata(to.path().join("d/f")).unwrap().mode() & 0o7777,
            0o4750
        );
        assert_eq!(fs::read_link(to.path().join("l")).unwrap(), Path::new("/nowhere"));
    }
}
