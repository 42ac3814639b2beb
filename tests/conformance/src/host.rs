//! The host the tests run on: a mount namespace of our own with every cgroup hierarchy a runtime may ask for, and becoming the
//! parent of what a runtime leaves behind.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};

const CGROUPS: &str = "/sys/fs/cgroup";

/// Makes this process fit to run runtimes. Must be called while it has one thread.
///
/// # Errors
/// Not root, or a system call that root may use is refused.
pub fn prepare() -> Result<()> {
    if !nix::unistd::geteuid().is_root() {
        bail!("runtimes are tested as root; run this as root");
    }
    own_mounts()?;
    // The container's process outlives `create`; its exit status comes to us, as it comes to an engine's monitor.
    nix::sys::prctl::set_child_subreaper(true).context("cannot become a subreaper")
}

/// Takes a mount namespace of our own in which nothing that runtimes insist on is missing. Must be called while the process has
/// one thread.
///
/// # Errors
/// Not root, or a system call that root may use is refused.
pub fn own_mounts() -> Result<()> {
    unshare(CloneFlags::CLONE_NEWNS).context("cannot have a mount namespace of our own; are you root?")?;
    change(None, "/", MsFlags::MS_REC | MsFlags::MS_SLAVE)?;
    complete_cgroups()
}

fn change(source: Option<&Path>, target: impl AsRef<Path>, flags: MsFlags) -> Result<()> {
    let target = target.as_ref();
    mount(source, target, None::<&str>, flags, None::<&str>)
        .with_context(|| format!("cannot change the mount {}", target.display()))
}

/// On a host with version 1 hierarchies, mount those that are missing: some runtimes insist on all.
///
/// What is mounted here is seen by nobody else and goes away with this process.
fn complete_cgroups() -> Result<()> {
    let known = fs::read_to_string("/proc/cgroups").unwrap_or_default();
    let mounted = version_1_controllers();
    if mounted.is_empty() {
        return Ok(());
    }
    let missing: Vec<&str> = known
        .lines()
        .filter(|line| !line.starts_with('#'))
        .filter_map(|line| {
            let mut fields = line.split_whitespace();
            let name = fields.next()?;
            (fields.nth(2) == Some("1") && !mounted.contains(name)).then_some(name)
        })
        .collect();
    if missing.is_empty() {
        return Ok(());
    }
    // A copy of the folder with more in it, mounted over it: nothing is made in the one that all processes see.
    let copy = tempfile::tempdir().context("cannot make a temporary folder")?;
    let tmpfs = |at: &Path| {
        mount(
            Some("tmpfs"),
            at,
            Some("tmpfs"),
            MsFlags::empty(),
            Some("mode=755"),
        )
        .with_context(|| format!("cannot mount a tmpfs on {}", at.display()))
    };
    tmpfs(copy.path())?;
    for entry in fs::read_dir(CGROUPS).with_context(|| format!("cannot read {CGROUPS}"))? {
        let entry = entry?;
        let at = copy.path().join(entry.file_name());
        if let Ok(target) = fs::read_link(entry.path()) {
            std::os::unix::fs::symlink(target, &at)?;
        } else if entry.path().is_dir() && !missing.iter().any(|name| entry.file_name() == *name) {
            fs::create_dir(&at)?;
            change(Some(&entry.path()), &at, MsFlags::MS_BIND)?;
        }
    }
    for controller in missing {
        let at = copy.path().join(controller);
        fs::create_dir(&at)?;
        let made = mount(
            Some("cgroup"),
            &at,
            Some("cgroup"),
            MsFlags::empty(),
            Some(controller),
        );
        if let Err(error) = made {
            eprintln!("note: the cgroup controller {controller} can't be mounted: {error}");
            fs::remove_dir(&at)?;
        }
    }
    change(Some(copy.path()), CGROUPS, MsFlags::MS_BIND | MsFlags::MS_REC)?;
    nix::mount::umount2(copy.path(), nix::mount::MntFlags::MNT_DETACH)
        .context("cannot unmount the copy of the cgroup folder")
}

fn version_1_controllers() -> BTreeSet<String> {
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    mounts
        .lines()
        .filter_map(|line| line.split_once(" - "))
        .filter(|(_, rest)| rest.starts_with("cgroup "))
        .filter_map(|(_, rest)| rest.rsplit(' ').next())
        .flat_map(|options| options.split(',').map(str::to_owned).collect::<Vec<_>>())
        .collect()
}

/// Whether the cgroups of containers are in version 1 hierarchies.
pub fn has_cgroup_v1() -> bool {
    version_1_controllers().contains("memory")
}

/// The folder of a cgroup in the hierarchy of a controller.
pub fn cgroup_dir(controller: &str, path: &str) -> std::path::PathBuf {
    let path = path.trim_start_matches('/');
    if has_cgroup_v1() {
        Path::new(CGROUPS).join(controller).join(path)
    } else {
        Path::new(CGROUPS).join(path)
    }
}

/// A namespace of this process, as the link in `/proc` shows it.
pub fn own_namespace(kind: &str) -> Result<String> {
    let link = fs::read_link(format!("/proc/self/ns/{kind}"))
        .with_context(|| format!("this kernel has no namespaces of type {kind}"))?;
    Ok(link.to_string_lossy().into_owned())
}

/// Removes the cgroups of this run's containers that a runtime left behind.
pub fn sweep_cgroups() {
    let Ok(hierarchies) = fs::read_dir(CGROUPS) else {
        return;
    };
    let marks = [
        format!("conf-{}-", std::process::id()),
        format!("conformance-conf-{}-", std::process::id()),
    ];
    let roots = hierarchies
        .flatten()
        .map(|entry| entry.path())
        .chain([CGROUPS.into()]);
    for entry in roots
        .filter_map(|root| fs::read_dir(root).ok())
        .flatten()
        .flatten()
    {
        let name = entry.file_name().to_string_lossy().into_owned();
        if marks.iter().any(|mark| name.starts_with(mark)) {
            fs::remove_dir(entry.path()).ok();
        }
    }
}
