//! `hull-bench run` and `hull-bench exec`: a whole command of a trivial program, beside runc, crun and QEMU microvm.
//!
//! All run the same busybox's `true` on the same files; wall time is taken around the client process by one clock. `hull run`
//! says itself how its time divides (`--timing=json`). QEMU boots our kernel with the same files as an EROFS disk and a shell script
//! as init, which runs `true` and resets the machine: a microVM without agent, container or client, so less than ours does.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use clap::Args;

use crate::bundle::Bundle;
use crate::harness::{Contender, Figures, interleave};
use crate::report::{RunContext, emit};
use crate::world::{World, succeed};

const TOTAL: &str = "total_ms";
/// What QEMU's guest runs: `true`, then the reset that ends QEMU.
const INIT: &str = "/bench-init";
/// How long a guest that panics waits; a round that took as long has failed.
const PANIC_WAIT_S: u32 = 30;

#[derive(Debug, Args)]
pub struct RunArgs {
    /// Rounds that count
    #[arg(long, default_value_t = 40)]
    rounds: u32,
    /// Rounds before, not counted
    #[arg(long, default_value_t = 3)]
    warmup: u32,
    /// Guest memory
    #[arg(long, default_value_t = 128)]
    memory_mib: u32,
    /// Leave QEMU out
    #[arg(long)]
    without_qemu: bool,
}

#[derive(Debug, Args)]
pub struct ExecArgs {
    /// Rounds that count
    #[arg(long, default_value_t = 100)]
    rounds: u32,
    /// Rounds before, not counted
    #[arg(long, default_value_t = 5)]
    warmup: u32,
}

/// Wall time of a command that must succeed.
fn timed(command: &mut Command) -> Result<(Figures, String)> {
    let begin = Instant::now();
    let output = succeed(command.stdout(Stdio::null()).stderr(Stdio::piped()))?;
    let total = begin.elapsed().as_secs_f64() * 1000.0;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    Ok((Figures::from([(TOTAL.to_owned(), total)]), said))
}

/// The steps `hull run --timing=json` reports, `NAME_us` each.
fn steps(said: &str) -> Result<Figures> {
    let line = said
        .lines()
        .find(|line| line.starts_with('{'))
        .with_context(|| format!("hull run reported no timing: {said}"))?;
    let steps: std::collections::BTreeMap<String, serde_json::Value> =
        serde_json::from_str(line).context("hull run's timing is not JSON")?;
    Ok(steps
        .iter()
        .filter_map(|(name, value)| {
            let step = name.strip_suffix("_us")?;
            Some((format!("{step}_ms"), value.as_f64()? / 1000.0))
        })
        .collect())
}

/// # Errors
/// A contender fails, or the report can't be written.
pub fn run(args: &RunArgs, out: &Path) -> Result<()> {
    hull_conformance::host::own_mounts()?;
    let kernel = crate::artifact("HULL_KERNEL")?;
    let world = World::with_images(&["busybox"])?;
    let [runc, crun, files] = [
        Bundle::of("busybox")?,
        Bundle::of("busybox")?,
        Bundle::of("busybox")?,
    ];
    for bundle in [&runc, &crun] {
        bundle.configure(&["true"])?;
    }
    let folder = tempfile::tempdir().context("cannot make a temporary folder")?;
    let disk = folder.path().join("busybox.erofs");
    let init = files.rootfs().join(INIT.trim_start_matches('/'));
    fs::write(&init, "#!/bin/sh\ntrue\nreboot -f\n").context("cannot write QEMU's init")?;
    fs::set_permissions(&init, fs::Permissions::from_mode(0o755)).context("cannot write QEMU's init")?;
    succeed(Command::new("mkfs.erofs").arg(&disk).arg(files.rootfs()))?;
    let memory = format!("{}m", args.memory_mib);
    let mut contenders = vec![
        Contender {
            name: "hull".to_owned(),
            run: Box::new(|| {
                let arguments = [
                    "run",
                    "--rm",
                    "--timing=json",
                    "--memory",
                    &memory,
                    "busybox",
                    "true",
                ];
                let (mut figures, said) = timed(&mut world.hull(&arguments))?;
                figures.extend(steps(&said)?);
                Ok(figures)
            }),
        },
        Contender {
            name: "runc".to_owned(),
            run: Box::new(|| Ok(timed(&mut runc.run("runc"))?.0)),
        },
        Contender {
            name: "crun".to_owned(),
            run: Box::new(|| Ok(timed(&mut crun.run("crun"))?.0)),
        },
    ];
    if !args.without_qemu {
        contenders.push(Contender {
            name: "qemu-microvm".to_owned(),
            run: Box::new(|| {
                let (figures, _) = timed(&mut qemu(&kernel, &disk, &memory))?;
                ensure!(
                    figures[TOTAL] < f64::from(PANIC_WAIT_S) * 1000.0,
                    "the guest under QEMU never reached its init"
                );
                Ok(figures)
            }),
        });
    }
    let series = interleave(&mut contenders, args.warmup, args.rounds)?;
    drop(contenders);
    report("run", &kernel, &series, out)
}

fn qemu(kernel: &Path, disk: &Path, memory: &str) -> Command {
    // A guest that never reaches its init panics and then waits, so that it can't pass for one that was fast.
    let append =
        format!("quiet reboot=t panic={PANIC_WAIT_S} pci=off root=/dev/vda rootfstype=erofs ro init={INIT}");
    let mut command = Command::new("qemu-system-x86_64");
    command
        .args([
            "-M",
            "microvm,acpi=off,accel=kvm,rtc=off,pit=on,pic=on,isa-serial=off",
            "-cpu",
            "host",
        ])
        .args(["-m", memory, "-nodefaults", "-no-user-config", "-display", "none"])
        .args(["-no-reboot", "-append", &append, "-kernel"])
        .arg(kernel)
        .arg("-drive")
        .arg(format!(
            "if=none,id=root,format=raw,readonly=on,file={}",
            disk.display()
        ))
        .args(["-device", "virtio-blk-device,drive=root"])
        .stdin(Stdio::null());
    command
}

/// # Errors
/// A contender fails, or the report can't be written.
pub fn exec(args: &ExecArgs, out: &Path) -> Result<()> {
    hull_conformance::host::own_mounts()?;
    let kernel = crate::artifact("HULL_KERNEL")?;
    let world = World::with_images(&["busybox"])?;
    let [runc, crun] = [Bundle::of("busybox")?, Bundle::of("busybox")?];
    let _hull_waits = world.waiting("bench", &[])?;
    let _runc_waits = runc.waiting("runc")?;
    let _crun_waits = crun.waiting("crun")?;
    let mut contenders = [
        Contender {
            name: "hull".to_owned(),
            run: Box::new(|| Ok(timed(&mut world.hull(&["exec", "bench", "true"]))?.0)),
        },
        Contender {
            name: "runc".to_owned(),
            run: Box::new(|| Ok(timed(&mut runc.command("runc", &["exec", &runc.id("runc"), "true"]))?.0)),
        },
        Contender {
            name: "crun".to_owned(),
            run: Box::new(|| Ok(timed(&mut crun.command("crun", &["exec", &crun.id("crun"), "true"]))?.0)),
        },
    ];
    let series = interleave(&mut contenders, args.warmup, args.rounds)?;
    drop(contenders);
    report("exec", &kernel, &series, out)
}

fn report(benchmark: &str, kernel: &Path, series: &crate::harness::Series, out: &Path) -> Result<()> {
    let context = RunContext {
        benchmark,
        baseline: "runc",
        guest_kernel: &crate::kernel_hash(kernel),
        plotted: TOTAL,
    };
    for path in emit(&context, series, out)? {
        println!("  {}", path.display());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_are_read_in_milliseconds_whatever_else_was_said() {
        let figures = steps("warning: x\n{\"client_us\":300,\"kernel_us\":97000}\n").unwrap();
        assert_eq!(
            figures.into_iter().collect::<Vec<_>>(),
            [("client_ms".to_owned(), 0.3), ("kernel_ms".to_owned(), 97.0)]
        );
        assert!(steps("nothing").is_err());
    }
}
