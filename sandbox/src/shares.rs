//! Directories and files of the host that a microVM sees: bind mounts, volumes, root filesystems.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// One of them. Kept with a container, so a field added later has a default.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ShareSpec {
    /// Its absolute path on the host.
    pub source: PathBuf,
    /// Whether the guest can't write to it, whatever it does.
    pub read_only: bool,
    /// Whether what is mounted below it is seen, too.
    pub recursive: bool,
}
