//! `hull-bench idle`: what a microVM costs that does nothing, beside QEMU microvm with the same kernel.
//!
//! The guest's only program waits for ever. After it has settled we watch the VMM process from outside: processor time of
//! all its threads, how often they were scheduled, and the memory it has beside the guest's (PSS of every mapping but the
//! guest's RAM, which is the mapping of exactly its size).

use std::fs;
use std::io::Read;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::Args;

use crate::guest::{self, Program};
use crate::harness::{Contender, Figures, interleave};
use crate::report::{RunContext, emit};

/// From the guest's first program until it is called idle.
const SETTLE: Duration = Duration::from_secs(2);

#[derive(Debug, Args)]
pub struct IdleArgs {
    /// Rounds that count
    #[arg(long, default_value_t = 5)]
    rounds: u32,
    /// How long each is watched
    #[arg(long, default_value_t = 10)]
    seconds: u64,
    /// Guest memory
    #[arg(long, default_value_t = 128)]
    memory_mib: u64,
}

/// Ends the VMM whatever happens.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        self.0.kill().ok();
        self.0.wait().ok();
    }
}

/// # Errors
/// A contender fails, or the report can't be written.
pub fn run(args: &IdleArgs, out: &Path) -> Result<()> {
    let vmm = crate::artifact("HULL_VMM")?;
    let kernel = crate::artifact("HULL_KERNEL")?;
    let directory = tempfile::tempdir().context("cannot make a temporary folder")?;
    let initramfs = guest::initramfs(directory.path(), Program::Idle)?;
    let watch = |child: Running| observe(child, args);
    let mut contenders = [
        Contender {
            name: "hull-vmm".to_owned(),
            run: Box::new(|| {
                watch(hull(
                    &vmm,
                    &kernel,
                    &initramfs,
                    directory.path(),
                    args.memory_mib,
                )?)
            }),
        },
        Contender {
            name: "qemu-microvm".to_owned(),
            run: Box::new(|| watch(qemu(&kernel, &initramfs, args.memory_mib)?)),
        },
    ];
    let series = interleave(&mut contenders, 0, args.rounds)?;
    drop(contenders);
    let context = RunContext {
        benchmark: "idle",
        baseline: "qemu-microvm",
        guest_kernel: &crate::kernel_hash(&kernel),
        plotted: "vmm_beside_guest_kib",
    };
    for path in emit(&context, &series, out)? {
        println!("  {}", path.display());
    }
    Ok(())
}

fn hull(vmm: &Path, kernel: &Path, initramfs: &Path, directory: &Path, memory_mib: u64) -> Result<Running> {
    let config = directory.join("idle.json");
    let wire = serde_json::json!({
        "vcpu_count": 1,
        "memory_mib": memory_mib,
        "kernel": { "path": kernel },
        "initrd": { "path": initramfs },
        "cmdline": "console=ttyS0 quiet reboot=t panic=-1",
        "serial": { "output": { "path": "/dev/stdout" } },
        "rng": true,
        "balloon": { "free_page_reporting": true },
    });
    fs::write(&config, wire.to_string()).with_context(|| format!("cannot write {}", config.display()))?;
    spawn(Command::new(vmm).arg("--config").arg(&config))
}

fn qemu(kernel: &Path, initramfs: &Path, memory_mib: u64) -> Result<Running> {
    let memory = memory_mib.to_string();
    spawn(
        Command::new("qemu-system-x86_64")
            .args([
                "-M",
                "microvm,accel=kvm,rtc=off,pit=on,pic=on",
                "-cpu",
                "host",
                "-m",
                &memory,
                "-nodefaults",
            ])
            .args([
                "-no-user-config",
                "-display",
                "none",
                "-no-reboot",
                "-serial",
                "stdio",
                "-kernel",
            ])
            .arg(kernel)
            .arg("-initrd")
            .arg(initramfs)
            .args(["-append", "console=ttyS0 quiet reboot=t panic=-1"]),
    )
}

/// Start a VMM and wait for the byte its guest's program says.
fn spawn(command: &mut Command) -> Result<Running> {
    let child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .with_context(|| format!("cannot start {}", command.get_program().to_string_lossy()))?;
    let mut running = Running(child);
    let mut said = [0];
    let Some(mut out) = running.0.stdout.take() else {
        bail!("no pipe")
    };
    // The firmware may speak first; the guest's program says "I" and nothing after.
    while said != *b"I" {
        out.read_exact(&mut said)
            .context("the guest never reached its program")?;
    }
    running.0.stdout = Some(out);
    Ok(running)
}

fn observe(running: Running, args: &IdleArgs) -> Result<Figures> {
    std::thread::sleep(SETTLE);
    let pid = running.0.id();
    let before = scheduled(pid)?;
    let begin = Instant::now();
    std::thread::sleep(Duration::from_secs(args.seconds));
    let seconds = begin.elapsed().as_secs_f64();
    let after = scheduled(pid)?;
    let memory = memory(pid, args.memory_mib << 10)?;
    Ok(Figures::from([
        (
            "cpu_percent".to_owned(),
            (after.cpu_ns - before.cpu_ns) / (seconds * 1e9) * 100.0,
        ),
        (
            "wakeups_per_s".to_owned(),
            (after.switches - before.switches) / seconds,
        ),
        ("vmm_beside_guest_kib".to_owned(), memory.vmm_kib),
        ("guest_resident_kib".to_owned(), memory.guest_kib),
    ]))
}

struct Scheduled {
    cpu_ns: f64,
    switches: f64,
}

/// Sums over all threads: time on a processor, and how often one was given.
fn scheduled(pid: u32) -> Result<Scheduled> {
    let mut sum = Scheduled {
        cpu_ns: 0.0,
        switches: 0.0,
    };
    for task in fs::read_dir(format!("/proc/{pid}/task")).context("the VMM has gone")? {
        let text = fs::read_to_string(task?.path().join("schedstat")).context("the VMM's thread has gone")?;
        let mut fields = text.split_whitespace().map(str::parse::<f64>);
        sum.cpu_ns += fields.next().context("schedstat is empty")??;
        sum.switches += fields.nth(1).context("schedstat is short")??;
    }
    Ok(sum)
}

struct Memory {
    vmm_kib: f64,
    guest_kib: f64,
}

/// Proportional set size of everything but the guest's RAM, and of the RAM alone.
fn memory(pid: u32, guest_kib: u64) -> Result<Memory> {
    let text = fs::read_to_string(format!("/proc/{pid}/smaps")).context("cannot read the VMM's mappings")?;
    let mut sum = Memory {
        vmm_kib: 0.0,
        guest_kib: 0.0,
    };
    let mut size_kib = 0;
    for line in text.lines() {
        let mut words = line.split_whitespace();
        match (words.next(), words.next().map(str::parse::<u64>)) {
            (Some("Size:"), Some(Ok(kib))) => size_kib = kib,
            // A mapping of at least the guest's size is its RAM: neighbours of the same kind may have been joined to it.
            (Some("Pss:"), Some(Ok(kib))) if size_kib >= guest_kib => {
                sum.guest_kib += f64::from(u32::try_from(kib)?)
            }
            (Some("Pss:"), Some(Ok(kib))) => sum.vmm_kib += f64::from(u32::try_from(kib)?),
            _ => {}
        }
    }
    if sum.guest_kib == 0.0 {
        bail!("no mapping of the guest's size found in the VMM");
    }
    Ok(sum)
}
