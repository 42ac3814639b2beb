//! `hull-bench containerd`: containers through a real containerd, our shim beside runc's, on one daemon and one image.
//!
//! A round is what a person does: `ctr run --rm` of a trivial command (created, started, ended, deleted), and a command executed in
//! a container that runs. Wall time is taken around `ctr` by one clock; what `ctr` itself needs is in both. The same with idle
//! containers beside, and what each further container costs in the shim's memory.

use std::path::Path;
use std::process::Output;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use clap::Args;
use hull_tests::containerd::{Containerd, HULL, RUNC, reference};

use crate::harness::{Contender, Figures, interleave};
use crate::report::{RunContext, emit};

const TOTAL: &str = "total_ms";
const EXEC: &str = "exec_ms";

#[derive(Debug, Args)]
pub struct ContainerdArgs {
    /// Rounds that count
    #[arg(long, default_value_t = 30)]
    rounds: u32,
    /// Rounds before, not counted
    #[arg(long, default_value_t = 3)]
    warmup: u32,
    /// Idle containers of each kind beside
    #[arg(long, default_value_t = 0)]
    idle: u32,
}

/// # Errors
/// A contender fails, or the report can't be written.
pub fn run(args: &ContainerdArgs, out: &Path) -> Result<()> {
    let kernel = crate::artifact("HULL_KERNEL")?;
    let world = Containerd::with_images(&["busybox"]).context("microVMs can't be run here")?;
    let names = [("hull", HULL), ("runc", RUNC)];
    let mut idle = Sleeping::new(&world);
    for (name, runtime) in names {
        idle.start(runtime, format!("{name}-exec"));
        for number in 0..args.idle {
            idle.start(runtime, format!("{name}-idle{number}"));
        }
    }
    let mut contenders: Vec<Contender<'_>> = names
        .iter()
        .map(|(name, runtime)| {
            let (world, mut round) = (&world, 0);
            Contender {
                name: (*name).to_owned(),
                run: Box::new(move || {
                    round += 1;
                    let total = timed(world, &run_arguments(name, runtime, round))?;
                    let id = format!("{name}-exec");
                    let exec_id = format!("e{round}");
                    let exec = ["tasks", "exec", "--exec-id", &exec_id, &id, "true"].map(str::to_owned);
                    Ok(Figures::from([
                        (TOTAL.to_owned(), total),
                        (EXEC.to_owned(), timed(world, &exec)?),
                    ]))
                }),
            }
        })
        .collect();
    let series = interleave(&mut contenders, args.warmup, args.rounds)?;
    drop(contenders);
    for (name, runtime) in names {
        println!("  {}", memory_of_each(&world, name, runtime)?);
    }
    println!("  {}", memory_of_further(&world)?);
    let context = RunContext {
        benchmark: if args.idle == 0 {
            "containerd"
        } else {
            "containerd-idle"
        },
        baseline: "runc",
        guest_kernel: &crate::kernel_hash(&kernel),
        plotted: TOTAL,
    };
    for path in emit(&context, &series, out)? {
        println!("  {}", path.display());
    }
    Ok(())
}

/// Containers that only wait, all removed when this goes: those of runc outlive their daemon and its shims.
struct Sleeping<'a> {
    world: &'a Containerd,
    ids: Vec<String>,
}

impl<'a> Sleeping<'a> {
    fn new(world: &'a Containerd) -> Self {
        Self {
            world,
            ids: Vec::new(),
        }
    }

    fn start(&mut self, runtime: &str, id: String) {
        self.world
            .run_detached(runtime, "busybox", &id, &["sleep", "100000"]);
        self.ids.push(id);
    }
}

impl Drop for Sleeping<'_> {
    fn drop(&mut self) {
        for id in &self.ids {
            self.world.remove(id);
        }
    }
}

fn run_arguments(name: &str, runtime: &str, round: u32) -> Vec<String> {
    let image = reference("busybox");
    let id = format!("{name}-run{round}");
    ["run", "--rm", "--runtime", runtime, &image, &id, "true"]
        .map(str::to_owned)
        .to_vec()
}

/// Wall time of a `ctr` command that must succeed.
fn timed(world: &Containerd, arguments: &[String]) -> Result<f64> {
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let begin = Instant::now();
    let output: Output = world
        .ctr_command(&arguments)
        .output()
        .context("ctr is installed")?;
    let total = begin.elapsed().as_secs_f64() * 1000.0;
    ensure!(
        output.status.success(),
        "ctr {arguments:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(total)
}

/// What all processes on the host that a container needs hold, each with a share of what it shares with others; of four
/// containers that wait, each with a shim of its own.
fn memory_of_each(world: &Containerd, name: &str, runtime: &str) -> Result<String> {
    const COUNT: u64 = 4;
    let before: Vec<i32> = world.processes().into_iter().map(|(pid, _)| pid).collect();
    let mut own: Vec<i32> = Vec::new();
    let mut sleeping = Sleeping::new(world);
    for number in 0..COUNT {
        let id = format!("{name}-memory{number}");
        sleeping.start(runtime, id.clone());
        // runc's container shows nothing of this world in its command line.
        own.extend(world.task(&id).map(|(pid, _)| pid));
    }
    let shims = world.processes().into_iter().map(|(pid, _)| pid);
    own.extend(shims.filter(|pid| !before.contains(pid)));
    own.sort_unstable();
    own.dedup();
    let mut total = 0;
    for pid in &own {
        total += summed_kib(*pid, "Pss:")?;
    }
    Ok(format!(
        "a container of {name}: {} KiB PSS in {} processes",
        total / COUNT,
        own.len() as u64 / COUNT
    ))
}

/// What a shim holds with one container, and with eight in a group of one shim, in its own memory.
fn memory_of_further(world: &Containerd) -> Result<String> {
    let shims = || world.processes_of("containerd-shim-hull-v2");
    let before = shims();
    let mut sizes = Vec::new();
    for number in 0..8 {
        let annotation = "io.containerd.hull.v2.group=bench";
        let outcome = world.run(
            HULL,
            &["--detach", "--annotation", annotation],
            "busybox",
            &format!("grouped{number}"),
            &["sleep", "100000"],
        );
        ensure!(outcome.status.success(), "{outcome:?}");
        let shim = shims()
            .into_iter()
            .find(|pid| !before.contains(pid) && is_resident(*pid))
            .context("no shim came with the group")?;
        sizes.push(summed_kib(shim, "Private_")?);
    }
    let (first, last) = (sizes[0], sizes[sizes.len() - 1]);
    Ok(format!(
        "a shim's private memory: {first} KiB with one container, {last} KiB with {}: {} KiB for each further one",
        sizes.len(),
        last.saturating_sub(first) / (sizes.len() as u64 - 1)
    ))
}

/// The resident shim, and not a monitor, which is the same program.
fn is_resident(pid: i32) -> bool {
    let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    String::from_utf8_lossy(&line).contains("-namespace")
}

/// The sum of the lines that begin so, in KiB.
fn summed_kib(pid: i32, lines: &str) -> Result<u64> {
    let path = format!("/proc/{pid}/smaps_rollup");
    let text = std::fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))?;
    let sum = text
        .lines()
        .filter(|line| line.starts_with(lines))
        .filter_map(|line| line.split_whitespace().nth(1)?.parse::<u64>().ok())
        .sum();
    Ok(sum)
}
