//! `json-file`: docker's format, one JSON object a line, in files that are rotated.
//!
//! ```text
//! container.log      the newest
//! container.log.1    the one before; higher numbers are older
//! ```
//!
//! Invariants: there are never more than `max_files` files of a little more than `max_bytes` each; a file that could not
//! be written as a whole (full disk) ends with a whole line all the same.

use std::{
    fs::{self, File},
    io::{self, ErrorKind, Write as _},
    path::{Path, PathBuf},
};

/// An open log.
#[derive(Debug)]
pub(crate) struct JsonFile {
    path: PathBuf,
    file: File,
    bytes: u64,
    max_bytes: u64,
    max_files: u32,
}

/// Appends one entry, as a line, to `out`.
pub(crate) fn encode(out: &mut Vec<u8>, stream: &str, time: &str, piece: &[u8]) {
    out.extend_from_slice(b"{\"log\":\"");
    if std::str::from_utf8(piece).is_ok() {
        escape(out, piece);
    } else {
        for chunk in piece.utf8_chunks() {
            escape(out, chunk.valid().as_bytes());
            if !chunk.invalid().is_empty() {
                out.extend_from_slice("\u{fffd}".as_bytes());
            }
        }
    }
    for part in ["\",\"stream\":\"", stream, "\",\"time\":\"", time, "\"}\n"] {
        out.extend_from_slice(part.as_bytes());
    }
}

/// Appends text as it is inside of a JSON string: most of it in one go, because a container may print faster than a
/// general serialiser writes.
fn escape(out: &mut Vec<u8>, text: &[u8]) {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    let mut rest = text;
    while let Some(plain) = find_special(rest) {
        let (before, after) = rest.split_at(plain);
        out.extend_from_slice(before);
        // They often come together, as zeroes do.
        let special = after.iter().take_while(|byte| is_special(**byte)).count();
        let (special, after) = after.split_at(special);
        out.reserve(special.len() * 6);
        for byte in special {
            let short = match byte {
                b'\n' => b'n',
                b'\t' => b't',
                b'\r' => b'r',
                0x08 => b'b',
                0x0c => b'f',
                b'"' | b'\\' => *byte,
                _ => 0,
            };
            if short == 0 {
                let digits = [byte >> 4, byte & 0xf].map(|digit| DIGITS[usize::from(digit)]);
                out.extend_from_slice(&[b'\\', b'u', b'0', b'0', digits[0], digits[1]]);
            } else {
                out.extend_from_slice(&[b'\\', short]);
            }
        }
        rest = after;
    }
    out.extend_from_slice(rest);
}

/// What a JSON string can't have as it is: a control character, a quote or a backslash.
fn is_special(byte: u8) -> bool {
    byte < 0x20 || byte == b'"' || byte == b'\\'
}

/// Where the first of these is.
fn find_special(text: &[u8]) -> Option<usize> {
    const ONES: u64 = u64::MAX / 255;
    const HIGH: u64 = ONES << 7;
    let (words, rest) = text.as_chunks::<8>();
    for (index, word) in words.iter().enumerate() {
        let word = u64::from_le_bytes(*word);
        // The high bit of each byte that is less than 0x20, and of each that is zero once it has met its own: exact up to
        // the first such byte, behind which a borrow may show more. Bytes above 0x7f are none.
        let control = word.wrapping_sub(ONES * 0x20);
        let zero = |byte: u8| {
            (word ^ (ONES * u64::from(byte))).wrapping_sub(ONES) & !(word ^ (ONES * u64::from(byte)))
        };
        let special = ((control & !word) | zero(b'"') | zero(b'\\')) & HIGH;
        if special != 0 {
            return Some(index * 8 + special.trailing_zeros() as usize / 8);
        }
    }
    let at = rest.iter().position(|byte| is_special(*byte))?;
    Some(words.len() * 8 + at)
}

fn rotated(path: &Path, number: u32) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(format!(".{number}"));
    PathBuf::from(name)
}

fn open(path: &Path) -> io::Result<File> {
    File::options().create(true).append(true).open(path)
}

impl JsonFile {
    /// Opens a log, or goes on with one.
    pub(crate) fn open(path: &Path, max_bytes: u64, max_files: u32) -> io::Result<Self> {
        let file = open(path)?;
        let bytes = file.metadata()?.len();
        Ok(Self {
            path: path.to_owned(),
            file,
            bytes,
            max_bytes,
            max_files,
        })
    }

    /// Writes whole lines.
    pub(crate) fn write(&mut self, lines: &[u8]) -> io::Result<()> {
        let mut rest = lines;
        while !rest.is_empty() {
            let room = usize::try_from(self.max_bytes.saturating_sub(self.bytes)).unwrap_or(usize::MAX);
            let fitting = if rest.len() <= room {
                rest.len()
            } else {
                memchr::memrchr(b'\n', &rest[..room]).map_or(0, |end| end + 1)
            };
            if fitting == 0 && self.bytes > 0 {
                self.rotate()?;
                continue;
            }
            // A single line longer than a file gets one of its own.
            let length = if fitting == 0 {
                memchr::memchr(b'\n', rest).map_or(rest.len(), |end| end + 1)
            } else {
                fitting
            };
            self.append(&rest[..length])?;
            rest = &rest[length..];
        }
        Ok(())
    }

    fn append(&mut self, lines: &[u8]) -> io::Result<()> {
        if let Err(error) = self.file.write_all(lines) {
            // Readers find whole lines only.
            drop(self.file.set_len(self.bytes));
            return Err(error);
        }
        self.bytes += lines.len() as u64;
        Ok(())
    }

    fn rotate(&mut self) -> io::Result<()> {
        if self.max_files <= 1 {
            self.file.set_len(0)?;
        } else {
            for number in (1..self.max_files).rev() {
                let from = if number == 1 {
                    self.path.clone()
                } else {
                    rotated(&self.path, number - 1)
                };
                match fs::rename(from, rotated(&self.path, number)) {
                    Err(error) if error.kind() != ErrorKind::NotFound => return Err(error),
                    _ => {}
                }
            }
            self.file = open(&self.path)?;
        }
        self.bytes = 0;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(count: usize) -> Vec<u8> {
        let mut out = Vec::new();
        for index in 0..count {
            encode(&mut out, "stdout", "T", format!("line {index}\n").as_bytes());
        }
        out
    }

    #[test]
    fn entry_is_what_docker_writes() {
        let mut out = Vec::new();
        encode(
            &mut out,
            "stderr",
            "2026-01-02T03:04:05.000000006Z",
            b"a \"b\"\x1b\xff\n",
        );
        assert_eq!(
            String::from_utf8(out).unwrap(),
            "{\"log\":\"a \\\"b\\\"\\u001b\u{fffd}\\n\",\"stream\":\"stderr\",\"time\":\"2026-01-02T03:04:05.000000006Z\"}\n"
        );
    }

    proptest::proptest! {
        #[test]
        fn entry_of_any_bytes_is_what_a_serialiser_writes(
            bytes in proptest::collection::vec(proptest::prelude::any::<u8>(), 0..300),
            text in ".*",
        ) {
            for piece in [bytes.as_slice(), text.as_bytes()] {
                let mut out = Vec::new();
                encode(&mut out, "stdout", "T", piece);
                let log = serde_json::to_string(&String::from_utf8_lossy(piece)).unwrap();
                let expected = format!("{{\"log\":{log},\"stream\":\"stdout\",\"time\":\"T\"}}\n");
                proptest::prop_assert_eq!(String::from_utf8(out).unwrap(), expected);
            }
        }
    }

    #[test]
    fn files_are_rotated_between_lines_and_the_oldest_goes() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("container.log");
        let mut log = JsonFile::open(&path, 200, 3).unwrap();
        log.write(&lines(40)).unwrap();
        let read = |path: PathBuf| fs::read_to_string(path).unwrap();
        let files = [
            read(rotated(&path, 2)),
            read(rotated(&path, 1)),
            read(path.clone()),
        ];
        for file in &files {
            assert!(file.len() <= 200 && file.ends_with('\n'), "{file}");
        }
        assert!(files[2].contains("line 39"));
        assert!(String::from_utf8(lines(40)).unwrap().ends_with(&files.concat()));
        assert!(!rotated(&path, 3).exists());
    }

    #[test]
    fn single_file_starts_again_when_it_is_full() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("container.log");
        let mut log = JsonFile::open(&path, 200, 1).unwrap();
        log.write(&lines(40)).unwrap();
        assert!(fs::metadata(&path).unwrap().len() <= 200);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn log_is_continued_by_the_next_run() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("container.log");
        JsonFile::open(&path, 1000, 2).unwrap().write(&lines(1)).unwrap();
        let mut log = JsonFile::open(&path, 1000, 2).unwrap();
        assert_eq!(log.bytes, lines(1).len() as u64);
        log.write(&lines(1)).unwrap();
        assert_eq!(fs::read(&path).unwrap(), [lines(1), lines(1)].concat());
    }

    #[test]
    fn line_longer_than_a_file_gets_one_of_its_own() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("container.log");
        let mut log = JsonFile::open(&path, 100, 3).unwrap();
        let mut long = Vec::new();
        encode(&mut long, "stdout", "T", &[b'x'; 500]);
        log.write(&[lines(1), long.clone(), lines(1)].concat()).unwrap();
        assert_eq!(fs::read(rotated(&path, 1)).unwrap(), long);
        assert_eq!(fs::read(&path).unwrap(), lines(1));
    }

    #[test]
    fn full_disk_is_an_error_and_leaves_whole_lines() {
        // A file that may not grow is the closest to a full disk without one.
        let mut log = JsonFile {
            path: PathBuf::from("/dev/full"),
            file: open(Path::new("/dev/full")).unwrap(),
            bytes: 0,
            max_bytes: 1000,
            max_files: 2,
        };
        assert_eq!(log.write(&lines(1)).unwrap_err().kind(), ErrorKind::StorageFull);
    }
}
