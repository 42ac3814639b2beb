//! A container's writable layer on disk: a sparse file of a given size with an empty ext4 in it.
//!
//! ```text
//! mke2fs, once per size ─► images/templates/ext4-VERSION-SIZE.img ─► cloned for each container: shared blocks, or a copy of the few
//!                                                                    extents that are not holes
//! ```
//!
//! Owner: whoever creates a container. The file belongs to the container from then on and goes with its directory; the store keeps
//! nothing of it. Blocks appear as the guest writes and vanish as it discards them, so the size is a quota, not a reservation.
//!
//! Invariants: the host never mounts or checks the file system, which is the guest's to read, replay and damage; the file appears
//! whole or not at all, and nothing is left of one that didn't.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use rustix::fs::{AtFlags, CWD, OFlags, SeekFrom};

use crate::store::{Error, Store};

/// Raised when templates are to be made anew.
const TEMPLATE_VERSION: u32 = 1;
/// Templates kept at a time; each takes some hundred kilobytes.
pub(crate) const TEMPLATES_MAX: usize = 16;
const PROGRAM: &str = "mke2fs";
/// Where administrators' programs are, whoever calls.
const PATH: &str = "/usr/sbin:/sbin:/usr/bin:/bin:/usr/local/sbin:/usr/local/bin";
/// All of them, so that the result doesn't depend on the host's configuration. Everything is known to Linux 4.15 and later.
const FEATURES: &str = "none,has_journal,ext_attr,dir_index,filetype,extent,64bit,flex_bg,sparse_super,large_file,\
                        huge_file,dir_nlink,extra_isize,metadata_csum";
/// A hole reads as zeroes: neither host nor guest has to write inode tables and journal. Older versions don't take the word for it,
/// and leave it to the guest to zero them in the background.
const ZEROED: [&str; 2] = [
    "assume_storage_prezeroed=1",
    "lazy_itable_init=1,lazy_journal_init=1",
];

/// Why there is no writable layer.
#[derive(Debug, thiserror::Error)]
pub enum WritableError {
    #[error("--storage-opt size={bytes} is less than {min} bytes (16m), the least a file system fits into")]
    TooSmall { bytes: u64, min: u64 },
    #[error("--storage-opt size={bytes} is more than {max} bytes (16t), the most a container can have")]
    TooLarge { bytes: u64, max: u64 },
    #[error("--storage-opt size= needs mke2fs: install e2fsprogs")]
    NoProgram { source: io::Error },
    #[error("mke2fs failed: {message}")]
    Program { message: String },
    #[error("{path} exists already")]
    Exists { path: PathBuf },
    #[error("cannot create {path}")]
    Create { path: PathBuf, source: io::Error },
    #[error("cannot prepare a file system for --storage-opt size=")]
    Store { source: Box<Error> },
}

impl From<Error> for WritableError {
    fn from(source: Error) -> Self {
        Self::Store {
            source: Box::new(source),
        }
    }
}

/// A size a writable layer can have.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Size(u64);

impl Size {
    /// The least.
    pub const MIN: Self = Self(16 << 20);
    /// The most; ext4 with blocks of 4 KiB ends here.
    pub const MAX: Self = Self(16 << 40);

    /// Check a size; a part of a block counts as a whole one.
    ///
    /// # Errors
    /// It is too small or too large.
    pub const fn new(bytes: u64) -> Result<Self, WritableError> {
        if bytes < Self::MIN.0 {
            return Err(WritableError::TooSmall {
                bytes,
                min: Self::MIN.0,
            });
        }
        if bytes > Self::MAX.0 {
            return Err(WritableError::TooLarge {
                bytes,
                max: Self::MAX.0,
            });
        }
        Ok(Self(bytes.next_multiple_of(4096)))
    }

    /// In bytes, a multiple of 4096.
    pub const fn bytes(self) -> u64 {
        self.0
    }

    /// Enough for bursts of small writes, but not much of a small disk: the journal's blocks are never given back.
    const fn journal_mib(self) -> u64 {
        match self.0 >> 20 {
            0..256 => 4,
            256..1024 => 16,
            _ => 32,
        }
    }
}

/// Space of a writable layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Usage {
    /// What the container was given.
    pub size_bytes: u64,
    /// What it takes on the host's disk now.
    pub allocated_bytes: u64,
}

/// How much a writable layer takes.
///
/// # Errors
/// There is none at `path`.
pub fn usage(path: &Path) -> io::Result<Usage> {
    let status = fs::metadata(path)?;
    Ok(Usage {
        size_bytes: status.len(),
        allocated_bytes: status.blocks() * 512,
    })
}

impl Store {
    /// Create a writable layer at `path`, readable and writable for its owner alone.
    ///
    /// # Errors
    /// Something is there already, the disk is full, or `mke2fs` is missing; there is nothing at `path` then that wasn't before.
    pub fn create_writable(&self, path: &Path, size: Size) -> Result<(), WritableError> {
        let template = self.template(size)?;
        let failed = |source: io::Error| {
            if source.kind() == io::ErrorKind::AlreadyExists {
                return WritableError::Exists {
                    path: path.to_path_buf(),
                };
            }
            WritableError::Create {
                path: path.to_path_buf(),
                source,
            }
        };
        let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty());
        let parent = parent.unwrap_or(Path::new("."));
        match unnamed(parent) {
            Ok(file) => {
                clone_into(&template, &file).map_err(failed)?;
                let from = format!("/proc/self/fd/{}", file.as_raw_fd());
                rustix::fs::linkat(CWD, from, CWD, path, AtFlags::SYMLINK_FOLLOW)
                    .map_err(|error| failed(error.into()))
            }
            // The directory's file system has no unnamed files.
            Err(error) if error == rustix::io::Errno::OPNOTSUPP => {
                let file = tempfile::NamedTempFile::new_in(parent).map_err(failed)?;
                clone_into(&template, file.as_file()).map_err(failed)?;
                let persisted = file.persist_noclobber(path);
                persisted.map(drop).map_err(|error| failed(error.error))
            }
            Err(error) => Err(failed(error.into())),
        }
    }

    /// The empty file system of this size, made if it isn't there.
    fn template(&self, size: Size) -> Result<File, WritableError> {
        let name = format!("ext4-{TEMPLATE_VERSION}-{}.img", size.bytes());
        if let Some(file) = self.open_template(&name)? {
            return Ok(file);
        }
        let made = |path: &Path| -> Result<(), WritableError> {
            let create = |source| WritableError::Create {
                path: path.to_path_buf(),
                source,
            };
            let file = OpenOptions::new().write(true).open(path).map_err(create)?;
            file.set_len(size.bytes()).map_err(create)?;
            make_file_system(path, size)
        };
        self.publish_template(&name, made)
    }
}

/// A file without a name, to be given one later.
fn unnamed(directory: &Path) -> Result<File, rustix::io::Errno> {
    let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
    let mode = rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR;
    rustix::fs::open(directory, flags, mode).map(File::from)
}

/// Give `to`, which is empty, the contents of `from`, holes as holes.
fn clone_into(from: &File, to: &File) -> io::Result<()> {
    if rustix::fs::ioctl_ficlone(to, from).is_ok() {
        return Ok(());
    }
    let size = from.metadata()?.len();
    to.set_len(size)?;
    let mut at = 0;
    loop {
        let start = match rustix::fs::seek(from, SeekFrom::Data(at)) {
            Ok(start) => start,
            Err(rustix::io::Errno::NXIO) => return Ok(()),
            Err(error) => return Err(error.into()),
        };
        let end = rustix::fs::seek(from, SeekFrom::Hole(start))?;
        copy_range(from, to, start, end)?;
        at = end;
    }
}

fn copy_range(from: &File, to: &File, start: u64, end: u64) -> io::Result<()> {
    let (mut read_at, mut write_at) = (start, start);
    while read_at < end {
        let left = usize::try_from(end - read_at).unwrap_or(usize::MAX);
        match rustix::fs::copy_file_range(from, Some(&mut read_at), to, Some(&mut write_at), left) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(_) => {}
            // Two file systems, or one that can't: through memory then.
            Err(rustix::io::Errno::XDEV | rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::INVAL) => {
                let mut buffer = vec![0; left.min(1 << 20)];
                std::os::unix::fs::FileExt::read_exact_at(from, &mut buffer, read_at)?;
                std::os::unix::fs::FileExt::write_all_at(to, &buffer, write_at)?;
                read_at += buffer.len() as u64;
                write_at = read_at;
            }
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

/// Make an empty file system in a file of zeroes.
fn make_file_system(path: &Path, size: Size) -> Result<(), WritableError> {
    let mut message = String::new();
    for zeroed in ZEROED {
        let output = Command::new(PROGRAM)
            .env_clear()
            .env("PATH", PATH)
            .env("LC_ALL", "C")
            .env("MKE2FS_CONFIG", "/dev/null")
            .args(["-q", "-F", "-b", "4096", "-I", "256", "-i", "16384", "-m", "0"])
            .args(["-O", FEATURES, "-e", "remount-ro"])
            .arg(format!("-Jsize={}", size.journal_mib()))
            .args(["-E", &format!("{zeroed},packed_meta_blocks=1,root_owner=0:0")])
            .arg(path)
            .stdin(Stdio::null())
            .output()
            .map_err(|source| WritableError::NoProgram { source })?;
        if output.status.success() {
            return Ok(());
        }
        message = String::from_utf8_lossy(&output.stderr).trim().replace('\n', "; ");
    }
    Err(WritableError::Program { message })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_bounds_and_are_whole_blocks() {
        assert_eq!(
            Size::new((16 << 20) + 1).expect("fine").bytes(),
            (16 << 20) + 4096
        );
        for bytes in [0, (16 << 20) - 1, (16 << 40) + 1, u64::MAX] {
            let error = Size::new(bytes).expect_err("out of bounds").to_string();
            assert!(
                error.contains(&format!("--storage-opt size={bytes} is")),
                "{error}"
            );
        }
    }

    #[test]
    fn a_copy_has_the_holes_of_the_original() {
        let scratch = tempfile::tempdir().expect("scratch directory");
        let (from, to) = (scratch.path().join("from"), scratch.path().join("to"));
        let original = File::create_new(&from).expect("file");
        original.set_len(1 << 30).expect("length");
        for at in [0, 40 << 20, (1 << 30) - 4096] {
            std::os::unix::fs::FileExt::write_all_at(&original, &[7; 4096], at).expect("write");
        }
        let copy = File::create_new(&to).expect("file");
        clone_into(&File::open(&from).expect("file"), &copy).expect("copy");
        assert!(usage(&to).expect("usage").allocated_bytes < 1 << 20);
        let mut block = [0; 4096];
        for (at, value) in [(0, 7), (4096, 0), (40 << 20, 7), ((1 << 30) - 4096, 7)] {
            std::os::unix::fs::FileExt::read_exact_at(&copy, &mut block, at).expect("read");
            assert_eq!(block, [value; 4096], "{at}");
        }
    }
}
