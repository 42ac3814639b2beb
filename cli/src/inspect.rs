//! `hull inspect`

use clap::{Args, ValueEnum};
use sandbox::{Directories, Runtime, SandboxError};
use serde_json::Value;

use crate::{container_inspect, format, image, image_inspect};

/// Show everything about containers and images.
#[derive(Debug, Args)]
pub struct Inspect {
    /// How to print: json, or a Go template such as '{{.State.Status}}'
    #[arg(short, long)]
    format: Option<String>,
    /// What the names are of; looked for in this order where it isn't given
    #[arg(long = "type", value_enum)]
    kind: Option<Kind>,
    /// Also the size of what a container keeps on disk
    #[arg(short, long)]
    size: bool,
    /// Names or ids
    #[arg(required = true)]
    names: Vec<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Kind {
    /// A container
    Container,
    /// An image
    Image,
}

/// Prints what `describe` says of each name: a JSON array, or a template filled with each. What isn't found is said
/// after what is, and makes the exit code 1.
///
/// # Errors
/// The template doesn't fit, or stdout can't be written to.
pub fn print(
    names: &[String],
    template: Option<&str>,
    describe: impl Fn(&str) -> anyhow::Result<Value>,
) -> anyhow::Result<u8> {
    let mut found = Vec::new();
    let mut errors = Vec::new();
    for name in names {
        match describe(name) {
            Ok(value) => found.push(value),
            Err(error) => errors.push(error),
        }
    }
    let mut text = String::new();
    match template {
        None | Some("json") => {
            text = serde_json::to_string_pretty(&found)? + "\n";
        }
        Some(template) => {
            for value in &found {
                text += &(format::fill_one(template, value)? + "\n");
            }
        }
    }
    format::write_out(&text)?;
    for error in &errors {
        eprintln!("hull: {error:#}");
    }
    Ok(u8::from(!errors.is_empty()))
}

impl Inspect {
    /// Prints them.
    pub fn execute(self) -> anyhow::Result<u8> {
        let directories = Directories::from_environment();
        let runtime = Runtime::open(&directories)?;
        print(&self.names, self.format.as_deref(), |name| {
            if self.kind != Some(Kind::Image) {
                match runtime.find(name) {
                    Ok(record) => return container_inspect::describe(&runtime, &record, self.size),
                    Err(SandboxError::NotFound { .. }) if self.kind.is_none() => {}
                    Err(error) => return Err(error.into()),
                }
            }
            let described = image_inspect::describe(&image::open_store(&directories)?, name);
            match described {
                Err(_) if self.kind.is_none() => Err(anyhow::anyhow!("no such container or image: {name}")),
                described => described,
            }
        })
    }
}
