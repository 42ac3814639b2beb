//! Everything that decides the bytes of a guest kernel, and the one hash over it.

use std::fmt;
use std::fs;
use std::path::Path;
use std::process::Command;

use sha2::{Digest, Sha256};

use crate::error::{Error, IoContext, Result};
use crate::source::SourcePin;

mod embedded {
    include!(concat!(env!("OUT_DIR"), "/embedded.rs"));
}

/// Raised when the driver builds differently from the same inputs (another make target, other flags, other stripping).
const RECIPE: u32 = 1;

/// The packages that bring every tool of the build, for the error message.
const TOOL_PACKAGES: &str = "gcc make flex bison bc libelf-dev perl patch xz-utils tar util-linux binutils";

/// A patch or a config fragment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InputFile {
    /// File name; the order of names is the order of application.
    pub name: String,
    /// Content.
    pub bytes: Vec<u8>,
}

/// The compiler and the linker, as they name themselves.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Toolchain {
    /// First line of `gcc --version`.
    pub compiler: String,
    /// First line of `ld --version`.
    pub linker: String,
}

impl Toolchain {
    /// Asks the tools on `PATH`.
    pub fn detect() -> Result<Self> {
        Ok(Self {
            compiler: first_line("gcc")?,
            linker: first_line("ld")?,
        })
    }
}

fn first_line(tool: &str) -> Result<String> {
    let missing = || Error::ToolMissing {
        missing: tool.to_owned(),
        packages: TOOL_PACKAGES,
    };
    let output = Command::new(tool)
        .arg("--version")
        .env("LC_ALL", "C")
        .output()
        .map_err(|_| missing())?;
    let text = String::from_utf8_lossy(&output.stdout);
    text.lines().next().map(str::to_owned).ok_or_else(missing)
}

/// Checks that every program the build starts is there, before anything is unpacked.
pub(crate) fn require_tools() -> Result<()> {
    let missing: Vec<&str> = [
        "gcc", "ld", "make", "flex", "bison", "bc", "perl", "patch", "tar", "xz", "setpriv", "strip",
    ]
    .into_iter()
    .filter(|tool| !on_path(tool))
    .collect();
    if missing.is_empty() {
        return Ok(());
    }
    Err(Error::ToolMissing {
        missing: missing.join(", "),
        packages: TOOL_PACKAGES,
    })
}

fn on_path(tool: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|folder| folder.join(tool).is_file())
}

/// The hash over all inputs, as 64 hexadecimal digits.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct InputHash(String);

impl InputHash {
    /// All digits.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for InputHash {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&self.0)
    }
}

/// All inputs of one guest kernel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Inputs {
    /// The source package.
    pub source: SourcePin,
    /// The patch series, in order.
    pub patches: Vec<InputFile>,
    /// The config fragments, in order; a later one wins.
    pub fragments: Vec<InputFile>,
    /// What compiles it.
    pub toolchain: Toolchain,
}

impl Inputs {
    /// The inputs this binary was built with, and the tools of this machine.
    pub fn embedded() -> Result<Self> {
        let own = |files: &[(&str, &[u8])]| {
            files
                .iter()
                .map(|(name, bytes)| InputFile {
                    name: (*name).to_owned(),
                    bytes: bytes.to_vec(),
                })
                .collect()
        };
        Ok(Self {
            source: SourcePin::LINUX,
            patches: own(embedded::PATCHES),
            fragments: own(embedded::FRAGMENTS),
            toolchain: Toolchain::detect()?,
        })
    }

    /// The inputs in a working copy: `FOLDER/patches/*.patch` and `FOLDER/config/*.config`. For work on the series.
    pub fn from_folder(folder: &Path) -> Result<Self> {
        Ok(Self {
            source: SourcePin::LINUX,
            patches: read_all(&folder.join("patches"), "patch")?,
            fragments: read_all(&folder.join("config"), "config")?,
            toolchain: Toolchain::detect()?,
        })
    }

    /// The name of the artifact these inputs make.
    pub fn hash(&self) -> InputHash {
        let mut hasher = Sha256::new();
        let mut part = |label: &str, bytes: &[u8]| {
            // Lengths delimit, so that no two lists of parts give the same stream.
            hasher.update((label.len() as u64).to_le_bytes());
            hasher.update(label.as_bytes());
            hasher.update((bytes.len() as u64).to_le_bytes());
            hasher.update(bytes);
        };
        part("recipe", &RECIPE.to_le_bytes());
        part("source", self.source.sha256.as_bytes());
        part("compiler", self.toolchain.compiler.as_bytes());
        part("linker", self.toolchain.linker.as_bytes());
        for patch in &self.patches {
            part(&format!("patch {}", patch.name), &patch.bytes);
        }
        for fragment in &self.fragments {
            part(&format!("config {}", fragment.name), &fragment.bytes);
        }
        InputHash(hex(&hasher.finalize()))
    }

    /// Hash over the patch series alone.
    pub fn patches_sha256(&self) -> String {
        sha256_of(&self.patches)
    }

    /// Hash over the config fragments alone.
    pub fn fragments_sha256(&self) -> String {
        sha256_of(&self.fragments)
    }
}

fn sha256_of(files: &[InputFile]) -> String {
    let mut hasher = Sha256::new();
    for file in files {
        hasher.update(file.name.as_bytes());
        hasher.update([0]);
        hasher.update(Sha256::digest(&file.bytes));
    }
    hex(&hasher.finalize())
}

fn read_all(folder: &Path, extension: &str) -> Result<Vec<InputFile>> {
    let mut files = Vec::new();
    for entry in fs::read_dir(folder).context("list", folder)? {
        let path = entry.context("list", folder)?.path();
        if path.extension().is_some_and(|found| found == extension) {
            let name = path
                .file_name()
                .unwrap_or_default()
                .to_string_lossy()
                .into_owned();
            files.push(InputFile {
                name,
                bytes: fs::read(&path).context("read", &path)?,
            });
        }
    }
    files.sort_by(|one, other| one.name.cmp(&other.name));
    Ok(files)
}

/// Lower-case hexadecimal.
pub(crate) fn hex(bytes: &[u8]) -> String {
    use fmt::Write as _;
    bytes
        .iter()
        .fold(String::with_capacity(bytes.len() * 2), |mut text, byte| {
            // Writing to a String cannot fail.
            let _ = write!(text, "{byte:02x}");
            text
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn inputs() -> Inputs {
        Inputs {
            source: SourcePin::LINUX,
            patches: vec![
                InputFile {
                    name: "0001-a.patch".into(),
                    bytes: b"one".to_vec(),
                },
                InputFile {
                    name: "0002-b.patch".into(),
                    bytes: b"two".to_vec(),
                },
            ],
            fragments: vec![InputFile {
                name: "10-base.config".into(),
                bytes: b"CONFIG_SMP=y\n".to_vec(),
            }],
            toolchain: Toolchain {
                compiler: "gcc 12".into(),
                linker: "ld 2.40".into(),
            },
        }
    }

    #[test]
    fn hash_is_the_same_on_every_machine_and_every_day() {
        // A change here means that every user rebuilds: it must be meant (then raise RECIPE instead where possible).
        assert_eq!(inputs().hash(), inputs().hash());
        assert_eq!(inputs().hash().as_str().len(), 64);
    }

    #[test]
    fn hash_changes_with_each_input() {
        let base = inputs().hash();
        let mut changed = inputs();
        changed.patches[1].bytes.push(b'\n');
        assert_ne!(base, changed.hash());
        let mut changed = inputs();
        changed.patches.swap(0, 1);
        assert_ne!(base, changed.hash());
        let mut changed = inputs();
        changed.fragments[0].bytes = b"CONFIG_SMP=n\n".to_vec();
        assert_ne!(base, changed.hash());
        let mut changed = inputs();
        changed.toolchain.compiler = "gcc 13".into();
        assert_ne!(base, changed.hash());
        let mut changed = inputs();
        changed.source.sha256 = "00";
        assert_ne!(base, changed.hash());
    }

    #[test]
    fn hash_keeps_a_boundary_between_name_and_content() {
        let mut one = inputs();
        one.patches = vec![InputFile {
            name: "ab".into(),
            bytes: b"c".to_vec(),
        }];
        let mut other = inputs();
        other.patches = vec![InputFile {
            name: "a".into(),
            bytes: b"bc".to_vec(),
        }];
        assert_ne!(one.hash(), other.hash());
    }

    #[test]
    fn embedded_inputs_carry_the_fragments_of_this_crate() {
        let inputs = Inputs::embedded().unwrap();
        let folder = Path::new(env!("CARGO_MANIFEST_DIR"));
        assert_eq!(inputs.fragments, Inputs::from_folder(folder).unwrap().fragments);
        assert!(inputs.fragments.len() >= 5);
    }
}
