//! `hull ps`

use std::collections::BTreeMap;

use clap::Args;
use sandbox::{ContainerRecord, Directories, Runtime, Status};
use serde::Serialize;

use crate::{format::PrintFormat, output, times};

/// List containers.
#[derive(Debug, Args)]
pub struct Ps {
    /// Also those that don't run
    #[arg(short, long)]
    all: bool,
    /// Print ids only
    #[arg(short, long)]
    quiet: bool,
    /// Don't shorten ids and commands
    #[arg(long)]
    no_trunc: bool,
    /// The newest one, whether it runs or not
    #[arg(short, long)]
    latest: bool,
    /// The newest N, whether they run or not
    #[arg(short = 'n', long, value_name = "N")]
    last: Option<usize>,
    /// Only those that match: id=, name=, label=, status=, exited=, ancestor=
    #[arg(short, long, value_name = "FILTER", value_parser = Filter::parse)]
    filter: Vec<Filter>,
    /// How to print: table, json, or a Go template
    #[arg(long, default_value = "table")]
    format: PrintFormat,
}

/// One `--filter`. Those of one kind are alternatives, those of different kinds must all match.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Filter {
    kind: &'static str,
    value: String,
}

const FILTERS: [&str; 6] = ["id", "name", "label", "status", "exited", "ancestor"];
const STATUSES: [&str; 4] = ["created", "running", "paused", "exited"];

impl Filter {
    fn parse(text: &str) -> Result<Self, String> {
        let (kind, value) = text
            .split_once('=')
            .ok_or("expected NAME=VALUE, as in status=exited")?;
        let kind = FILTERS
            .into_iter()
            .find(|known| *known == kind)
            .ok_or_else(|| format!("unknown filter {kind:?}; there are {}", FILTERS.join(", ")))?;
        let valid = match kind {
            "status" => STATUSES.contains(&value),
            "exited" => value.parse::<u8>().is_ok(),
            _ => true,
        };
        if !valid {
            return Err(format!(
                "{value:?} is no value of {kind}; expected {}",
                if kind == "status" {
                    STATUSES.join(", ")
                } else {
                    "an exit code".to_owned()
                }
            ));
        }
        Ok(Self {
            kind,
            value: value.to_owned(),
        })
    }

    fn matches(&self, record: &ContainerRecord) -> bool {
        let value = self.value.as_str();
        match self.kind {
            "id" => record.id.as_str().starts_with(value),
            "name" => record.name.contains(value.trim_start_matches('/')),
            "label" => match value.split_once('=') {
                None => record.spec.labels.contains_key(value),
                Some((label, wanted)) => record.spec.labels.get(label).is_some_and(|have| have == wanted),
            },
            "status" => record.status.as_str() == value,
            "exited" => {
                record.status == Status::Exited
                    && record.exit_code.map(|code| code.to_string()).as_deref() == Some(value)
            }
            _ => {
                record.spec.image == value
                    || record
                        .spec
                        .image_id
                        .starts_with(value.trim_start_matches("sha256:"))
            }
        }
    }
}

fn all_match(filters: &[Filter], record: &ContainerRecord) -> bool {
    FILTERS.iter().all(|kind| {
        let mut of_kind = filters.iter().filter(|filter| filter.kind == *kind).peekable();
        of_kind.peek().is_none() || of_kind.any(|filter| filter.matches(record))
    })
}

#[derive(Serialize)]
#[serde(rename_all = "PascalCase")]
struct Row {
    #[serde(rename = "ID")]
    id: String,
    image: String,
    command: String,
    created: String,
    created_at: String,
    running_for: String,
    state: String,
    status: String,
    names: String,
    labels: String,
    vcpus: u8,
    memory_mib: u64,
    monitor_pid: Option<i32>,
    vmm_pid: Option<i32>,
}

/// As docker shows a command: quoted, cut after twenty characters.
fn show_command(command: &[String], whole: bool) -> String {
    let joined = output::printable(&command.join(" "));
    if whole || joined.chars().count() <= 20 {
        return format!("\"{joined}\"");
    }
    let cut: String = joined.chars().take(19).collect();
    format!("\"{cut}…\"")
}

fn show_status(record: &ContainerRecord) -> String {
    let up = || match record.started_ms {
        Some(started) => format!("Up {}", output::since(started).trim_end_matches(" ago")),
        None => "Up".to_owned(),
    };
    match record.status {
        Status::Created => "Created".to_owned(),
        Status::Running => up(),
        Status::Paused => format!("{} (Paused)", up()),
        Status::Exited => {
            let ago = record.finished_ms.map(output::since).unwrap_or_default();
            format!("Exited ({}) {ago}", record.exit_code.unwrap_or(0))
        }
    }
}

fn show_labels(labels: &BTreeMap<String, String>) -> String {
    let pairs: Vec<String> = labels
        .iter()
        .map(|(name, value)| format!("{name}={value}"))
        .collect();
    pairs.join(",")
}

fn row(record: &ContainerRecord, whole: bool) -> Row {
    let id = if whole {
        record.id.as_str()
    } else {
        record.id.short()
    };
    Row {
        id: id.to_owned(),
        image: record.spec.image.clone(),
        command: show_command(&record.spec.process.args, whole),
        created: output::since(record.created_ms),
        created_at: times::rfc3339(record.created_ms),
        running_for: output::since(record.created_ms),
        state: record.status.to_string(),
        status: show_status(record),
        names: record.name.clone(),
        labels: show_labels(&record.spec.labels),
        vcpus: record.spec.vcpus,
        memory_mib: record.spec.memory_mib,
        monitor_pid: record.run.as_ref().map(|run| run.monitor.pid),
        vmm_pid: record.run.as_ref().and_then(|run| run.vmm).map(|vmm| vmm.pid),
    }
}

impl Ps {
    /// Whether a container that doesn't run is shown, too.
    fn shows_all(&self) -> bool {
        let asks = |filter: &Filter| matches!(filter.kind, "status" | "exited");
        self.all || self.latest || self.last.is_some() || self.filter.iter().any(asks)
    }

    /// Prints the list.
    pub fn execute(self) -> anyhow::Result<u8> {
        let runtime = Runtime::open(&Directories::from_environment())?;
        let records = runtime.list()?;
        let limit = if self.latest {
            1
        } else {
            self.last.unwrap_or(usize::MAX)
        };
        let rows: Vec<Row> = records
            .iter()
            .filter(|record| self.shows_all() || record.status.is_live())
            .filter(|record| all_match(&self.filter, record))
            .take(limit)
            .map(|record| row(record, self.no_trunc))
            .collect();
        if self.quiet {
            return output::print_lines(rows.iter().map(|row| row.id.as_str()));
        }
        let header = ["CONTAINER ID", "IMAGE", "COMMAND", "CREATED", "STATUS", "NAMES"];
        self.format.print(&header, &rows, |row| {
            vec![
                row.id.clone(),
                row.image.clone(),
                row.command.clone(),
                row.created.clone(),
                row.status.clone(),
                row.names.clone(),
            ]
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_command_is_cut_and_control_characters_are_not_printed() {
        let command = [
            "sh".to_owned(),
            "-c".into(),
            "echo a very long line\x1b[2J".into(),
        ];
        assert_eq!(show_command(&command, false), "\"sh -c echo a very l…\"");
        assert!(!show_command(&command, true).contains('\x1b'));
    }

    #[test]
    fn filter_that_does_not_exist_is_refused_with_those_that_do() {
        assert!(Filter::parse("status=running").is_ok());
        for text in ["status", "status=up", "exited=x", "volume=x"] {
            assert!(Filter::parse(text).is_err(), "{text}");
        }
        assert!(Filter::parse("volume=x").unwrap_err().contains("ancestor"));
    }

    fn record(json: &str) -> ContainerRecord {
        let id = "ab".repeat(32);
        let text = format!(r#"{{"version":1,"id":"{id}","name":"web","created_ms":1,{json}}}"#);
        serde_json::from_str(&text).unwrap()
    }

    #[test]
    fn filters_of_one_kind_are_alternatives_and_kinds_all_match() {
        let record = record(r#""spec":{"labels":{"a":"1"}},"status":"exited","exit_code":3"#);
        let matches = |filters: &[&str]| {
            let filters: Vec<Filter> = filters.iter().map(|text| Filter::parse(text).unwrap()).collect();
            all_match(&filters, &record)
        };
        assert!(matches(&["status=running", "status=exited", "label=a"]));
        assert!(matches(&["exited=3", "label=a=1", "name=we", "id=abab"]));
        assert!(
            !matches(&["label=a=2"]) && !matches(&["exited=0"]) && !matches(&["status=running", "label=a"])
        );
    }

    #[test]
    fn status_is_in_dockers_words() {
        let exited = record(r#""spec":{},"status":"exited","exit_code":137,"finished_ms":0"#);
        assert!(show_status(&exited).starts_with("Exited (137) "));
        let paused = record(r#""spec":{},"status":"paused","started_ms":0"#);
        assert!(show_status(&paused).ends_with(" (Paused)"));
        assert_eq!(show_status(&record(r#""spec":{},"status":"created""#)), "Created");
    }
}
