//! Reads the files of the `json-file` log driver, oldest line first, across rotation.
//!
//! ```text
//! container.log.2   container.log.1   container.log      each line {"log": …, "stream": …, "time": …}
//!      oldest                          being written
//! ```
//!
//! The writer rotates by renaming, so a file is followed by its inode: whatever it is called meanwhile, what comes after it
//! is the file that now has the next smaller number. Only lines that end are read; half a line is one being written.

use std::{
    ffi::OsString,
    fs::{self, File},
    io::{self, BufRead as _, BufReader, Read as _, Seek as _, SeekFrom},
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};

use serde::Deserialize;

/// Longer than any line the driver writes: 16 KiB, each byte escaped, and the rest.
const LINE_MAX_BYTES: u64 = 1 << 20;
/// How often the list of files may change while it is read.
const ATTEMPTS: usize = 100;
const BLOCK_BYTES: u64 = 64 << 10;

/// One line of a log.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Entry {
    /// What was written, with its line break unless it was cut.
    pub log: String,
    /// `stdout` or `stderr`.
    pub stream: String,
    /// RFC 3339 with nanoseconds.
    pub time: String,
}

/// A log being read.
#[derive(Debug)]
pub struct LogReader {
    path: PathBuf,
    current: Option<Open>,
    /// Lines that were no JSON.
    damaged: u64,
}

#[derive(Debug)]
struct Open {
    inode: u64,
    reader: BufReader<File>,
    /// Of the line that has not ended yet.
    partial: Vec<u8>,
}

impl Open {
    fn new(file: File) -> io::Result<Self> {
        Ok(Self {
            inode: file.metadata()?.ino(),
            reader: BufReader::with_capacity(usize::try_from(BLOCK_BYTES).unwrap_or(1 << 16), file),
            partial: Vec::new(),
        })
    }

    /// The next line that ends, without its line break.
    fn line(&mut self) -> io::Result<Option<Vec<u8>>> {
        let room = LINE_MAX_BYTES.saturating_sub(self.partial.len() as u64);
        (&mut self.reader)
            .take(room)
            .read_until(b'\n', &mut self.partial)?;
        if self.partial.last() == Some(&b'\n') {
            self.partial.pop();
            return Ok(Some(std::mem::take(&mut self.partial)));
        }
        if self.partial.len() as u64 >= LINE_MAX_BYTES {
            // No line of the driver's: it is given up as damaged, and so is what follows up to the next break.
            return Ok(Some(std::mem::take(&mut self.partial)));
        }
        Ok(None)
    }
}

impl LogReader {
    /// Opens a log at its beginning, or before its last `tail` lines. One that isn't there yet is empty.
    ///
    /// # Errors
    /// Its files can't be read.
    pub fn open(path: &Path, tail: Option<u64>) -> io::Result<Self> {
        let mut files = open_all(path)?;
        let mut this = Self {
            path: path.to_owned(),
            current: None,
            damaged: 0,
        };
        let Some(tail) = tail else {
            this.current = files.pop().map(Open::new).transpose()?;
            return Ok(this);
        };
        // From the newest file backwards, until there are enough lines.
        let mut missing = tail;
        let mut chosen = None;
        for mut file in files {
            let (found, offset) = seek_back(&mut file, missing)?;
            file.seek(SeekFrom::Start(offset))?;
            missing -= found.min(missing);
            chosen = Some(file);
            if missing == 0 {
                break;
            }
        }
        this.current = chosen.map(Open::new).transpose()?;
        Ok(this)
    }

    /// The next line there is now.
    ///
    /// # Errors
    /// The files can't be read.
    pub fn next(&mut self) -> io::Result<Option<Entry>> {
        loop {
            if let Some(line) = self.current.as_mut().map_or(Ok(None), Open::line)? {
                match serde_json::from_slice(&line) {
                    Ok(entry) => return Ok(Some(entry)),
                    Err(_) => self.damaged += 1,
                }
                continue;
            }
            let Some(successor) = self.successor()? else {
                return Ok(None);
            };
            // What was written between our last look and the rotation is still to be read.
            if let Some(current) = &mut self.current
                && let Some(line) = current.line()?
            {
                match serde_json::from_slice(&line) {
                    Ok(entry) => return Ok(Some(entry)),
                    Err(_) => self.damaged += 1,
                }
                continue;
            }
            self.current = Some(Open::new(successor)?);
        }
    }

    /// How many lines could not be understood so far.
    pub const fn damaged(&self) -> u64 {
        self.damaged
    }

    /// The file after the current one, if there is one.
    fn successor(&self) -> io::Result<Option<File>> {
        let newest = match fs::metadata(&self.path) {
            Ok(metadata) => metadata.ino(),
            // Not there yet, or just being rotated.
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        let Some(current) = &self.current else {
            return Ok(open_all(&self.path)?.pop());
        };
        if current.inode == newest {
            return Ok(None);
        }
        let mut after = None;
        for file in open_all(&self.path)? {
            if file.metadata()?.ino() == current.inode {
                return Ok(after);
            }
            after = Some(file);
        }
        // Ours was rotated out of existence: go on with the oldest there is.
        Ok(after)
    }
}

/// The log's files, newest first; each once, whatever is renamed meanwhile.
fn open_all(path: &Path) -> io::Result<Vec<File>> {
    for _ in 0..ATTEMPTS {
        let before = names(path)?;
        let mut files = Vec::new();
        let mut inodes = Vec::new();
        let mut stable = true;
        for (name, inode) in &before {
            match File::open(name) {
                Ok(file) if file.metadata()?.ino() == *inode => {
                    inodes.push(*inode);
                    files.push(file);
                }
                Ok(_) => stable = false,
                Err(error) if error.kind() == io::ErrorKind::NotFound => stable = false,
                Err(error) => return Err(error),
            }
        }
        if stable && names(path)? == before {
            return Ok(files);
        }
    }
    Err(io::Error::other("the log is rotated faster than it can be read"))
}

/// Names and inodes, newest first.
fn names(path: &Path) -> io::Result<Vec<(PathBuf, u64)>> {
    let (Some(folder), Some(base)) = (path.parent(), path.file_name()) else {
        return Ok(Vec::new());
    };
    let prefix = [base.to_string_lossy().as_ref(), "."].concat();
    let entries = match fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    let mut found: Vec<(u32, OsString, u64)> = Vec::new();
    for entry in entries.flatten() {
        let name = entry.file_name();
        let number = match name.to_str() {
            Some(text) if name == base => Some((0, text)),
            Some(text) => text
                .strip_prefix(&prefix)
                .and_then(|number| Some((number.parse().ok()?, text))),
            None => None,
        };
        if let (Some((number, _)), Ok(metadata)) = (number, entry.metadata())
            && metadata.is_file()
        {
            found.push((number, name.clone(), metadata.ino()));
        }
    }
    found.sort();
    // Seen twice: renamed while the folder was read.
    let mut seen = Vec::new();
    found.retain(|(_, _, inode)| {
        let new = !seen.contains(inode);
        seen.push(*inode);
        new
    });
    Ok(found
        .into_iter()
        .map(|(_, name, inode)| (folder.join(name), inode))
        .collect())
}

/// How many of the last `wanted` lines a file has, and where the first of them begins.
fn seek_back(file: &mut File, wanted: u64) -> io::Result<(u64, u64)> {
    let length = file.metadata()?.len();
    if wanted == 0 {
        return Ok((0, length));
    }
    let mut position = length;
    let mut breaks = 0_u64;
    let mut block = Vec::new();
    while position > 0 {
        let start = position.saturating_sub(BLOCK_BYTES);
        file.seek(SeekFrom::Start(start))?;
        block.clear();
        file.take(position - start).read_to_end(&mut block)?;
        for (index, byte) in block.iter().enumerate().rev() {
            if *byte == b'\n' {
                breaks += 1;
                // The break before the first line wanted.
                if breaks > wanted {
                    return Ok((wanted, start + index as u64 + 1));
                }
            }
        }
        position = start;
    }
    Ok((breaks, 0))
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    fn line(text: &str) -> String {
        format!("{{\"log\":\"{text}\\n\",\"stream\":\"stdout\",\"time\":\"2026-01-01T00:00:00Z\"}}\n")
    }

    fn append(path: &Path, text: &str) {
        let mut file = File::options().create(true).append(true).open(path).unwrap();
        file.write_all(text.as_bytes()).unwrap();
    }

    fn rotate(path: &Path, keep: u32) {
        let name = |number: u32| path.with_file_name(format!("container.log.{number}"));
        for number in (1..keep).rev() {
            let _ = fs::rename(name(number), name(number + 1));
        }
        fs::rename(path, name(1)).unwrap();
    }

    fn rest(reader: &mut LogReader) -> Vec<String> {
        let mut lines = Vec::new();
        while let Some(entry) = reader.next().unwrap() {
            lines.push(entry.log.trim_end().to_owned());
        }
        lines
    }

    #[test]
    fn rotated_files_are_read_oldest_first() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("container.log");
        for number in 0..5 {
            append(&path, &line(&number.to_string()));
            if number < 4 {
                rotate(&path, 9);
            }
        }
        assert_eq!(
            rest(&mut LogReader::open(&path, None).unwrap()),
            ["0", "1", "2", "3", "4"]
        );
        for (tail, first) in [(0, 5), (1, 4), (3, 2), (5, 0), (100, 0)] {
            let mut reader = LogReader::open(&path, Some(tail)).unwrap();
            let expected: Vec<String> = (first..5).map(|number| number.to_string()).collect();
            assert_eq!(rest(&mut reader), expected, "{tail}");
        }
    }

    #[test]
    fn file_is_followed_through_several_rotations() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("container.log");
        append(&path, &line("a"));
        let mut reader = LogReader::open(&path, None).unwrap();
        assert_eq!(rest(&mut reader), ["a"]);
        append(&path, &line("b"));
        for next in ["c", "d"] {
            rotate(&path, 9);
            append(&path, &line(next));
        }
        assert_eq!(rest(&mut reader), ["b", "c", "d"]);
        // Rotated away altogether: what is left is read.
        append(&path, &line("lost"));
        for next in ["e", "f", "g"] {
            rotate(&path, 2);
            append(&path, &line(next));
        }
        let text = rest(&mut reader);
        assert!(text.ends_with(&["e".into(), "f".into(), "g".into()]), "{text:?}");
    }

    #[test]
    fn half_a_line_is_read_when_it_is_whole() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("container.log");
        let whole = line("x");
        append(&path, &whole[..20]);
        let mut reader = LogReader::open(&path, None).unwrap();
        assert_eq!(rest(&mut reader), Vec::<String>::new());
        append(&path, &whole[20..]);
        assert_eq!(rest(&mut reader), ["x"]);
    }

    #[test]
    fn damaged_line_is_counted_and_passed_over() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("container.log");
        append(&path, &(line("x") + "garbage\n" + &line("y")));
        let mut reader = LogReader::open(&path, None).unwrap();
        assert_eq!(rest(&mut reader), ["x", "y"]);
        assert_eq!(reader.damaged(), 1);
    }

    #[test]
    fn log_that_is_not_there_yet_is_empty() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("container.log");
        let mut reader = LogReader::open(&path, Some(3)).unwrap();
        assert_eq!(rest(&mut reader), Vec::<String>::new());
        append(&path, &line("x"));
        assert_eq!(rest(&mut reader), ["x"]);
    }

    #[test]
    fn last_lines_are_found_across_blocks() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("container.log");
        let text: String = (0..5000).map(|number| line(&number.to_string())).collect();
        append(&path, &text);
        let mut reader = LogReader::open(&path, Some(2000)).unwrap();
        let lines = rest(&mut reader);
        assert_eq!((lines.len(), lines[0].as_str()), (2000, "3000"));
    }
}
