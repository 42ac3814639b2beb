//! Builds the tiny guests that benchmarks boot: an initramfs with one static program of a few hundred bytes.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use cpio::{newc, write_cpio};

const S_IFDIR: u32 = 0o040_000;
const S_IFCHR: u32 = 0o020_000;
const S_IFREG: u32 = 0o100_000;

/// What the only program of a guest does.
#[derive(Debug, Clone, Copy)]
pub enum Program {
    /// Say one byte on the console and reset the machine.
    Reset,
    /// Say one byte on the console and wait for ever.
    Idle,
}

/// Assemble `guest/init.S` and pack it as `/init` beside an empty `/dev/console`; returns the archive's path.
///
/// # Errors
/// No C compiler, or the folder can't be written.
pub fn initramfs(directory: &Path, what: Program) -> Result<PathBuf> {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("guest/init.S");
    let program = directory.join("init");
    let status = Command::new("gcc")
        .args([
            "-nostdlib",
            "-static",
            "-no-pie",
            "-Wl,--build-id=none",
            "-Wl,-z,noseparate-code",
            "-s",
            "-o",
        ])
        .arg(&program)
        .args(matches!(what, Program::Idle).then_some("-DIDLE"))
        .arg(&source)
        .status()
        .context("cannot start gcc; `cargo xtask setup` installs it")?;
    if !status.success() {
        bail!("gcc could not assemble {}", source.display());
    }
    let archive = directory.join("initramfs.cpio");
    let init = fs::read(&program).with_context(|| format!("cannot read {}", program.display()))?;
    let entry = |name: &str, mode: u32| newc::Builder::new(name).mode(mode).nlink(1);
    let inputs = vec![
        (entry("dev", S_IFDIR | 0o755), std::io::Cursor::new(Vec::new())),
        (
            entry("dev/console", S_IFCHR | 0o600).rdev_major(5).rdev_minor(1),
            std::io::Cursor::new(Vec::new()),
        ),
        (entry("init", S_IFREG | 0o755), std::io::Cursor::new(init)),
    ];
    let file = File::create(&archive).with_context(|| format!("cannot create {}", archive.display()))?;
    write_cpio(inputs.into_iter(), file).with_context(|| format!("cannot write {}", archive.display()))?;
    Ok(archive)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn initramfs_holds_a_static_init_and_a_console() {
        let directory = tempfile::tempdir().unwrap();
        let archive = fs::read(initramfs(directory.path(), Program::Reset).unwrap()).unwrap();
        assert!(archive.starts_with(b"070701"));
        assert!(archive.len() < 16 << 10, "{} bytes", archive.len());
        let text = String::from_utf8_lossy(&archive);
        assert!(text.contains("dev/console") && text.contains("init"));
    }
}
