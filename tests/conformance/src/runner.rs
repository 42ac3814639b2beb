//! Runs cases, a few at once, and holds the outcome against what is expected.

use std::panic::AssertUnwindSafe;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use crate::bundle::Programs;
use crate::case::{Case, Skip};
use crate::expectations::Expectations;
use crate::report::{self, Format};
use crate::runtime::Runtime;
use crate::world::World;

/// How a case ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    Passed,
    Failed(String),
    /// Failed, as is known; the reason.
    ExpectedFailure(String, String),
    /// Passed, and is on the list of known failures.
    UnexpectedPass,
    Skipped(String),
}

impl Outcome {
    /// Whether the run as a whole may be called good in spite of it.
    pub fn is_good(&self) -> bool {
        !matches!(self, Self::Failed(_) | Self::UnexpectedPass)
    }
}

/// A case with its outcome.
#[derive(Debug)]
pub struct Finished {
    pub case: Case,
    pub outcome: Outcome,
    pub took: Duration,
}

/// Runs all cases; results in the order of the cases.
///
/// # Errors
/// The probe can't be built, or there is no temporary folder.
pub fn run(
    runtime: &Runtime,
    cases: Vec<Case>,
    jobs: usize,
    expectations: &Expectations,
    format: Format,
) -> Result<Vec<Finished>> {
    let folder = tempfile::Builder::new()
        .prefix("hull-conf-")
        .tempdir()
        .context("cannot make a temporary folder")?;
    let programs = Programs::build(folder.path())?;
    report::header(cases.len(), format);
    let next = AtomicUsize::new(0);
    let done: Mutex<Vec<(usize, Outcome, Duration)>> = Mutex::default();
    std::thread::scope(|scope| {
        for _ in 0..jobs.max(1) {
            scope.spawn(|| {
                loop {
                    let index = next.fetch_add(1, Ordering::Relaxed);
                    let Some(case) = cases.get(index) else { return };
                    let begin = Instant::now();
                    let outcome = judged(
                        case,
                        attempt(case, runtime, &programs, folder.path()),
                        expectations,
                    );
                    let took = begin.elapsed();
                    report::line(index, case, &outcome, took, format);
                    if let Ok(mut done) = done.lock() {
                        done.push((index, outcome, took));
                    }
                }
            });
        }
    });
    crate::host::sweep_cgroups();
    let mut done = done.into_inner().unwrap_or_default();
    done.sort_by_key(|(index, ..)| *index);
    Ok(cases
        .into_iter()
        .zip(done)
        .map(|(case, (_, outcome, took))| Finished { case, outcome, took })
        .collect())
}

fn attempt(case: &Case, runtime: &Runtime, programs: &Programs, folder: &std::path::Path) -> Result<()> {
    let world = World::new(runtime, programs, folder)?;
    // A check that panics is a failed check: the others go on.
    let ended = std::panic::catch_unwind(AssertUnwindSafe(|| (case.check)(&world)));
    ended.unwrap_or_else(|_| Err(anyhow::anyhow!("the check panicked")))
}

fn judged(case: &Case, result: Result<()>, expectations: &Expectations) -> Outcome {
    let expected = expectations.reason(&case.name);
    match (result, expected) {
        (Ok(()), None) => Outcome::Passed,
        (Ok(()), Some(_)) => Outcome::UnexpectedPass,
        (Err(error), expected) => match (error.downcast_ref::<Skip>(), expected) {
            (Some(skip), _) => Outcome::Skipped(skip.0.clone()),
            (None, Some(reason)) => Outcome::ExpectedFailure(format!("{error:#}"), reason.to_owned()),
            (None, None) => Outcome::Failed(format!("{error:#}")),
        },
    }
}
