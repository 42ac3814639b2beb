//! `cargo xtask test`: everything, on the real thing.
//!
//! The products are built as they are shipped (release profile); the tests that drive them are built as `dev`, with overflow
//! checks. Where /dev/kvm is there, a test that skips itself for want of KVM fails the run.

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use clap::Args;

use crate::process::{cargo, check, shown, step};

#[derive(Debug, Args)]
pub struct TestArgs {
    /// Only the tests of this package
    #[arg(long, short)]
    package: Option<String>,
    /// Passed on to the test programs, e.g. a name to filter by
    #[arg(trailing_var_arg = true)]
    filter: Vec<String>,
}

#[derive(Debug, Args)]
pub struct SoakArgs {
    /// How long each vCPU count is soaked
    #[arg(long, default_value_t = 30)]
    minutes: u32,
    /// vCPU counts, one after the other
    #[arg(long, value_delimiter = ',', default_value = "1,2,4")]
    vcpus: Vec<u8>,
}

/// What the test programs reported, summed up.
#[derive(Debug, Default, PartialEq, Eq)]
struct Tally {
    passed: u64,
    failed: u64,
    ignored: u64,
}

pub fn run(args: &TestArgs) -> Result<()> {
    let begin = Instant::now();
    crate::setup::run(crate::setup::Purpose::Everything)?;
    let artifacts = crate::artifacts::build_all()?;
    let images = crate::images::all()?;

    step("test: cargo test");
    let mut command = cargo();
    command.args(["test", "--no-fail-fast"]);
    match &args.package {
        Some(package) => command.args(["--package", package]),
        None => command.arg("--workspace"),
    };
    command.arg("--").args(&args.filter);
    artifacts
        .environment(&mut command)
        .env("HULL_TEST_IMAGES", images);
    if Path::new("/dev/kvm").exists() {
        command.env("HULL_REQUIRE_KVM", "1");
    } else {
        eprintln!("    /dev/kvm is not there: tests that boot a microVM say so and are skipped");
    }
    let (tally, success) = tallied(&mut command)?;
    let minutes = begin.elapsed().as_secs_f64() / 60.0;
    println!(
        "{} passed, {} failed, {} skipped",
        tally.passed, tally.failed, tally.ignored
    );
    if !success || tally.failed > 0 {
        bail!("tests failed (after {minutes:.1} min)");
    }
    if tally.passed == 0 && args.filter.is_empty() {
        bail!("no test was run");
    }
    println!("verdict: green, in {minutes:.1} min");
    Ok(())
}

pub fn soak(args: &SoakArgs) -> Result<()> {
    crate::setup::run(crate::setup::Purpose::Everything)?;
    let artifacts = crate::artifacts::build_all()?;
    let vcpus: Vec<String> = args.vcpus.iter().map(ToString::to_string).collect();
    let mut command = cargo();
    command
        .args([
            "test",
            "--package",
            "hull-tests",
            "--test",
            "kernel_soak",
            "--",
            "--ignored",
            "--nocapture",
        ])
        .env("HULL_REQUIRE_KVM", "1")
        .env("HULL_SOAK_MINUTES", args.minutes.to_string())
        .env("HULL_SOAK_VCPUS", vcpus.join(","));
    check(artifacts.environment(&mut command))
}

/// Run, pass the output on line by line, and add up the `test result:` lines.
fn tallied(command: &mut Command) -> Result<(Tally, bool)> {
    command.stdout(Stdio::piped());
    let mut child = command
        .spawn()
        .with_context(|| format!("cannot start {}", shown(command)))?;
    let mut tally = Tally::default();
    if let Some(stdout) = child.stdout.take() {
        let mut out = std::io::stdout().lock();
        for line in BufReader::new(stdout).lines() {
            let line = line.context("cannot read what the tests print")?;
            tally.add(&line);
            writeln!(out, "{line}")?;
        }
    }
    Ok((tally, child.wait()?.success()))
}

impl Tally {
    /// `test result: ok. 5 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.00s`
    fn add(&mut self, line: &str) {
        let Some(rest) = line.strip_prefix("test result: ") else {
            return;
        };
        let counts = rest.split_once(". ").map_or(rest, |(_, counts)| counts);
        for part in counts.split(';') {
            let Some((number, what)) = part.trim().split_once(' ') else {
                continue;
            };
            let Ok(number) = number.parse::<u64>() else {
                continue;
            };
            match what {
                "passed" => self.passed += number,
                "failed" => self.failed += number,
                "ignored" => self.ignored += number,
                _ => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tally_adds_up_result_lines_and_ignores_the_rest() {
        let mut tally = Tally::default();
        tally.add("test foo ... ok");
        tally.add(
            "test result: ok. 5 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.00s",
        );
        tally.add("test result: FAILED. 2 passed; 3 failed; 0 ignored; 0 measured; 0 filtered out; finished in 1.00s");
        assert_eq!(
            tally,
            Tally {
                passed: 7,
                failed: 3,
                ignored: 1
            }
        );
    }
}
