//! The root file system of the soak: a Debian tree with the workloads' programs, as a read-only EROFS image.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result};
use sha2::{Digest, Sha256};

use crate::kernel_guest::run;
use crate::kernel_vm;

const SUITE: &str = "bookworm";
const PACKAGES: &str = "redis-server,redis-tools,postgresql-15,postgresql-client-15,stress-ng,gdb,dash,coreutils,util-linux,\
                        procps,sed,grep,mawk,findutils,libc-bin,libc6";

/// The image, made once (about twenty seconds) and kept in the user's cache.
///
/// # Errors
/// If mmdebstrap or mkfs.erofs is missing, or the packages are not to be had.
pub fn image() -> Result<PathBuf> {
    let key: String = Sha256::digest(format!("1 {SUITE} {PACKAGES}"))
        .iter()
        .take(8)
        .map(|byte| format!("{byte:02x}"))
        .collect();
    let cache = kernel_vm::cache_folder()?.join("test-soak-root");
    let image = cache.join(format!("{key}.erofs"));
    if image.exists() {
        return Ok(image);
    }
    fs::create_dir_all(&cache)?;
    let staging = tempfile::Builder::new().prefix(".new-").tempdir_in(&cache)?;
    let tree = staging.path().join("tree");
    run(Command::new("mmdebstrap")
        .args([
            "--quiet",
            "--variant=extract",
            &format!("--include={PACKAGES}"),
            SUITE,
        ])
        .arg(&tree)
        .args(package_sources()))
    .context("the soak's root file system comes from Debian packages")?;
    let new = staging.path().join("image");
    run(Command::new("mkfs.erofs").arg("--quiet").arg(&new).arg(&tree))?;
    fs::rename(&new, &image)?;
    Ok(image)
}

/// The machine's own files of package sources that are about the suite, in either of apt's formats.
fn package_sources() -> Vec<PathBuf> {
    let listed = fs::read_dir("/etc/apt/sources.list.d").into_iter().flatten();
    let parts = listed.flatten().map(|entry| entry.path()).filter(|path| {
        path.extension()
            .is_some_and(|format| format == "list" || format == "sources")
    });
    std::iter::once(PathBuf::from("/etc/apt/sources.list"))
        .chain(parts)
        .filter(|path| fs::read_to_string(path).is_ok_and(|text| text.contains(SUITE)))
        .collect()
}
