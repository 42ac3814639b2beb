//! Maps of sparse files: which parts of the file the stored bytes are.

use std::io::Read;

use super::header::parse_number;
use super::{RECORD, TarError, pax};

/// A file with more runs than this is an attack on our memory.
pub(super) const MAP_MAX_SEGMENTS: usize = 1 << 20;

/// A run of stored bytes and where in the file it belongs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segment {
    pub offset: u64,
    pub len: u64,
}

/// All runs of a file, and its size with the holes.
#[derive(Debug)]
pub(super) struct Map {
    pub size: u64,
    pub segments: Vec<Segment>,
}

impl Map {
    pub const fn new(size: u64) -> Self {
        Self {
            size,
            segments: Vec::new(),
        }
    }

    /// Runs must go forward, stay inside of the file and add up to what is stored.
    pub fn check(&self, stored: u64) -> Result<(), &'static str> {
        let mut end = 0;
        let mut total: u64 = 0;
        for segment in &self.segments {
            let next = segment
                .offset
                .checked_add(segment.len)
                .ok_or("a sparse file's map overflows")?;
            if segment.offset < end || next > self.size {
                return Err("a sparse file's map is out of order or exceeds its size");
            }
            end = next;
            total += segment.len;
        }
        if total == stored {
            Ok(())
        } else {
            Err("a sparse file's map does not add up to its contents")
        }
    }

    /// Pairs of 12-byte numbers, up to the first empty one.
    pub fn push_old_gnu(&mut self, fields: &[u8], offset: u64) -> Result<(), TarError> {
        for pair in fields.chunks_exact(24) {
            if pair[0] == 0 {
                break;
            }
            let number = |field| parse_number(field).and_then(|value| u64::try_from(value).ok());
            match (number(&pair[..12]), number(&pair[12..])) {
                (Some(offset), Some(len)) => self.segments.push(Segment { offset, len }),
                _ => return Err(damaged(offset)),
            }
        }
        Ok(())
    }

    /// A block of more pairs; tells whether another follows.
    pub fn extend_old_gnu(&mut self, block: &[u8; RECORD], offset: u64) -> Result<bool, TarError> {
        if self.segments.len() > MAP_MAX_SEGMENTS {
            return Err(damaged(offset));
        }
        self.push_old_gnu(&block[..504], offset)?;
        Ok(block[504] != 0)
    }

    /// Version 1.0: decimal lines in front of the contents, padded to a record. Returns the bytes used.
    pub fn read_version_1(&mut self, contents: &mut dyn Read, offset: u64) -> Result<u64, TarError> {
        let mut lines = Lines {
            contents,
            block: [0; RECORD],
            at: RECORD,
            used: 0,
            offset,
        };
        let count = lines.number()?;
        if count > MAP_MAX_SEGMENTS as u64 {
            return Err(damaged(offset));
        }
        for _ in 0..count {
            let (offset, len) = (lines.number()?, lines.number()?);
            self.segments.push(Segment { offset, len });
        }
        Ok(lines.used)
    }
}

/// Numbers, one a line, read in whole records.
struct Lines<'a> {
    contents: &'a mut dyn Read,
    block: [u8; RECORD],
    at: usize,
    used: u64,
    offset: u64,
}

impl Lines<'_> {
    fn number(&mut self) -> Result<u64, TarError> {
        let mut digits = Vec::new();
        loop {
            if self.at == RECORD {
                self.contents
                    .read_exact(&mut self.block)
                    .map_err(|source| super::truncated(source, "a sparse file's map"))?;
                self.used += RECORD as u64;
                self.at = 0;
            }
            let byte = self.block[self.at];
            self.at += 1;
            if byte == b'\n' {
                return pax::unsigned(&digits).ok_or_else(|| damaged(self.offset));
            }
            if digits.len() >= 20 {
                return Err(damaged(self.offset));
            }
            digits.push(byte);
        }
    }
}

const fn damaged(offset: u64) -> TarError {
    TarError::Header {
        offset,
        problem: "a sparse file's map is damaged",
    }
}
