//! Finds the microVM's disks by the serial numbers that the host gave them.

use std::{
    fs,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

/// How long a disk may take to appear: it is on the kernel's command line, so it is there at boot or never.
const PATIENCE: Duration = Duration::from_secs(2);

fn has_serial(disk: &Path, serial: &str) -> bool {
    // virtio pads a short serial number with zero bytes.
    fs::read_to_string(disk.join("serial"))
        .is_ok_and(|found| found.trim_end_matches(['\n', '\0', ' ']) == serial)
}

/// The device node of the disk with this serial number, under `sys_block` (`/sys/block`) and `dev` (`/dev`).
///
/// Reading a serial number is a request to the disk, so the one at the expected place is asked first.
fn find_in(sys_block: &Path, dev: &Path, expected: &str, serial: &str) -> Option<PathBuf> {
    if has_serial(&sys_block.join(expected), serial) {
        return Some(dev.join(expected));
    }
    let entries = fs::read_dir(sys_block).ok()?;
    entries
        .flatten()
        .find_map(|entry| has_serial(&entry.path(), serial).then(|| dev.join(entry.file_name())))
}

/// The device node of the disk with this serial number, which probably is the microVM's disk number `index`.
pub fn find(serial: &str, index: usize) -> Option<PathBuf> {
    let deadline = Instant::now() + PATIENCE;
    let letter = u8::try_from(index)
        .ok()
        .and_then(|index| b'a'.checked_add(index))
        .filter(u8::is_ascii_lowercase);
    let expected = format!("vd{}", char::from(letter.unwrap_or(b'a')));
    loop {
        let found = find_in(Path::new("/sys/block"), Path::new("/dev"), &expected, serial);
        if found.is_some() || Instant::now() >= deadline {
            return found;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn disk_is_found_by_its_padded_serial_number_wherever_it_is() {
        let dir = tempfile::tempdir().unwrap();
        for (disk, serial) in [("vda", "root"), ("vdb", "layer0\0\0\n"), ("vdc", "layer01")] {
            fs::create_dir(dir.path().join(disk)).unwrap();
            fs::write(dir.path().join(disk).join("serial"), serial).unwrap();
        }
        fs::create_dir(dir.path().join("loop0")).unwrap();
        let find = |expected, serial| find_in(dir.path(), Path::new("/dev"), expected, serial);
        assert_eq!(find("vdb", "layer0"), Some(PathBuf::from("/dev/vdb")));
        assert_eq!(find("vda", "layer0"), Some(PathBuf::from("/dev/vdb")));
        assert_eq!(find("vdb", "layer"), None);
    }
}
