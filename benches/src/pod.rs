//! `hull-bench pod`: what a pod's idle containers cost in memory, in one microVM and in one each.
//!
//! Proportional set size of everything the pod has on the host: microVMs, monitors, the shim, the pod's process. The pod's sandbox
//! is the same image and command in both. Containers are made by `ctr`, with the annotations that a kubelet's have.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use clap::Args;
use hull_tests::containerd::{Containerd, HULL};

use crate::density::pss_kib;
use crate::harness::{Contender, Figures, interleave};
use crate::report::{RunContext, emit};

/// From the last container's start until they are called idle: free page reporting works in steps of two seconds.
const SETTLE: Duration = Duration::from_secs(6);

#[derive(Debug, Args)]
pub struct PodArgs {
    /// How many containers the pods have
    #[arg(long, value_delimiter = ',', default_value = "1,2,3,4")]
    containers: Vec<u32>,
    /// Rounds that count
    #[arg(long, default_value_t = 3)]
    rounds: u32,
}

/// # Errors
/// A container can't be started, or the report can't be written.
pub fn run(args: &PodArgs, out: &Path) -> Result<()> {
    let kernel = crate::artifact("HULL_KERNEL")?;
    let world = Containerd::with_images(&["busybox"]).context("microVMs can't be run here")?;
    let mut contenders = Vec::new();
    for mode in ["separate", "microvm"] {
        for &count in &args.containers {
            let (world, mut round) = (&world, 0);
            contenders.push(Contender {
                name: format!("{mode}-{count}"),
                run: Box::new(move || {
                    round += 1;
                    measure(world, &format!("{mode}{count}-{round}"), mode, count)
                }),
            });
        }
    }
    let series = interleave(&mut contenders, 0, args.rounds)?;
    drop(contenders);
    let baseline = format!("separate-{}", args.containers.first().unwrap_or(&1));
    let context = RunContext {
        benchmark: "pod",
        baseline: &baseline,
        guest_kernel: &crate::kernel_hash(&kernel),
        plotted: "pss_mib",
    };
    for path in emit(&context, &series, out)? {
        println!("  {}", path.display());
    }
    Ok(())
}

/// A pod's containers, all removed when this goes.
struct Pod<'a> {
    world: &'a Containerd,
    ids: Vec<String>,
}

impl Pod<'_> {
    fn start(&mut self, pod: &str, mode: &str, kind: &str, id: &str) -> Result<()> {
        let annotations = [
            format!("io.kubernetes.cri.container-type={kind}"),
            format!("io.kubernetes.cri.sandbox-id={pod}"),
            format!("io.hull.pod={mode}"),
        ];
        let mut options = vec!["--detach"];
        for annotation in &annotations {
            options.extend(["--annotation", annotation]);
        }
        let command = ["sleep", "100000"];
        let outcome = self.world.run(HULL, &options, "busybox", id, &command);
        self.ids.push(id.to_owned());
        ensure!(outcome.status.success(), "{outcome:?}\n{}", self.world.log());
        Ok(())
    }
}

impl Drop for Pod<'_> {
    fn drop(&mut self) {
        // The sandbox last, as a kubelet does.
        for id in self.ids.iter().rev() {
            self.world.remove(id);
        }
    }
}

fn measure(world: &Containerd, id: &str, mode: &str, count: u32) -> Result<Figures> {
    let mut pod = Pod {
        world,
        ids: Vec::new(),
    };
    pod.start(id, mode, "sandbox", id)?;
    for number in 0..count {
        pod.start(id, mode, "container", &format!("{id}-{number}"))?;
    }
    std::thread::sleep(SETTLE);
    let vmms = world.processes_of("hull-vmm");
    let expected = if mode == "microvm" { 1 } else { count as usize };
    ensure!(vmms.len() == expected, "{} microVMs", vmms.len());
    let (mut microvms, mut rest) = (0.0, 0.0);
    for (pid, _) in world.processes() {
        // One that has just ended costs nothing.
        let Some(kib) = u32::try_from(pid).ok().and_then(pss_kib) else {
            continue;
        };
        let sum = if vmms.contains(&pid) {
            &mut microvms
        } else {
            &mut rest
        };
        *sum += kib / 1024.0;
    }
    Ok(Figures::from([
        ("pss_mib".to_owned(), microvms + rest),
        ("vmm_pss_mib".to_owned(), microvms),
        ("monitors_and_shim_pss_mib".to_owned(), rest),
    ]))
}
