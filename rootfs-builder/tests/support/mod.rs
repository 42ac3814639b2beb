//! Mounting what was built, and describing trees so that they can be compared.

#![allow(dead_code, reason = "each test program uses its own part of this")]

pub mod archive;
pub mod server;

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::io::Read;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use sha2::{Digest, Sha256};

/// Why mounting can't be tested here, printed; nothing if it can.
pub fn cannot_mount() -> bool {
    let root = nix::unistd::geteuid().is_root();
    let filesystems = fs::read_to_string("/proc/filesystems").unwrap_or_default();
    let missing: Vec<&str> = ["erofs", "overlay"]
        .into_iter()
        .filter(|name| !filesystems.contains(name))
        .collect();
    if !root {
        println!("skipped: mounting needs root");
    } else if !missing.is_empty() {
        println!("skipped: the kernel lacks {}", missing.join(" and "));
    }
    !root || !missing.is_empty()
}

/// Whether a program is there; says that the test is skipped if it isn't.
pub fn has(program: &str) -> bool {
    let found = Command::new(program).arg("--version").output().is_ok();
    if !found {
        println!("skipped: {program} is not installed");
    }
    found
}

/// A mounted file system, unmounted when dropped.
pub struct Mounted(pub PathBuf);

impl Mounted {
    pub fn erofs(image: &Path, at: &Path) -> Self {
        fs::create_dir_all(at).expect("scratch directory");
        run(Command::new("mount")
            .args(["-t", "erofs", "-o", "loop,ro"])
            .arg(image)
            .arg(at));
        Self(at.to_path_buf())
    }

    /// The layers, bottom first, as a container sees them without its writable layer.
    pub fn overlay(bottom_up: &[Mounted], scratch: &Path, at: &Path) -> Self {
        let empty = scratch.join("empty");
        fs::create_dir_all(at).expect("scratch directory");
        fs::create_dir_all(&empty).expect("scratch directory");
        // overlayfs wants two layers at least.
        let mut lower = vec![empty.display().to_string()];
        lower.extend(bottom_up.iter().rev().map(|layer| layer.0.display().to_string()));
        let options = format!("ro,lowerdir={}", lower.join(":"));
        run(Command::new("mount")
            .args(["-t", "overlay", "overlay", "-o", &options])
            .arg(at));
        Self(at.to_path_buf())
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(&self.0).status();
    }
}

/// A file system of its own for the store.
pub fn small_disk(at: &Path, options: &str) -> Mounted {
    fs::create_dir_all(at).expect("scratch directory");
    run(Command::new("mount")
        .args(["-t", "tmpfs", "-o", options, "tmpfs"])
        .arg(at));
    Mounted(at.to_path_buf())
}

pub fn run(command: &mut Command) {
    let output = command
        .output()
        .unwrap_or_else(|error| panic!("{command:?}: {error}"));
    assert!(
        output.status.success(),
        "{command:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
}

/// Everything about a file that an image carries.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Described {
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
    pub mtime: (i64, i64),
    pub rdev: u64,
    pub size: u64,
    /// Digest of the contents, or a link's target.
    pub content: String,
    pub xattrs: BTreeMap<String, Vec<u8>>,
    /// The first path of the same inode, for files with several names.
    pub same_as: Option<String>,
}

/// Describe a tree, the root as `.`.
pub fn describe(root: &Path) -> BTreeMap<String, Described> {
    let mut all = BTreeMap::new();
    let mut todo = vec![(root.to_path_buf(), ".".to_owned())];
    let mut inodes: HashMap<(u64, u64), Vec<String>> = HashMap::new();
    while let Some((path, name)) = todo.pop() {
        let status =
            fs::symlink_metadata(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        if status.is_dir() {
            for entry in fs::read_dir(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display())) {
                let entry = entry.expect("directory entry");
                todo.push((
                    entry.path(),
                    format!("{name}/{}", escaped(entry.file_name().as_bytes())),
                ));
            }
        } else if status.nlink() > 1 {
            // Layers have numbers of their own.
            inodes
                .entry((status.dev(), status.ino()))
                .or_default()
                .push(name.clone());
        }
        all.insert(name, describe_one(&path, &status));
    }
    // Names that an upper layer hides still count as links.
    for names in inodes.values_mut().filter(|names| names.len() > 1) {
        names.sort();
        for name in names.iter() {
            if let Some(described) = all.get_mut(name) {
                described.same_as = Some(names[0].clone());
            }
        }
    }
    all
}

fn describe_one(path: &Path, status: &fs::Metadata) -> Described {
    let kind = status.file_type();
    let content = if kind.is_symlink() {
        escaped(fs::read_link(path).expect("link").as_os_str().as_bytes())
    } else if kind.is_file() {
        digest_of(path)
    } else {
        String::new()
    };
    let xattrs = xattr::list(path).map(|names| {
        names
            .filter_map(|name| {
                Some((
                    name.to_string_lossy().into_owned(),
                    xattr::get(path, &name).ok()??,
                ))
            })
            .collect()
    });
    let is_device = status.mode() & 0o170_000 == 0o020_000 || status.mode() & 0o170_000 == 0o060_000;
    Described {
        mode: status.mode(),
        uid: status.uid(),
        gid: status.gid(),
        mtime: (status.mtime(), status.mtime_nsec()),
        rdev: if is_device { status.rdev() } else { 0 },
        size: if kind.is_dir() { 0 } else { status.size() },
        content,
        xattrs: xattrs.unwrap_or_default(),
        same_as: None,
    }
}

fn digest_of(path: &Path) -> String {
    let mut file = fs::File::open(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let mut hasher = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        let count = file
            .read(&mut buffer)
            .unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        if count == 0 {
            break;
        }
        hasher.update(&buffer[..count]);
    }
    hasher
        .finalize()
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect()
}

fn escaped(bytes: &[u8]) -> String {
    bytes.escape_ascii().to_string()
}

/// Differences as readable lines.
pub fn differences(ours: &BTreeMap<String, Described>, theirs: &BTreeMap<String, Described>) -> Vec<String> {
    let mut lines = Vec::new();
    for (name, theirs) in theirs {
        match ours.get(name) {
            None => lines.push(format!("{name}: missing")),
            Some(ours) if ours != theirs => {
                lines.push(format!("{name}:\n  ours   {ours:?}\n  theirs {theirs:?}"))
            }
            Some(_) => {}
        }
    }
    lines.extend(
        ours.keys()
            .filter(|name| !theirs.contains_key(*name))
            .map(|name| format!("{name}: only ours")),
    );
    lines
}

/// An error with all its causes.
pub fn told(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text += &format!(": {error}");
        cause = error.source();
    }
    text
}
