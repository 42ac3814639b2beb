//! What was published: the manifest beside the image, and the check that both still fit.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::error::{Error, IoContext, Result};
use crate::source::sha256_file;

/// Version of the manifest's own format.
pub(crate) const FORMAT: u32 = 1;

/// One file that went in or came out.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileRecord {
    /// File name.
    pub name: String,
    /// Length of its content.
    pub size_bytes: u64,
    /// Hash of its content.
    pub sha256: String,
}

/// `manifest.json`: what the image is made of and how large it is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// Version of this format.
    pub format: u32,
    /// Hash of all inputs; the name of the folder.
    pub input_hash: String,
    /// Version of the kernel source.
    pub linux_version: String,
    /// Package and version the source came from.
    pub source_package: String,
    /// Hash of the source tarball.
    pub source_sha256: String,
    /// Hash over the patch series.
    pub patches_sha256: String,
    /// The patches, in order.
    pub patches: Vec<FileRecord>,
    /// Hash over the fragments.
    pub fragments_sha256: String,
    /// The config fragments, in order.
    pub fragments: Vec<FileRecord>,
    /// The complete configuration that resulted.
    pub config: FileRecord,
    /// The image.
    pub vmlinux: FileRecord,
    /// What the image takes of guest memory when loaded: text, data and bss.
    pub loaded_size_bytes: u64,
    /// GNU build id in the image's notes.
    pub build_id: String,
    /// Compiler that built it.
    pub compiler: String,
    /// Linker that linked it.
    pub linker: String,
    /// Wall time of the build that made it (short when most objects were there already).
    pub build_duration_ms: u64,
    /// Compiler and tool runs of that build.
    pub build_steps: u64,
}

/// A published guest kernel.
#[derive(Debug, Clone)]
pub struct Artifact {
    /// The uncompressed ELF image.
    pub vmlinux: PathBuf,
    /// The manifest beside it.
    pub manifest_path: PathBuf,
    /// The manifest's content.
    pub manifest: Manifest,
}

/// What the image file looked like when its hash was last found right.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Verified {
    inode: u64,
    size_bytes: u64,
    mtime_ns: i64,
    ctime_ns: i64,
    sha256: String,
}

impl Artifact {
    /// The artifact in `folder`, if it is whole. A damaged or half-removed one counts as absent.
    ///
    /// The image is hashed once per file identity (inode, size, times): hashing it at every container start would cost
    /// more than the boot.
    pub(crate) fn open(folder: &Path, input_hash: &str) -> Option<Self> {
        let artifact = Self::read(folder).ok()?;
        if artifact.manifest.input_hash != input_hash || artifact.manifest.format != FORMAT {
            return None;
        }
        artifact.verify(folder).ok()?.then_some(artifact)
    }

    fn read(folder: &Path) -> Result<Self> {
        let manifest_path = folder.join("manifest.json");
        let text = fs::read(&manifest_path).context("read", &manifest_path)?;
        let manifest = serde_json::from_slice(&text).map_err(|source| Error::BadManifest {
            path: manifest_path.clone(),
            source,
        })?;
        Ok(Self {
            vmlinux: folder.join("vmlinux"),
            manifest_path,
            manifest,
        })
    }

    fn verify(&self, folder: &Path) -> Result<bool> {
        let metadata = fs::metadata(&self.vmlinux).context("read", &self.vmlinux)?;
        if metadata.len() != self.manifest.vmlinux.size_bytes {
            return Ok(false);
        }
        let now = Verified {
            inode: metadata.ino(),
            size_bytes: metadata.len(),
            mtime_ns: metadata.mtime() * 1_000_000_000 + metadata.mtime_nsec(),
            ctime_ns: metadata.ctime() * 1_000_000_000 + metadata.ctime_nsec(),
            sha256: self.manifest.vmlinux.sha256.clone(),
        };
        let stamp = folder.join("verified.json");
        let before: Option<Verified> = fs::read(&stamp)
            .ok()
            .and_then(|text| serde_json::from_slice(&text).ok());
        if before.as_ref() == Some(&now) {
            return Ok(true);
        }
        if sha256_file(&self.vmlinux)? != now.sha256 {
            return Ok(false);
        }
        // Only a saving: in a cache we cannot write to, the next caller hashes again.
        if let Ok(text) = serde_json::to_vec(&now) {
            let _ = fs::write(&stamp, text);
        }
        Ok(true)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::inputs::hex;
    use sha2::{Digest, Sha256};

    fn publish(folder: &Path, image: &[u8]) {
        let record = |name: &str, bytes: &[u8]| FileRecord {
            name: name.to_owned(),
            size_bytes: bytes.len() as u64,
            sha256: hex(&Sha256::digest(bytes)),
        };
        let manifest = Manifest {
            format: FORMAT,
            input_hash: "abcd".into(),
            linux_version: "6.12".into(),
            source_package: "p=1".into(),
            source_sha256: String::new(),
            patches_sha256: String::new(),
            patches: Vec::new(),
            fragments_sha256: String::new(),
            fragments: Vec::new(),
            config: record("config", b""),
            vmlinux: record("vmlinux", image),
            loaded_size_bytes: 1,
            build_id: String::new(),
            compiler: String::new(),
            linker: String::new(),
            build_duration_ms: 0,
            build_steps: 0,
        };
        fs::write(folder.join("vmlinux"), image).unwrap();
        fs::write(
            folder.join("manifest.json"),
            serde_json::to_vec(&manifest).unwrap(),
        )
        .unwrap();
    }

    #[test]
    fn whole_artifact_is_found_again_and_again() {
        let folder = tempfile::tempdir().unwrap();
        publish(folder.path(), b"image");
        assert!(Artifact::open(folder.path(), "abcd").is_some());
        assert!(folder.path().join("verified.json").exists());
        assert!(Artifact::open(folder.path(), "abcd").is_some());
    }

    #[test]
    fn truncated_image_counts_as_absent() {
        let folder = tempfile::tempdir().unwrap();
        publish(folder.path(), b"image");
        fs::write(folder.path().join("vmlinux"), b"imag").unwrap();
        assert!(Artifact::open(folder.path(), "abcd").is_none());
    }

    #[test]
    fn flipped_bytes_of_the_same_length_count_as_absent_even_after_a_good_check() {
        let folder = tempfile::tempdir().unwrap();
        publish(folder.path(), b"image");
        assert!(Artifact::open(folder.path(), "abcd").is_some());
        fs::write(folder.path().join("vmlinux"), b"imagX").unwrap();
        assert!(Artifact::open(folder.path(), "abcd").is_none());
    }

    #[test]
    fn garbled_manifest_counts_as_absent() {
        let folder = tempfile::tempdir().unwrap();
        publish(folder.path(), b"image");
        fs::write(folder.path().join("manifest.json"), b"{").unwrap();
        assert!(Artifact::open(folder.path(), "abcd").is_none());
    }

    #[test]
    fn artifact_of_other_inputs_counts_as_absent() {
        let folder = tempfile::tempdir().unwrap();
        publish(folder.path(), b"image");
        assert!(Artifact::open(folder.path(), "ef01").is_none());
    }
}
