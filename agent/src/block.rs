//! Finds the microVM's disks by the serial numbers that the host gave them.

use std::{
    fs,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

/// How long a disk may take to appear: it is on the kernel's command line, so it is there at boot or never.
const PATIENCE: Duration = Duration::from_secs(2);

/// The device node of the disk with this serial number, under `sys_block` (`/sys/block`) and `dev` (`/dev`).
fn find_in(sys_block: &Path, dev: &Path, serial: &str) -> Option<PathBuf> {
    let entries = fs::read_dir(sys_block).ok()?;
    entries.flatten().find_map(|entry| {
        let found = fs::read_to_string(entry.path().join("serial")).ok()?;
        // virtio pads a short serial number with zero bytes.
        let found = found.trim_end_matches(['\n', '\0', ' ']);
        (found == serial).then(|| dev.join(entry.file_name()))
    })
}

/// The device node of the disk with this serial number.
pub fn find(serial: &str) -> Option<PathBuf> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let found = find_in(Path::new("/sys/block"), Path::new("/dev"), serial);
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
    fn disk_is_found_by_its_padded_serial_number() {
        let dir = tempfile::tempdir().unwrap();
        for (disk, serial) in [("vda", "root"), ("vdb", "layer0\0\0\n"), ("vdc", "layer01")] {
            fs::create_dir(dir.path().join(disk)).unwrap();
            fs::write(dir.path().join(disk).join("serial"), serial).unwrap();
        }
        fs::create_dir(dir.path().join("loop0")).unwrap();
        assert_eq!(
            find_in(dir.path(), Path::new("/dev"), "layer0"),
            Some(PathBuf::from("/dev/vdb"))
        );
        assert_eq!(find_in(dir.path(), Path::new("/dev"), "layer"), None);
    }
}
