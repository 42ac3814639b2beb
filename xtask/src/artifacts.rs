//! Building what is shipped, and putting it where the programs find each other.
//!
//! ```text
//! target/release/hull, hull-vmm           the programs
//! target/release/hull-oci                 the one Podman, Docker and others run
//! target/release/containerd-shim-hull-v2  the one containerd looks for beside them, or on its PATH
//! target/release/agent-root.erofs         the microVM's root: the static agent and empty mount points
//! target/release/vmlinux                  link into the guest kernel's cache
//! ```

use std::fmt;
use std::fs::File;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use rootfs_builder::erofs::{ImageBuilder, Metadata};

use crate::process::{cargo, check, step, target_dir};

/// The agent is linked statically for the guest, which has no libraries; naming the target keeps its products apart.
const AGENT_TARGET: &str = "x86_64-unknown-linux-gnu";

/// Where everything is.
#[derive(Debug)]
pub struct Artifacts {
    pub hull: PathBuf,
    pub oci: PathBuf,
    pub shim: PathBuf,
    pub vmm: PathBuf,
    pub kernel: PathBuf,
    pub agent_image: PathBuf,
}

impl Artifacts {
    /// Name everything in the environment of a program that is to use it.
    pub fn environment<'a>(&self, command: &'a mut Command) -> &'a mut Command {
        command
            .env("HULL_BIN", &self.hull)
            .env("HULL_OCI", &self.oci)
            .env("HULL_SHIM", &self.shim)
            .env("HULL_VMM", &self.vmm)
            .env("HULL_KERNEL", &self.kernel)
            .env("HULL_AGENT_IMAGE", &self.agent_image)
    }
}

impl fmt::Display for Artifacts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "hull          {}", self.hull.display())?;
        writeln!(f, "hull-oci      {}", self.oci.display())?;
        writeln!(f, "shim          {}", self.shim.display())?;
        writeln!(f, "hull-vmm      {}", self.vmm.display())?;
        writeln!(f, "guest kernel  {}", self.kernel.display())?;
        write!(f, "agent image   {}", self.agent_image.display())
    }
}

/// The guest kernel, from the cache or built now.
///
/// # Errors
/// The build fails; the message says why and what to do.
pub fn guest_kernel() -> Result<PathBuf> {
    step("guest kernel");
    Ok(guest_kernel::locate_or_build()?.vmlinux)
}

/// Everything, in the release profile.
///
/// # Errors
/// A compiler fails, or a product can't be written.
pub fn build_all() -> Result<Artifacts> {
    let kernel = guest_kernel()?;
    step("hull, hull-oci, containerd-shim-hull-v2, hull-vmm");
    let mut build = cargo();
    build.args(["build", "--release"]);
    for package in ["vmm", "cli", "oci-runtime", "shim"] {
        build.args(["--package", package]);
    }
    check(&mut build)?;
    step("hull-agent");
    check(
        cargo()
            .args([
                "build",
                "--release",
                "--package",
                "agent",
                "--target",
                AGENT_TARGET,
            ])
            .env("RUSTFLAGS", "-C target-feature=+crt-static"),
    )?;
    let products = target_dir().join("release");
    let agent_image = products.join("agent-root.erofs");
    let agent = target_dir().join(AGENT_TARGET).join("release/hull-agent");
    agent_root(&agent, &agent_image)?;
    let kernel_link = products.join("vmlinux");
    link(&kernel, &kernel_link)?;
    Ok(Artifacts {
        hull: products.join("hull"),
        oci: products.join("hull-oci"),
        shim: products.join("containerd-shim-hull-v2"),
        vmm: products.join("hull-vmm"),
        kernel,
        agent_image,
    })
}

/// The root file system of every microVM: the agent, and the folders it mounts things on.
fn agent_root(agent: &Path, image: &Path) -> Result<()> {
    let folder = Metadata::new(0o755);
    let mut builder = ImageBuilder::new(image.parent().unwrap_or(image))?;
    for name in ["dev", "mnt", "proc", "run", "sys", "tmp"] {
        builder.directory(name, folder.clone())?;
    }
    let mut program = File::open(agent).with_context(|| format!("cannot open {}", agent.display()))?;
    builder.file("hull-agent", folder, &mut program)?;
    builder
        .write_to(image)
        .with_context(|| format!("cannot write {}", image.display()))?;
    Ok(())
}

fn link(to: &Path, at: &Path) -> Result<()> {
    if at.read_link().is_ok_and(|old| old == to) {
        return Ok(());
    }
    let fresh = at.with_extension("new");
    std::fs::remove_file(&fresh).ok();
    symlink(to, &fresh)
        .and_then(|()| std::fs::rename(&fresh, at))
        .with_context(|| format!("cannot link {}", at.display()))
}
