//! `hull volume …`

use std::{collections::BTreeMap, io::Write as _};

use clap::{Args, Subcommand};
use sandbox::{Directories, Runtime, SandboxError, Volume as Found};
use serde::Serialize;
use serde_json::{Value, json};

use crate::{container_options::parse_label, format::PrintFormat, inspect, output, prune, times};

/// Manage volumes: directories that outlive their containers.
#[derive(Debug, Args)]
pub struct Volume {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    Create(Create),
    #[command(visible_alias = "list")]
    Ls(Ls),
    Inspect(Inspect),
    #[command(visible_alias = "remove")]
    Rm(Rm),
    Prune(Prune),
}

/// Make a volume, and print its name; one that is there already stays as it is.
#[derive(Debug, Args)]
struct Create {
    /// Label it: NAME or NAME=VALUE
    #[arg(short, long)]
    label: Vec<String>,
    /// Where it is kept; there is only local
    #[arg(short, long, default_value = "local", value_parser = ["local"])]
    driver: String,
    /// Its name; one that nobody has where it isn't given
    name: Option<String>,
}

/// List volumes.
#[derive(Debug, Args)]
struct Ls {
    /// Print names only
    #[arg(short, long)]
    quiet: bool,
    /// Only those that fit: name=PART, label=NAME[=VALUE], dangling=true|false
    #[arg(short, long, value_name = "FILTER", value_parser = parse_filter)]
    filter: Vec<Filter>,
    /// How to print: table, json, or a Go template
    #[arg(long, default_value = "table")]
    format: PrintFormat,
}

/// Show everything about volumes.
#[derive(Debug, Args)]
struct Inspect {
    /// How to print: json, or a Go template such as '{{.Mountpoint}}'
    #[arg(short, long)]
    format: Option<String>,
    /// Their names
    #[arg(required = true)]
    names: Vec<String>,
}

/// Remove volumes and what is in them.
#[derive(Debug, Args)]
struct Rm {
    /// It is no error if there is none
    #[arg(short, long)]
    force: bool,
    /// Their names
    #[arg(required = true)]
    names: Vec<String>,
}

/// Remove all volumes that no container has.
#[derive(Debug, Args)]
struct Prune {
    /// Accepted for docker's sake, as volumes all have names
    #[arg(short, long)]
    all: bool,
    /// Don't ask
    #[arg(short, long)]
    force: bool,
}

/// Which volumes are shown.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Filter {
    Name(String),
    Label(String, Option<String>),
    Dangling(bool),
}

fn parse_filter(text: &str) -> Result<Filter, String> {
    match text.split_once('=') {
        Some(("name", part)) => Ok(Filter::Name(part.to_owned())),
        Some(("label", label)) => Ok(match label.split_once('=') {
            Some((name, value)) => Filter::Label(name.to_owned(), Some(value.to_owned())),
            None => Filter::Label(label.to_owned(), None),
        }),
        Some(("dangling", "true" | "1")) => Ok(Filter::Dangling(true)),
        Some(("dangling", "false" | "0")) => Ok(Filter::Dangling(false)),
        _ => Err("expected name=PART, label=NAME[=VALUE] or dangling=true|false".to_owned()),
    }
}

impl Filter {
    fn fits(&self, volume: &Found) -> bool {
        match self {
            Self::Name(part) => volume.record.name.contains(part.as_str()),
            Self::Label(name, value) => volume
                .record
                .labels
                .get(name)
                .is_some_and(|found| value.as_ref().is_none_or(|value| value == found)),
            Self::Dangling(dangling) => *dangling == volume.used_by.is_empty(),
        }
    }
}

#[derive(Serialize)]
#[serde(rename_all = "PascalCase")]
struct Row {
    driver: &'static str,
    labels: String,
    mountpoint: String,
    name: String,
    scope: &'static str,
}

fn describe(volume: &Found) -> Value {
    json!({
        "CreatedAt": times::rfc3339(volume.record.created_ms),
        "Driver": "local",
        "Labels": volume.record.labels,
        "Mountpoint": volume.data,
        "Name": volume.record.name,
        "Options": {},
        "Scope": "local",
    })
}

fn row(volume: &Found) -> Row {
    let labels = volume.record.labels.iter();
    Row {
        driver: "local",
        labels: labels
            .map(|(name, value)| format!("{name}={value}"))
            .collect::<Vec<_>>()
            .join(","),
        mountpoint: volume.data.display().to_string(),
        name: volume.record.name.clone(),
        scope: "local",
    }
}

impl Volume {
    /// Does what was asked for.
    pub fn execute(self) -> anyhow::Result<u8> {
        let runtime = Runtime::open(&Directories::from_environment())?;
        match self.verb {
            Verb::Create(verb) => verb.execute(&runtime),
            Verb::Ls(verb) => verb.execute(&runtime),
            Verb::Inspect(verb) => inspect::print(&verb.names, verb.format.as_deref(), |name| {
                Ok(describe(&runtime.volume(name)?))
            }),
            Verb::Rm(verb) => Ok(output::each(&verb.names, |name| {
                match runtime.remove_volume(name) {
                    Err(SandboxError::NoVolume { .. }) if verb.force => Ok(()),
                    result => Ok(result?),
                }
            })),
            Verb::Prune(verb) => verb.execute(&runtime),
        }
    }
}

impl Create {
    fn execute(self, runtime: &Runtime) -> anyhow::Result<u8> {
        let labels = self.label.iter().map(|text| parse_label(text));
        let labels = labels.collect::<Result<BTreeMap<_, _>, _>>()?;
        let volume = runtime.create_volume(self.name.as_deref(), labels)?;
        output::print_lines([volume.record.name.as_str()].into_iter())
    }
}

impl Ls {
    fn execute(self, runtime: &Runtime) -> anyhow::Result<u8> {
        let mut volumes = runtime.volumes()?;
        volumes.retain(|volume| self.filter.iter().all(|filter| filter.fits(volume)));
        if self.quiet {
            return output::print_lines(volumes.iter().map(|volume| volume.record.name.as_str()));
        }
        let rows: Vec<Row> = volumes.iter().map(row).collect();
        self.format.print(&["DRIVER", "VOLUME NAME"], &rows, |row| {
            vec![row.driver.to_owned(), row.name.clone()]
        })
    }
}

impl Prune {
    fn execute(self, runtime: &Runtime) -> anyhow::Result<u8> {
        let warning = "This will remove all local volumes not used by at least one container.";
        if !self.force && !prune::confirmed(warning)? {
            return Ok(0);
        }
        let (names, bytes) = runtime.prune_volumes()?;
        let mut stdout = std::io::stdout();
        if !names.is_empty() {
            writeln!(stdout, "Deleted Volumes:")?;
            for name in names {
                writeln!(stdout, "{name}")?;
            }
            writeln!(stdout)?;
        }
        writeln!(stdout, "Total reclaimed space: {}", output::size(bytes))?;
        Ok(0)
    }
}
