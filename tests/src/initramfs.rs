//! Initial RAM file systems for test guests: the "newc" cpio format the kernel unpacks, and nothing else.

use std::fmt::Write as _;
use std::fs;
use std::io;
use std::path::Path;

const DIRECTORY: u32 = 0o040_755;
const PROGRAM: u32 = 0o100_755;
const SYMLINK: u32 = 0o120_777;
const CHARACTER_DEVICE: u32 = 0o020_600;

/// An archive under construction.
#[derive(Debug, Clone)]
pub struct Initramfs {
    bytes: Vec<u8>,
    entries: u32,
}

impl Default for Initramfs {
    fn default() -> Self {
        Self::new()
    }
}

impl Initramfs {
    /// The folders and the console device every guest needs.
    pub fn new() -> Self {
        let mut archive = Self {
            bytes: Vec::new(),
            entries: 0,
        };
        for folder in ["dev", "proc", "sys", "tmp", "bin"] {
            archive.directory(folder);
        }
        archive.entry("dev/console", CHARACTER_DEVICE, (5, 1), &[]);
        archive
    }

    /// Adds a folder; its parents must be there.
    pub fn directory(&mut self, path: &str) -> &mut Self {
        self.entry(path, DIRECTORY, (0, 0), &[])
    }

    /// Adds a program or another file, readable and executable by all.
    pub fn file(&mut self, path: &str, content: &[u8]) -> &mut Self {
        self.entry(path, PROGRAM, (0, 0), content)
    }

    /// Adds a file of the host.
    ///
    /// # Errors
    /// If it cannot be read.
    pub fn copy(&mut self, path: &str, from: &Path) -> io::Result<&mut Self> {
        let content = fs::read(from)?;
        Ok(self.file(path, &content))
    }

    /// Adds a symbolic link.
    pub fn symlink(&mut self, path: &str, target: &str) -> &mut Self {
        self.entry(path, SYMLINK, (0, 0), target.as_bytes())
    }

    /// The finished archive.
    pub fn finish(mut self) -> Vec<u8> {
        self.entry("TRAILER!!!", 0, (0, 0), &[]);
        self.bytes.resize(self.bytes.len().next_multiple_of(512), 0);
        self.bytes
    }

    fn entry(&mut self, path: &str, mode: u32, device: (u32, u32), content: &[u8]) -> &mut Self {
        self.entries += 1;
        let (size, name_size) = (content.len(), path.len() + 1);
        let mut header = String::from("070701");
        let fields = [
            u64::from(self.entries),
            u64::from(mode),
            0, // uid
            0, // gid
            1, // links
            0, // mtime
            size as u64,
            0,
            0,
            u64::from(device.0),
            u64::from(device.1),
            name_size as u64,
            0,
        ];
        for field in fields {
            // Writing to a String cannot fail.
            let _ = write!(header, "{field:08X}");
        }
        self.bytes.extend_from_slice(header.as_bytes());
        self.bytes.extend_from_slice(path.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(content);
        self.pad();
        self
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::process::{Command, Stdio};

    use super::*;

    #[test]
    fn archive_is_what_cpio_reads() {
        let mut archive = Initramfs::new();
        archive.file("init", b"#!/bin/sh\n").symlink("bin/sh", "busybox");
        let mut child = Command::new("cpio")
            .args(["-t", "--quiet"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        child.stdin.take().unwrap().write_all(&archive.finish()).unwrap();
        let output = child.wait_with_output().unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        assert_eq!(
            text.lines().collect::<Vec<_>>(),
            [
                "dev",
                "proc",
                "sys",
                "tmp",
                "bin",
                "dev/console",
                "init",
                "bin/sh"
            ]
        );
    }
}
