//! `hull prune` and `hull image prune`

use std::io::{BufRead as _, IsTerminal as _, Write as _};

use clap::Args;
use rootfs_builder::{PruneOptions, Pruned};
use sandbox::{Directories, Runtime};

use crate::{image, output};

/// Remove images nobody needs: those without a name, and what pulls that broke off left.
#[derive(Debug, Args)]
pub struct ImagePrune {
    /// Also those with a name that no container was made from
    #[arg(short, long)]
    all: bool,
    /// Don't ask
    #[arg(short, long)]
    force: bool,
    /// Only say what would go
    #[arg(long)]
    dry_run: bool,
}

/// Asks before something is gone for good. Without a terminal or an answer, it is no.
fn confirmed(warning: &str) -> anyhow::Result<bool> {
    let mut stderr = std::io::stderr();
    write!(stderr, "WARNING! {warning}\nAre you sure you want to continue? [y/N] ")?;
    let mut answer = String::new();
    std::io::stdin().lock().read_line(&mut answer)?;
    if !std::io::stdin().is_terminal() {
        writeln!(stderr)?;
    }
    Ok(matches!(answer.trim(), "y" | "Y" | "yes"))
}

fn print_images(pruned: &Pruned) {
    if pruned.images.is_empty() {
        return;
    }
    println!("Deleted Images:");
    for image in &pruned.images {
        for name in &image.names {
            println!("untagged: {name}");
        }
        println!("deleted: sha256:{}", image.id);
    }
    println!();
}

impl ImagePrune {
    /// Removes them and says how much room that made.
    pub fn execute(self) -> anyhow::Result<u8> {
        let warning = if self.all {
            "This will remove all images without at least one container associated to them."
        } else {
            "This will remove all dangling images."
        };
        if !self.force && !self.dry_run && !confirmed(warning)? {
            return Ok(0);
        }
        let directories = Directories::from_environment();
        let runtime = Runtime::open(&directories)?;
        let in_use = image::ids_in_use(&runtime)?;
        let pruned = image::open_store(&directories)?.prune(&PruneOptions {
            in_use: &in_use,
            all: self.all,
            dry_run: self.dry_run,
        })?;
        print_images(&pruned);
        println!("Total reclaimed space: {}", output::size(pruned.bytes));
        Ok(0)
    }
}
