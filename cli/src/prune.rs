//! `hull prune` and `hull image prune`

use std::{
    io::{BufRead as _, IsTerminal as _, Write as _},
    os::unix::fs::MetadataExt as _,
    path::Path,
};

use clap::Args;
use rootfs_builder::{PruneOptions, Pruned};
use sandbox::{ContainerRecord, Directories, Runtime, Status};

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

/// Remove containers that have ended, and images nobody needs.
#[derive(Debug, Args)]
pub struct Prune {
    /// Also images with a name that no container is left of
    #[arg(short, long)]
    all: bool,
    /// Don't ask
    #[arg(short, long)]
    force: bool,
    /// Only say what would go
    #[arg(long)]
    dry_run: bool,
    /// Leave the images alone
    #[arg(long, conflicts_with = "all")]
    containers: bool,
}

/// Asks before something is gone for good. Without a terminal or an answer, it is no.
pub fn confirmed(warning: &str) -> anyhow::Result<bool> {
    let mut stderr = std::io::stderr();
    write!(
        stderr,
        "WARNING! {warning}\nAre you sure you want to continue? [y/N] "
    )?;
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

/// Space that a folder's files take.
fn allocated(folder: &Path) -> u64 {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    entries
        .filter_map(|entry| entry.metadata().ok())
        .filter(std::fs::Metadata::is_file)
        .map(|metadata| metadata.blocks().saturating_mul(512))
        .sum()
}

impl Prune {
    fn warning(&self) -> &'static str {
        match (self.containers, self.all) {
            (true, _) => "This will remove all stopped containers.",
            (_, false) => "This will remove all stopped containers and all dangling images.",
            (_, true) => {
                "This will remove all stopped containers and all images without at least one container associated to them."
            }
        }
    }

    /// Removes containers; what is left, and how much room that made.
    fn remove(&self, runtime: &Runtime) -> anyhow::Result<(Vec<ContainerRecord>, u64, u8)> {
        let (going, kept): (Vec<_>, Vec<_>) = runtime
            .list()?
            .into_iter()
            .partition(|record| matches!(record.status, Status::Created | Status::Exited));
        let (mut bytes, mut code) = (0, 0);
        let mut removed = Vec::new();
        for record in going {
            let space = allocated(&runtime.home(&record.id));
            // Started meanwhile: then it is none of ours.
            let result = if self.dry_run {
                Ok(())
            } else {
                runtime.remove(&record, false)
            };
            match result {
                Ok(()) => {
                    bytes += space;
                    removed.push(record);
                }
                Err(error) => {
                    eprintln!("hull: {:#}", anyhow::Error::from(error));
                    code = 1;
                }
            }
        }
        if !removed.is_empty() {
            println!("Deleted Containers:");
            for record in &removed {
                println!("{}", record.id.as_str());
            }
            println!();
        }
        Ok((kept, bytes, code))
    }

    /// Removes them and says how much room that made.
    pub fn execute(self) -> anyhow::Result<u8> {
        if !self.force && !self.dry_run && !confirmed(self.warning())? {
            return Ok(0);
        }
        let directories = Directories::from_environment();
        let runtime = Runtime::open(&directories)?;
        let (kept, mut bytes, code) = self.remove(&runtime)?;
        if !self.containers {
            // What a dry run leaves standing doesn't keep its image.
            let in_use: Vec<String> = kept.into_iter().map(|record| record.spec.image_id).collect();
            let pruned = image::open_store(&directories)?.prune(&PruneOptions {
                in_use: &in_use,
                all: self.all,
                dry_run: self.dry_run,
            })?;
            print_images(&pruned);
            bytes += pruned.bytes;
        }
        println!("Total reclaimed space: {}", output::size(bytes));
        Ok(code)
    }
}
