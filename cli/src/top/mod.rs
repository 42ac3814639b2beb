//! `hull top`: all microVMs as they are now, or the processes of one container.

mod processes;
mod table;
mod view;

use std::{io::IsTerminal as _, time::Duration};

use clap::Args;
use sandbox::{Directories, Runtime};

use crate::{format, format::PrintFormat, sampler::Sampler};

/// Watch all microVMs, or show a container's processes.
///
/// Without a container: a view of all microVMs that goes on until q is pressed; where stdout is no terminal, one table. With
/// one: its processes, as docker's top shows them.
#[derive(Debug, Args)]
pub struct Top {
    /// Seconds between two looks
    #[arg(short, long, value_name = "SECONDS", default_value = "2", value_parser = clap::value_parser!(u64).range(1..=3600))]
    delay: u64,
    /// Print one table and end, though stdout is a terminal
    #[arg(long)]
    no_stream: bool,
    /// How to print: table, json, or a Go template
    #[arg(long, default_value = "table")]
    format: PrintFormat,
    /// Name or id
    container: Option<String>,
}

/// A rate needs a time; this much is waited for where only one table is printed.
const FIRST_INTERVAL: Duration = Duration::from_millis(500);

impl Top {
    /// Shows what was asked for.
    pub fn execute(self) -> anyhow::Result<u8> {
        let runtime = Runtime::open(&Directories::from_environment())?;
        if let Some(container) = &self.container {
            return processes::print(&runtime, &runtime.find(container)?, &self.format);
        }
        let is_live = std::io::stdout().is_terminal() && std::io::stdin().is_terminal();
        let mut sampler = Sampler::new(runtime);
        if is_live && !self.no_stream && self.format == PrintFormat::Table {
            view::run(sampler, Duration::from_secs(self.delay))?;
            return Ok(0);
        }
        table::look(&mut sampler)?;
        std::thread::sleep(FIRST_INTERVAL);
        let rows = table::look(&mut sampler)?;
        let rows: Vec<table::Row> = rows.iter().map(table::Row::of).collect();
        format::write_out(
            &self
                .format
                .render(&table::HEADER, &rows, |row| row.cells().to_vec())?,
        )
    }
}
