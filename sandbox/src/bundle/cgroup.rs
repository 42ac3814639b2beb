//! A container's control groups on the host: its monitor and its VMM live in them, so that what the whole microVM uses is
//! counted and bounded where everybody on the host looks for it.
//!
//! Every hierarchy of version 1 that is mounted gets a group, and so does version 2, as runc does: whoever finds the
//! container's groups by a process id (`/proc/PID/cgroup`) finds its own in each. What acts on processes inside, such as
//! `pids.max`, is set in the guest, by the agent.
//!
//! A group that can't be made for want of permission is left out: who may not make groups runs containers without.

use std::{
    fs::{self, DirBuilder},
    io::{self, ErrorKind},
    os::unix::fs::DirBuilderExt as _,
    path::{Path, PathBuf},
    time::Duration,
};

use super::error::{BundleError, Result};
use crate::oci_spec::HostCgroup;

/// How often a group that is still busy is tried to be removed, and how long it takes in between.
const REMOVE_TRIES: u32 = 100;
const REMOVE_PAUSE: Duration = Duration::from_millis(10);

/// Limits of the microVM, in the units of version 1.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct HostLimits {
    pub(super) memory_bytes: Option<u64>,
    pub(super) cpu_shares: Option<u64>,
    pub(super) cpu_quota_us: Option<i64>,
    pub(super) cpu_period_us: Option<u64>,
    pub(super) cpus: Option<String>,
    pub(super) memory_nodes: Option<String>,
}

/// A mounted hierarchy.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Hierarchy {
    mount: PathBuf,
    /// Empty for version 2.
    controllers: Vec<String>,
    /// Where this process is in it.
    own: PathBuf,
}

impl Hierarchy {
    fn is_v2(&self) -> bool {
        self.controllers.is_empty()
    }

    fn has(&self, controller: &str) -> bool {
        self.controllers.iter().any(|has| has == controller)
    }
}

/// The groups of one container: one directory in each hierarchy.
#[derive(Debug)]
pub(super) struct HostCgroups {
    groups: Vec<(Hierarchy, PathBuf)>,
}

/// The hierarchies, read off `/proc/self/mountinfo` and `/proc/self/cgroup`.
fn hierarchies(mountinfo: &str, own: &str) -> Vec<Hierarchy> {
    let mut found: Vec<Hierarchy> = Vec::new();
    for line in mountinfo.lines() {
        let Some((before, after)) = line.split_once(" - ") else {
            continue;
        };
        let (before, after): (Vec<&str>, Vec<&str>) =
            (before.split(' ').collect(), after.split(' ').collect());
        let ([_, _, _, root, mount, ..], [kind, _, options, ..]) = (&before[..], &after[..]) else {
            continue;
        };
        let membership = own.lines().filter_map(|line| {
            let mut parts = line.splitn(3, ':').skip(1);
            Some((parts.next()?, parts.next()?))
        });
        let mut matching = membership.filter(|(controllers, _)| match *kind {
            "cgroup2" => controllers.is_empty(),
            "cgroup" => {
                !controllers.is_empty()
                    && controllers
                        .split(',')
                        .all(|controller| options.split(',').any(|option| option == controller))
            }
            _ => false,
        });
        let Some((controllers, path)) = matching.next() else {
            continue;
        };
        let controllers: Vec<String> = controllers
            .split(',')
            .filter(|name| !name.is_empty())
            .map(str::to_owned)
            .collect();
        if found.iter().any(|hierarchy| hierarchy.controllers == controllers) {
            continue;
        }
        let own = Path::new(path).strip_prefix(root).unwrap_or(Path::new(path));
        found.push(Hierarchy {
            mount: PathBuf::from(mount.replace("\\040", " ")),
            controllers,
            own: own.strip_prefix("/").unwrap_or(own).to_owned(),
        });
    }
    found
}

fn hierarchies_of_this_process() -> Vec<Hierarchy> {
    let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
    hierarchies(&read("/proc/self/mountinfo"), &read("/proc/self/cgroup"))
}

/// Where a container's groups are in every hierarchy; beneath its creator's own where nobody says it.
pub(super) fn host_path(wanted: Option<&HostCgroup>, id: &str) -> PathBuf {
    match wanted {
        None => PathBuf::from(id),
        Some(HostCgroup::Path(path)) => Path::new("/").join(path),
        Some(HostCgroup::Systemd { slice, prefix, name }) => systemd_path(slice, prefix, name),
    }
}

/// Where `slice:prefix:name` is, as systemd lays slices out: `a-b.slice` is in `a.slice`.
fn systemd_path(slice: &str, prefix: &str, name: &str) -> PathBuf {
    let slice = if slice.is_empty() { "system.slice" } else { slice };
    let mut path = PathBuf::from("/");
    let stem = slice.strip_suffix(".slice").unwrap_or(slice);
    let mut whole = String::new();
    for part in stem.split('-').filter(|part| !part.is_empty()) {
        if !whole.is_empty() {
            whole.push('-');
        }
        whole.push_str(part);
        path.push(format!("{whole}.slice"));
    }
    if name.ends_with(".slice") {
        path.push(name);
    } else if prefix.is_empty() {
        path.push(format!("{name}.scope"));
    } else {
        path.push(format!("{prefix}-{name}.scope"));
    }
    path
}

/// An absolute path is one of the hierarchy, another one beneath the creator's own group. `..` leads nowhere.
fn group_path(hierarchy: &Hierarchy, wanted: &Path) -> PathBuf {
    let mut path = hierarchy.mount.clone();
    if !wanted.is_absolute() {
        path.push(&hierarchy.own);
    }
    for part in wanted.components() {
        if let std::path::Component::Normal(part) = part {
            path.push(part);
        }
    }
    path
}

fn is_forbidden(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        ErrorKind::PermissionDenied | ErrorKind::ReadOnlyFilesystem
    )
}

fn failed(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> BundleError {
    let path = path.to_owned();
    move |source| BundleError::Cgroup { path, action, source }
}

/// A new group of cpuset has no CPU until it is given some.
fn inherit_cpuset(parent: &Path, group: &Path) -> io::Result<()> {
    for file in ["cpuset.cpus", "cpuset.mems"] {
        if fs::read_to_string(group.join(file))?.trim().is_empty() {
            fs::write(group.join(file), fs::read_to_string(parent.join(file))?)?;
        }
    }
    Ok(())
}

impl HostCgroups {
    /// Where the groups will be.
    pub(super) fn planned(wanted: &Path) -> Self {
        let groups = hierarchies_of_this_process().into_iter().map(|hierarchy| {
            let path = group_path(&hierarchy, wanted);
            (hierarchy, path)
        });
        Self {
            groups: groups.collect(),
        }
    }

    /// Makes the groups; returns the directories of those that may be made.
    pub(super) fn make(&mut self) -> Result<Vec<PathBuf>> {
        let mut made = Vec::new();
        for (hierarchy, path) in self.groups.drain(..) {
            match make(&hierarchy, &path) {
                Ok(()) => made.push((hierarchy, path)),
                Err(error) if is_forbidden(&error) => {
                    tracing::debug!(path = %path.display(), %error, "no control group");
                }
                Err(error) => return Err(failed("can't be made", &path)(error)),
            }
        }
        self.groups = made;
        Ok(self.directories())
    }

    /// Those that were made before, found again.
    pub(super) fn existing(directories: &[PathBuf]) -> Self {
        let hierarchies = hierarchies_of_this_process();
        let groups = directories.iter().filter_map(|path| {
            let hierarchy = hierarchies
                .iter()
                .find(|hierarchy| path.starts_with(&hierarchy.mount))?;
            Some((hierarchy.clone(), path.clone()))
        });
        Self {
            groups: groups.collect(),
        }
    }

    pub(super) fn directories(&self) -> Vec<PathBuf> {
        self.groups.iter().map(|(_, path)| path.clone()).collect()
    }

    /// Moves this process, which has no second thread, into the groups.
    ///
    /// A process that moves its only thread by itself needs no lock that stops all forks on the host, which in
    /// version 1 the file `tasks` takes advantage of.
    pub(super) fn join(&self) -> Result<()> {
        for (hierarchy, path) in &self.groups {
            let file = path.join(if hierarchy.is_v2() {
                "cgroup.procs"
            } else {
                "tasks"
            });
            fs::write(&file, "0").map_err(failed("can't be joined", path))?;
        }
        Ok(())
    }

    /// Sets what a limit is given for.
    pub(super) fn limit(&self, limits: &HostLimits) -> Result<()> {
        for (hierarchy, path) in &self.groups {
            for (file, value) in settings(hierarchy, limits) {
                let file = path.join(file);
                if hierarchy.is_v2() && !file.exists() {
                    // The controller is not in this hierarchy, or not handed down to here.
                    continue;
                }
                fs::write(&file, value).map_err(failed("can't be set", &file))?;
            }
        }
        Ok(())
    }
}

fn settings(hierarchy: &Hierarchy, limits: &HostLimits) -> Vec<(&'static str, String)> {
    let mut settings = Vec::new();
    let mut set = |file, value: Option<String>| settings.extend(value.map(|value| (file, value)));
    if hierarchy.is_v2() {
        set("memory.max", limits.memory_bytes.map(|bytes| bytes.to_string()));
        set("cpu.weight", limits.cpu_shares.map(cpu_weight));
        let period = limits.cpu_period_us.unwrap_or(100_000);
        let max = match limits.cpu_quota_us {
            Some(quota) if quota > 0 => Some(format!("{quota} {period}")),
            Some(_) => Some(format!("max {period}")),
            None => limits.cpu_period_us.map(|period| format!("max {period}")),
        };
        set("cpu.max", max);
        set("cpuset.cpus", limits.cpus.clone());
        set("cpuset.mems", limits.memory_nodes.clone());
        return settings;
    }
    if hierarchy.has("memory") {
        set(
            "memory.limit_in_bytes",
            limits.memory_bytes.map(|bytes| bytes.to_string()),
        );
    }
    if hierarchy.has("cpu") {
        set("cpu.shares", limits.cpu_shares.map(|shares| shares.to_string()));
        set(
            "cpu.cfs_period_us",
            limits.cpu_period_us.map(|period| period.to_string()),
        );
        set(
            "cpu.cfs_quota_us",
            limits.cpu_quota_us.map(|quota| quota.to_string()),
        );
    }
    if hierarchy.has("cpuset") {
        set("cpuset.cpus", limits.cpus.clone());
        set("cpuset.mems", limits.memory_nodes.clone());
    }
    settings
}

/// Shares of version 1 (2 to 262144) as a weight of version 2 (1 to 10000), by the formula all runtimes use.
fn cpu_weight(shares: u64) -> String {
    let shares = shares.clamp(2, 262_144);
    (1 + (shares - 2) * 9999 / 262_142).to_string()
}

/// Makes a group and what is missing above it.
fn make(hierarchy: &Hierarchy, path: &Path) -> io::Result<()> {
    let below = path.strip_prefix(&hierarchy.mount).unwrap_or(Path::new(""));
    let mut at = hierarchy.mount.clone();
    for part in below {
        if hierarchy.is_v2() {
            // Best effort: a controller may be in version 1, and a group with processes can't hand any down.
            for controller in ["+cpu", "+memory", "+cpuset", "+io", "+pids"] {
                drop(fs::write(at.join("cgroup.subtree_control"), controller));
            }
        }
        let parent = at.clone();
        at.push(part);
        match DirBuilder::new().mode(0o755).create(&at) {
            Err(error) if error.kind() != ErrorKind::AlreadyExists => return Err(error),
            _ => {}
        }
        if hierarchy.has("cpuset") {
            inherit_cpuset(&parent, &at)?;
        }
    }
    Ok(())
}

/// Removes groups, and those that somebody made in them.
pub(super) fn remove(directories: &[PathBuf]) {
    for path in directories {
        for _ in 0..REMOVE_TRIES {
            match remove_tree(path) {
                Ok(()) => break,
                Err(error) if error.kind() == ErrorKind::NotFound => break,
                // A process that has just ended may still count.
                Err(error) if error.kind() == ErrorKind::ResourceBusy => std::thread::sleep(REMOVE_PAUSE),
                Err(error) => {
                    tracing::warn!(path = %path.display(), %error, "can't remove a control group");
                    break;
                }
            }
        }
    }
}

fn remove_tree(path: &Path) -> io::Result<()> {
    for entry in fs::read_dir(path)?.flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove_tree(&entry.path())?;
        }
    }
    fs::remove_dir(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MOUNTS: &str = "\
31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755
32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw,relatime shared:9 - cgroup cgroup rw,cpu,cpuacct
35 31 0:32 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory
40 31 0:37 / /sys/fs/cgroup/systemd rw,relatime - cgroup cgroup rw,name=systemd
41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw
42 31 0:32 / /other/memory rw,relatime - cgroup cgroup rw,memory";
    const OWN: &str = "9:name=systemd:/\n4:memory:/outer/inner\n1:cpu,cpuacct:/\n0::/here";

    #[test]
    fn hybrid_hierarchies_are_found_once_each() {
        let found = hierarchies(MOUNTS, OWN);
        let mounts: Vec<&str> = found.iter().filter_map(|h| h.mount.to_str()).collect();
        assert_eq!(
            mounts,
            [
                "/sys/fs/cgroup/cpu,cpuacct",
                "/sys/fs/cgroup/memory",
                "/sys/fs/cgroup/systemd",
                "/sys/fs/cgroup/unified"
            ]
        );
        assert!(found[3].is_v2() && found[0].has("cpuacct"));
        let path = |index: usize, wanted: &str| group_path(&found[index], Path::new(wanted));
        assert_eq!(path(1, "/docker/x"), Path::new("/sys/fs/cgroup/memory/docker/x"));
        assert_eq!(path(1, "x"), Path::new("/sys/fs/cgroup/memory/outer/inner/x"));
        assert_eq!(path(3, "x"), Path::new("/sys/fs/cgroup/unified/here/x"));
        assert_eq!(path(1, "/../../etc"), Path::new("/sys/fs/cgroup/memory/etc"));
    }

    #[test]
    fn slices_are_nested_as_systemd_does() {
        assert_eq!(
            systemd_path("user-1000-app.slice", "libpod", "abc"),
            Path::new("/user.slice/user-1000.slice/user-1000-app.slice/libpod-abc.scope")
        );
        assert_eq!(
            systemd_path("", "docker", "x"),
            Path::new("/system.slice/docker-x.scope")
        );
    }

    #[test]
    fn limits_become_what_each_version_has() {
        let limits = HostLimits {
            memory_bytes: Some(1 << 20),
            cpu_shares: Some(1024),
            cpu_quota_us: Some(50_000),
            ..HostLimits::default()
        };
        let found = hierarchies(MOUNTS, OWN);
        assert_eq!(
            settings(&found[0], &limits),
            [
                ("cpu.shares", "1024".to_owned()),
                ("cpu.cfs_quota_us", "50000".to_owned())
            ]
        );
        assert_eq!(
            settings(&found[3], &limits),
            [
                ("memory.max", "1048576".to_owned()),
                ("cpu.weight", "39".to_owned()),
                ("cpu.max", "50000 100000".to_owned())
            ]
        );
        assert!(settings(&found[2], &limits).is_empty());
    }
}
