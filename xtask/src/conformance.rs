//! `cargo xtask conformance`: the conformance tests of the OCI runtime specification, against any runtime binary.

use anyhow::Result;
use clap::Args;

use crate::process::{cargo, check, step};

#[derive(Debug, Args)]
pub struct ConformanceArgs {
    /// Passed on: `--runtime runc`, `--filter mounts.`, `--format tap`, `--list`; `--help` shows all
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    arguments: Vec<String>,
}

/// Build the suite and run it.
///
/// # Errors
/// A case fails, or passes against expectation.
pub fn run(args: &ConformanceArgs) -> Result<()> {
    crate::setup::run(crate::setup::Purpose::Everything)?;
    step("conformance");
    check(
        cargo()
            .args(["run", "--quiet", "--package", "hull-conformance", "--"])
            .args(&args.arguments),
    )
}
