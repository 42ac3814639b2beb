//! `hull-bench density`: what an idle container costs the host in all, when there is one and when there are many.
//!
//! Proportional set size of every process a container has (microVM, monitor, and whatever else carries the world in its
//! environment), and by how much the host's available memory has shrunk, which counts what belongs to no process: page tables, and the
//! shadow page tables of a pagetable-based host. The second is the noise of everything else on the machine too.

use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::Args;

use crate::harness::{Contender, Figures, interleave};
use crate::report::{RunContext, emit};
use crate::world::World;

/// From the last container's start until they are called idle: free page reporting works in steps of two seconds.
const SETTLE: Duration = Duration::from_secs(6);

#[derive(Debug, Args)]
pub struct DensityArgs {
    /// How many containers at once
    #[arg(long, value_delimiter = ',', default_value = "1,8,30")]
    containers: Vec<u32>,
    /// Rounds that count
    #[arg(long, default_value_t = 3)]
    rounds: u32,
    /// Memory of each microVM
    #[arg(long, default_value_t = 128)]
    memory_mib: u32,
}

/// # Errors
/// A container can't be started, or the report can't be written.
pub fn run(args: &DensityArgs, out: &Path) -> Result<()> {
    let kernel = crate::artifact("HULL_KERNEL")?;
    let world = World::with_images(&["busybox"])?;
    let mut contenders: Vec<Contender<'_>> = args
        .containers
        .iter()
        .map(|&count| {
            let world = &world;
            Contender {
                name: format!("hull-{count:02}"),
                run: Box::new(move || measure(world, count, args.memory_mib)),
            }
        })
        .collect();
    let series = interleave(&mut contenders, 0, args.rounds)?;
    drop(contenders);
    let baseline = args
        .containers
        .first()
        .map(|count| format!("hull-{count:02}"))
        .unwrap_or_default();
    let context = RunContext {
        benchmark: "density",
        baseline: &baseline,
        guest_kernel: &crate::kernel_hash(&kernel),
        plotted: "pss_mib_per_container",
    };
    for path in emit(&context, &series, out)? {
        println!("  {}", path.display());
    }
    Ok(())
}

/// Detached containers, all ended when this goes.
struct Crowd<'a> {
    world: &'a World,
    names: Vec<String>,
}

impl Drop for Crowd<'_> {
    fn drop(&mut self) {
        let names = self.names.iter().map(String::as_str);
        let arguments: Vec<&str> = ["kill"].into_iter().chain(names).collect();
        self.world.succeed(&arguments).ok();
    }
}

fn measure(world: &World, count: u32, memory_mib: u32) -> Result<Figures> {
    let before = available_kib()?;
    let memory = format!("{memory_mib}m");
    let mut crowd = Crowd {
        world,
        names: Vec::new(),
    };
    for n in 0..count {
        let name = format!("idle-{n}");
        let arguments = [
            "run", "-d", "--rm", "--memory", &memory, "--name", &name, "busybox", "sleep", "100000",
        ];
        // A pipe for its output would be held open by what lives on.
        let status = world
            .hull(&arguments)
            .stdout(std::process::Stdio::null())
            .status()
            .context("cannot start hull")?;
        anyhow::ensure!(status.success(), "hull run -d ended with {status}");
        crowd.names.push(name);
    }
    std::thread::sleep(SETTLE);
    let (mut vmm, mut rest, mut processes) = (0.0, 0.0, 0.0);
    for (pid, is_vmm) in processes_of(&world.marker())? {
        // One that has just ended costs nothing.
        let Some(kib) = pss_kib(pid) else { continue };
        processes += 1.0;
        if is_vmm {
            vmm += kib;
        } else {
            rest += kib;
        }
    }
    let after = available_kib()?;
    drop(crowd);
    let per = |kib: f64| kib / 1024.0 / f64::from(count);
    Ok(Figures::from([
        ("pss_mib_per_container".to_owned(), per(vmm + rest)),
        ("vmm_pss_mib_per_container".to_owned(), per(vmm)),
        ("monitor_pss_mib_per_container".to_owned(), per(rest)),
        (
            "processes_per_container_count".to_owned(),
            processes / f64::from(count),
        ),
        ("host_available_mib_per_container".to_owned(), per(before - after)),
    ]))
}

fn processes_of(marker: &str) -> Result<Vec<(u32, bool)>> {
    let own = std::process::id();
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").context("cannot read /proc")?.flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else {
            continue;
        };
        let read = |name: &str| fs::read(entry.path().join(name)).unwrap_or_default();
        let line = String::from_utf8_lossy(&read("cmdline")).into_owned();
        let ours = String::from_utf8_lossy(&read("environ")).contains(marker) || line.contains(marker);
        if pid != own && ours {
            found.push((pid, line.contains("hull-vmm")));
        }
    }
    Ok(found)
}

/// A process's proportional set size; nothing if it has ended.
pub fn pss_kib(pid: u32) -> Option<f64> {
    field(
        &fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).ok()?,
        "Pss:",
    )
}

fn available_kib() -> Result<f64> {
    field(
        &fs::read_to_string("/proc/meminfo").context("cannot read /proc/meminfo")?,
        "MemAvailable:",
    )
    .context("/proc/meminfo says nothing of available memory")
}

fn field(text: &str, name: &str) -> Option<f64> {
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    line.split_whitespace().next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_found_by_their_whole_name() {
        let text = "Rss:  12 kB\nPss_Dirty: 3 kB\nPss:   7 kB\n";
        assert_eq!(field(text, "Pss:"), Some(7.0));
        assert_eq!(field(text, "Swap:"), None);
        assert!(pss_kib(std::process::id()).is_some_and(|kib| kib > 0.0));
    }
}
