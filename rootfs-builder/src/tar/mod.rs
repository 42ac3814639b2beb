//! Tar archives as container layers use them: POSIX ustar and pax, old GNU and its extensions, v7, star.
//!
//! A reader of our own, because a layer's archive is hostile input and its details count: pax values may hold any byte
//! (the usual crate splits them at newlines, which breaks binary extended attributes such as `security.capability`), sparse
//! files come in four encodings, and everything that allocates must be bounded. What is accepted follows Go's
//! `archive/tar`, which made most images.
//!
//! Owner: the thread converting a layer. Nothing is buffered but headers.
//!
//! States of a [`TarReader`]: *between entries* → `next_entry` → *in an entry* (its contents may be read, wholly or in part)
//! → `next_entry` … → *ended* (two zero blocks, or the input's end between entries).

mod header;
mod pax;
mod sparse;

use std::io::{self, Read};

use header::RawHeader;
pub use sparse::Segment;

use crate::erofs::Timestamp;

/// Bytes of a header, and the unit contents are padded to.
const RECORD: usize = 512;
/// The most a pax header or a long name may take: more than any real one, little to allocate.
const SPECIAL_MAX_BYTES: u64 = 1 << 20;

/// Why an archive is refused.
#[derive(Debug, thiserror::Error)]
pub enum TarError {
    #[error("cannot read the archive")]
    Read { source: io::Error },
    #[error("archive ends in the middle of {place}")]
    Truncated { place: &'static str },
    #[error("not a tar header at byte {offset}: {problem}")]
    Header { offset: u64, problem: &'static str },
    #[error("{entry:?}: {problem}")]
    Entry { entry: String, problem: &'static str },
    #[error("{entry:?}: {what} is {value}, out of range")]
    OutOfRange {
        entry: String,
        what: &'static str,
        value: i128,
    },
    #[error("a header extension of {bytes} bytes exceeds the limit of {limit}")]
    ExtensionTooLarge { bytes: u64, limit: u64 },
    #[error("{entry:?}: entry type {kind:?} does not belong into a layer")]
    Unsupported { entry: String, kind: char },
}

/// An input that can pass over bytes.
pub trait Source: Read + Sized {
    /// Pass over `count` bytes, all of which must exist.
    ///
    /// # Errors
    /// The input fails or ends before.
    fn skip(&mut self, count: u64) -> io::Result<()> {
        let passed = io::copy(&mut self.by_ref().take(count), &mut io::sink())?;
        if passed == count {
            Ok(())
        } else {
            Err(io::ErrorKind::UnexpectedEof.into())
        }
    }
}

impl Source for &[u8] {}

/// What an entry is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum EntryKind {
    Regular,
    Directory,
    Symlink { target: Vec<u8> },
    HardLink { target: Vec<u8> },
    CharDevice { major: u32, minor: u32 },
    BlockDevice { major: u32, minor: u32 },
    Fifo,
}

/// One member of the archive, as its headers describe it.
#[derive(Debug, Clone)]
pub struct Entry {
    /// As stored: not normalised, any bytes but NUL.
    pub path: Vec<u8>,
    pub kind: EntryKind,
    /// Permission bits with set-user-id, set-group-id and sticky.
    pub mode: u16,
    pub uid: u32,
    pub gid: u32,
    pub mtime: Timestamp,
    /// Full names and values, in the order of the archive; a later one of the same name counts.
    pub xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    /// Size of the file once unpacked.
    pub size: u64,
    /// Where the stored bytes belong; one segment of the whole size unless the file is sparse.
    pub segments: Vec<Segment>,
    /// Where the stored bytes begin in the archive.
    pub data_offset: u64,
}

/// Reads an archive from its start to its end.
#[derive(Debug)]
pub struct TarReader<S> {
    source: S,
    offset: u64,
    /// Stored bytes of the current entry that were not read yet, and the padding behind them.
    remaining: u64,
    padding: u64,
    ended: bool,
}

/// Extensions that come before the header they belong to.
#[derive(Default)]
struct Extensions {
    pax: pax::Records,
    long_name: Option<Vec<u8>>,
    long_link: Option<Vec<u8>>,
}

impl<S: Source> TarReader<S> {
    pub const fn new(source: S) -> Self {
        Self {
            source,
            offset: 0,
            remaining: 0,
            padding: 0,
            ended: false,
        }
    }

    /// The input, positioned behind what was read.
    pub const fn source_mut(&mut self) -> &mut S {
        &mut self.source
    }

    /// Give the input back.
    pub fn into_source(self) -> S {
        self.source
    }

    /// The next member, or nothing at the archive's end. What is left of the previous one is passed over.
    ///
    /// # Errors
    /// The archive is malformed, truncated, or uses what doesn't belong into a layer.
    pub fn next_entry(&mut self) -> Result<Option<Entry>, TarError> {
        let mut extensions = Extensions::default();
        let mut pending = false;
        loop {
            self.finish_entry()?;
            let Some(header) = self.read_header()? else {
                if pending {
                    return Err(TarError::Truncated {
                        place: "an entry's headers",
                    });
                }
                return Ok(None);
            };
            match header.kind() {
                b'x' => extensions.pax = pax::parse(&self.read_special(&header)?, header.offset)?,
                // Global headers carry comments in practice; Go's reader doesn't apply them either.
                b'g' => {
                    self.read_special(&header)?;
                    continue;
                }
                b'L' => extensions.long_name = Some(until_nul(self.read_special(&header)?)),
                b'K' => extensions.long_link = Some(until_nul(self.read_special(&header)?)),
                _ => return self.entry(&header, extensions).map(Some),
            }
            pending = true;
        }
    }

    /// Pass over what is left of the current entry.
    fn finish_entry(&mut self) -> Result<(), TarError> {
        let count = self.remaining + self.padding;
        self.source
            .skip(count)
            .map_err(|source| truncated(source, "an entry's contents"))?;
        self.offset += count;
        (self.remaining, self.padding) = (0, 0);
        Ok(())
    }

    /// The next header block, or nothing at the end.
    fn read_header(&mut self) -> Result<Option<RawHeader>, TarError> {
        if self.ended {
            return Ok(None);
        }
        let offset = self.offset;
        let Some(block) = self.read_record(true)? else {
            self.ended = true;
            return Ok(None);
        };
        if block.iter().all(|byte| *byte == 0) {
            self.ended = true;
            // One zero block must be followed by another, or by nothing.
            return match self.read_record(true)? {
                Some(second) if second.iter().any(|byte| *byte != 0) => Err(TarError::Header {
                    offset: offset + RECORD as u64,
                    problem: "data behind the end mark",
                }),
                _ => Ok(None),
            };
        }
        RawHeader::new(block, offset).map(Some)
    }

    fn read_record(&mut self, may_end: bool) -> Result<Option<Box<[u8; RECORD]>>, TarError> {
        let mut block = Box::new([0; RECORD]);
        let mut filled = 0;
        while filled < RECORD {
            match self.source.read(&mut block[filled..]) {
                Ok(0) if filled == 0 && may_end => return Ok(None),
                Ok(0) => return Err(TarError::Truncated { place: "a header" }),
                Ok(count) => filled += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(source) => return Err(TarError::Read { source }),
            }
        }
        self.offset += RECORD as u64;
        Ok(Some(block))
    }

    /// The contents of a pax header or a long name.
    fn read_special(&mut self, header: &RawHeader) -> Result<Vec<u8>, TarError> {
        let bytes = header.size()?;
        if bytes > SPECIAL_MAX_BYTES {
            return Err(TarError::ExtensionTooLarge {
                bytes,
                limit: SPECIAL_MAX_BYTES,
            });
        }
        let mut content = vec![0; usize::try_from(bytes).unwrap_or(0)];
        self.source
            .read_exact(&mut content)
            .map_err(|source| truncated(source, "a header extension"))?;
        self.offset += bytes;
        self.padding = padding_of(bytes);
        Ok(content)
    }

    /// Put a header and its extensions together.
    fn entry(&mut self, header: &RawHeader, extensions: Extensions) -> Result<Entry, TarError> {
        let pax = extensions.pax;
        let path = extensions.long_name.or(pax.path).unwrap_or_else(|| header.path());
        let link = extensions
            .long_link
            .or(pax.link_path)
            .unwrap_or_else(|| header.link_name());
        // A sparse file's header has a made-up name; the true one comes with the map.
        let path = pax.sparse.name.clone().unwrap_or(path);
        let shown = || String::from_utf8_lossy(&path).into_owned();
        let range = |what, value| TarError::OutOfRange {
            entry: shown(),
            what,
            value,
        };
        let owner = |what, value: i128| match u32::try_from(value) {
            // All ones means "leave it" to chown(2): no file has that owner.
            Ok(id) if id != u32::MAX => Ok(id),
            _ => Err(range(what, value)),
        };
        let uid = owner("owner", pax.uid.map_or_else(|| header.uid(), Ok)?)?;
        let gid = owner("group", pax.gid.map_or_else(|| header.gid(), Ok)?)?;
        let mtime = pax.mtime.map_or_else(|| header.mtime(), Ok)?;
        let kind = entry_kind(header, &path, link)?;
        let stored = if kind == EntryKind::Regular {
            pax.size.map_or_else(|| header.size(), Ok)?
        } else {
            0
        };

        self.remaining = stored;
        self.padding = padding_of(stored);
        let map = if kind == EntryKind::Regular {
            self.sparse_map(header, &pax.sparse)?
        } else {
            None
        };
        // Reading the map may have used up some of the contents.
        let stored = self.remaining;
        let (size, segments) = match map {
            Some(map) => {
                map.check(stored).map_err(|problem| TarError::Entry {
                    entry: shown(),
                    problem,
                })?;
                (map.size, map.segments)
            }
            None => (
                stored,
                vec![Segment {
                    offset: 0,
                    len: stored,
                }],
            ),
        };
        Ok(Entry {
            path,
            kind,
            mode: header.mode()?,
            uid,
            gid,
            mtime,
            xattrs: pax.xattrs,
            size,
            segments,
            data_offset: self.offset,
        })
    }

    /// The map of a sparse file, in whichever of the encodings there is one.
    fn sparse_map(
        &mut self,
        header: &RawHeader,
        pax: &pax::SparseRecords,
    ) -> Result<Option<sparse::Map>, TarError> {
        if header.kind() == b'S' {
            let mut map = header.sparse_map()?;
            let mut more = header.sparse_continues();
            while more {
                let block = self.read_record(false)?.ok_or(TarError::Truncated {
                    place: "a sparse file's map",
                })?;
                more = map.extend_old_gnu(&block, header.offset)?;
            }
            return Ok(Some(map));
        }
        if pax.is_version_1() {
            let mut map = sparse::Map::new(pax.real_size(header.offset)?);
            let used = map.read_version_1(&mut (&mut self.source).take(self.remaining), header.offset)?;
            self.remaining = self.remaining.saturating_sub(used);
            self.offset += used;
            return Ok(Some(map));
        }
        pax.map(header.offset)
    }
}

/// Reads the stored bytes of the current entry; holes are not among them.
impl<S: Source> Read for TarReader<S> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let limit = usize::try_from(self.remaining)
            .unwrap_or(usize::MAX)
            .min(buffer.len());
        if limit == 0 {
            return Ok(0);
        }
        let count = self.source.read(&mut buffer[..limit])?;
        if count == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.remaining -= count as u64;
        self.offset += count as u64;
        Ok(count)
    }
}

fn entry_kind(header: &RawHeader, path: &[u8], link: Vec<u8>) -> Result<EntryKind, TarError> {
    let entry = || String::from_utf8_lossy(path).into_owned();
    let device = |(major, minor): (u64, u64)| match (u32::try_from(major), u32::try_from(minor)) {
        (Ok(major), Ok(minor)) => Ok((major, minor)),
        _ => Err(TarError::OutOfRange {
            entry: entry(),
            what: "device number",
            value: i128::from(major.max(minor)),
        }),
    };
    Ok(match header.kind() {
        // Archives older than ustar mark directories by a slash at the name's end.
        0 if path.ends_with(b"/") => EntryKind::Directory,
        0 | b'0' | b'7' | b'S' => EntryKind::Regular,
        b'1' => EntryKind::HardLink { target: link },
        b'2' => EntryKind::Symlink { target: link },
        b'3' => {
            let (major, minor) = device(header.device()?)?;
            EntryKind::CharDevice { major, minor }
        }
        b'4' => {
            let (major, minor) = device(header.device()?)?;
            EntryKind::BlockDevice { major, minor }
        }
        b'5' => EntryKind::Directory,
        b'6' => EntryKind::Fifo,
        kind => {
            return Err(TarError::Unsupported {
                entry: entry(),
                kind: char::from(kind),
            });
        }
    })
}

fn truncated(source: io::Error, place: &'static str) -> TarError {
    match source.kind() {
        io::ErrorKind::UnexpectedEof => TarError::Truncated { place },
        _ => TarError::Read { source },
    }
}

const fn padding_of(size: u64) -> u64 {
    size.wrapping_neg() % RECORD as u64
}

fn until_nul(mut bytes: Vec<u8>) -> Vec<u8> {
    if let Some(end) = bytes.iter().position(|byte| *byte == 0) {
        bytes.truncate(end);
    }
    bytes
}
