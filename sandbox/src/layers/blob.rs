//! Whether a file is an EROFS image that a microVM's kernel can mount by itself.
//!
//! An image that came with a container image is anything its author likes. It is parsed by the guest's kernel; what is looked
//! at here decides only whether it gets that far.

use std::{
    fs::{self, File},
    io,
    os::unix::fs::FileExt as _,
    path::Path,
};

use rustix::fs::statfs;

const EROFS_MAGIC: u32 = 0xe0f5_e1e2;
const SUPERBLOCK_AT: u64 = 1024;
const SUPERBLOCK_BYTES: usize = 128;
/// What the guest's kernel knows: compression of all kinds, chunks, tails, prefixes of attributes' names.
const KNOWN_FEATURES: u32 = 0x7f;
/// Blocks of up to a page.
const MAX_BLOCK_BITS: u8 = 12;
const SECTOR_BYTES: u64 = 512;

/// Whether it is one in a single file.
pub(super) fn is_mountable(path: &Path) -> bool {
    let read = || -> io::Result<bool> {
        let file = File::open(path)?;
        let found = file.metadata()?;
        let mut superblock = [0; SUPERBLOCK_BYTES];
        file.read_exact_at(&mut superblock, SUPERBLOCK_AT)?;
        Ok(found.is_file() && found.len() % SECTOR_BYTES == 0 && is_known(&superblock))
    };
    read().unwrap_or(false)
}

fn is_known(superblock: &[u8; SUPERBLOCK_BYTES]) -> bool {
    let word = |at: usize| {
        let bytes = superblock.get(at..at + 4).and_then(|bytes| bytes.try_into().ok());
        bytes.map_or(0, u32::from_le_bytes)
    };
    let further_devices = u16::from_le_bytes([superblock[86], superblock[87]]);
    word(0) == EROFS_MAGIC
        && superblock[12] <= MAX_BLOCK_BITS
        && word(80) & !KNOWN_FEATURES == 0
        && further_devices == 0
}

/// Whether `directory` shows this very file: it is a mount of it, by itself or by a loop device.
pub(super) fn is_mounted_at(blob: &Path, directory: &Path) -> bool {
    let is_erofs = statfs(directory)
        .is_ok_and(|found| u32::try_from(found.f_type).is_ok_and(|magic| magic == EROFS_MAGIC));
    if !is_erofs {
        return false;
    }
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let source = source_of(&mounts, directory);
    source.is_some_and(|source| {
        let backing = source.strip_prefix("/dev/").map(|device| {
            fs::read_to_string(format!("/sys/block/{device}/loop/backing_file")).unwrap_or_default()
        });
        let file = backing.as_deref().map_or(source.as_str(), str::trim_end);
        Path::new(file) == blob
    })
}

/// What the topmost mount at a directory is of.
fn source_of(mounts: &str, directory: &Path) -> Option<String> {
    let directory = directory.to_str()?;
    let line = mounts
        .lines()
        .rfind(|line| line.split(' ').nth(4).map(unescaped).as_deref() == Some(directory))?;
    let (_, filesystem) = line.split_once(" - ")?;
    filesystem.split(' ').nth(1).map(unescaped)
}

/// As the kernel writes names with spaces and the like.
fn unescaped(text: &str) -> String {
    ["\\040 ", "\\011\t", "\\012\n", "\\134\\"]
        .iter()
        .fold(text.to_owned(), |text, pair| {
            let (code, meant) = pair.split_at(4);
            text.replace(code, meant)
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn image_with_what_the_guest_does_not_know_is_left_alone() {
        let mut superblock = [0; SUPERBLOCK_BYTES];
        superblock[..4].copy_from_slice(&EROFS_MAGIC.to_le_bytes());
        superblock[12] = 12;
        assert!(is_known(&superblock));
        for (at, value) in [(0, 0), (12, 13), (81, 1), (86, 1)] {
            let mut other = superblock;
            other[at] = value;
            assert!(!is_known(&other), "byte {at}");
        }
        assert!(!is_mountable(Path::new("/dev/null")));
    }

    #[test]
    fn topmost_mount_counts() {
        let mounts = "30 1 8:1 / / rw - ext4 /dev/vda rw\n\
                      31 30 0:5 / /s/a\\040b/fs ro - erofs /s/a\\040b/layer.erofs ro\n\
                      32 30 0:6 / /s/a\\040b/fs ro - erofs /dev/loop3 ro\n";
        let source = source_of(mounts, Path::new("/s/a b/fs"));
        assert_eq!(source.as_deref(), Some("/dev/loop3"));
        assert_eq!(source_of(mounts, Path::new("/s")), None);
    }
}
