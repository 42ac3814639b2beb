//! Where things are: the parts of the installation, the image store and the run directory.

use std::{
    env, fs,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

use crate::{Result, SandboxError};

/// The two directories Hull keeps things in.
#[derive(Debug, Clone)]
pub struct Directories {
    /// Images and containers; survives a reboot. `HULL_ROOT`.
    pub root: PathBuf,
    /// What belongs to running containers; doesn't. `HULL_RUNTIME_DIR`.
    pub run: PathBuf,
}

fn home_relative(variable: &str, below_home: &str) -> Option<PathBuf> {
    let from_variable = env::var_os(variable)
        .map(PathBuf::from)
        .filter(|path| path.is_absolute());
    from_variable.or_else(|| env::home_dir().map(|home| home.join(below_home)))
}

fn absolute(path: PathBuf) -> PathBuf {
    std::path::absolute(&path).unwrap_or(path)
}

impl Directories {
    /// The directories of this user, from the environment or by convention.
    #[must_use]
    pub fn from_environment() -> Self {
        let privileged = rustix::process::geteuid().is_root();
        let given = |variable| {
            env::var_os(variable)
                .filter(|value| !value.is_empty())
                .map(PathBuf::from)
        };
        let root =
            given("HULL_ROOT").unwrap_or_else(|| match home_relative("XDG_DATA_HOME", ".local/share") {
                Some(data) if !privileged => data.join("hull"),
                _ => PathBuf::from("/var/lib/hull"),
            });
        let run = given("HULL_RUNTIME_DIR").unwrap_or_else(|| match given("XDG_RUNTIME_DIR") {
            Some(run) if !privileged => run.join("hull"),
            _ => PathBuf::from("/run/hull"),
        });
        // A monitor works in another folder than its client.
        Self {
            root: absolute(root),
            run: absolute(run),
        }
    }
}

/// The parts of the installation a sandbox is made of.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Components {
    /// The VMM's program. `HULL_VMM`.
    pub vmm: PathBuf,
    /// The guest kernel. `HULL_KERNEL`.
    pub kernel: PathBuf,
    /// The agent's root image. `HULL_AGENT_IMAGE`.
    pub agent_image: PathBuf,
}

impl Components {
    /// Finds all parts.
    ///
    /// # Errors
    ///
    /// Names the first part that is missing, where it was looked for, and what to do.
    pub fn find() -> Result<Self> {
        Ok(Self {
            vmm: Self::find_vmm()?,
            kernel: Self::find_kernel()?,
            agent_image: Self::find_agent_image()?,
        })
    }

    /// Finds the VMM.
    ///
    /// # Errors
    ///
    /// As [`Components::find`].
    pub fn find_vmm() -> Result<PathBuf> {
        find(
            "the VMM (hull-vmm)",
            "HULL_VMM",
            "hull-vmm",
            &[],
            "install it beside hull, or set HULL_VMM",
        )
    }

    /// Finds the guest kernel: the newest of the cache where none is installed.
    ///
    /// # Errors
    ///
    /// As [`Components::find`].
    pub fn find_kernel() -> Result<PathBuf> {
        let cached = cache_dir().map(|cache| newest_kernel(&cache.join("guest-kernel")));
        let remedy = "build it with `cargo xtask guest-kernel`, or set HULL_KERNEL";
        let cached: Vec<PathBuf> = cached.into_iter().flatten().collect();
        find(
            "the guest kernel (vmlinux)",
            "HULL_KERNEL",
            "vmlinux",
            &cached,
            remedy,
        )
    }

    /// Finds the agent's image.
    ///
    /// # Errors
    ///
    /// As [`Components::find`].
    pub fn find_agent_image() -> Result<PathBuf> {
        let cached: Vec<PathBuf> = cache_dir()
            .map(|cache| cache.join("agent/agent-root.erofs"))
            .into_iter()
            .collect();
        let remedy = "build it with `cargo xtask build`, or set HULL_AGENT_IMAGE";
        find(
            "the agent's image (agent-root.erofs)",
            "HULL_AGENT_IMAGE",
            "agent-root.erofs",
            &cached,
            remedy,
        )
    }
}

fn cache_dir() -> Option<PathBuf> {
    home_relative("XDG_CACHE_HOME", ".cache").map(|cache| cache.join("hull"))
}

fn find(
    what: &'static str,
    variable: &str,
    file: &str,
    cached: &[PathBuf],
    remedy: &'static str,
) -> Result<PathBuf> {
    let missing = |looked_at| SandboxError::ComponentMissing {
        what,
        looked_at,
        remedy,
    };
    if let Some(given) = env::var_os(variable).filter(|value| !value.is_empty()) {
        let given = PathBuf::from(given);
        // A wrong override is an error; falling back would run something else than was asked for.
        return if given.is_file() {
            Ok(absolute(given))
        } else {
            Err(missing(format!("{variable}={}", given.display())))
        };
    }
    let mut candidates = Vec::new();
    if let Ok(program) = env::current_exe()
        && let Some(dir) = program.parent()
    {
        candidates.push(dir.join(file));
        candidates.push(dir.join("../libexec/hull").join(file));
    }
    candidates.extend_from_slice(cached);
    candidates
        .iter()
        .find(|candidate| candidate.is_file())
        .cloned()
        .ok_or_else(|| {
            let places: Vec<String> = candidates.iter().map(|path| path.display().to_string()).collect();
            missing(places.join(", "))
        })
}

/// The most recently published kernel of the cache; its folders are named by the hash of their inputs.
fn newest_kernel(cache: &Path) -> Option<PathBuf> {
    let published = |entry: fs::DirEntry| {
        let manifest = entry.path().join("manifest.json");
        let time = fs::metadata(manifest)
            .and_then(|metadata| metadata.modified())
            .ok()?;
        Some((time, entry.path().join("vmlinux")))
    };
    fs::read_dir(cache)
        .ok()?
        .flatten()
        .filter_map(published)
        .max()
        .map(|(_, kernel)| kernel)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernel_without_a_manifest_is_not_taken() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("half")).unwrap();
        fs::write(dir.path().join("half/vmlinux"), "").unwrap();
        assert_eq!(newest_kernel(dir.path()), None);
        fs::create_dir(dir.path().join("whole")).unwrap();
        fs::write(dir.path().join("whole/manifest.json"), "").unwrap();
        assert_eq!(newest_kernel(dir.path()), Some(dir.path().join("whole/vmlinux")));
    }
}
