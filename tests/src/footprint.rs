//! What the machine holds on behalf of one world of containers, counted from outside, so that a leak of any kind shows.
//!
//! Only what can be told to be this world's is counted: its processes carry its folders in their environment, its files, mounts
//! and sockets lie below them; control groups and anything in shared places are told by hull's name or a container's id. Other
//! users of the machine don't disturb the count.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use crate::hull::Hull;

/// Everything found, one line an item. Two footprints are compared as sets.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Footprint {
    pub items: BTreeSet<String>,
}

impl Footprint {
    /// Of a world, now.
    pub fn of(hull: &Hull) -> Self {
        let mut items = BTreeSet::new();
        for (pid, line) in hull.processes() {
            items.insert(format!("process {pid}: {line}"));
        }
        let root = hull.root_dir();
        let marker = root.display().to_string();
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        let ours = mounts.lines().filter(|line| line.contains(&marker));
        items.extend(ours.map(|line| format!("mount {line}")));
        // Sockets are among them: by name in a folder, and open in a process.
        files(root, &mut items);
        for shared in ["/dev/shm", "/run", "/var/tmp", "/sys/fs/cgroup"] {
            named_ours(Path::new(shared), 3, &mut items);
        }
        Self { items }
    }

    /// What is in this one and not in an earlier one.
    pub fn beyond(&self, earlier: &Self) -> Vec<String> {
        self.items.difference(&earlier.items).cloned().collect()
    }
}

/// How many descriptors a process has open.
pub fn open_files(pid: i32) -> usize {
    fs::read_dir(format!("/proc/{pid}/fd")).map_or(0, Iterator::count)
}

fn files(directory: &Path, items: &mut BTreeSet<String>) {
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        let path = entry.path();
        items.insert(format!("file {}", path.display()));
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            files(&path, items);
        }
    }
}

/// Entries of a shared place that bear our name or a container's id (64 hexadecimal digits).
fn named_ours(directory: &Path, depth: usize, items: &mut BTreeSet<String>) {
    if depth == 0 {
        return;
    }
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let is_id = name.len() == 64 && name.bytes().all(|byte| byte.is_ascii_hexdigit());
        // Bundles of `crate::runc` are another tool's.
        if (is_id || name.contains("hull")) && !name.contains("hull-tests") {
            items.insert(format!("entry {}", entry.path().display()));
        }
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            named_ours(&entry.path(), depth - 1, items);
        }
    }
}
