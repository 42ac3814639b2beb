//! What can go wrong between a pin and a `vmlinux`, each with the thing to do about it.

use std::io;
use std::path::PathBuf;

/// Result of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// A failure of the guest kernel's build or of its cache.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("cannot {action} {path}")]
    Io {
        action: &'static str,
        path: PathBuf,
        source: io::Error,
    },

    #[error("neither XDG_CACHE_HOME nor HOME is set, so there is no cache folder; set one of them")]
    NoCacheFolder,

    #[error(
        "the pinned guest kernel source, package {package} version {version}, is not to be had: {reason}; \
         install it with `apt-get install {package}={version}`, or put its {tarball} into {wanted_at}"
    )]
    SourceUnavailable {
        package: &'static str,
        version: &'static str,
        tarball: &'static str,
        wanted_at: PathBuf,
        reason: String,
    },

    #[error(
        "{path} is not the pinned source: sha256 is {found}, expected {expected}; remove the file and build again"
    )]
    SourceMismatch {
        path: PathBuf,
        expected: String,
        found: String,
    },

    #[error("the guest kernel's build needs {missing}; install with `apt-get install {packages}`")]
    ToolMissing { missing: String, packages: &'static str },

    #[error("patch {patch} does not apply to the pinned source: {detail}")]
    PatchRejected { patch: String, detail: String },

    #[error("the kernel's configuration dropped what was asked for: {}", dropped.join(", "))]
    ConfigDropped { dropped: Vec<String> },

    #[error("no config fragments given")]
    NoFragments,

    #[error(
        "{path} is full: the build needs about {needed_mib} MiB free there and found {free_mib} MiB; \
         free some space or point XDG_CACHE_HOME elsewhere"
    )]
    DiskFull {
        path: PathBuf,
        needed_mib: u64,
        free_mib: u64,
    },

    #[error("{command} failed ({status}); the whole output is in {log}\n{tail}")]
    CommandFailed {
        command: String,
        status: String,
        log: PathBuf,
        tail: String,
    },

    #[error("{path} is not a 64-bit x86 kernel image: {reason}")]
    NotAKernel { path: PathBuf, reason: &'static str },

    #[error("the manifest {path} cannot be read")]
    BadManifest {
        path: PathBuf,
        source: serde_json::Error,
    },
}

/// Adds the action and the path to an I/O error.
pub(crate) trait IoContext<T> {
    /// Names what was being done, and to which file.
    fn context(self, action: &'static str, path: impl Into<PathBuf>) -> Result<T>;
}

impl<T> IoContext<T> for io::Result<T> {
    fn context(self, action: &'static str, path: impl Into<PathBuf>) -> Result<T> {
        self.map_err(|source| Error::Io {
            action,
            path: path.into(),
            source,
        })
    }
}

impl<T> IoContext<T> for rustix::io::Result<T> {
    fn context(self, action: &'static str, path: impl Into<PathBuf>) -> Result<T> {
        self.map_err(|errno| Error::Io {
            action,
            path: path.into(),
            source: errno.into(),
        })
    }
}
