//! A mount and a network namespace of a test's own, for programs that mount and make bridges: container engines.
//!
//! A process holds both; everything else is started in them. When the enclosure is dropped, whatever still runs in it is
//! killed, and its mounts and interfaces are gone with the last of it: nothing of an engine is ever seen on the machine.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use nix::sys::signal::Signal;

use crate::hull::{PATIENCE, eventually, signal};

/// The namespaces, held.
#[derive(Debug)]
pub struct Enclosure {
    holder: Child,
    mounts: PathBuf,
}

impl Enclosure {
    /// Fresh ones, the loopback interface up.
    ///
    /// # Panics
    /// They can't be made; it takes root.
    pub fn new() -> Self {
        let mut command = Command::new("unshare");
        command
            .args(["--mount", "--net", "--propagation", "slave", "sh", "-c"])
            .arg("ip link set lo up && exec sleep infinity")
            .stdin(Stdio::null());
        let holder = command.spawn().expect("unshare is part of util-linux");
        let name = format!("/proc/{}/comm", holder.id());
        let ready = eventually(PATIENCE, || {
            fs::read_to_string(&name).is_ok_and(|name| name.trim() == "sleep")
        });
        assert!(
            ready,
            "namespaces of our own could not be made; tests of engines run as root"
        );
        let mounts = fs::read_link(format!("/proc/{}/ns/mnt", holder.id())).expect("the holder runs");
        Self { holder, mounts }
    }

    /// A program in the namespaces, not started yet.
    pub fn command(&self, program: impl AsRef<Path>) -> Command {
        let mut command = Command::new("nsenter");
        command
            .args([
                "--mount",
                "--net",
                "--target",
                &self.holder.id().to_string(),
                "--",
            ])
            .arg(program.as_ref())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        command
    }

    /// The processes in the mount namespace, but for the one that holds it. Containers have mount namespaces of their own; their
    /// engines' monitors are here.
    pub fn processes(&self) -> Vec<i32> {
        let holder = i32::try_from(self.holder.id()).unwrap_or(-1);
        let Ok(entries) = fs::read_dir("/proc") else {
            return Vec::new();
        };
        entries
            .flatten()
            .filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok())
            .filter(|pid| *pid != holder)
            .filter(|pid| fs::read_link(format!("/proc/{pid}/ns/mnt")).is_ok_and(|link| link == self.mounts))
            .collect()
    }
}

impl Default for Enclosure {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for Enclosure {
    fn drop(&mut self) {
        let empty = eventually(PATIENCE, || {
            let left = self.processes();
            for pid in &left {
                signal(*pid, Signal::SIGKILL);
            }
            left.is_empty()
        });
        self.holder.kill().ok();
        self.holder.wait().ok();
        if !empty && !std::thread::panicking() {
            eprintln!("note: processes of an engine could not be killed");
        }
    }
}

/// The runtime an engine is given: a small program that names the products in its environment, which engines empty, and
/// becomes the runtime.
///
/// # Panics
/// It can't be written.
pub fn runtime_for_engines(runtime: &Path, dir: &Path) -> PathBuf {
    use std::fmt::Write as _;
    use std::os::unix::fs::PermissionsExt as _;
    let name = runtime
        .file_name()
        .expect("a program has a name")
        .to_string_lossy()
        .into_owned();
    let mut script = "#!/bin/sh\n".to_owned();
    for name in ["HULL_VMM", "HULL_KERNEL", "HULL_AGENT_IMAGE"] {
        if let Some(value) = std::env::var_os(name) {
            writeln!(script, "export {name}='{}'", value.to_string_lossy()).expect("a string takes all");
        }
    }
    writeln!(script, "exec '{}' \"$@\"", runtime.display()).expect("a string takes all");
    let path = dir.join(name);
    fs::write(&path, script).expect("the folder is ours");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).expect("the file is ours");
    path
}

/// A test image as an archive both engines load, under a name.
///
/// # Panics
/// It can't be converted.
pub fn archive_of(image: &str, name: &str, dir: &Path) -> PathBuf {
    let layouts = PathBuf::from(std::env::var_os("HULL_TEST_IMAGES").expect("checked by program()"));
    let archive = dir.join(format!("{image}.tar"));
    let mut command = Command::new("skopeo");
    command
        .args(["copy", "--quiet", "--insecure-policy"])
        .arg(format!("oci:{}:latest", layouts.join(image).display()))
        .arg(format!("docker-archive:{}:{name}", archive.display()));
    let status = command.stdout(Stdio::null()).status();
    assert!(
        status.is_ok_and(|status| status.success()),
        "skopeo can't convert the image {image}"
    );
    archive
}

/// The runtimes an engine is tested with: runc, and `hull-oci` where microVMs can be booted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EngineRuntime {
    Runc,
    HullOci,
}

impl EngineRuntime {
    /// Where it is; `None` where the test must be skipped.
    ///
    /// # Panics
    /// It isn't there although it has to be.
    pub fn program(self) -> Option<PathBuf> {
        if std::env::var_os("HULL_TEST_IMAGES").is_none() {
            eprintln!(
                "skipped: HULL_TEST_IMAGES is not set; `cargo xtask test` builds the images and sets it"
            );
            return None;
        }
        match self {
            Self::Runc => {
                let list = std::env::var_os("PATH")?;
                let found = std::env::split_paths(&list)
                    .map(|dir| dir.join("runc"))
                    .find(|path| path.is_file());
                Some(found.expect("`cargo xtask setup` installs runc"))
            }
            Self::HullOci => crate::hull::available().then(|| {
                PathBuf::from(
                    std::env::var_os("HULL_OCI").expect("`cargo xtask test` builds it and sets HULL_OCI"),
                )
            }),
        }
    }
}
