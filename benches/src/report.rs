//! What a run leaves behind: a table for people, JSON for machines, an SVG plot to look at.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, anyhow};
use comfy_table::{CellAlignment, Table, presets};
use plotters::prelude::*;
use serde::Serialize;

use crate::harness::Series;
use crate::stats::{Comparison, Summary, compare, summary};

/// Where and on what the figures were taken; figures without it can't be compared later.
#[derive(Debug, Serialize)]
pub struct Host {
    pub cpu: String,
    pub cpu_count: usize,
    pub kernel: String,
    pub kvm_backend: String,
    pub load_average: String,
    pub revision: String,
}

#[derive(Debug, Serialize)]
struct Report<'a> {
    benchmark: &'a str,
    baseline: &'a str,
    host: Host,
    guest_kernel: &'a str,
    summaries: BTreeMap<&'a str, BTreeMap<&'a str, Summary>>,
    /// contender → figure → against the baseline of the same run
    comparisons: BTreeMap<&'a str, BTreeMap<&'a str, Comparison>>,
    series: &'a Series,
}

/// What a report needs beside the samples.
#[derive(Debug)]
pub struct RunContext<'a> {
    pub benchmark: &'a str,
    /// The contender others are compared with.
    pub baseline: &'a str,
    /// Hash of the guest kernel's inputs, or "none".
    pub guest_kernel: &'a str,
    /// Figure to plot; its name ends in its unit.
    pub plotted: &'a str,
}

impl Host {
    /// Read off the machine; what can't be read is "unknown".
    pub fn read() -> Self {
        let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let field = |name: &str| {
            cpuinfo
                .lines()
                .find(|line| line.starts_with(name))
                .and_then(|line| line.split_once(':'))
                .map_or("unknown", |(_, value)| value.trim())
                .to_owned()
        };
        let flags = field("flags");
        let hardware = flags.split(' ').any(|flag| flag == "vmx" || flag == "svm");
        let one_line = |path: &str| fs::read_to_string(path).unwrap_or_default().trim().to_owned();
        let revision = Command::new("git")
            .args(["describe", "--always", "--dirty", "--abbrev=12"])
            .output()
            .map_or_else(
                |_| "unknown".to_owned(),
                |out| String::from_utf8_lossy(&out.stdout).trim().to_owned(),
            );
        Self {
            cpu: field("model name"),
            cpu_count: std::thread::available_parallelism().map_or(0, usize::from),
            kernel: one_line("/proc/sys/kernel/osrelease"),
            kvm_backend: if hardware {
                "hardware".to_owned()
            } else {
                "pvm".to_owned()
            },
            load_average: one_line("/proc/loadavg"),
            revision,
        }
    }
}

/// Print the table, write `NAME.json` and `NAME.svg` into `directory`, return their paths.
///
/// # Errors
/// The files can't be written.
pub fn emit(context: &RunContext<'_>, series: &Series, directory: &Path) -> Result<[PathBuf; 2]> {
    let mut summaries: BTreeMap<&str, BTreeMap<&str, Summary>> = BTreeMap::new();
    let mut comparisons: BTreeMap<&str, BTreeMap<&str, Comparison>> = BTreeMap::new();
    for (contender, figures) in series {
        for (figure, samples) in figures {
            if let Some(summary) = summary(samples) {
                summaries.entry(contender).or_default().insert(figure, summary);
            }
            let against = series.get(context.baseline).and_then(|base| base.get(figure));
            if contender != context.baseline
                && let Some(comparison) = against.and_then(|base| compare(samples, base))
            {
                comparisons
                    .entry(contender)
                    .or_default()
                    .insert(figure, comparison);
            }
        }
    }
    println!("{}", table(context, &summaries, &comparisons));
    fs::create_dir_all(directory).with_context(|| format!("cannot make {}", directory.display()))?;
    let json = directory.join(format!("{}.json", context.benchmark));
    let report = Report {
        benchmark: context.benchmark,
        baseline: context.baseline,
        host: Host::read(),
        guest_kernel: context.guest_kernel,
        summaries,
        comparisons,
        series,
    };
    fs::write(&json, serde_json::to_string_pretty(&report)?)
        .with_context(|| format!("cannot write {}", json.display()))?;
    let svg = directory.join(format!("{}.svg", context.benchmark));
    plot(context, series, &svg).with_context(|| format!("cannot write {}", svg.display()))?;
    Ok([json, svg])
}

fn table(
    context: &RunContext<'_>,
    summaries: &BTreeMap<&str, BTreeMap<&str, Summary>>,
    comparisons: &BTreeMap<&str, BTreeMap<&str, Comparison>>,
) -> Table {
    let mut table = Table::new();
    table.load_style(presets::UTF8_BORDERS_ONLY);
    let versus = format!("p50 ÷ {}", context.baseline);
    table.set_header([
        "contender",
        "figure",
        "n",
        "min",
        "p50",
        "p99",
        "max",
        versus.as_str(),
        "p value",
    ]);
    for (contender, figures) in summaries {
        for (figure, s) in figures {
            let against = comparisons.get(contender).and_then(|figures| figures.get(figure));
            table.add_row([
                (*contender).to_owned(),
                (*figure).to_owned(),
                s.count.to_string(),
                format!("{:.2}", s.min),
                format!("{:.2}", s.p50),
                format!("{:.2}", s.p99),
                format!("{:.2}", s.max),
                against.map_or(String::new(), |c| format!("{:.2}", c.p50_ratio)),
                against.map_or(String::new(), |c| format!("{:.2e}", c.p_value)),
            ]);
        }
    }
    for column in table.column_iter_mut().skip(2) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table
}

/// Cumulative distribution of the plotted figure, one line a contender.
fn plot(context: &RunContext<'_>, series: &Series, path: &Path) -> Result<()> {
    let sorted: Vec<(&str, Vec<f64>)> = series
        .iter()
        .filter_map(|(contender, figures)| {
            let mut samples = figures.get(context.plotted)?.clone();
            samples.sort_by(f64::total_cmp);
            Some((contender.as_str(), samples))
        })
        .collect();
    let widest = sorted
        .iter()
        .filter_map(|(_, samples)| samples.last())
        .fold(1.0_f64, |a, &b| a.max(b));
    let area = SVGBackend::new(path, (900, 480)).into_drawing_area();
    let failed = |error: &dyn std::fmt::Display| anyhow!("cannot draw the plot: {error}");
    area.fill(&WHITE).map_err(|e| failed(&e))?;
    let mut chart = ChartBuilder::on(&area)
        .caption(
            format!("{}: {}", context.benchmark, context.plotted),
            ("sans-serif", 20),
        )
        .margin(16)
        .x_label_area_size(36)
        .y_label_area_size(48)
        .build_cartesian_2d(0.0..widest * 1.02, 0.0..100.0)
        .map_err(|e| failed(&e))?;
    chart
        .configure_mesh()
        .x_desc(context.plotted)
        .y_desc("% of runs")
        .draw()
        .map_err(|e| failed(&e))?;
    for (index, (contender, samples)) in sorted.iter().enumerate() {
        let colour = Palette99::pick(index).to_rgba();
        let steps = f64::from(u32::try_from(samples.len()).unwrap_or(1));
        let points = samples
            .iter()
            .zip(1_u32..)
            .map(|(&x, rank)| (x, f64::from(rank) * 100.0 / steps));
        chart
            .draw_series(LineSeries::new(points, colour.stroke_width(2)))
            .map_err(|e| failed(&e))?
            .label(*contender)
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 16, y)], colour.stroke_width(2)));
    }
    chart
        .configure_series_labels()
        .background_style(WHITE.mix(0.8))
        .border_style(BLACK)
        .draw()
        .map_err(|e| failed(&e))?;
    area.present().map_err(|e| failed(&e))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn emit_writes_json_with_ratios_and_a_plot() {
        let directory = tempfile::tempdir().unwrap();
        let figures = |x: f64| BTreeMap::from([("total".to_owned(), vec![x, x + 1.0, x + 2.0])]);
        let series = Series::from([
            ("hull".to_owned(), figures(10.0)),
            ("qemu".to_owned(), figures(20.0)),
        ]);
        let context = RunContext {
            benchmark: "boot",
            baseline: "qemu",
            guest_kernel: "none",
            plotted: "total",
        };
        let [json, svg] = emit(&context, &series, directory.path()).unwrap();
        let value: serde_json::Value = serde_json::from_str(&fs::read_to_string(json).unwrap()).unwrap();
        let ratio = value["comparisons"]["hull"]["total"]["p50_ratio"]
            .as_f64()
            .unwrap();
        assert!((ratio - 11.0 / 21.0).abs() < 1e-9);
        assert!(fs::read_to_string(svg).unwrap().contains("qemu"));
    }
}
