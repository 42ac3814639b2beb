//! Files of this host become an archive for a guest.

use std::{
    ffi::OsStr,
    fs::{self, File},
    io::{self, Read as _, Write},
    os::unix::fs::{FileTypeExt as _, MetadataExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
};

use tar::{Builder, EntryType, Header};

/// What is packed, and as whose.
#[derive(Debug, Clone, Copy)]
pub struct Packing<'a> {
    /// What the source is called in the archive; nothing if only its content is packed.
    pub name: Option<&'a OsStr>,
    /// Follow the source itself if it is a link; links below it are kept.
    pub follow: bool,
    /// Keep owners; otherwise all belongs to the container's root.
    pub keep_owners: bool,
}

/// Writes the archive; says what was left out as it can't be copied.
///
/// # Errors
/// A file can't be read, or nobody takes the archive.
pub fn pack(output: impl Write, source: &Path, packing: Packing<'_>) -> io::Result<Vec<PathBuf>> {
    let mut builder = Builder::new(output);
    let mut skipped = Vec::new();
    let metadata = if packing.follow {
        fs::metadata(source)?
    } else {
        fs::symlink_metadata(source)?
    };
    let mut packer = Packer {
        builder: &mut builder,
        keep_owners: packing.keep_owners,
        skipped: &mut skipped,
    };
    match packing.name {
        Some(name) => packer.append(source, Path::new(name), &metadata)?,
        None => packer.append_content(source, Path::new(""))?,
    }
    builder.into_inner()?.flush()?;
    Ok(skipped)
}

struct Packer<'a, W: Write> {
    builder: &'a mut Builder<W>,
    keep_owners: bool,
    skipped: &'a mut Vec<PathBuf>,
}

impl<W: Write> Packer<'_, W> {
    fn header(&self, metadata: &fs::Metadata) -> Header {
        let mut header = Header::new_gnu();
        header.set_mode(metadata.mode() & 0o7777);
        header.set_mtime(u64::try_from(metadata.mtime()).unwrap_or(0));
        if self.keep_owners {
            header.set_uid(metadata.uid().into());
            header.set_gid(metadata.gid().into());
        } else {
            header.set_uid(0);
            header.set_gid(0);
        }
        header.set_size(0);
        header
    }

    fn append_content(&mut self, directory: &Path, name: &Path) -> io::Result<()> {
        let mut entries = fs::read_dir(directory)?.collect::<io::Result<Vec<_>>>()?;
        entries.sort_by_key(fs::DirEntry::file_name);
        for entry in entries {
            let path = entry.path();
            let metadata = fs::symlink_metadata(&path)?;
            self.append(&path, &name.join(entry.file_name()), &metadata)?;
        }
        Ok(())
    }

    fn append(&mut self, source: &Path, name: &Path, metadata: &fs::Metadata) -> io::Result<()> {
        let kind = metadata.file_type();
        let mut header = self.header(metadata);
        if kind.is_dir() {
            header.set_entry_type(EntryType::Directory);
            self.builder.append_data(&mut header, name, io::empty())?;
            return self.append_content(source, name);
        }
        if kind.is_symlink() {
            header.set_entry_type(EntryType::Symlink);
            return self
                .builder
                .append_link(&mut header, name, fs::read_link(source)?);
        }
        if kind.is_fifo() {
            header.set_entry_type(EntryType::Fifo);
            return self.builder.append_data(&mut header, name, io::empty());
        }
        if !kind.is_file() {
            self.skipped.push(source.to_owned());
            return Ok(());
        }
        // Not blocking: should a pipe have taken the file's place meanwhile, it is noticed by its length.
        let file = File::options()
            .read(true)
            .custom_flags(rustix::fs::OFlags::NONBLOCK.bits().cast_signed())
            .open(source)?;
        let size = file.metadata()?.len();
        header.set_entry_type(EntryType::Regular);
        header.set_size(size);
        // The archive has promised so many bytes, whatever happens to the file meanwhile.
        let content = file.take(size).chain(io::repeat(0)).take(size);
        self.builder.append_data(&mut header, name, content)
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;
    use crate::cp::unpack::Destination;

    #[test]
    fn tree_survives_packing_and_unpacking() {
        let scratch = tempfile::tempdir().unwrap();
        let from = scratch.path().join("from");
        let long = "n".repeat(180);
        fs::create_dir_all(from.join("sub").join(&long)).unwrap();
        fs::write(from.join("file"), vec![7; 100_000]).unwrap();
        fs::write(from.join("sub").join(&long).join("deep"), "deep").unwrap();
        symlink("file", from.join("link")).unwrap();
        let mut archive = Vec::new();
        let packing = Packing {
            name: Some(OsStr::new("top")),
            follow: false,
            keep_owners: false,
        };
        assert!(pack(&mut archive, &from, packing).unwrap().is_empty());
        let to = scratch.path().join("to");
        fs::create_dir(&to).unwrap();
        let destination = Destination::open(&to, Some("copy".into()), false).unwrap();
        destination.unpack(archive.as_slice()).unwrap();
        assert_eq!(fs::read(to.join("copy/file")).unwrap(), vec![7; 100_000]);
        assert_eq!(
            fs::read_to_string(to.join("copy/sub").join(&long).join("deep")).unwrap(),
            "deep"
        );
        assert_eq!(fs::read_link(to.join("copy/link")).unwrap(), Path::new("file"));
    }

    #[test]
    fn link_is_followed_only_where_asked_for() {
        let scratch = tempfile::tempdir().unwrap();
        fs::write(scratch.path().join("file"), "content").unwrap();
        let link = scratch.path().join("link");
        symlink("file", &link).unwrap();
        for (follow, kind) in [(false, EntryType::Symlink), (true, EntryType::Regular)] {
            let mut bytes = Vec::new();
            let packing = Packing {
                name: Some(OsStr::new("x")),
                follow,
                keep_owners: true,
            };
            pack(&mut bytes, &link, packing).unwrap();
            let mut archive = tar::Archive::new(bytes.as_slice());
            let entry = archive.entries().unwrap().next().unwrap().unwrap();
            assert_eq!(entry.header().entry_type(), kind);
            assert_eq!(
                entry.header().uid().unwrap(),
                u64::from(rustix::process::getuid().as_raw())
            );
        }
    }

    #[test]
    fn socket_is_left_out_and_told() {
        let scratch = tempfile::tempdir().unwrap();
        let path = scratch.path().join("socket");
        let _listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
        let packing = Packing {
            name: None,
            follow: false,
            keep_owners: false,
        };
        let skipped = pack(io::sink(), scratch.path(), packing).unwrap();
        assert_eq!(skipped, [path]);
    }
}
