//! Boots the guest kernel with a test guest: on `hull-vmm` alone (no agent, no image) or on QEMU, within a time limit.
//!
//! The guest talks on the serial console; a line that begins with `HULL ` is a JSON object for the test, anything else is
//! the kernel's and is searched for signs of trouble.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use crate::kernel_guest::Guest;

/// How `hull-vmm` enters the kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Entry {
    /// Hull's own: 64-bit entry, page tables with the user bit.
    Linux64,
    /// As QEMU and Cloud Hypervisor do.
    Pvh,
    /// As Firecracker does: 64-bit entry, page tables without the user bit, an empty IDT, no preset MSR.
    Firecracker,
}

/// What runs the kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Machine {
    /// `hull-vmm` on this host's KVM.
    Hull(Entry),
    /// `qemu-system-x86_64 -M microvm` on this host's KVM.
    QemuKvm,
    /// The same without KVM.
    QemuTcg,
}

/// A virtual machine to be run once.
#[derive(Debug, Clone)]
pub struct KernelVm {
    machine: Machine,
    kernel: PathBuf,
    initramfs: PathBuf,
    vcpus: u8,
    memory_mib: u64,
    disks: Vec<(PathBuf, bool)>,
    parameters: String,
    timeout: Duration,
}

/// What came of it.
#[derive(Debug)]
pub struct Run {
    /// Everything on the serial console.
    pub console: String,
    /// What the VMM wrote to standard error.
    pub stderr: String,
    /// How the VMM ended; `None` if it was killed at the time limit.
    pub status: Option<ExitStatus>,
    /// From start to end.
    pub elapsed: Duration,
}

/// Lines of a kernel that is not well.
const TROUBLE: [&str; 14] = [
    "Oops",
    "BUG:",
    "WARNING:",
    "Kernel panic",
    "general protection fault",
    "double fault",
    "Call Trace",
    "soft lockup",
    "rcu: INFO",
    "Unable to handle",
    "blocked for more than",
    "unexpected trap",
    "irq: nobody cared",
    "Bad page",
];

impl KernelVm {
    /// One vCPU, 128 MiB, a minute. `None`, after saying why, where this machine cannot run it.
    ///
    /// # Panics
    /// With `HULL_REQUIRE_KVM=1` where it cannot: a skip would hide a failure.
    pub fn prepare(machine: Machine, guest: Guest) -> Option<Self> {
        match Self::try_prepare(machine, guest) {
            Ok(vm) => Some(vm),
            Err(error) => {
                let required = std::env::var_os("HULL_REQUIRE_KVM").is_some_and(|value| value == "1");
                assert!(!required, "HULL_REQUIRE_KVM=1, but: {error:#}");
                eprintln!("skipped: {error:#}");
                None
            }
        }
    }

    fn try_prepare(machine: Machine, guest: Guest) -> Result<Self> {
        if machine != Machine::QemuTcg && !Path::new("/dev/kvm").exists() {
            bail!("/dev/kvm is not there");
        }
        match machine {
            Machine::Hull(_) => {
                vmm_program()?;
            }
            Machine::QemuKvm | Machine::QemuTcg => {
                Command::new("qemu-system-x86_64")
                    .arg("--version")
                    .output()
                    .context("qemu-system-x86_64 is not installed")?;
            }
        }
        Ok(Self {
            machine,
            kernel: kernel_image()?,
            initramfs: guest.initramfs()?,
            vcpus: 1,
            memory_mib: 128,
            disks: Vec::new(),
            parameters: String::new(),
            timeout: crate::hull::PATIENCE,
        })
    }

    /// Number of vCPUs.
    #[must_use]
    pub fn vcpus(mut self, count: u8) -> Self {
        self.vcpus = count;
        self
    }

    /// Size of guest memory.
    #[must_use]
    pub fn memory_mib(mut self, size: u64) -> Self {
        self.memory_mib = size;
        self
    }

    /// Adds a disk (`/dev/vda` first).
    #[must_use]
    pub fn disk(mut self, image: &Path, read_only: bool) -> Self {
        self.disks.push((image.to_owned(), read_only));
        self
    }

    /// Adds words to the kernel command line.
    #[must_use]
    pub fn parameters(mut self, words: &str) -> Self {
        self.parameters.push(' ');
        self.parameters.push_str(words);
        self
    }

    /// Kills the run after this long.
    #[must_use]
    pub fn timeout(mut self, limit: Duration) -> Self {
        self.timeout = limit;
        self
    }

    /// Runs it to its end or to the time limit.
    ///
    /// # Errors
    /// If the VMM cannot be started or its output not be read.
    pub fn run(&self) -> Result<Run> {
        let folder = tempfile::tempdir()?;
        let console = folder.path().join("console");
        let stderr = folder.path().join("stderr");
        File::create(&console)?;
        // The VMM may write to the console after it has given up its privileges.
        fs::set_permissions(&console, std::os::unix::fs::PermissionsExt::from_mode(0o666))?;
        let mut command = match self.machine {
            Machine::Hull(entry) => self.hull(entry, folder.path(), &console)?,
            Machine::QemuKvm => self.qemu("kvm", "host", &console),
            Machine::QemuTcg => self.qemu("tcg", "max", &console),
        };
        let begin = Instant::now();
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(File::create(&stderr)?)
            .spawn()
            .with_context(|| format!("cannot start {command:?}"))?;
        let status = wait(&mut child, self.timeout)?;
        Ok(Run {
            console: String::from_utf8_lossy(&fs::read(&console)?).into_owned(),
            stderr: String::from_utf8_lossy(&fs::read(&stderr)?).into_owned(),
            status,
            elapsed: begin.elapsed(),
        })
    }

    fn command_line(&self) -> String {
        format!("console=ttyS0 reboot=t panic=-1 quiet{}", self.parameters)
    }

    fn hull(&self, entry: Entry, folder: &Path, console: &Path) -> Result<Command> {
        let protocol = match entry {
            Entry::Linux64 => "linux64",
            Entry::Pvh => "pvh",
            Entry::Firecracker => "firecracker",
        };
        let disks: Vec<Value> = self
            .disks
            .iter()
            .enumerate()
            .map(|(index, (path, read_only))| {
                json!({"id": format!("disk{index}"), "source": {"path": path}, "read_only": read_only})
            })
            .collect();
        let config = json!({
            "vcpu_count": self.vcpus,
            "memory_mib": self.memory_mib,
            "kernel": {"path": self.kernel},
            "initrd": {"path": self.initramfs},
            "cmdline": self.command_line(),
            "boot_protocol": protocol,
            "huge_pages": "transparent",
            "blk": disks,
            "rng": true,
            "serial": {"output": {"path": console}},
            "boot_timer": true,
        });
        let path = folder.join("config.json");
        fs::write(&path, serde_json::to_vec(&config)?)?;
        let mut command = Command::new(vmm_program()?);
        command.arg("--config").arg(path);
        Ok(command)
    }

    fn qemu(&self, accelerator: &str, cpu: &str, console: &Path) -> Command {
        let mut command = Command::new("qemu-system-x86_64");
        command
            .args([
                "-M",
                "microvm,acpi=off",
                "-accel",
                accelerator,
                "-cpu",
                cpu,
                "-smp",
                &self.vcpus.to_string(),
            ])
            .args([
                "-m",
                &format!("{}M", self.memory_mib),
                "-nodefaults",
                "-no-user-config",
                "-display",
                "none",
            ])
            .arg("-no-reboot")
            .arg("-serial")
            .arg(format!("file:{}", console.display()))
            .arg("-kernel")
            .arg(&self.kernel)
            .arg("-initrd")
            .arg(&self.initramfs)
            .args(["-append", &self.command_line()]);
        for (index, (path, read_only)) in self.disks.iter().enumerate() {
            let read_only = if *read_only { "on" } else { "off" };
            command
                .arg("-drive")
                .arg(format!(
                    "id=disk{index},file={},format=raw,if=none,readonly={read_only}",
                    path.display()
                ))
                .arg("-device")
                .arg(format!("virtio-blk-device,drive=disk{index}"));
        }
        command
    }
}

impl Run {
    /// The objects the guest reported.
    pub fn reports(&self) -> Vec<Value> {
        self.console
            .lines()
            .filter_map(|line| {
                line.split_once("HULL ")
                    .and_then(|(_, text)| serde_json::from_str(text.trim()).ok())
            })
            .collect()
    }

    /// Checks of the guest that failed, as text.
    pub fn failures(&self) -> Vec<String> {
        let failed = |report: &Value| report["ok"] == json!(false);
        let reports = self.reports();
        reports
            .iter()
            .filter(|report| failed(report))
            .map(|report| {
                format!(
                    "{}: {}",
                    report["check"].as_str().unwrap_or("?"),
                    report["detail"].as_str().unwrap_or("")
                )
            })
            .collect()
    }

    /// Lines of the kernel that tell of trouble.
    pub fn trouble(&self) -> Vec<&str> {
        self.console
            .lines()
            .filter(|line| TROUBLE.iter().any(|sign| line.contains(sign)))
            .collect()
    }

    /// The boot timer's summary that `hull-vmm` prints when the guest has stopped.
    pub fn boot_timer(&self) -> Option<Value> {
        self.stderr.lines().rev().find_map(|line| {
            let value: Value = serde_json::from_str(line).ok()?;
            value.get("boot_timer").is_some().then_some(value)
        })
    }

    /// What is wrong with this run, if anything: no orderly end, trouble in the kernel, a guest that did not finish.
    pub fn verdict(&self) -> Result<(), String> {
        let finished = self.reports().iter().any(|report| report.get("done").is_some());
        let ended_well = self.status.is_some_and(|status| status.success());
        let trouble = self.trouble();
        if finished && ended_well && trouble.is_empty() {
            return Ok(());
        }
        Err(format!(
            "guest finished: {finished}; VMM: {}; kernel: {}{}\n--- console (end)\n{}\n--- stderr (end)\n{}",
            self.status.map_or_else(
                || "killed at the time limit".to_owned(),
                |status| status.to_string()
            ),
            if trouble.is_empty() {
                "no complaint".to_owned()
            } else {
                trouble.join("; ")
            },
            trouble
                .first()
                .map(|first| format!("\n--- console (from there)\n{}", from(first, &self.console)))
                .unwrap_or_default(),
            tail(&self.console),
            tail(&self.stderr),
        ))
    }
}

/// What an oops is told by, from a line a little before it on.
fn from(line: &str, text: &str) -> String {
    let lines: Vec<_> = text.lines().collect();
    let begin = lines.iter().position(|other| *other == line).unwrap_or(0);
    let end = lines.len().min(begin + 60);
    lines[begin.saturating_sub(10)..end].join("\n")
}

fn tail(text: &str) -> String {
    let lines: Vec<_> = text.lines().collect();
    lines[lines.len().saturating_sub(30)..].join("\n")
}

fn wait(child: &mut Child, limit: Duration) -> Result<Option<ExitStatus>> {
    let deadline = Instant::now() + limit;
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(Some(status));
        }
        if Instant::now() >= deadline {
            child.kill()?;
            child.wait()?;
            return Ok(None);
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// The kernel under test: `HULL_KERNEL`, else what the build driver has in its cache.
///
/// # Errors
/// If there is none.
pub fn kernel_image() -> Result<PathBuf> {
    if let Some(path) = std::env::var_os("HULL_KERNEL") {
        return Ok(PathBuf::from(path));
    }
    let inputs = guest_kernel::Inputs::embedded()?;
    let cache = guest_kernel::Cache::of_user()?;
    let artifact = guest_kernel::locate(&inputs, &cache)
        .context("the guest kernel is not built; run `cargo xtask guest-kernel` or set HULL_KERNEL")?;
    Ok(artifact.vmlinux)
}

/// The VMM under test: `HULL_VMM`, else the one built beside this test.
///
/// # Errors
/// If there is none.
pub fn vmm_program() -> Result<PathBuf> {
    if let Some(path) = std::env::var_os("HULL_VMM") {
        return Ok(PathBuf::from(path));
    }
    let test = std::env::current_exe()?;
    let folder = test
        .parent()
        .and_then(Path::parent)
        .context("this test runs from an unknown place")?;
    let program = folder.join("hull-vmm");
    if !program.exists() {
        bail!("hull-vmm is not built; run `cargo build --package vmm` or set HULL_VMM");
    }
    Ok(program)
}

/// Where what is slow to make is kept between runs.
///
/// # Errors
/// If the user has no cache folder.
pub fn cache_folder() -> Result<PathBuf> {
    let kernel = guest_kernel::Cache::of_user()?;
    Ok(kernel
        .root()
        .parent()
        .context("the cache folder has no parent")?
        .to_owned())
}
