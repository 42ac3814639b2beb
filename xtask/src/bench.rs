//! `cargo xtask bench`: build everything as it is shipped, then hand over to `hull-bench`.

use anyhow::Result;
use clap::Args;

use crate::process::{cargo, check};

#[derive(Debug, Args)]
pub struct BenchArgs {
    /// What `hull-bench` understands; `--help` lists it
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    arguments: Vec<String>,
}

pub fn run(args: &BenchArgs) -> Result<()> {
    crate::setup::run(crate::setup::Purpose::Everything)?;
    let artifacts = crate::artifacts::build_all()?;
    let images = crate::images::all()?;
    check(
        artifacts
            .environment(cargo().args(["run", "--quiet", "--release", "--package", "benches", "--"]))
            .env("HULL_TEST_IMAGES", images)
            .args(&args.arguments),
    )
}
