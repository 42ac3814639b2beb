//! `hull image history`

use clap::Args;
use sandbox::Directories;
use serde::Serialize;

use crate::{format::PrintFormat, image, output, times};

/// Show how an image was made.
#[derive(Debug, Args)]
pub struct ImageHistory {
    /// Don't shorten the commands
    #[arg(long)]
    no_trunc: bool,
    /// How to print: table, json, or a Go template
    #[arg(long, default_value = "table")]
    format: PrintFormat,
    /// Name or id
    image: String,
}

#[derive(Serialize)]
#[serde(rename_all = "PascalCase")]
struct Row {
    created_at: String,
    created_since: String,
    created_by: String,
    size: String,
    size_bytes: u64,
    comment: String,
}

/// Docker's width of this column.
const COMMAND_CHARS: usize = 45;

fn shorten(text: &str, whole: bool) -> String {
    let text = output::printable(text);
    if whole || text.chars().count() <= COMMAND_CHARS {
        return text;
    }
    text.chars().take(COMMAND_CHARS - 1).chain(['…']).collect()
}

impl ImageHistory {
    /// Prints it, the newest step first.
    pub fn execute(self) -> anyhow::Result<u8> {
        let store = image::open_store(&Directories::from_environment())?;
        let details = store.inspect(&self.image)?;
        let rows: Vec<Row> = details
            .history
            .into_iter()
            .rev()
            .map(|step| {
                let created = step.created.unwrap_or_default();
                Row {
                    created_since: times::since_rfc3339(&created),
                    created_at: created,
                    created_by: shorten(&step.created_by.unwrap_or_default(), self.no_trunc),
                    size: output::size(step.size_bytes),
                    size_bytes: step.size_bytes,
                    comment: output::printable(&step.comment.unwrap_or_default()),
                }
            })
            .collect();
        self.format
            .print(&["CREATED", "CREATED BY", "SIZE", "COMMENT"], &rows, |row| {
                vec![
                    row.created_since.clone(),
                    row.created_by.clone(),
                    row.size.clone(),
                    row.comment.clone(),
                ]
            })
    }
}
