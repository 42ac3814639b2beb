//! The guest programs of `tests/guest`: compiled once per content, packed as initramfs images.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use anyhow::{Context, Result, bail};
use sha2::{Digest, Sha256};

use crate::initramfs::Initramfs;

/// A program that runs as init, reports lines that begin with `HULL `, and stops the machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Guest {
    /// Reaches init and says so.
    Minimal,
    /// Tries to get at the kernel, and checks that the CPU behaves as on hardware.
    Isolation,
    /// Uses every kernel feature a container may need.
    Features,
    /// Measures what system calls, faults and processes cost.
    Bench,
    /// Runs the workloads of the soak; needs a root file system on `/dev/vda`.
    Soak,
}

impl Guest {
    fn name(self) -> &'static str {
        match self {
            Self::Minimal => "minimal",
            Self::Isolation => "isolation",
            Self::Features => "features",
            Self::Bench => "bench",
            Self::Soak => "soak",
        }
    }

    /// The initramfs with this program as init.
    ///
    /// # Errors
    /// If a compiler or a tool that makes file systems is missing or fails.
    pub fn initramfs(self) -> Result<PathBuf> {
        let folder = built()?;
        Ok(folder.join(format!("{}.cpio", self.name())))
    }

    /// The static program itself, to be run on the host for comparison.
    ///
    /// # Errors
    /// As [`Guest::initramfs`].
    pub fn program(self) -> Result<PathBuf> {
        Ok(built()?.join(self.name()))
    }
}

const ALL: [Guest; 5] = [
    Guest::Minimal,
    Guest::Isolation,
    Guest::Features,
    Guest::Bench,
    Guest::Soak,
];

/// The folder with all programs and images, made by the first caller of this process and kept in the user's cache.
fn built() -> Result<&'static Path> {
    static FOLDER: OnceLock<Result<PathBuf, String>> = OnceLock::new();
    match FOLDER.get_or_init(|| build().map_err(|error| format!("{error:#}"))) {
        Ok(folder) => Ok(folder),
        Err(error) => bail!("cannot make the test guests: {error}"),
    }
}

fn build() -> Result<PathBuf> {
    let sources = Path::new(env!("CARGO_MANIFEST_DIR")).join("guest");
    let mut names: Vec<_> = fs::read_dir(&sources)?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .collect();
    names.sort();
    let mut hasher = Sha256::new();
    hasher.update(b"1");
    for name in &names {
        hasher.update(fs::read(name)?);
        hasher.update([0]);
    }
    let key: String = hasher
        .finalize()
        .iter()
        .take(8)
        .map(|byte| format!("{byte:02x}"))
        .collect();
    let cache = crate::kernel_vm::cache_folder()?.join("test-guests");
    let folder = cache.join(key);
    if folder.is_dir() {
        return Ok(folder);
    }
    fs::create_dir_all(&cache)?;
    let staging = tempfile::Builder::new().prefix(".new-").tempdir_in(&cache)?;
    for guest in ALL {
        compile(&sources, guest, &names, staging.path())?;
    }
    for guest in ALL {
        let archive = pack(guest, staging.path())?;
        fs::write(staging.path().join(format!("{}.cpio", guest.name())), archive)?;
    }
    // Another process may have been faster: its result is the same.
    if fs::rename(staging.path(), &folder).is_ok() {
        let _ = staging.keep();
    }
    Ok(folder)
}

fn compile(sources: &Path, guest: Guest, names: &[PathBuf], to: &Path) -> Result<()> {
    let main = format!("{}.c", guest.name());
    let part = format!("{}_", guest.name());
    let own = names.iter().filter(|path| {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let is_source = path.extension().is_some_and(|extension| extension == "c");
        is_source && (name == main || name == "guest.c" || name.starts_with(&part))
    });
    run(Command::new("gcc")
        .args(["-O1", "-static", "-Wall", "-o"])
        .arg(to.join(guest.name()))
        .args(own)
        .arg("-lpthread")
        .current_dir(sources))
}

fn pack(guest: Guest, folder: &Path) -> Result<Vec<u8>> {
    let mut archive = Initramfs::new();
    archive.copy("init", &folder.join(guest.name()))?;
    if guest == Guest::Features {
        archive.symlink("bin/features-helper", "/init");
        add_images(&mut archive)?;
    }
    if guest == Guest::Soak {
        let sources = Path::new(env!("CARGO_MANIFEST_DIR")).join("guest");
        archive.copy("soak.sh", &sources.join("soak.sh"))?;
        archive.copy("isolation", &folder.join(Guest::Isolation.name()))?;
    }
    Ok(archive.finish())
}

/// EROFS images with each compressor this machine's mkfs.erofs knows, and an empty ext4 one.
fn add_images(archive: &mut Initramfs) -> Result<()> {
    let folder = tempfile::tempdir()?;
    let content = folder.path().join("content");
    fs::create_dir(&content)?;
    fs::write(content.join("text"), "hull\n".repeat(100_000))?;
    archive.directory("images");
    for compressor in ["plain", "lz4", "lz4hc", "lzma", "deflate", "zstd"] {
        let image = folder.path().join("image");
        let _ = fs::remove_file(&image);
        let mut command = Command::new("mkfs.erofs");
        if compressor != "plain" {
            command.arg(format!("-z{compressor}"));
        }
        // Which compressors it was built with depends on its version: the plain image must work, the rest may.
        let made = run(command.arg(&image).arg(&content));
        if compressor == "plain" {
            made?;
        } else if made.is_err() {
            continue;
        }
        archive.copy(&format!("images/erofs-{compressor}.img"), &image)?;
    }
    let image = folder.path().join("ext4");
    fs::File::create(&image)?.set_len(8 << 20)?;
    run(Command::new("mkfs.ext4").arg("-q").arg(&image))?;
    archive.copy("images/ext4.img", &image)?;
    Ok(())
}

/// Runs a tool to its end.
pub(crate) fn run(command: &mut Command) -> Result<()> {
    let output = command
        .output()
        .with_context(|| format!("cannot start {command:?}"))?;
    if output.status.success() {
        return Ok(());
    }
    bail!(
        "{command:?}: {}: {}",
        output.status,
        String::from_utf8_lossy(&output.stderr).trim()
    )
}
