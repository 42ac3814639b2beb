//! The same images under `runc` and `crun`: ordinary containers, the baseline of everything that runs in one.
//!
//! A bundle's root filesystem is an overlay whose upper side is a tmpfs, as in our microVMs, so that disks are not what is compared.
//! The mounts are in a mount namespace of the benchmark's own and vanish with it.

use std::fs;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use anyhow::{Context, Result};
use nix::mount::{MsFlags, mount};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::world::succeed;

/// What docker lets a container's root do, as our containers' may.
const CAPABILITIES: &[&str] = &[
    "CAP_AUDIT_WRITE",
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_KILL",
    "CAP_MKNOD",
    "CAP_NET_BIND_SERVICE",
    "CAP_NET_RAW",
    "CAP_SETFCAP",
    "CAP_SETGID",
    "CAP_SETPCAP",
    "CAP_SETUID",
    "CAP_SYS_CHROOT",
];

/// One image, unpacked.
#[derive(Debug)]
pub struct Bundle {
    dir: TempDir,
}

impl Bundle {
    /// Unpack a test image and lay a tmpfs over it.
    ///
    /// # Errors
    /// umoci or a mount fails.
    pub fn of(image: &str) -> Result<Self> {
        let layout = format!(
            "{}:latest",
            crate::artifact("HULL_TEST_IMAGES")?.join(image).display()
        );
        let bundle = Self {
            dir: tempfile::tempdir().context("cannot make a temporary folder")?,
        };
        let path = bundle.path();
        succeed(
            Command::new("umoci")
                .args(["unpack", "--image", &layout])
                .arg(&path),
        )?;
        let [over, root] = ["over", "root"].map(|name| path.join(name));
        for folder in [&over, &root] {
            fs::create_dir(folder).with_context(|| format!("cannot create {}", folder.display()))?;
        }
        mount(
            Some("tmpfs"),
            &over,
            Some("tmpfs"),
            MsFlags::empty(),
            None::<&str>,
        )
        .context("cannot mount a tmpfs")?;
        for folder in ["upper", "work"] {
            fs::create_dir(over.join(folder)).context("cannot write into the tmpfs")?;
        }
        let options = format!(
            "lowerdir={},upperdir={},workdir={}",
            path.join("rootfs").display(),
            over.join("upper").display(),
            over.join("work").display()
        );
        mount(
            Some("overlay"),
            &root,
            Some("overlay"),
            MsFlags::empty(),
            Some(options.as_str()),
        )
        .context("cannot mount the overlay")?;
        Ok(bundle)
    }

    /// Its folder.
    pub fn path(&self) -> PathBuf {
        self.dir.path().join("bundle")
    }

    /// The image's files, read-only by agreement.
    pub fn rootfs(&self) -> PathBuf {
        self.path().join("rootfs")
    }

    /// Make `arguments` what the bundle's container runs.
    ///
    /// # Errors
    /// The configuration can't be read or written.
    pub fn configure(&self, arguments: &[&str]) -> Result<()> {
        let path = self.path().join("config.json");
        let text = fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
        let mut config: Value =
            serde_json::from_slice(&text).with_context(|| format!("{} is not JSON", path.display()))?;
        config["process"]["terminal"] = json!(false);
        config["process"]["args"] = json!(arguments);
        config["root"] = json!({ "path": "root", "readonly": false });
        let held = if config["process"]["user"]["uid"] == json!(0) {
            CAPABILITIES
        } else {
            &[]
        };
        config["process"]["capabilities"] =
            json!({ "bounding": CAPABILITIES, "effective": held, "permitted": held });
        fs::write(&path, config.to_string()).with_context(|| format!("cannot write {}", path.display()))
    }

    /// A name no other user of the runtime has.
    pub fn id(&self, runtime: &str) -> String {
        let name = self.dir.path().file_name().unwrap_or_default().to_string_lossy();
        format!("hull-bench-{runtime}{}", name.replace('.', "-"))
    }

    /// `RUNTIME` with its state in the bundle.
    pub fn command(&self, runtime: &str, arguments: &[&str]) -> Command {
        let mut command = Command::new(runtime);
        command
            .arg("--root")
            .arg(self.dir.path().join("state"))
            .args(arguments)
            .stdin(Stdio::null());
        command
    }

    /// `RUNTIME run` of what was configured.
    pub fn run(&self, runtime: &str) -> Command {
        let mut command = self.command(runtime, &["run", "--bundle"]);
        command.arg(self.path()).arg(self.id(runtime));
        command
    }

    /// A container that waits until it is dropped.
    ///
    /// # Errors
    /// It can't be started.
    pub fn waiting<'a>(&'a self, runtime: &'a str) -> Result<Waiting<'a>> {
        self.configure(&["sleep", "100000"])?;
        let mut command = self.command(runtime, &["run", "--detach", "--bundle"]);
        command.arg(self.path()).arg(self.id(runtime));
        // Its output goes nowhere; a pipe would be waited for until the container ends.
        let status = command
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status()
            .with_context(|| format!("cannot start {runtime}; `cargo xtask setup` installs it"))?;
        anyhow::ensure!(status.success(), "{runtime} run --detach ended with {status}");
        Ok(Waiting {
            bundle: self,
            runtime,
        })
    }
}

impl Drop for Bundle {
    fn drop(&mut self) {
        for name in ["root", "over"] {
            nix::mount::umount(&self.path().join(name)).ok();
        }
    }
}

/// A running container, removed when this goes.
#[derive(Debug)]
pub struct Waiting<'a> {
    bundle: &'a Bundle,
    runtime: &'a str,
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        let id = self.bundle.id(self.runtime);
        succeed(&mut self.bundle.command(self.runtime, &["delete", "--force", &id])).ok();
    }
}
