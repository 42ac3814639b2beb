//! Root filesystems that needn't be mounted on the host: an overlay of layers that are known as EROFS blobs.
//!
//! ```text
//!  overlay mount of the snapshotter ──► lower directories, snapshot ──► LayerCache ──► all known: LayeredRootfs
//!                                                                           └──► else: mounted and shared as ever, and
//!                                                      convert-layers, a process of its own, for the next start
//! ```
//!
//! Owner: `Create`. What isn't plainly such an overlay is mounted.

use std::{
    path::{Path, PathBuf},
    process::{Command, ExitCode, Stdio},
    thread,
};

use containerd_shim_protos::types::mount::Mount;
use oci_spec::runtime::Spec;
use sandbox::{
    Directories,
    layers::{CacheUse, LayerCache, LayeredRootfs, supported},
    oci_spec::wants_shared_rootfs,
};

/// What this program is called with to convert layers, whose directories follow.
pub const VERB: &str = "convert-layers";
/// Options that change nothing about what the container sees.
const HARMLESS: [&str; 5] = ["index=off", "rw", "metacopy=off", "redirect_dir=off", "xino=off"];

/// An overlay of the snapshotter's.
#[derive(Debug, PartialEq, Eq)]
struct Overlay {
    /// Lowest first.
    lower: Vec<PathBuf>,
    snapshot: PathBuf,
}

impl Overlay {
    /// The one these mounts are, if they are no more than that.
    fn of(mounts: &[Mount]) -> Option<Self> {
        let [mount] = mounts else { return None };
        if mount.type_ != "overlay" || !mount.target.is_empty() {
            return None;
        }
        let (mut lower, mut upper, mut work) = (None, None, None);
        for option in &mount.options {
            match option.split_once('=') {
                Some(("lowerdir", given)) => lower = Some(given),
                Some(("upperdir", given)) => upper = Some(Path::new(given)),
                Some(("workdir", given)) => work = Some(Path::new(given)),
                _ if HARMLESS.contains(&option.as_str()) => {}
                _ => return None,
            }
        }
        // A path with a colon is written with a backslash.
        let lower = lower.filter(|lower| !lower.contains('\\') && !lower.contains("::"))?;
        let mut lower: Vec<PathBuf> = lower.split(':').map(PathBuf::from).collect();
        lower.reverse();
        let snapshot = upper?.parent()?;
        let is_snapshot = upper? == snapshot.join("fs") && work? == snapshot.join("work");
        let absolute = snapshot.is_absolute() && lower.iter().all(|layer| layer.is_absolute());
        (is_snapshot && absolute).then(|| Self {
            lower,
            snapshot: snapshot.to_owned(),
        })
    }
}

/// What a container's root filesystem is made of.
#[derive(Debug, Default)]
pub struct Plan {
    /// Layers; without, the mounts are to be mounted.
    pub layers: Option<LayeredRootfs>,
    /// Until the microVM has opened them.
    held: Option<CacheUse>,
    missing: Vec<PathBuf>,
}

impl Plan {
    /// Decides.
    pub fn of(spec: &Spec, mounts: &[Mount]) -> Self {
        // A hook may want to find, or to change, the root filesystem on the host.
        if wants_shared_rootfs(spec) || spec.hooks().is_some() || !supported() {
            return Self::default();
        }
        let Some(overlay) = Overlay::of(mounts) else {
            return Self::default();
        };
        let cache = LayerCache::open(&Directories::from_environment().root);
        let held = match cache.hold() {
            Ok(held) => held,
            Err(error) => {
                tracing::warn!(%error, "a root filesystem is shared as it is mounted");
                return Self::default();
            }
        };
        match cache.find(&overlay.lower, &held) {
            Some(layers) => Self {
                layers: Some(LayeredRootfs {
                    layers,
                    snapshot: overlay.snapshot,
                }),
                held: Some(held),
                missing: Vec::new(),
            },
            None => Self {
                missing: cache.missing(&overlay.lower),
                ..Self::default()
            },
        }
    }

    /// Called when the container is there: what is missing is converted, in the background.
    pub fn finish(self) {
        drop(self.held);
        if self.missing.is_empty() {
            return;
        }
        let start = || -> std::io::Result<()> {
            let mut converter = Command::new(std::env::current_exe()?)
                .arg(VERB)
                .args(&self.missing)
                .stdin(Stdio::null())
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .spawn()?;
            let collect = move || drop(converter.wait());
            thread::Builder::new().name("converter".into()).spawn(collect)?;
            Ok(())
        };
        if let Err(error) = start() {
            tracing::warn!(%error, "layers are not converted");
        }
    }
}

/// Converts the layers in the directories on the command line. The shim that started it may end meanwhile.
pub fn main() -> ExitCode {
    // What can't be had of this is no reason not to go on.
    let _ = nix::unistd::setsid();
    let _ = rustix::process::nice(19);
    let layers: Vec<PathBuf> = std::env::args_os().skip(2).map(PathBuf::from).collect();
    match LayerCache::open(&Directories::from_environment().root).convert(&layers) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!(
                "containerd-shim-hull-v2: {error}: {:?}",
                std::error::Error::source(&error)
            );
            ExitCode::FAILURE
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rootfs::tests::mount;

    const UPPER: &str = "upperdir=/s/9/fs";
    const WORK: &str = "workdir=/s/9/work";

    #[test]
    fn overlay_of_a_snapshot_is_taken_apart_lowest_layer_first() {
        let given = mount("overlay", &["index=off", WORK, UPPER, "lowerdir=/s/3/fs:/s/1/fs"]);
        let expected = Overlay {
            lower: vec!["/s/1/fs".into(), "/s/3/fs".into()],
            snapshot: "/s/9".into(),
        };
        assert_eq!(Overlay::of(&[given]), Some(expected));
    }

    #[test]
    fn anything_else_is_mounted() {
        let lower = "lowerdir=/s/1/fs";
        for given in [
            vec![],
            vec![mount("bind", &["rbind", "rw"])],
            vec![mount("overlay", &[lower])],
            vec![mount("overlay", &[WORK, "upperdir=/s/8/fs", lower])],
            vec![mount("overlay", &["workdir=/s/9/w", UPPER, lower])],
            vec![mount("overlay", &[WORK, UPPER, lower, "userxattr"])],
            vec![mount("overlay", &[WORK, UPPER, lower, "ro"])],
            vec![mount("overlay", &[WORK, UPPER, "lowerdir=1/fs"])],
            vec![mount("overlay", &[WORK, UPPER, "lowerdir=/s/a\\:b"])],
            vec![mount("overlay", &[WORK, UPPER, "lowerdir=/s/1/fs::/data"])],
            vec![mount("erofs", &["loop"]), mount("overlay", &[WORK, UPPER, lower])],
        ] {
            assert_eq!(Overlay::of(&given), None, "{given:?}");
        }
    }
}
