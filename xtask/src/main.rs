//! `cargo xtask`: everything a developer or a CI machine does with this repository, one verb each.
//!
//! Owner: the repository. It runs on the developer's machine, as root where a verb installs packages or boots microVMs.
//! Invariants: every verb is idempotent; what is slow is cached by the hash of its inputs; every verb ends with a verdict
//! and a non-zero exit code when the verdict is bad.

mod artifacts;
mod bench;
mod conformance;
mod demo;
mod images;
mod lint;
mod process;
mod setup;
mod test;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

#[derive(Debug, Parser)]
#[command(name = "cargo xtask", about = "Build, try, test and check Hull")]
struct Cli {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Install what this machine lacks (Debian packages, by name)
    Setup,
    /// Build guest kernel, agent, VMM and command line; build real images; run them in microVMs; say what happened
    Demo,
    /// Build everything and put it beside the `hull` binary
    Build,
    /// All tests: unit, device, KVM, end to end
    Test(test::TestArgs),
    /// Formatting, clippy, dependency rules, licences, repository hygiene
    Lint,
    /// Build (or find in the cache) the guest kernel and print where it is
    GuestKernel,
    /// Build (or find in the cache) the container images made from distribution packages
    Images(images::ImagesArgs),
    /// Run the OCI runtime specification's conformance tests against a runtime; arguments go to `hull-conformance`
    Conformance(conformance::ConformanceArgs),
    /// Run the benchmark harness; arguments go to `hull-bench`
    Bench(bench::BenchArgs),
    /// The long guest-kernel soak (30 minutes by default)
    Soak(test::SoakArgs),
}

fn main() -> ExitCode {
    let outcome = match Cli::parse().verb {
        Verb::Setup => setup::run(setup::Purpose::Everything),
        Verb::Demo => demo::run(),
        Verb::Build => artifacts::build_all().map(|artifacts| println!("{artifacts}")),
        Verb::Test(args) => test::run(&args),
        Verb::Lint => lint::run(),
        Verb::GuestKernel => artifacts::guest_kernel().map(|path| println!("{}", path.display())),
        Verb::Images(args) => images::main(&args),
        Verb::Conformance(args) => conformance::run(&args),
        Verb::Bench(args) => bench::run(&args),
        Verb::Soak(args) => test::soak(&args),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}
