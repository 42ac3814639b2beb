//! `hull stats`

use std::{
    io::{ErrorKind, IsTerminal as _, Write as _},
    time::Duration,
};

use clap::Args;
use sandbox::{ContainerRecord, Directories, Runtime};
use serde::Serialize;

use crate::{
    format::{self, PrintFormat},
    output,
    sampler::{Sampler, Usage, binary_size},
};

/// Between two looks.
const INTERVAL: Duration = Duration::from_secs(1);
/// A rate needs a time; this much is waited for where only one table is printed.
const FIRST_INTERVAL: Duration = Duration::from_millis(500);

/// Show what containers use, as their guests count it, again and again.
#[derive(Debug, Args)]
pub struct Stats {
    /// Also containers that don't run
    #[arg(short, long)]
    all: bool,
    /// Print one table and end
    #[arg(long)]
    no_stream: bool,
    /// Don't shorten ids
    #[arg(long)]
    no_trunc: bool,
    /// How to print: table, json, or a Go template
    #[arg(long, default_value = "table")]
    format: PrintFormat,
    /// Names or ids; all running ones where none is given
    containers: Vec<String>,
}

#[derive(Serialize)]
#[serde(rename_all = "PascalCase")]
struct Row {
    #[serde(rename = "ID")]
    id: String,
    container: String,
    name: String,
    #[serde(rename = "CPUPerc")]
    cpu_perc: String,
    mem_usage: String,
    mem_perc: String,
    #[serde(rename = "NetIO")]
    net_io: &'static str,
    #[serde(rename = "BlockIO")]
    block_io: String,
    #[serde(rename = "PIDs")]
    pids: u64,
    #[serde(rename = "HostCPUPerc")]
    host_cpu_perc: String,
    host_memory_bytes: u64,
    cpu_usage_us: u64,
    memory_current_bytes: u64,
    memory_total_bytes: u64,
    memory_available_bytes: u64,
    io_read_bytes: u64,
    io_write_bytes: u64,
    oom_kills: u64,
}

fn percent(value: Option<f64>) -> String {
    value.map_or_else(|| "--".to_owned(), |value| format!("{value:.2}%"))
}

#[expect(clippy::cast_precision_loss, reason = "two decimals are shown")]
fn row(usage: &Usage, whole: bool) -> Row {
    let id = if whole {
        usage.record.id.as_str()
    } else {
        usage.record.id.short()
    };
    let guest = usage.guest.unwrap_or_default();
    let known = usage.guest.is_some();
    Row {
        id: id.to_owned(),
        container: id.to_owned(),
        name: usage.record.name.clone(),
        cpu_perc: percent(usage.cpu_percent),
        mem_usage: if known {
            format!(
                "{} / {}",
                binary_size(guest.memory_current_bytes),
                binary_size(usage.given_bytes())
            )
        } else {
            "-- / --".to_owned()
        },
        mem_perc: percent(
            known.then(|| usage.used_bytes() as f64 * 100.0 / usage.given_bytes().max(1) as f64),
        ),
        // There is no network device.
        net_io: "--",
        block_io: if known {
            format!(
                "{} / {}",
                output::size(guest.io_read_bytes),
                output::size(guest.io_write_bytes)
            )
        } else {
            "-- / --".to_owned()
        },
        pids: guest.pids,
        host_cpu_perc: percent(usage.host_cpu_percent),
        host_memory_bytes: usage.host_memory_bytes,
        cpu_usage_us: guest.cpu_usage_us,
        memory_current_bytes: guest.memory_current_bytes,
        memory_total_bytes: guest.memory_total_bytes,
        memory_available_bytes: guest.memory_available_bytes,
        io_read_bytes: guest.io_read_bytes,
        io_write_bytes: guest.io_write_bytes,
        oom_kills: guest.oom_kills,
    }
}

const HEADER: [&str; 8] = [
    "CONTAINER ID",
    "NAME",
    "CPU %",
    "MEM USAGE / LIMIT",
    "MEM %",
    "HOST MEM",
    "BLOCK I/O",
    "PIDS",
];

fn cells(row: &Row) -> Vec<String> {
    vec![
        row.id.clone(),
        row.name.clone(),
        row.cpu_perc.clone(),
        row.mem_usage.clone(),
        row.mem_perc.clone(),
        binary_size(row.host_memory_bytes),
        row.block_io.clone(),
        row.pids.to_string(),
    ]
}

impl Stats {
    fn records(&self, runtime: &Runtime) -> anyhow::Result<Vec<ContainerRecord>> {
        if !self.containers.is_empty() {
            let find = |name: &String| runtime.find(name);
            return Ok(self
                .containers
                .iter()
                .map(find)
                .collect::<sandbox::Result<Vec<_>>>()?);
        }
        let mut records = runtime.list()?;
        records.retain(|record| self.all || record.status.is_live());
        Ok(records)
    }

    fn render(&self, sampler: &mut Sampler) -> anyhow::Result<String> {
        let records = self.records(sampler.runtime())?;
        let rows: Vec<Row> = sampler
            .look(records)
            .iter()
            .map(|usage| row(usage, self.no_trunc))
            .collect();
        self.format.render(&HEADER, &rows, cells)
    }

    /// Prints them, once or until somebody ends it.
    pub fn execute(self) -> anyhow::Result<u8> {
        let mut sampler = Sampler::new(Runtime::open(&Directories::from_environment())?);
        self.render(&mut sampler)?;
        std::thread::sleep(FIRST_INTERVAL);
        if self.no_stream {
            return format::write_out(&self.render(&mut sampler)?);
        }
        let clears = std::io::stdout().is_terminal() && self.format == PrintFormat::Table;
        loop {
            let text = self.render(&mut sampler)?;
            // Home, then each line to its end, then what is below: without flicker.
            let text = if clears {
                format!("\x1b[H{}\x1b[J", text.replace('\n', "\x1b[K\n"))
            } else {
                text
            };
            let mut stdout = std::io::stdout();
            match stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()) {
                Ok(()) => {}
                // Whoever read has enough.
                Err(error) if error.kind() == ErrorKind::BrokenPipe => return Ok(0),
                Err(error) => return Err(error.into()),
            }
            std::thread::sleep(INTERVAL);
        }
    }
}
