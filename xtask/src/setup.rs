//! `cargo xtask setup`: install what the machine lacks, by Debian package name.
//!
//! Invariant: nothing is downloaded by address; a package that is present is left alone, so a second run does nothing.

use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

use crate::process::{check, step};

/// What the caller is about to do, so that a demo installs less than the whole test run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    Demo,
    Everything,
}

/// Compile the guest kernel and our C-linking crates.
const BUILD: &[&str] = &[
    "bc",
    "bison",
    "build-essential",
    "ca-certificates",
    "cpio",
    "flex",
    "kmod",
    "libelf-dev",
    "libssl-dev",
    "perl",
    "pkg-config",
    "rsync",
    "xz-utils",
    "zstd",
];
/// Make container images from distribution packages.
const IMAGES: &[&str] = &["busybox-static", "mmdebstrap", "umoci"];
/// Check our results against somebody else's: other VMMs, other runtimes, other file system tools.
const TESTS: &[&str] = &[
    "attr",
    "conmon",
    "containerd",
    "containernetworking-plugins",
    "crun",
    "curl",
    "docker-registry",
    "docker.io",
    "e2fsprogs",
    "erofs-utils",
    "gdb",
    "iproute2",
    "iptables",
    "jq",
    "libcap2-bin",
    "netavark",
    "nftables",
    "openssl",
    "podman",
    "procps",
    "qemu-system-x86",
    "runc",
    "seabios",
    "skopeo",
    "strace",
    "util-linux",
];

/// Install the packages that are missing.
///
/// # Errors
/// Packages are missing and we are not root, or `apt-get` fails.
pub fn run(purpose: Purpose) -> Result<()> {
    let mut wanted: Vec<&str> = [BUILD, IMAGES].concat();
    if purpose == Purpose::Everything {
        wanted.extend_from_slice(TESTS);
    }
    let missing: Vec<&str> = wanted
        .into_iter()
        .filter(|package| !is_installed(package))
        .collect();
    if missing.is_empty() {
        step("setup: every package is there");
        return Ok(());
    }
    step(&format!("setup: installing {}", missing.join(" ")));
    if !nix::unistd::geteuid().is_root() {
        bail!(
            "these Debian packages are missing and only root can install them: {}",
            missing.join(" ")
        );
    }
    apt(&["update"])?;
    let mut arguments = vec!["install", "-y", "--no-install-recommends"];
    arguments.extend(missing);
    apt(&arguments)
}

fn is_installed(package: &str) -> bool {
    Command::new("dpkg-query")
        .args(["-W", "-f", "${db:Status-Status}", package])
        .stderr(Stdio::null())
        .output()
        .is_ok_and(|output| output.status.success() && output.stdout == b"installed")
}

fn apt(arguments: &[&str]) -> Result<()> {
    check(
        Command::new("apt-get")
            .env("DEBIAN_FRONTEND", "noninteractive")
            .args(["-q", "-o", "Dpkg::Use-Pty=0", "-o", "DPkg::Lock::Timeout=300"])
            .args(arguments)
            .stdout(Stdio::null()),
    )
    .context("the package manager could not do its part; `apt-get update` by hand shows why")
}
