//! A machine with ordinary KVM inside this one: QEMU without acceleration emulates an AMD CPU with SVM, a distribution's
//! kernel on it loads its own `kvm-amd`, and `hull-vmm` with the guest kernel runs on that. Slow, but the real vendor backend.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::json;

use crate::initramfs::Initramfs;
use crate::kernel_guest::{Guest, run};
use crate::kernel_vm;

/// The package that depends on the newest kernel for clouds.
const META_PACKAGE: &str = "linux-image-cloud-amd64";

/// Loads KVM, runs each configuration in turn, shows what its console said. Run in a tmpfs of its own, because a process in
/// the initramfs cannot pivot away from it, which the VMM's jail does.
const OUTER_INIT: &str = r#"#!/bin/busybox sh
/bin/busybox --install -s /bin
export PATH=/bin
mkdir -p /new
mount -t tmpfs tmpfs /new
for folder in bin lib lib64 modules vm; do cp -a /$folder /new/; done
mkdir -p /new/tmp /new/run /new/dev /new/proc /new/sys
exec switch_root /new /vm/second-init
"#;

const SECOND_INIT: &str = r#"#!/bin/sh
export PATH=/bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
mount -t cgroup2 cgroup2 /sys/fs/cgroup
exec >/dev/console 2>&1
ip link set lo up
for module in irqbypass kvm kvm-amd; do insmod /modules/$module.ko; done
for config in /vm/*.json; do
    name=$(basename $config .json)
    : >/vm/$name.console
    chmod 666 /vm/$name.console
    /vm/hull-vmm --config $config
    echo "OUTER $name exit $?"
    sed "s/^/INNER $name /" /vm/$name.console
done
reboot -f
"#;

/// What one inner guest came to.
#[derive(Debug)]
pub struct Inner {
    /// The name given to [`boot`].
    pub name: String,
    /// Exit status of the VMM.
    pub exit: Option<i32>,
    /// The inner guest's console.
    pub console: String,
}

/// One guest to be run inside.
#[derive(Debug, Clone)]
pub struct Configuration {
    /// Tells them apart in the output.
    pub name: &'static str,
    /// `boot_protocol` of the VMM's configuration.
    pub protocol: &'static str,
    /// Number of vCPUs.
    pub vcpus: u8,
}

/// Boots the outer machine and runs the configurations with the minimal guest in it.
///
/// # Errors
/// If the distribution's kernel is not to be had, a tool is missing, or QEMU does not end in time.
pub fn boot(configurations: &[Configuration], limit: Duration) -> Result<(Vec<Inner>, String)> {
    let package = outer_kernel()?;
    let folder = tempfile::tempdir()?;
    let archive = folder.path().join("outer.cpio");
    fs::write(&archive, outer_initramfs(&package, configurations)?)?;
    let kernel = find(&package.join("boot"), |name| name.starts_with("vmlinuz-"))?;
    let mut child = Command::new("qemu-system-x86_64")
        .args([
            "-M",
            "pc",
            "-accel",
            "tcg",
            "-cpu",
            "max,+svm,+npt",
            "-m",
            "1024",
            "-nodefaults",
            "-display",
            "none",
        ])
        .args(["-no-reboot", "-serial"])
        .arg(format!("file:{}", folder.path().join("console").display()))
        .arg("-kernel")
        .arg(kernel)
        .arg("-initrd")
        .arg(&archive)
        .args(["-append", "console=ttyS0 reboot=t panic=-1 rdinit=/init quiet"])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .spawn()
        .context("qemu-system-x86_64 is not installed")?;
    let deadline = Instant::now() + limit;
    while child.try_wait()?.is_none() {
        if Instant::now() > deadline {
            child.kill()?;
            child.wait()?;
            break;
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    let console = fs::read(folder.path().join("console")).unwrap_or_default();
    let console = String::from_utf8_lossy(&console).into_owned();
    let inner = configurations
        .iter()
        .map(|configuration| sort_out(configuration.name, &console))
        .collect();
    Ok((inner, console))
}

fn sort_out(name: &str, console: &str) -> Inner {
    let exit = format!("OUTER {name} exit ");
    let inner = format!("INNER {name} ");
    Inner {
        name: name.to_owned(),
        exit: console
            .lines()
            .find_map(|line| line.trim().strip_prefix(&exit)?.parse().ok()),
        console: console
            .lines()
            .filter_map(|line| line.strip_prefix(&inner))
            .fold(String::new(), |text, line| text + line.trim_end() + "\n"),
    }
}

fn outer_initramfs(package: &Path, configurations: &[Configuration]) -> Result<Vec<u8>> {
    let mut archive = Initramfs::new();
    for folder in ["lib", "lib/x86_64-linux-gnu", "lib64", "modules", "vm", "run"] {
        archive.directory(folder);
    }
    archive
        .file("init", OUTER_INIT.as_bytes())
        .file("vm/second-init", SECOND_INIT.as_bytes());
    archive
        .copy("bin/busybox", Path::new("/bin/busybox"))
        .context("busybox-static is not installed")?;
    archive.symlink("bin/sh", "busybox");
    let modules = find(&package.join("lib/modules"), |_| true)?.join("kernel");
    for module in ["virt/lib/irqbypass", "arch/x86/kvm/kvm", "arch/x86/kvm/kvm-amd"] {
        let file = Path::new(module)
            .file_name()
            .unwrap_or_default()
            .to_string_lossy();
        archive.copy(
            &format!("modules/{file}.ko"),
            &modules.join(format!("{module}.ko")),
        )?;
    }
    let vmm = kernel_vm::vmm_program()?;
    archive.copy("vm/hull-vmm", &vmm)?;
    for library in libraries(&vmm)? {
        archive.copy(library.to_string_lossy().trim_start_matches('/'), &library)?;
    }
    archive.copy("vm/vmlinux", &kernel_vm::kernel_image()?)?;
    archive.copy("vm/minimal.cpio", &Guest::Minimal.initramfs()?)?;
    for configuration in configurations {
        let config = json!({
            "vcpu_count": configuration.vcpus,
            "memory_mib": 128,
            "kernel": {"path": "/vm/vmlinux"},
            "initrd": {"path": "/vm/minimal.cpio"},
            "cmdline": "console=ttyS0 reboot=t panic=-1 quiet",
            "boot_protocol": configuration.protocol,
            "serial": {"output": {"path": format!("/vm/{}.console", configuration.name)}},
        });
        archive.file(
            &format!("vm/{}.json", configuration.name),
            &serde_json::to_vec(&config)?,
        );
    }
    Ok(archive.finish())
}

/// The shared libraries a program loads; none if it is static.
fn libraries(program: &Path) -> Result<Vec<PathBuf>> {
    let output = Command::new("ldd")
        .arg(program)
        .output()
        .context("ldd is not installed")?;
    let text = String::from_utf8_lossy(&output.stdout);
    Ok(text
        .lines()
        .filter_map(|line| {
            line.split_whitespace()
                .find(|word| word.starts_with('/'))
                .map(PathBuf::from)
        })
        .collect())
}

/// The unpacked kernel package, fetched once into the user's cache.
fn outer_kernel() -> Result<PathBuf> {
    let cache = kernel_vm::cache_folder()?.join("test-outer-kernel");
    if let Ok(found) = find(&cache, |name| name.starts_with("linux-image-")) {
        return Ok(found);
    }
    let output = Command::new("apt-cache")
        .args(["depends", META_PACKAGE])
        .output()
        .context("apt-cache is not installed")?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let Some(name) = text
        .lines()
        .find_map(|line| line.trim().strip_prefix("Depends: "))
    else {
        bail!("no package {META_PACKAGE} to be had; run `apt-get update`");
    };
    fs::create_dir_all(&cache)?;
    let staging = tempfile::Builder::new().prefix(".new-").tempdir_in(&cache)?;
    run(Command::new("apt-get")
        .args(["-q", "download", name])
        .current_dir(staging.path()))?;
    let package = find(staging.path(), |name| name.starts_with("linux-image-"))?;
    let unpacked = staging.path().join("root");
    run(Command::new("dpkg-deb").arg("-x").arg(&package).arg(&unpacked))?;
    let folder = cache.join(name);
    fs::rename(&unpacked, &folder)?;
    Ok(folder)
}

/// The first entry of a folder that fits.
fn find(folder: &Path, fits: impl Fn(&str) -> bool) -> Result<PathBuf> {
    let mut entries: Vec<_> = fs::read_dir(folder)
        .with_context(|| format!("cannot list {}", folder.display()))?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.file_name().is_some_and(|name| fits(&name.to_string_lossy())))
        .collect();
    entries.sort();
    entries
        .into_iter()
        .next()
        .with_context(|| format!("nothing fitting in {}", folder.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn consoles_of_several_guests_are_told_apart() {
        let console = "noise\nOUTER a exit 0\nINNER a one\r\nINNER a two\nOUTER b exit 1\nINNER b three\n";
        let (a, b) = (sort_out("a", console), sort_out("b", console));
        assert_eq!((a.exit, a.console.as_str()), (Some(0), "one\ntwo\n"));
        assert_eq!((b.exit, b.console.as_str()), (Some(1), "three\n"));
    }
}
