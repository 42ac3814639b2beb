//! `hull ps`

use clap::Args;
use sandbox::{Directories, Runtime, SandboxRecord, Status};
use serde::Serialize;

use crate::output;

/// List containers.
#[derive(Debug, Args)]
pub struct Ps {
    /// Also those that aren't running; a container that ended is gone, so these are those being made
    #[arg(short, long)]
    all: bool,
    /// Print ids only
    #[arg(short, long)]
    quiet: bool,
    /// Don't shorten ids and commands
    #[arg(long)]
    no_trunc: bool,
    /// How to print: table or json
    #[arg(long, default_value = "table")]
    format: output::Format,
}

#[derive(Serialize)]
#[serde(rename_all = "PascalCase")]
struct Row {
    #[serde(rename = "ID")]
    id: String,
    image: String,
    command: String,
    created: String,
    status: String,
    names: String,
    vcpus: u8,
    memory_mib: u64,
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

fn row(record: &SandboxRecord, whole: bool) -> Row {
    let status = match (record.status, record.started_ms) {
        (Status::Running, Some(started)) => format!("Up {}", output::since(started).trim_end_matches(" ago")),
        (Status::Running, None) => "Up".to_owned(),
        _ => "Created".to_owned(),
    };
    Row {
        id: if whole {
            record.id.as_str().to_owned()
        } else {
            record.id.short().to_owned()
        },
        image: record.image.clone(),
        command: show_command(&record.command, whole),
        created: output::since(record.created_ms),
        status,
        names: record.name.clone(),
        vcpus: record.vcpus,
        memory_mib: record.memory_mib,
        vmm_pid: record.vmm.map(|vmm| vmm.pid),
    }
}

impl Ps {
    /// Prints the list.
    pub fn execute(self) -> anyhow::Result<u8> {
        let runtime = Runtime::open(&Directories::from_environment())?;
        let records = runtime.list()?;
        let shown = records
            .iter()
            .filter(|record| self.all || record.status == Status::Running);
        let rows: Vec<Row> = shown.map(|record| row(record, self.no_trunc)).collect();
        if self.quiet {
            rows.iter().for_each(|row| println!("{}", row.id));
            return Ok(0);
        }
        let header = ["CONTAINER ID", "IMAGE", "COMMAND", "CREATED", "STATUS", "NAMES"];
        output::print(self.format, &header, &rows, |row| {
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
}
