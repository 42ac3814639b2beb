//! `--pid-file`: read by somebody as soon as it is there, so it is there whole or not at all.

use std::{fs, path::Path};

use anyhow::{Context as _, Result};

/// Writes a process id, to a temporary name first.
pub(crate) fn write(path: &Path, pid: u32) -> Result<()> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let temporary = path.with_file_name(format!(".{name}"));
    fs::write(&temporary, pid.to_string())
        .and_then(|()| fs::rename(&temporary, path))
        .with_context(|| format!("cannot write the pid file {}", path.display()))
}
