//! `hull-bench import`: how long an image takes from a layout to what a container can run on, beside `umoci unpack`.
//!
//! Each round imports into an empty store, and unpacks into an empty folder, on the same disk. Both end with a sync of what
//! they made, because ours writes its layers through and the other leaves that to the kernel.

use std::fs::File;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result};
use clap::Args;

use crate::harness::{Contender, Figures, interleave};
use crate::report::{RunContext, emit};
use crate::world::{World, succeed};

#[derive(Debug, Args)]
pub struct ImportArgs {
    /// Rounds that count
    #[arg(long, default_value_t = 5)]
    rounds: u32,
    /// Rounds before, not counted
    #[arg(long, default_value_t = 1)]
    warmup: u32,
    /// Images, by the names of the test images
    #[arg(long, value_delimiter = ',', default_value = "busybox,redis,node,gcc")]
    images: Vec<String>,
}

/// How long `make` takes, and until all of it is on the disk that `folder` is on.
fn timed(folder: &Path, make: impl FnOnce() -> Result<()>) -> Result<f64> {
    let begin = Instant::now();
    make()?;
    let disk = File::open(folder).with_context(|| format!("cannot open {}", folder.display()))?;
    nix::unistd::syncfs(&disk).context("cannot sync")?;
    Ok(begin.elapsed().as_secs_f64() * 1000.0)
}

/// # Errors
/// A contender fails, or the report can't be written.
pub fn run(args: &ImportArgs, out: &Path) -> Result<()> {
    let kernel = crate::artifact("HULL_KERNEL")?;
    let images = crate::artifact("HULL_TEST_IMAGES")?;
    let layout = |image: &str| format!("{}:latest", images.join(image).display());
    let mut contenders = [
        Contender {
            name: "hull".to_owned(),
            run: Box::new(|| {
                let mut figures = Figures::new();
                for image in &args.images {
                    let world = World::with_images(&[])?;
                    let source = format!("oci:{}", layout(image));
                    let import = || world.succeed(&["import", "-q", &source, image]).map(drop);
                    figures.insert(format!("{image}_ms"), timed(world.root(), import)?);
                }
                Ok(figures)
            }),
        },
        Contender {
            name: "umoci".to_owned(),
            run: Box::new(|| {
                let mut figures = Figures::new();
                for image in &args.images {
                    let folder = tempfile::tempdir().context("cannot make a temporary folder")?;
                    let unpack = || {
                        let mut command = Command::new("umoci");
                        command
                            .args(["unpack", "--image", &layout(image)])
                            .arg(folder.path().join("bundle"))
                            .stdout(Stdio::null());
                        succeed(&mut command).map(drop)
                    };
                    figures.insert(format!("{image}_ms"), timed(folder.path(), unpack)?);
                }
                Ok(figures)
            }),
        },
    ];
    let series = interleave(&mut contenders, args.warmup, args.rounds)?;
    drop(contenders);
    let plotted = args
        .images
        .last()
        .map(|image| format!("{image}_ms"))
        .context("no image is named")?;
    let context = RunContext {
        benchmark: "import",
        baseline: "umoci",
        guest_kernel: &crate::kernel_hash(&kernel),
        plotted: &plotted,
    };
    for path in emit(&context, &series, out)? {
        println!("  {}", path.display());
    }
    Ok(())
}
