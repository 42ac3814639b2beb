//! The pinned kernel source: a file of a distribution package, fetched when absent, and always checked by hash.

use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::process::Command;

use sha2::{Digest, Sha256};

use crate::error::{Error, IoContext, Result};
use crate::inputs::hex;

/// A source tarball inside a distribution package.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SourcePin {
    /// Binary package that carries the tarball.
    pub package: &'static str,
    /// Exact version of that package.
    pub version: &'static str,
    /// Version of the kernel in it.
    pub linux_version: &'static str,
    /// File name of the tarball.
    pub tarball: &'static str,
    /// Folder the package installs the tarball into.
    pub installed_in: &'static str,
    /// Top-level folder inside the tarball.
    pub top_folder: &'static str,
    /// Hash of the tarball.
    pub sha256: &'static str,
}

impl SourcePin {
    /// The source every guest kernel is made of. Why 6.12: docs/adr/0001-guest-kernel-source.md.
    pub const LINUX: Self = Self {
        package: "linux-source-6.12",
        version: "6.12.117-1~deb12u1",
        linux_version: "6.12.117",
        tarball: "linux-source-6.12.tar.xz",
        installed_in: "/usr/src",
        top_folder: "linux-source-6.12",
        sha256: "585a4a074597aefa2b1a68ada83a3184ba351c127544dea80618bbcceaa3961f",
    };

    /// The checked tarball: as installed, else as cached, else fetched into `folder` with `apt-get download`.
    ///
    /// An installed file with another hash is another version of the package; it is passed over, not an error.
    pub(crate) fn obtain(&self, folder: &Path) -> Result<PathBuf> {
        let installed = Path::new(self.installed_in).join(self.tarball);
        if installed.is_file() && sha256_file(&installed)? == self.sha256 {
            return Ok(installed);
        }
        let cached = folder.join(self.tarball);
        if cached.is_file() {
            let found = sha256_file(&cached)?;
            if found == self.sha256 {
                return Ok(cached);
            }
            return Err(Error::SourceMismatch {
                path: cached,
                expected: self.sha256.to_owned(),
                found,
            });
        }
        self.fetch(folder)?;
        let found = sha256_file(&cached)?;
        if found != self.sha256 {
            let _ = fs::remove_file(&cached);
            return Err(Error::SourceMismatch {
                path: cached,
                expected: self.sha256.to_owned(),
                found,
            });
        }
        Ok(cached)
    }

    /// Downloads the package and takes the tarball out of it. The folder holds the tarball afterwards, or nothing new.
    fn fetch(&self, folder: &Path) -> Result<()> {
        fs::create_dir_all(folder).context("create", folder)?;
        let staging = folder.join(".fetch");
        remove_tree(&staging)?;
        fs::create_dir(&staging).context("create", &staging)?;
        let outcome = self.fetch_into(&staging, folder);
        remove_tree(&staging)?;
        outcome
    }

    fn fetch_into(&self, staging: &Path, folder: &Path) -> Result<()> {
        let wanted = format!("{}={}", self.package, self.version);
        self.run(
            Command::new("apt-get")
                .args(["-q", "download", &wanted])
                .current_dir(staging),
            folder,
        )?;
        let package = fs::read_dir(staging)
            .context("list", staging)?
            .filter_map(io::Result::ok)
            .map(|entry| entry.path())
            .find(|path| path.extension().is_some_and(|extension| extension == "deb"))
            .ok_or_else(|| self.unavailable(folder, "apt-get left no package behind".to_owned()))?;
        self.run(
            Command::new("dpkg-deb")
                .arg("-x")
                .arg(&package)
                .arg(staging.join("root")),
            folder,
        )?;
        let relative = self.installed_in.trim_start_matches('/');
        let tarball = staging.join("root").join(relative).join(self.tarball);
        fs::rename(&tarball, folder.join(self.tarball)).context("move into place", &tarball)
    }

    fn run(&self, command: &mut Command, folder: &Path) -> Result<()> {
        let name = command.get_program().to_string_lossy().into_owned();
        let output = command
            .env("LC_ALL", "C")
            .output()
            .map_err(|error| self.unavailable(folder, format!("{name}: {error}")))?;
        if output.status.success() {
            return Ok(());
        }
        let text = String::from_utf8_lossy(&output.stderr);
        let reason = text
            .lines()
            .rev()
            .find(|line| line.starts_with("E:"))
            .or(text.lines().last())
            .unwrap_or("no output");
        Err(self.unavailable(folder, format!("{name}: {reason}")))
    }

    fn unavailable(&self, folder: &Path, reason: String) -> Error {
        Error::SourceUnavailable {
            package: self.package,
            version: self.version,
            tarball: self.tarball,
            wanted_at: folder.to_owned(),
            reason,
        }
    }
}

/// Hash of a file's content.
pub(crate) fn sha256_file(path: &Path) -> Result<String> {
    let mut file = File::open(path).context("open", path)?;
    let mut hasher = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        let count = file.read(&mut buffer).context("read", path)?;
        if count == 0 {
            return Ok(hex(&hasher.finalize()));
        }
        hasher.update(&buffer[..count]);
    }
}

/// Removes a tree that may not be there.
pub(crate) fn remove_tree(path: &Path) -> Result<()> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error).context("remove", path),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ABSENT: SourcePin = SourcePin {
        package: "linux-source-0.0-absent",
        version: "0.0-1",
        linux_version: "0.0",
        tarball: "linux-source-0.0.tar.xz",
        installed_in: "/nonexistent",
        top_folder: "linux-source-0.0",
        sha256: "0000000000000000000000000000000000000000000000000000000000000000",
    };

    #[test]
    fn absent_package_is_one_error_naming_pin_and_way_out_and_leaves_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let error = ABSENT.obtain(folder.path()).unwrap_err();
        let text = error.to_string();
        assert!(matches!(error, Error::SourceUnavailable { .. }), "{text}");
        assert!(text.contains("linux-source-0.0-absent version 0.0-1"), "{text}");
        assert!(
            text.contains("apt-get install linux-source-0.0-absent=0.0-1"),
            "{text}"
        );
        assert!(text.contains(&folder.path().display().to_string()), "{text}");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
    }

    #[test]
    fn cached_tarball_with_another_hash_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join(ABSENT.tarball), b"something else").unwrap();
        let error = ABSENT.obtain(folder.path()).unwrap_err();
        assert!(matches!(error, Error::SourceMismatch { .. }), "{error}");
    }

    #[test]
    fn cached_tarball_with_the_pinned_hash_is_taken() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(ABSENT.tarball);
        fs::write(&path, b"abc").unwrap();
        let pin = SourcePin {
            sha256: "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad",
            ..ABSENT
        };
        assert_eq!(pin.obtain(folder.path()).unwrap(), path);
    }
}
