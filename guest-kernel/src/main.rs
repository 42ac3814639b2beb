//! `hull-guest-kernel`: build, find and describe the guest kernel.

use std::num::NonZero;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::{Parser, Subcommand};
use guest_kernel::{BuildOptions, Inputs, ProgressMode, build, locate};

#[derive(Debug, Parser)]
#[command(
    name = "hull-guest-kernel",
    version,
    about = "Build, find and describe Hull's guest kernel"
)]
struct Cli {
    /// Take the patch series and the config fragments from this folder instead of those built in
    #[arg(long, global = true, value_name = "FOLDER")]
    tree: Option<PathBuf>,
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Build the kernel unless the cache has it; print the path of the image
    Build {
        /// Compilers at a time [default: all cores]
        #[arg(long, short)]
        jobs: Option<NonZero<usize>>,
        /// No progress, only the result
        #[arg(long, short)]
        quiet: bool,
    },
    /// Print the path of the image if the cache has it; exit with 1 if not
    Locate,
    /// Print the hash of the inputs
    Hash,
    /// Print the manifest of the image in the cache
    Manifest,
}

fn main() -> ExitCode {
    match run(&Cli::parse()) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("hull-guest-kernel: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(cli: &Cli) -> Result<ExitCode> {
    let inputs = match &cli.tree {
        Some(folder) => Inputs::from_folder(folder)?,
        None => Inputs::embedded()?,
    };
    let mut options = BuildOptions::for_user()?;
    match &cli.verb {
        Verb::Build { jobs, quiet } => {
            if let Some(jobs) = jobs {
                options.jobs = *jobs;
            }
            if *quiet {
                options.progress = ProgressMode::Silent;
            }
            println!("{}", build(&inputs, &options)?.vmlinux.display());
        }
        Verb::Locate => match locate(&inputs, &options.cache) {
            Some(artifact) => println!("{}", artifact.vmlinux.display()),
            None => {
                eprintln!("hull-guest-kernel: not built yet; run `hull-guest-kernel build`");
                return Ok(ExitCode::FAILURE);
            }
        },
        Verb::Hash => println!("{}", inputs.hash()),
        Verb::Manifest => {
            let artifact =
                locate(&inputs, &options.cache).context("not built yet; run `hull-guest-kernel build`")?;
            println!("{}", serde_json::to_string_pretty(&artifact.manifest)?);
        }
    }
    Ok(ExitCode::SUCCESS)
}
