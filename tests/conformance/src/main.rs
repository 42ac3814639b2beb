//! `hull-conformance`: one test for each MUST of the OCI runtime specification, run against any runtime binary.
//!
//! Owner: `cargo xtask conformance` and this package's own tests, which run it on runc, crun and `hull-oci`. It needs root, as
//! the runtimes do. A test makes a bundle, drives the runtime by the command line that engines use, and looks at what a probe
//! inside the container saw, or at the host.
//!
//! Invariants: the process has a mount namespace of its own, so no mount outlives it; every container lives under a `--root`
//! in the suite's temporary folder and is deleted by force when its test ends, passed or not; every wait is bounded.
//!
//! ```text
//! case (what is required) ─► world (a folder, ids) ─► bundle (rootfs, config.json) ─► runtime (the program under test)
//!      └──────────── expectations (known failures, with reasons) ─► report (table, TAP, JSON) and exit code
//! ```

mod bundle;
mod case;
mod cases;
mod console;
mod container;
mod expectations;
mod report;
mod runner;
mod runtime;
mod world;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use clap::Parser;
use hull_conformance::host;

use crate::expectations::Expectations;
use crate::report::Format;
use crate::runtime::Runtime;

#[derive(Debug, Parser)]
#[command(
    name = "hull-conformance",
    about = "Run the conformance tests of the OCI runtime specification against a runtime"
)]
struct Cli {
    /// The runtime under test: a path, or a name to be looked up in PATH
    #[arg(long, default_value = "runc")]
    runtime: PathBuf,
    /// Only cases whose name contains this text; can be given more than once
    #[arg(long)]
    filter: Vec<String>,
    /// How results are printed
    #[arg(long, value_enum, default_value = "table")]
    format: Format,
    /// Print the cases with what they require, and run nothing
    #[arg(long)]
    list: bool,
    /// Known failures to hold the runtime to: a file, or `none`; by default those that are kept for the runtime's name
    #[arg(long)]
    expect: Option<PathBuf>,
    /// Cases run at once
    #[arg(long, short)]
    jobs: Option<usize>,
}

fn main() -> ExitCode {
    match run(&Cli::parse()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("hull-conformance: {error:#}");
            ExitCode::from(2)
        }
    }
}

fn run(cli: &Cli) -> Result<bool> {
    let cases = case::selected(cases::all(), &cli.filter)?;
    if cli.list {
        report::list(&cases, cli.format);
        return Ok(true);
    }
    let expectations = Expectations::load(&cli.runtime, cli.expect.as_deref())?;
    expectations.check_names(&cases::all())?;
    // Before any thread: a mount namespace belongs to the whole process only while it has one.
    host::prepare()?;
    let runtime = Runtime::new(&cli.runtime)?;
    let jobs = cli
        .jobs
        .unwrap_or_else(|| std::thread::available_parallelism().map_or(2, usize::from));
    let results = runner::run(&runtime, cases, jobs, &expectations, cli.format)?;
    Ok(report::summary(&results, cli.format, &runtime))
}
