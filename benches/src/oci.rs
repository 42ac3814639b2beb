//! `hull-bench oci`: a container's whole life by an engine's commands, on `hull-oci` beside runc and crun, on the same bundle.
//!
//! Create, start, wait for the process of the pid file, delete: each command a process, as conmon or a shim runs them. Wall
//! time is taken around each and around all by one clock. The container runs busybox's `true`.

use std::fs;
use std::os::fd::AsFd;
use std::path::Path;
use std::process::Stdio;
use std::time::Instant;

use anyhow::{Context, Result};
use clap::Args;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use crate::bundle::Bundle;
use crate::harness::{Contender, Figures, interleave};
use crate::report::{RunContext, emit};
use crate::world::succeed;

const TOTAL: &str = "total_ms";

#[derive(Debug, Args)]
pub struct OciArgs {
    /// Rounds that count
    #[arg(long, default_value_t = 40)]
    rounds: u32,
    /// Rounds before, not counted
    #[arg(long, default_value_t = 3)]
    warmup: u32,
    /// Containers of hull-oci that run meanwhile
    #[arg(long, default_value_t = 0)]
    beside: u32,
}

/// One life; how long each step took.
fn life(bundle: &Bundle, runtime: &str, name: &str) -> Result<Figures> {
    let id = bundle.id(name);
    let pid_file = bundle.path().join("pid");
    let pid_text = pid_file.to_string_lossy().into_owned();
    let path = bundle.path();
    let path = path.to_string_lossy();
    let mut figures = Figures::new();
    let begin = Instant::now();
    let mut step = |name: &str, arguments: &[&str]| -> Result<()> {
        let begin = Instant::now();
        // A pipe would be waited for until the container ends.
        let status = bundle
            .command(runtime, arguments)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status()
            .with_context(|| format!("cannot start {runtime}; `cargo xtask setup` installs it"))?;
        anyhow::ensure!(
            status.success(),
            "{runtime} {} ended with {status}",
            arguments.join(" ")
        );
        figures.insert(format!("{name}_ms"), begin.elapsed().as_secs_f64() * 1000.0);
        Ok(())
    };
    step(
        "create",
        &["create", "--bundle", &path, "--pid-file", &pid_text, &id],
    )?;
    let pid: i32 = fs::read_to_string(&pid_file)
        .context("no pid file")?
        .trim()
        .parse()
        .context("the pid file has no number")?;
    let pidfd = Pid::from_raw(pid).and_then(|pid| pidfd_open(pid, PidfdFlags::empty()).ok());
    let pidfd = pidfd.context("the container's process is not there")?;
    step("start", &["start", &id])?;
    poll(&mut [PollFd::new(&pidfd.as_fd(), PollFlags::IN)], None).context("cannot wait")?;
    step("delete", &["delete", &id])?;
    figures.insert(TOTAL.to_owned(), begin.elapsed().as_secs_f64() * 1000.0);
    Ok(figures)
}

/// Containers that only wait, removed when this goes.
struct Waiting<'a> {
    bundle: &'a Bundle,
    runtime: &'a str,
    count: u32,
}

impl<'a> Waiting<'a> {
    fn start(bundle: &'a Bundle, runtime: &'a str, count: u32) -> Result<Self> {
        bundle.configure(&["sleep", "100000"])?;
        let waiting = Self {
            bundle,
            runtime,
            count,
        };
        let path = bundle.path();
        let path = path.to_string_lossy();
        for number in 0..count {
            let id = bundle.id(&format!("waiting{number}"));
            let status = bundle
                .command(runtime, &["run", "--detach", "--bundle", &path, &id])
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .status();
            anyhow::ensure!(
                status.is_ok_and(|status| status.success()),
                "container {number} does not start"
            );
        }
        Ok(waiting)
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        for number in 0..self.count {
            let id = self.bundle.id(&format!("waiting{number}"));
            succeed(&mut self.bundle.command(self.runtime, &["delete", "--force", &id])).ok();
        }
    }
}

/// # Errors
/// A contender fails, or the report can't be written.
pub fn run(args: &OciArgs, out: &Path) -> Result<()> {
    hull_conformance::host::own_mounts()?;
    let kernel = crate::artifact("HULL_KERNEL")?;
    let hull = crate::artifact("HULL_OCI")?.to_string_lossy().into_owned();
    let bundles = [
        Bundle::of("busybox")?,
        Bundle::of("busybox")?,
        Bundle::of("busybox")?,
        Bundle::of("busybox")?,
    ];
    let [ours, runc, crun, beside] = &bundles;
    for bundle in [ours, runc, crun] {
        bundle.configure(&["true"])?;
    }
    let waiting = Waiting::start(beside, &hull, args.beside)?;
    let mut contenders = [
        Contender {
            name: "hull-oci".to_owned(),
            run: Box::new(|| life(ours, &hull, "hull")),
        },
        Contender {
            name: "runc".to_owned(),
            run: Box::new(|| life(runc, "runc", "runc")),
        },
        Contender {
            name: "crun".to_owned(),
            run: Box::new(|| life(crun, "crun", "crun")),
        },
    ];
    let series = interleave(&mut contenders, args.warmup, args.rounds)?;
    drop(contenders);
    drop(waiting);
    let context = RunContext {
        benchmark: "oci",
        baseline: "runc",
        guest_kernel: &crate::kernel_hash(&kernel),
        plotted: TOTAL,
    };
    for path in emit(&context, &series, out)? {
        println!("  {}", path.display());
    }
    Ok(())
}
