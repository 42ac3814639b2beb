//! A tar header block: fields at fixed places, numbers in octal or, as GNU writes large ones, in binary.

use super::sparse::Map;
use super::{RECORD, TarError};
use crate::erofs::Timestamp;

/// Which of the dialects the block is written in; they differ in what follows the link name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Dialect {
    V7,
    Ustar,
    Star,
    Gnu,
}

/// A header block whose checksum is right.
#[derive(Debug)]
pub(super) struct RawHeader {
    block: Box<[u8; RECORD]>,
    dialect: Dialect,
    /// Where in the archive the block begins.
    pub offset: u64,
}

impl RawHeader {
    pub fn new(block: Box<[u8; RECORD]>, offset: u64) -> Result<Self, TarError> {
        let dialect = match (&block[257..263], &block[263..265]) {
            (b"ustar\0", _) if &block[508..512] == b"tar\0" => Dialect::Star,
            (b"ustar\0", _) => Dialect::Ustar,
            (b"ustar ", b" \0") => Dialect::Gnu,
            _ => Dialect::V7,
        };
        let header = Self {
            block,
            dialect,
            offset,
        };
        let stored = header.octal_or_binary(148..156).unwrap_or(-1);
        // The checksum field counts as spaces; some writers summed signed bytes.
        let bytes = || {
            header
                .block
                .iter()
                .enumerate()
                .map(|(at, byte)| if (148..156).contains(&at) { b' ' } else { *byte })
        };
        let unsigned: i128 = bytes().map(i128::from).sum();
        let signed: i128 = bytes().map(|byte| i128::from(byte.cast_signed())).sum();
        if stored != unsigned && stored != signed {
            return Err(TarError::Header {
                offset,
                problem: "checksum is wrong",
            });
        }
        Ok(header)
    }

    /// The type flag.
    pub fn kind(&self) -> u8 {
        self.block[156]
    }

    pub fn path(&self) -> Vec<u8> {
        let name = self.text(0..100);
        let prefix = match self.dialect {
            Dialect::Ustar => self.text(345..500),
            Dialect::Star => self.text(345..476),
            Dialect::V7 | Dialect::Gnu => &[],
        };
        if prefix.is_empty() {
            name.to_vec()
        } else {
            [prefix, name].join(&b'/')
        }
    }

    pub fn link_name(&self) -> Vec<u8> {
        self.text(157..257).to_vec()
    }

    pub fn mode(&self) -> Result<u16, TarError> {
        let mode = self.number(100..108, "mode")?;
        Ok(u16::try_from(mode & 0o7777).unwrap_or(0))
    }

    pub fn uid(&self) -> Result<i128, TarError> {
        self.number(108..116, "owner")
    }

    pub fn gid(&self) -> Result<i128, TarError> {
        self.number(116..124, "group")
    }

    pub fn size(&self) -> Result<u64, TarError> {
        self.unsigned(124..136, "size")
    }

    pub fn mtime(&self) -> Result<Timestamp, TarError> {
        let secs = self.number(136..148, "modification time")?;
        let secs = i64::try_from(secs).map_err(|_| self.wrong("modification time is out of range"))?;
        Ok(Timestamp { secs, nanos: 0 })
    }

    pub fn device(&self) -> Result<(u64, u64), TarError> {
        // Version 7 had no such fields; what stands there is undefined.
        if self.dialect == Dialect::V7 {
            return Ok((0, 0));
        }
        Ok((
            self.unsigned(329..337, "device number")?,
            self.unsigned(337..345, "device number")?,
        ))
    }

    /// The part of an old GNU sparse file's map that is in the header itself.
    pub fn sparse_map(&self) -> Result<Map, TarError> {
        let mut map = Map::new(self.unsigned(483..495, "size")?);
        map.push_old_gnu(&self.block[386..482], self.offset)?;
        Ok(map)
    }

    /// Whether blocks with more of the map follow.
    pub fn sparse_continues(&self) -> bool {
        self.block[482] != 0
    }

    fn text(&self, range: std::ops::Range<usize>) -> &[u8] {
        let field = &self.block[range];
        &field[..field.iter().position(|byte| *byte == 0).unwrap_or(field.len())]
    }

    fn unsigned(&self, range: std::ops::Range<usize>, what: &'static str) -> Result<u64, TarError> {
        let value = self.number(range, what)?;
        u64::try_from(value)
            .ok()
            .filter(|value| *value <= i64::MAX.cast_unsigned())
            .ok_or(TarError::OutOfRange {
                entry: String::from_utf8_lossy(&self.path()).into_owned(),
                what,
                value,
            })
    }

    fn number(&self, range: std::ops::Range<usize>, what: &'static str) -> Result<i128, TarError> {
        self.octal_or_binary(range).ok_or_else(|| {
            self.wrong(match what {
                "mode" => "mode is not a number",
                "size" => "size is not a number",
                "owner" | "group" => "owner is not a number",
                "device number" => "device number is not a number",
                _ => "modification time is not a number",
            })
        })
    }

    fn octal_or_binary(&self, range: std::ops::Range<usize>) -> Option<i128> {
        parse_number(&self.block[range])
    }

    const fn wrong(&self, problem: &'static str) -> TarError {
        TarError::Header {
            offset: self.offset,
            problem,
        }
    }
}

/// A number field: octal digits between spaces and NULs, or two's complement with the top bit of the first byte set.
pub(super) fn parse_number(field: &[u8]) -> Option<i128> {
    if field.first().is_some_and(|first| first & 0x80 != 0) {
        // The next bit is the sign; more than 16 bytes there never are.
        let negative = field[0] & 0x40 != 0;
        let start = if negative { -1 } else { 0 };
        return Some(field.iter().enumerate().fold(start, |value: i128, (at, byte)| {
            let byte = if at == 0 {
                if negative { byte | 0x80 } else { byte & 0x7f }
            } else {
                *byte
            };
            value << 8 | i128::from(byte)
        }));
    }
    let blank = |byte: &u8| matches!(byte, b' ' | 0);
    let start = field.iter().position(|byte| !blank(byte)).unwrap_or(field.len());
    let digits = &field[start..];
    let digits = &digits[..digits
        .iter()
        .rposition(|byte| !blank(byte))
        .map_or(0, |last| last + 1)];
    digits.iter().try_fold(0, |value: i128, digit| match digit {
        b'0'..=b'7' => Some(value << 3 | i128::from(digit - b'0')),
        _ => None,
    })
}
