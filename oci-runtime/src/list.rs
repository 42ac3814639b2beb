//! `hull-oci list`.

use anyhow::{Result, bail};
use clap::Args;
use serde_json::Value;

use crate::{Global, state::extended};

/// List the containers beneath the root
#[derive(Debug, Args)]
pub(crate) struct List {
    /// table or json
    #[arg(long, short, default_value = "table")]
    format: String,
    /// Ids alone
    #[arg(long, short, num_args = 0..=1, require_equals = true, default_value_t = false, default_missing_value = "true")]
    quiet: bool,
}

impl List {
    pub(crate) fn execute(&self, global: &Global) -> Result<u8> {
        let states = global.bundles()?.list()?;
        if self.quiet {
            for state in &states {
                println!("{}", state.id);
            }
            return Ok(0);
        }
        let values: Vec<Value> = states.iter().map(extended).collect();
        match self.format.as_str() {
            "json" => println!("{}", Value::from(values)),
            "table" => {
                const COLUMNS: [&str; 6] = ["id", "pid", "status", "bundle", "created", "owner"];
                let cell = |value: &Value, column: &str| match &value[column] {
                    // A blank would shift what follows for who splits the line.
                    Value::String(text) if text.is_empty() => "root".to_owned(),
                    Value::String(text) => text.clone(),
                    other => other.to_string(),
                };
                let rows = values
                    .iter()
                    .map(|value| COLUMNS.map(|column| cell(value, column)))
                    .collect::<Vec<_>>();
                print_table(&COLUMNS.map(str::to_uppercase), &rows);
            }
            other => bail!("invalid format option: {other}; it is table or json"),
        }
        Ok(0)
    }
}

/// Columns as wide as their widest cell, at least twelve, three apart.
pub(crate) fn print_table<const N: usize>(header: &[String; N], rows: &[[String; N]]) {
    let width = |column: usize| {
        let cells = rows.iter().chain(std::iter::once(header));
        cells
            .map(|row| row[column].chars().count())
            .max()
            .unwrap_or(0)
            .max(9)
            + 3
    };
    let widths: Vec<usize> = (0..N).map(width).collect();
    for row in std::iter::once(header).chain(rows) {
        let mut line = String::new();
        for (cell, width) in row.iter().zip(&widths) {
            line.push_str(&format!("{cell:<width$}"));
        }
        println!("{}", line.trim_end());
    }
}
