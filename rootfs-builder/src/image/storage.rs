//! The files of an image, in a directory or in a tar archive that is read in place.

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io::{self, BufReader, Read, Seek};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::ImageError;
use crate::limits::Limits;
use crate::tar::{EntryKind, Source, TarReader};

/// More members than any image has.
const MEMBERS_MAX: usize = 100_000;
/// An archive is decompressed in steps, with a look at its size and the disk after each.
const DECOMPRESS_STEP_BYTES: u64 = 16 << 20;
/// Old docker archives link one layer's file to another's.
const LINKS_MAX: usize = 8;

/// Where an image's files are.
#[derive(Debug)]
pub(crate) enum Storage {
    Directory(PathBuf),
    Archive {
        path: PathBuf,
        file: Arc<File>,
        members: HashMap<String, Member>,
    },
}

/// A member of an archive.
#[derive(Debug, Clone)]
pub(crate) enum Member {
    File { offset: u64, size: u64 },
    Link { target: String },
}

impl Storage {
    /// An image layout's directory.
    pub fn directory(path: &Path) -> Result<Self, ImageError> {
        if path.is_dir() {
            return Ok(Self::Directory(path.to_path_buf()));
        }
        let problem = if path.exists() {
            "not a directory"
        } else {
            "there is no such directory"
        };
        Err(ImageError::NotAnImage {
            path: path.to_path_buf(),
            problem,
        })
    }

    /// Index an archive, decompressing it into an unnamed file below `scratch` first if it must be.
    pub fn archive(path: &Path, limits: &Limits, scratch: &Path) -> Result<Self, ImageError> {
        let read = |source| ImageError::Read {
            path: path.to_path_buf(),
            source,
        };
        let mut file = open_regular(path).map_err(read)?;
        if let Some(decompressed) = decompress(&mut file, limits, scratch).map_err(read)? {
            file = decompressed;
        }
        file.rewind().map_err(read)?;
        let archive_error = |source| ImageError::Archive {
            path: path.to_path_buf(),
            source,
        };
        let mut tar = TarReader::new(SeekingSource(BufReader::new(file.try_clone().map_err(read)?)));
        let mut members = HashMap::new();
        while let Some(entry) = tar.next_entry().map_err(archive_error)? {
            if members.len() >= MEMBERS_MAX {
                return Err(ImageError::NotAnImage {
                    path: path.to_path_buf(),
                    problem: "the archive has too many members",
                });
            }
            let Some(name) = normal(&String::from_utf8_lossy(&entry.path)) else {
                continue;
            };
            let parent = name.rsplit_once('/').map_or("", |(parent, _)| parent).to_owned();
            let member = match entry.kind {
                EntryKind::Regular => Some(Member::File {
                    offset: entry.data_offset,
                    size: entry.size,
                }),
                EntryKind::Symlink { target } => {
                    normal(&format!("{parent}/{}", String::from_utf8_lossy(&target)))
                        .map(|target| Member::Link { target })
                }
                EntryKind::HardLink { target } => {
                    normal(&String::from_utf8_lossy(&target)).map(|target| Member::Link { target })
                }
                _ => None,
            };
            if let Some(member) = member {
                members.insert(name, member);
            }
        }
        Ok(Self::Archive {
            path: path.to_path_buf(),
            file: Arc::new(file),
            members,
        })
    }

    /// For error messages.
    pub fn path(&self) -> &Path {
        match self {
            Self::Directory(path) | Self::Archive { path, .. } => path,
        }
    }

    /// Whether there is a file of this name.
    pub fn contains(&self, name: &str) -> bool {
        match self {
            Self::Directory(path) => path.join(name).is_file(),
            Self::Archive { members, .. } => members.contains_key(name),
        }
    }

    /// A file's contents and size. `name` has no `..`: it is fixed, made of a parsed digest, or normalised.
    pub fn open(&self, name: &str) -> Result<(Box<dyn Read + Send>, u64), ImageError> {
        match self {
            Self::Directory(directory) => {
                let path = directory.join(name);
                let file = match open_regular(&path) {
                    Ok(file) => file,
                    Err(error) if error.kind() == io::ErrorKind::NotFound => {
                        return Err(ImageError::Missing {
                            name: name.to_owned(),
                        });
                    }
                    Err(source) => return Err(ImageError::Read { path, source }),
                };
                let size = file
                    .metadata()
                    .map_err(|source| ImageError::Read { path, source })?
                    .len();
                Ok((Box::new(file), size))
            }
            Self::Archive { file, members, .. } => {
                let mut wanted = name;
                for _ in 0..LINKS_MAX {
                    match members.get(wanted) {
                        Some(Member::File { offset, size }) => {
                            let reader = MemberReader {
                                file: Arc::clone(file),
                                offset: *offset,
                                remaining: *size,
                            };
                            return Ok((Box::new(reader), *size));
                        }
                        Some(Member::Link { target }) => wanted = target,
                        None => break,
                    }
                }
                Err(ImageError::Missing {
                    name: name.to_owned(),
                })
            }
        }
    }

    /// A whole small file.
    pub fn read_document(&self, name: &str, limits: &Limits) -> Result<Vec<u8>, ImageError> {
        let (reader, bytes) = self.open(name)?;
        let limit = limits.document_bytes;
        if bytes > limit {
            return Err(ImageError::DocumentTooLarge {
                name: name.to_owned(),
                bytes,
                limit,
            });
        }
        let mut content = Vec::new();
        reader
            .take(limit)
            .read_to_end(&mut content)
            .map_err(|source| ImageError::Read {
                path: self.path().join(name),
                source,
            })?;
        Ok(content)
    }
}

/// A relative path without detours, or nothing if it leads out of the archive.
pub(super) fn normal(path: &str) -> Option<String> {
    let mut names: Vec<&str> = Vec::new();
    for name in path.split('/') {
        match name {
            "" | "." => {}
            ".." => {
                names.pop()?;
            }
            name => names.push(name),
        }
    }
    (!names.is_empty()).then(|| names.join("/"))
}

/// Open what must be a file: a fifo or a device would hang or do worse.
fn open_regular(path: &Path) -> io::Result<File> {
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(nix::libc::O_NONBLOCK | nix::libc::O_NOCTTY)
        .open(path)?;
    if file.metadata()?.is_file() {
        Ok(file)
    } else {
        Err(io::Error::new(io::ErrorKind::InvalidInput, "not a regular file"))
    }
}

/// The decompressed contents in an unnamed file, or nothing if the file isn't compressed.
fn decompress(file: &mut File, limits: &Limits, scratch: &Path) -> io::Result<Option<File>> {
    let mut magic = [0; 4];
    let count = file.read_at(&mut magic, 0)?;
    // Clones share their position, which tells how much was read.
    let mut reader: Box<dyn Read> = match &magic[..count] {
        [0x1f, 0x8b, ..] => Box::new(flate2::read::MultiGzDecoder::new(file.try_clone()?)),
        [0x28, 0xb5, 0x2f, 0xfd] => Box::new(zstd::stream::read::Decoder::new(file.try_clone()?)?),
        _ => return Ok(None),
    };
    let mut output = tempfile::tempfile_in(scratch)?;
    let mut total = 0;
    loop {
        let written = io::copy(&mut reader.by_ref().take(DECOMPRESS_STEP_BYTES), &mut output)?;
        if written == 0 {
            return Ok(Some(output));
        }
        total += written;
        let problem = if total > limits.layer_bytes {
            "the archive decompresses to more than the limit"
        } else if total > limits.ratio_free_bytes
            && total / file.stream_position()?.max(1) > limits.compression_ratio
        {
            "the archive is a decompression bomb"
        } else if available(scratch)? < limits.reserve_bytes {
            return Err(io::Error::new(
                io::ErrorKind::StorageFull,
                "not enough space in the image store to decompress the archive",
            ));
        } else {
            continue;
        };
        return Err(io::Error::new(io::ErrorKind::FileTooLarge, problem));
    }
}

/// Space that is left where a directory is.
fn available(directory: &Path) -> io::Result<u64> {
    let status = rustix::fs::statvfs(directory)?;
    Ok(status.f_bavail.saturating_mul(status.f_frsize))
}

/// Passes over members by seeking.
struct SeekingSource(BufReader<File>);

impl Read for SeekingSource {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.0.read(buffer)
    }
}

impl Source for SeekingSource {
    fn skip(&mut self, count: u64) -> io::Result<()> {
        let offset = i64::try_from(count).map_err(|_| io::Error::from(io::ErrorKind::UnexpectedEof))?;
        self.0.seek_relative(offset)?;
        // Seeking goes past the end without complaint.
        if self.0.stream_position()? > self.0.get_ref().metadata()?.len() {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        Ok(())
    }
}

/// Reads one member, without a position shared with other readers.
struct MemberReader {
    file: Arc<File>,
    offset: u64,
    remaining: u64,
}

impl Read for MemberReader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let limit = usize::try_from(self.remaining)
            .unwrap_or(usize::MAX)
            .min(buffer.len());
        let count = self.file.read_at(&mut buffer[..limit], self.offset)?;
        self.offset += count as u64;
        self.remaining -= count as u64;
        Ok(count)
    }
}
