//! `hull-bench`: the benchmark harness. Everything is a ratio against a named baseline interleaved in the same run.
//!
//! Run it through `cargo xtask bench`, which builds what is measured as it is shipped and says where it is.

mod boot;
mod bundle;
mod containerd;
mod density;
mod guest;
mod harness;
mod idle;
mod import;
mod oci;
mod pod;
mod report;
mod run;
mod stats;
mod stdio;
mod workloads;
mod world;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::{Parser, Subcommand};

#[derive(Debug, Parser)]
#[command(name = "hull-bench", about = "Measure Hull against its peers, interleaved")]
struct Cli {
    /// Folder for JSON and plots
    #[arg(long, global = true, default_value = "target/bench")]
    out: PathBuf,
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// From starting a VMM to the guest's first program, beside QEMU microvm on the same kernel
    Boot(boot::BootArgs),
    /// What a microVM costs that does nothing, beside QEMU microvm on the same kernel
    Idle(idle::IdleArgs),
    /// A whole `hull run` of a trivial command, beside runc, crun and QEMU microvm on the same files
    Run(run::RunArgs),
    /// A whole `hull exec` of a trivial command, beside runc and crun
    Exec(run::ExecArgs),
    /// A container's whole life by `hull-oci`, beside runc and crun on the same bundle
    Oci(oci::OciArgs),
    /// Containers through a real containerd, beside runc's shim on the same daemon
    Containerd(containerd::ContainerdArgs),
    /// Real programs' own figures, beside runc on the same images
    Workloads(workloads::WorkloadsArgs),
    /// What an idle container costs in memory, for one and for many
    Density(density::DensityArgs),
    /// What a pod's idle containers cost in memory, in one microVM and in one each
    Pod(pod::PodArgs),
    /// How fast bytes go into and out of a container, beside runc
    Stdio(stdio::StdioArgs),
    /// From an image layout to what a container can run on, beside umoci
    Import(import::ImportArgs),
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let outcome = match &cli.verb {
        Verb::Boot(args) => boot::run(args, &cli.out),
        Verb::Idle(args) => idle::run(args, &cli.out),
        Verb::Run(args) => run::run(args, &cli.out),
        Verb::Exec(args) => run::exec(args, &cli.out),
        Verb::Oci(args) => oci::run(args, &cli.out),
        Verb::Containerd(args) => containerd::run(args, &cli.out),
        Verb::Workloads(args) => workloads::run(args, &cli.out),
        Verb::Density(args) => density::run(args, &cli.out),
        Verb::Pod(args) => pod::run(args, &cli.out),
        Verb::Stdio(args) => stdio::run(args, &cli.out),
        Verb::Import(args) => import::run(args, &cli.out),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("hull-bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// A built file that `cargo xtask bench` names in the environment.
fn artifact(variable: &str) -> Result<PathBuf> {
    std::env::var_os(variable).map(PathBuf::from).with_context(|| {
        format!("{variable} is not set: run this through `cargo xtask bench`, which builds what is measured")
    })
}

/// The folder a guest kernel lies in is named by the hash of its inputs.
fn kernel_hash(kernel: &Path) -> String {
    let real = kernel.canonicalize().unwrap_or_else(|_| kernel.to_path_buf());
    real.parent().and_then(Path::file_name).map_or_else(
        || "unknown".to_owned(),
        |name| name.to_string_lossy().into_owned(),
    )
}
