//! What is printed: a table for people, TAP for harnesses, JSON lines for programs.

use std::time::Duration;

use clap::ValueEnum;
use serde_json::json;

use crate::case::Case;
use crate::runner::{Finished, Outcome};
use crate::runtime::Runtime;

/// How results are printed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Format {
    Table,
    Tap,
    Json,
}

/// Before the first case.
pub fn header(count: usize, format: Format) {
    if format == Format::Tap {
        println!("TAP version 13\n1..{count}");
    }
}

/// A case that has ended.
pub fn line(index: usize, case: &Case, outcome: &Outcome, took: Duration, format: Format) {
    match format {
        Format::Table => {
            let (word, detail) = match outcome {
                Outcome::Passed => ("ok", String::new()),
                Outcome::Failed(message) => (
                    "FAILED",
                    format!(
                        "\n           {}: {}\n           {message}",
                        case.section, case.requirement
                    ),
                ),
                Outcome::ExpectedFailure(_, reason) => ("known", format!("  ({reason})")),
                Outcome::UnexpectedPass => ("PASSED", "  (it is on the list of known failures)".to_owned()),
                Outcome::Skipped(why) => ("skipped", format!("  ({why})")),
            };
            println!("{word:<8} {:>5} ms  {}{detail}", took.as_millis(), case.name);
        }
        Format::Tap => {
            let number = index + 1;
            match outcome {
                Outcome::Passed => println!("ok {number} - {}", case.name),
                Outcome::Skipped(why) => println!("ok {number} - {} # SKIP {}", case.name, one_line(why)),
                Outcome::UnexpectedPass => println!("ok {number} - {} # TODO", case.name),
                Outcome::ExpectedFailure(message, reason) => println!(
                    "not ok {number} - {} # TODO {}\n# {}",
                    case.name,
                    one_line(reason),
                    one_line(message)
                ),
                Outcome::Failed(message) => println!(
                    "not ok {number} - {}\n# {}: {}\n# {}",
                    case.name,
                    case.section,
                    one_line(&case.requirement),
                    one_line(message)
                ),
            }
        }
        Format::Json => {
            let (word, message, reason) = match outcome {
                Outcome::Passed => ("passed", None, None),
                Outcome::Failed(message) => ("failed", Some(message), None),
                Outcome::ExpectedFailure(message, reason) => {
                    ("expected failure", Some(message), Some(reason))
                }
                Outcome::UnexpectedPass => ("unexpected pass", None, None),
                Outcome::Skipped(why) => ("skipped", Some(why), None),
            };
            let line = json!({
                "name": case.name, "section": case.section, "requirement": case.requirement,
                "level": case.level.to_string(), "host": case.host, "outcome": word,
                "message": message, "reason": reason, "took_ms": took.as_secs_f64() * 1000.0,
            });
            println!("{line}");
        }
    }
}

/// After the last case; whether the run was good.
pub fn summary(results: &[Finished], format: Format, runtime: &Runtime) -> bool {
    let count = |wanted: fn(&Outcome) -> bool| results.iter().filter(|one| wanted(&one.outcome)).count();
    let failed = count(|outcome| matches!(outcome, Outcome::Failed(_)));
    let unexpected = count(|outcome| *outcome == Outcome::UnexpectedPass);
    if format == Format::Table {
        println!(
            "\n{}: {} cases: {} passed, {failed} failed, {} known failures, {unexpected} passed unexpectedly, {} skipped, in {:.1} s of run time",
            runtime.version(),
            results.len(),
            count(|outcome| *outcome == Outcome::Passed),
            count(|outcome| matches!(outcome, Outcome::ExpectedFailure(..))),
            count(|outcome| matches!(outcome, Outcome::Skipped(_))),
            results.iter().map(|one| one.took.as_secs_f64()).sum::<f64>(),
        );
        for bad in results.iter().filter(|one| !one.outcome.is_good()) {
            println!("    {}", bad.case.name);
        }
    }
    results.iter().all(|one| one.outcome.is_good())
}

/// The cases, with what they require.
pub fn list(cases: &[Case], format: Format) {
    for case in cases {
        if format == Format::Json {
            let line = json!({
                "name": case.name, "section": case.section, "requirement": case.requirement,
                "level": case.level.to_string(), "host": case.host,
            });
            println!("{line}");
        } else {
            let host = if case.host { ", host" } else { "" };
            println!(
                "{} ({}{host}; {})\n    {}",
                case.name, case.level, case.section, case.requirement
            );
        }
    }
}

fn one_line(text: &str) -> String {
    text.replace('\n', " | ")
}
