//! `hull images`

use clap::Args;
use sandbox::Directories;
use serde::Serialize;

use crate::{image, output};

/// List the images in the store.
#[derive(Debug, Args)]
pub struct Images {
    /// Print ids only
    #[arg(short, long)]
    quiet: bool,
    /// Don't shorten ids
    #[arg(long)]
    no_trunc: bool,
    /// How to print: table or json
    #[arg(long, default_value = "table")]
    format: output::Format,
}

#[derive(Serialize)]
#[serde(rename_all = "PascalCase")]
struct Row {
    repository: String,
    tag: String,
    #[serde(rename = "ID")]
    id: String,
    created: String,
    size: String,
    size_bytes: u64,
}

fn split_name(name: &str) -> (String, String) {
    match name.rsplit_once(':') {
        Some((repository, tag)) if !tag.contains('/') => (repository.to_owned(), tag.to_owned()),
        _ => (name.to_owned(), "latest".to_owned()),
    }
}

impl Images {
    /// Prints the list.
    pub fn execute(self) -> anyhow::Result<u8> {
        let store = image::open_store(&Directories::from_environment())?;
        let mut rows = Vec::new();
        for image in store.list()? {
            let id = if self.no_trunc {
                image.id.clone()
            } else {
                image.id.chars().take(12).collect()
            };
            let none = ["<none>:<none>".to_owned()];
            let names = if image.names.is_empty() {
                none.as_slice()
            } else {
                image.names.as_slice()
            };
            for name in names {
                let (repository, tag) = split_name(name);
                rows.push(Row {
                    repository,
                    tag,
                    id: id.clone(),
                    created: output::since(image.imported_at.saturating_mul(1000)),
                    size: output::size(image.size_bytes),
                    size_bytes: image.size_bytes,
                });
            }
        }
        if self.quiet {
            rows.dedup_by(|a, b| a.id == b.id);
            rows.iter().for_each(|row| println!("{}", row.id));
            return Ok(0);
        }
        output::print(
            self.format,
            &["REPOSITORY", "TAG", "IMAGE ID", "CREATED", "SIZE"],
            &rows,
            |row| {
                vec![
                    row.repository.clone(),
                    row.tag.clone(),
                    row.id.clone(),
                    row.created.clone(),
                    row.size.clone(),
                ]
            },
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn port_of_a_registry_is_not_a_tag() {
        assert_eq!(split_name("a:5000/b"), ("a:5000/b".into(), "latest".into()));
        assert_eq!(split_name("b:1.2"), ("b".into(), "1.2".into()));
    }
}
