//! Root filesystems of layers that a snapshotter of containerd keeps, and what Hull keeps of them.
//!
//! ```text
//!  snapshotter's layer directory ──► LayerCache: converted? ── yes, all ──► disks of the microVM, read-only
//!                                       │ no                                overlay in the guest
//!                                       ▼                                        │ upper
//!                     this once by virtio-fs, converted for the next       snapshot's fs and work by virtio-fs
//! ```
//!
//! The writable layer is the snapshotter's own directory, in overlayfs' form, as if the host had mounted it: it is there for
//! snapshots, commits and quotas at any moment. What a guest may do to it is in `docs/adr/0017-layers.md`.

mod blob;
mod cache;
mod marks;

use std::{fs, path::PathBuf};

use landlock::{AccessFs, CompatLevel, Compatible as _, Ruleset, RulesetAttr as _};
use serde::{Deserialize, Serialize};

pub use cache::{CacheUse, LayerCache, LayerCacheError};
pub(crate) use marks::serve as serve_marks;

use crate::rootfs::MAX_LAYERS;

/// A root filesystem as the overlay of layers and a snapshot that is written to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LayeredRootfs {
    /// EROFS blobs, lowest first.
    pub layers: Vec<PathBuf>,
    /// The directory that has the upper layer as `fs` and overlayfs' working directory as `work`.
    pub snapshot: PathBuf,
}

/// Whether there can be any on this host.
#[must_use]
pub fn supported() -> bool {
    // What confines the shares' thread to the two directories of a snapshot.
    let landlock = Ruleset::default()
        .set_compatibility(CompatLevel::HardRequirement)
        .handle_access(AccessFs::Refer)
        .is_ok();
    // The host's own overlayfs must not write marks that the guest's doesn't read.
    let plain = ["metacopy", "redirect_dir"].iter().all(|parameter| {
        let path = format!("/sys/module/overlay/parameters/{parameter}");
        fs::read_to_string(path).map_or(true, |value| value.trim() == "N")
    });
    landlock && plain && rustix::process::geteuid().is_root()
}

/// Whether so many layers can be disks of a microVM.
#[must_use]
pub fn fits(layers: usize) -> bool {
    (1..=MAX_LAYERS).contains(&layers)
}
