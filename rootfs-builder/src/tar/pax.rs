//! Pax extended headers: `LENGTH KEY=VALUE\n` records, where the length is what delimits them.

use super::TarError;
use super::sparse::{MAP_MAX_SEGMENTS, Map, Segment};
use crate::erofs::Timestamp;

/// More attributes than this no file system would take.
const XATTRS_MAX: usize = 4096;

/// The records that matter to a layer.
#[derive(Debug, Default)]
pub(super) struct Records {
    pub path: Option<Vec<u8>>,
    pub link_path: Option<Vec<u8>>,
    pub size: Option<u64>,
    pub uid: Option<i128>,
    pub gid: Option<i128>,
    pub mtime: Option<Timestamp>,
    pub xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    pub sparse: SparseRecords,
}

/// GNU's records of sparse files, versions 0.0, 0.1 and 1.0.
#[derive(Debug, Default)]
pub(super) struct SparseRecords {
    pub name: Option<Vec<u8>>,
    major: Option<u64>,
    size: Option<u64>,
    /// Version 0.0: one record for each number. Version 0.1: all of them in one.
    numbers: Vec<u64>,
    blocks: bool,
}

impl SparseRecords {
    /// Version 1.0 keeps the map in front of the contents.
    pub const fn is_version_1(&self) -> bool {
        matches!(self.major, Some(1))
    }

    pub fn real_size(&self, offset: u64) -> Result<u64, TarError> {
        self.size.ok_or(TarError::Header {
            offset,
            problem: "a sparse file has no size",
        })
    }

    /// The map of versions 0.0 and 0.1.
    pub fn map(&self, offset: u64) -> Result<Option<Map>, TarError> {
        if !self.blocks {
            return Ok(None);
        }
        let mut map = Map::new(self.real_size(offset)?);
        if !self.numbers.len().is_multiple_of(2) {
            return Err(TarError::Header {
                offset,
                problem: "a sparse file's map is damaged",
            });
        }
        map.segments = self
            .numbers
            .chunks(2)
            .map(|pair| Segment {
                offset: pair[0],
                len: pair[1],
            })
            .collect();
        Ok(Some(map))
    }
}

/// Read all records of one extended header.
pub(super) fn parse(mut bytes: &[u8], offset: u64) -> Result<Records, TarError> {
    let wrong = |problem| TarError::Header { offset, problem };
    let mut records = Records::default();
    while !bytes.is_empty() {
        let (key, value, rest) = split_record(bytes).ok_or_else(|| wrong("a pax record is malformed"))?;
        bytes = rest;
        records.take(key, value).map_err(wrong)?;
    }
    Ok(records)
}

/// The first record's key and value, and the bytes behind it.
fn split_record(bytes: &[u8]) -> Option<(&[u8], &[u8], &[u8])> {
    let space = bytes.iter().take(20).position(|byte| *byte == b' ')?;
    let length: usize = std::str::from_utf8(&bytes[..space]).ok()?.parse().ok()?;
    if length <= space + 1 || length > bytes.len() {
        return None;
    }
    let (record, rest) = bytes.split_at(length);
    let body = record[space + 1..].strip_suffix(b"\n")?;
    let equals = body.iter().position(|byte| *byte == b'=')?;
    (equals > 0).then_some((&body[..equals], &body[equals + 1..], rest))
}

impl Records {
    fn take(&mut self, key: &[u8], value: &[u8]) -> Result<(), &'static str> {
        if let Some(name) = key.strip_prefix(b"SCHILY.xattr.") {
            if self.xattrs.len() >= XATTRS_MAX {
                return Err("too many extended attributes");
            }
            // As with every record, an empty value takes an earlier one back.
            self.xattrs.retain(|(earlier, _)| earlier != name);
            if !value.is_empty() {
                self.xattrs.push((name.to_vec(), value.to_vec()));
            }
            return Ok(());
        }
        match key {
            b"path" => self.path = text(value, "pax path holds a NUL byte")?,
            b"linkpath" => self.link_path = text(value, "pax link path holds a NUL byte")?,
            b"size" => self.size = optional(value, unsigned, "pax size is not a number")?,
            b"uid" => self.uid = optional(value, signed, "pax uid is not a number")?,
            b"gid" => self.gid = optional(value, signed, "pax gid is not a number")?,
            b"mtime" => self.mtime = optional(value, timestamp, "pax mtime is not a time")?,
            b"GNU.sparse.name" => self.sparse.name = text(value, "sparse name holds a NUL byte")?,
            b"GNU.sparse.major" => {
                self.sparse.major = optional(value, unsigned, "sparse version is not a number")?
            }
            b"GNU.sparse.size" | b"GNU.sparse.realsize" => {
                self.sparse.size = optional(value, unsigned, "sparse size is not a number")?;
            }
            b"GNU.sparse.numblocks" => self.sparse.blocks = true,
            b"GNU.sparse.offset" | b"GNU.sparse.numbytes" => self.sparse_numbers(&[value])?,
            b"GNU.sparse.map" => {
                self.sparse.blocks = true;
                let numbers: Vec<&[u8]> = value
                    .split(|byte| *byte == b',')
                    .filter(|text| !text.is_empty())
                    .collect();
                self.sparse_numbers(&numbers)?;
            }
            // Times of access and change, user names, comments, checksums: nothing an image keeps.
            _ => {}
        }
        Ok(())
    }

    fn sparse_numbers(&mut self, texts: &[&[u8]]) -> Result<(), &'static str> {
        if self.sparse.numbers.len() + texts.len() > 2 * MAP_MAX_SEGMENTS {
            return Err("a sparse file's map is too long");
        }
        for text in texts {
            self.sparse
                .numbers
                .push(unsigned(text).ok_or("a sparse file's map is damaged")?);
        }
        Ok(())
    }
}

/// An empty value takes the record back.
fn text(value: &[u8], problem: &'static str) -> Result<Option<Vec<u8>>, &'static str> {
    if value.contains(&0) {
        return Err(problem);
    }
    Ok((!value.is_empty()).then(|| value.to_vec()))
}

fn optional<T>(
    value: &[u8],
    parse: impl Fn(&[u8]) -> Option<T>,
    problem: &'static str,
) -> Result<Option<T>, &'static str> {
    if value.is_empty() {
        Ok(None)
    } else {
        parse(value).map(Some).ok_or(problem)
    }
}

pub(super) fn unsigned(text: &[u8]) -> Option<u64> {
    let text = std::str::from_utf8(text).ok()?;
    let digits_only = text.bytes().all(|byte| byte.is_ascii_digit());
    text.parse()
        .ok()
        .filter(|value| digits_only && *value <= i64::MAX.cast_unsigned())
}

fn signed(text: &[u8]) -> Option<i128> {
    std::str::from_utf8(text)
        .ok()?
        .parse::<i64>()
        .ok()
        .map(i128::from)
}

/// `[-]SECONDS[.FRACTION]`, cut off after nanoseconds.
fn timestamp(text: &[u8]) -> Option<Timestamp> {
    let text = std::str::from_utf8(text).ok()?;
    let (whole, fraction) = text.split_once('.').unwrap_or((text, ""));
    let secs: i64 = whole.parse().ok()?;
    if !fraction.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let nanos: u32 = format!("{fraction:0<9}").get(..9)?.parse().ok()?;
    if !whole.starts_with('-') || nanos == 0 {
        return Some(Timestamp { secs, nanos });
    }
    Some(Timestamp {
        secs: secs.checked_sub(1)?,
        nanos: 1_000_000_000 - nanos,
    })
}
