//! The cases, by the part of the specification they come from, and what their checks share.

mod capabilities;
mod cgroups;
mod create;
mod delete;
mod devices;
mod extensibility;
mod features;
mod hook_failures;
mod hooks;
mod hostname;
mod kill;
mod mount_options;
mod mounts;
mod namespaces;
mod paths;
mod practice;
mod process;
mod propagation;
mod rlimits;
mod root;
mod seccomp;
mod start;
mod state;
mod terminal;
mod user;

use std::fmt::Debug;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::case::Case;

/// Every case there is.
pub fn all() -> Vec<Case> {
    [
        state::cases(),
        create::cases(),
        start::cases(),
        kill::cases(),
        delete::cases(),
        hooks::cases(),
        hook_failures::cases(),
        root::cases(),
        mounts::cases(),
        mount_options::cases(),
        propagation::cases(),
        process::cases(),
        terminal::cases(),
        user::cases(),
        capabilities::cases(),
        rlimits::cases(),
        hostname::cases(),
        namespaces::cases(),
        devices::cases(),
        cgroups::cases(),
        seccomp::cases(),
        paths::cases(),
        features::cases(),
        extensibility::cases(),
        practice::cases(),
    ]
    .into_iter()
    .flatten()
    .collect()
}

/// Fails with both values.
fn equal<A: PartialEq<B> + Debug, B: Debug>(what: &str, found: A, wanted: B) -> Result<()> {
    ensure!(found == wanted, "{what}: found {found:?}, wanted {wanted:?}");
    Ok(())
}

/// The error number of an operation of the probe, 0 if it succeeded.
fn errno(line: &Value) -> Result<i32> {
    let number = line["errno"]
        .as_i64()
        .with_context(|| format!("no error number in {line}"))?;
    Ok(i32::try_from(number)?)
}

/// An operation of the probe had to succeed.
fn worked(line: &Value) -> Result<()> {
    let number = errno(line)?;
    ensure!(
        number == 0,
        "{} {} failed: {}",
        line["op"].as_str().unwrap_or("?"),
        line["path"].as_str().unwrap_or(""),
        nix::errno::Errno::from_raw(number)
    );
    Ok(())
}

/// An operation of the probe had to fail with one of these.
fn failed_with(line: &Value, wanted: &[nix::errno::Errno]) -> Result<()> {
    let number = errno(line)?;
    ensure!(
        wanted.iter().any(|one| *one as i32 == number),
        "{} {}: found {}, wanted {wanted:?}",
        line["op"].as_str().unwrap_or("?"),
        line["path"].as_str().unwrap_or(""),
        if number == 0 {
            "success".to_owned()
        } else {
            nix::errno::Errno::from_raw(number).to_string()
        },
    );
    Ok(())
}

/// A line of `/proc/self/status` in a report.
fn status_line<'v>(report: &'v Value, name: &str) -> Result<&'v str> {
    let status = report["status"]
        .as_str()
        .context("the process can't read /proc/self/status")?;
    status
        .lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))
        .map(str::trim)
        .with_context(|| format!("no {name} in /proc/self/status"))
}

/// A text of a report.
fn text<'v>(report: &'v Value, name: &str) -> Result<&'v str> {
    report[name]
        .as_str()
        .with_context(|| format!("the process could not find out: {name}"))
}

/// A mount as `/proc/self/mountinfo` shows it.
#[derive(Debug, Clone)]
struct MountInfo {
    point: String,
    options: Vec<String>,
    propagation: Vec<String>,
    kind: String,
    super_options: Vec<String>,
}

/// The mounts of a report, in order.
fn mounts_of(report: &Value) -> Result<Vec<MountInfo>> {
    let list = |text: &str, separator: char| text.split(separator).map(str::to_owned).collect::<Vec<_>>();
    text(report, "mountinfo")?
        .lines()
        .map(|line| {
            let (left, right) = line
                .split_once(" - ")
                .with_context(|| format!("odd line in mountinfo: {line}"))?;
            let left: Vec<&str> = left.split(' ').collect();
            let right: Vec<&str> = right.split(' ').collect();
            ensure!(
                left.len() >= 6 && right.len() >= 3,
                "odd line in mountinfo: {line}"
            );
            Ok(MountInfo {
                point: left[4].to_owned(),
                options: list(left[5], ','),
                propagation: left[6..].iter().map(|&field| field.to_owned()).collect(),
                kind: right[0].to_owned(),
                super_options: list(right[2], ','),
            })
        })
        .collect()
}

/// The topmost mount at a place.
fn mount_at(report: &Value, point: &str) -> Result<MountInfo> {
    mounts_of(report)?
        .into_iter()
        .rfind(|mount| mount.point == point)
        .with_context(|| format!("nothing is mounted on {point}"))
}
