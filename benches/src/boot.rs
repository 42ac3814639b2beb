//! `hull-bench boot`: from starting a VMM process to the guest's first program, against QEMU microvm on the same kernel.
//!
//! Both VMMs get the same `vmlinux`, the same initramfs, the same command line and the same memory. The kernel marks its phases
//! with one-byte writes to an I/O port (`hull_boottimer=`): `hull-vmm` reports them when the guest stops, QEMU passes them on
//! through its debug console, where we stamp them as they arrive. `spawn_to_exit_ms` is taken outside both, by the same clock.

use std::collections::BTreeMap;
use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::Args;
use serde::Deserialize;

use crate::guest;
use crate::harness::{Contender, Figures, interleave};
use crate::report::{RunContext, emit};

/// Port of the boot timer, and the phases worth a figure.
const MARK_PORT: u16 = 0x5b8;
const PHASES: &[(u8, &str)] = &[
    (1, "entry"),
    (2, "start_kernel"),
    (3, "before_smp"),
    (4, "after_smp"),
    (6, "initcalls"),
    (7, "init"),
];
/// A boot that takes longer has failed.
const TIMEOUT: Duration = Duration::from_secs(60);

#[derive(Debug, Args)]
pub struct BootArgs {
    /// Rounds that count
    #[arg(long, default_value_t = 30)]
    rounds: u32,
    /// Rounds before, not counted
    #[arg(long, default_value_t = 3)]
    warmup: u32,
    /// vCPU counts to boot with
    #[arg(long, value_delimiter = ',', default_value = "1,2")]
    vcpus: Vec<u8>,
    /// Guest memory
    #[arg(long, default_value_t = 128)]
    memory_mib: u32,
    /// Leave QEMU out
    #[arg(long)]
    hull_only: bool,
}

/// What every contender boots.
struct Guest<'a> {
    vmm: &'a Path,
    kernel: &'a Path,
    initramfs: PathBuf,
    memory_mib: u32,
    vcpus: u8,
    directory: &'a Path,
}

/// The line `hull-vmm` prints when a standalone microVM stops.
#[derive(Deserialize)]
struct StopReport {
    boot_timer: BootTimer,
}
#[derive(Deserialize)]
struct BootTimer {
    main_to_first_run_us: f64,
    marks: Vec<Mark>,
}
#[derive(Deserialize)]
struct Mark {
    phase: u8,
    since_first_run_us: f64,
}

/// # Errors
/// A contender fails, or the report can't be written.
pub fn run(args: &BootArgs, out: &Path) -> Result<()> {
    let vmm = crate::artifact("HULL_VMM")?;
    let kernel = crate::artifact("HULL_KERNEL")?;
    let directory = tempfile::tempdir().context("cannot make a temporary folder")?;
    for &vcpus in &args.vcpus {
        let guest = Guest {
            vmm: &vmm,
            kernel: &kernel,
            initramfs: guest::initramfs(directory.path(), guest::Program::Reset)?,
            memory_mib: args.memory_mib,
            vcpus,
            directory: directory.path(),
        };
        let mut contenders = vec![Contender {
            name: "hull-vmm".to_owned(),
            run: Box::new(|| hull(&guest)),
        }];
        if !args.hull_only {
            contenders.push(Contender {
                name: "qemu-microvm".to_owned(),
                run: Box::new(|| qemu(&guest)),
            });
        }
        println!("boot, {vcpus} vCPU, {} MiB", args.memory_mib);
        let series = interleave(&mut contenders, args.warmup, args.rounds)?;
        let name = format!("boot-{vcpus}vcpu");
        let context = RunContext {
            benchmark: &name,
            baseline: if args.hull_only {
                "hull-vmm"
            } else {
                "qemu-microvm"
            },
            guest_kernel: &crate::kernel_hash(&kernel),
            plotted: "spawn_to_exit_ms",
        };
        for path in emit(&context, &series, out)? {
            println!("  {}", path.display());
        }
    }
    Ok(())
}

fn command_line() -> String {
    format!("quiet reboot=t panic=-1 pci=off noreplace-smp 8250.nr_uarts=0 hull_boottimer={MARK_PORT:#x}")
}

fn hull(guest: &Guest<'_>) -> Result<Figures> {
    let config = guest.directory.join("vm.json");
    let path = |path: &Path| serde_json::json!({ "path": path });
    let wire = serde_json::json!({
        "vcpu_count": guest.vcpus,
        "memory_mib": guest.memory_mib,
        "kernel": path(guest.kernel),
        "initrd": path(&guest.initramfs),
        "cmdline": command_line(),
        "boot_timer": true,
    });
    fs::write(&config, wire.to_string()).with_context(|| format!("cannot write {}", config.display()))?;
    let begin = Instant::now();
    let mut child = Command::new(guest.vmm)
        .arg("--config")
        .arg(&config)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot start {}", guest.vmm.display()))?;
    let mut text = String::new();
    let reader = child.stderr.take();
    let total = wait(&mut child, begin)?;
    if let Some(mut reader) = reader {
        reader.read_to_string(&mut text)?;
    }
    let report: StopReport = text
        .lines()
        .rev()
        .find_map(|line| serde_json::from_str(line).ok())
        .with_context(|| format!("hull-vmm printed no stop report: {text}"))?;
    let timer = report.boot_timer;
    let mut figures = Figures::from([
        ("spawn_to_exit_ms".to_owned(), total),
        (
            "main_to_first_run_ms".to_owned(),
            timer.main_to_first_run_us / 1000.0,
        ),
    ]);
    for mark in timer.marks {
        if let Some((_, name)) = PHASES.iter().find(|(phase, _)| *phase == mark.phase) {
            figures
                .entry(format!("run_to_{name}_ms"))
                .or_insert(mark.since_first_run_us / 1000.0);
        }
    }
    Ok(figures)
}

fn qemu(guest: &Guest<'_>) -> Result<Figures> {
    let memory = guest.memory_mib.to_string();
    let vcpus = guest.vcpus.to_string();
    let begin = Instant::now();
    let mut child = Command::new("qemu-system-x86_64")
        .args([
            "-M",
            "microvm,accel=kvm,rtc=off,pit=on,pic=on,isa-serial=off",
            "-cpu",
            "host",
            "-m",
            &memory,
            "-smp",
            &vcpus,
        ])
        .args([
            "-nodefaults",
            "-no-user-config",
            "-display",
            "none",
            "-no-reboot",
            "-kernel",
        ])
        .arg(guest.kernel)
        .arg("-initrd")
        .arg(&guest.initramfs)
        .args([
            "-append",
            &command_line(),
            "-chardev",
            "stdio,id=marks,signal=off",
        ])
        .args([
            "-device",
            &format!("isa-debugcon,iobase={MARK_PORT:#x},chardev=marks"),
        ])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .context("cannot start qemu-system-x86_64; `cargo xtask setup` installs it")?;
    let marks = child
        .stdout
        .take()
        .map(|out| std::thread::spawn(move || stamp(out, begin)));
    let total = wait(&mut child, begin)?;
    let mut figures = Figures::from([("spawn_to_exit_ms".to_owned(), total)]);
    let stamped = marks.and_then(|thread| thread.join().ok()).unwrap_or_default();
    for (phase, name) in PHASES {
        if let Some(at) = stamped.get(phase) {
            figures.insert(format!("spawn_to_{name}_ms"), *at);
        }
    }
    if !figures.contains_key("spawn_to_init_ms") {
        bail!("the guest under QEMU never reached its first program");
    }
    Ok(figures)
}

/// When each phase's first mark arrived, in milliseconds since `begin`.
fn stamp(mut from: impl Read, begin: Instant) -> BTreeMap<u8, f64> {
    let mut seen = BTreeMap::new();
    let mut byte = [0];
    while matches!(from.read(&mut byte), Ok(1)) {
        seen.entry(byte[0])
            .or_insert_with(|| begin.elapsed().as_secs_f64() * 1000.0);
    }
    seen
}

/// Wait for a clean exit; the wall time since `begin` in milliseconds.
fn wait(child: &mut Child, begin: Instant) -> Result<f64> {
    // Waiting in short sleeps would add to what is measured, so a watchdog kills a child that hangs while we block.
    let pid = nix::unistd::Pid::from_raw(i32::try_from(child.id())?);
    let (done, watch) = std::sync::mpsc::channel::<()>();
    let dog = std::thread::spawn(move || {
        if watch
            .recv_timeout(TIMEOUT)
            .is_err_and(|e| e == std::sync::mpsc::RecvTimeoutError::Timeout)
        {
            // The child has not been waited for yet, so the pid is still its own.
            nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL).ok();
        }
    });
    let status = child.wait();
    let total = begin.elapsed().as_secs_f64() * 1000.0;
    drop(done);
    dog.join().ok();
    let status = status.context("cannot wait for the VMM")?;
    if !status.success() {
        bail!("the VMM ended with {status}");
    }
    Ok(total)
}
