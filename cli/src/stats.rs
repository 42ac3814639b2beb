//! `hull stats`

use clap::Args;
use sandbox::{Directories, Runtime, SandboxRecord, Status};
use serde::Serialize;

use crate::output;

/// Show what containers use, as their guests count it.
#[derive(Debug, Args)]
pub struct Stats {
    /// How to print: table or json
    #[arg(long, default_value = "table")]
    format: output::Format,
    /// Names or ids; all running ones where none is given
    containers: Vec<String>,
}

#[derive(Serialize)]
#[serde(rename_all = "PascalCase")]
struct Row {
    #[serde(rename = "ID")]
    id: String,
    name: String,
    cpu_usage_us: u64,
    memory_current_bytes: u64,
    memory_total_bytes: u64,
    memory_available_bytes: u64,
    #[serde(rename = "PIDs")]
    pids: u64,
    io_read_bytes: u64,
    io_write_bytes: u64,
    oom_kills: u64,
}

fn row(runtime: &Runtime, record: &SandboxRecord) -> sandbox::Result<Row> {
    let stats = runtime.stats(record)?;
    Ok(Row {
        id: record.id.short().to_owned(),
        name: record.name.clone(),
        cpu_usage_us: stats.cpu_usage_us,
        memory_current_bytes: stats.memory_current_bytes,
        memory_total_bytes: stats.guest_memory_total_bytes,
        memory_available_bytes: stats.guest_memory_available_bytes,
        pids: stats.pids_current,
        io_read_bytes: stats.io_read_bytes,
        io_write_bytes: stats.io_write_bytes,
        oom_kills: stats.oom_kills,
    })
}

impl Stats {
    /// Prints them once.
    pub fn execute(self) -> anyhow::Result<u8> {
        let runtime = Runtime::open(&Directories::from_environment())?;
        let rows = if self.containers.is_empty() {
            let running = runtime
                .list()?
                .into_iter()
                .filter(|record| record.status == Status::Running);
            // One that ends meanwhile is left out.
            running.filter_map(|record| row(&runtime, &record).ok()).collect()
        } else {
            let find = |name: &String| row(&runtime, &runtime.find(name)?);
            self.containers
                .iter()
                .map(find)
                .collect::<sandbox::Result<Vec<_>>>()?
        };
        let header = [
            "CONTAINER ID",
            "NAME",
            "CPU TIME",
            "MEM USAGE / TOTAL",
            "BLOCK I/O",
            "PIDS",
        ];
        output::print(self.format, &header, &rows, |row| {
            vec![
                row.id.clone(),
                row.name.clone(),
                format!("{} ms", row.cpu_usage_us / 1000),
                format!(
                    "{} / {}",
                    output::size(row.memory_current_bytes),
                    output::size(row.memory_total_bytes)
                ),
                format!(
                    "{} / {}",
                    output::size(row.io_read_bytes),
                    output::size(row.io_write_bytes)
                ),
                row.pids.to_string(),
            ]
        })
    }
}
