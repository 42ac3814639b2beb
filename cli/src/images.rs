//! `hull images`

use std::str::FromStr;

use clap::Args;
use rootfs_builder::ImageSummary;
use sandbox::Directories;
use serde::Serialize;

use crate::{format::PrintFormat, image, output, times};

/// List the images in the store.
#[derive(Debug, Args)]
pub struct Images {
    /// All images; accepted for docker's sake, as there are no intermediate ones
    #[arg(short, long)]
    all: bool,
    /// Print ids only
    #[arg(short, long)]
    quiet: bool,
    /// Don't shorten ids
    #[arg(long)]
    no_trunc: bool,
    /// Show digests
    #[arg(long)]
    digests: bool,
    /// Only those that fit: reference=PATTERN, label=NAME[=VALUE], dangling=true|false
    #[arg(short, long, value_name = "FILTER")]
    filter: Vec<Filter>,
    /// How to print: table, json, or a Go template
    #[arg(long, default_value = "table")]
    format: PrintFormat,
    /// Only images of this name, or this repository
    #[arg(value_name = "REPOSITORY[:TAG]")]
    reference: Option<String>,
}

/// Which images are shown.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Filter {
    Reference(String),
    Label(String, Option<String>),
    Dangling(bool),
}

impl FromStr for Filter {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once('=') {
            Some(("reference", pattern)) => Ok(Self::Reference(pattern.to_owned())),
            Some(("label", label)) => Ok(match label.split_once('=') {
                Some((name, value)) => Self::Label(name.to_owned(), Some(value.to_owned())),
                None => Self::Label(label.to_owned(), None),
            }),
            Some(("dangling", "true" | "1")) => Ok(Self::Dangling(true)),
            Some(("dangling", "false" | "0")) => Ok(Self::Dangling(false)),
            _ => Err("expected reference=PATTERN, label=NAME[=VALUE] or dangling=true|false".to_owned()),
        }
    }
}

impl Filter {
    fn fits(&self, image: &ImageSummary, name: Option<&str>) -> bool {
        match self {
            Self::Reference(pattern) => name.is_some_and(|name| names_match(pattern, name)),
            Self::Label(label, value) => image
                .labels
                .get(label)
                .is_some_and(|found| value.as_ref().is_none_or(|value| value == found)),
            Self::Dangling(dangling) => *dangling == name.is_none(),
        }
    }
}

/// Whether a name is meant by a pattern: the whole name or the repository alone; `*` stands for anything but a slash.
fn names_match(pattern: &str, name: &str) -> bool {
    let (repository, _) = image::split_name(name);
    matches(pattern.as_bytes(), name.as_bytes()) || matches(pattern.as_bytes(), repository.as_bytes())
}

fn matches(pattern: &[u8], text: &[u8]) -> bool {
    match pattern.split_first() {
        None => text.is_empty(),
        Some((b'*', rest)) => {
            let reach = text.iter().position(|byte| *byte == b'/').unwrap_or(text.len());
            (0..=reach).any(|taken| matches(rest, &text[taken..]))
        }
        Some((byte, rest)) => text
            .split_first()
            .is_some_and(|(first, others)| (first == byte || *byte == b'?') && matches(rest, others)),
    }
}

#[derive(Serialize)]
#[serde(rename_all = "PascalCase")]
struct Row {
    repository: String,
    tag: String,
    digest: String,
    #[serde(rename = "ID")]
    id: String,
    created: String,
    created_at: String,
    created_since: String,
    size: String,
    size_bytes: u64,
}

const NONE: &str = "<none>";

impl Images {
    fn row(&self, image: &ImageSummary, name: Option<&str>) -> Row {
        let (repository, tag) = name.map_or((NONE, NONE), image::split_name);
        let imported = times::rfc3339(image.imported_at.saturating_mul(1000));
        let created_at = image.created.clone().unwrap_or(imported);
        let created = times::since_rfc3339(&created_at);
        Row {
            repository: repository.to_owned(),
            tag: tag.to_owned(),
            digest: if image.manifest_digest.is_empty() {
                NONE.to_owned()
            } else {
                image.manifest_digest.clone()
            },
            id: if self.no_trunc {
                format!("sha256:{}", image.id)
            } else {
                image.id.chars().take(12).collect()
            },
            created: created.clone(),
            created_at,
            created_since: created,
            size: output::size(image.size_bytes),
            size_bytes: image.size_bytes,
        }
    }

    fn rows(&self, images: &[ImageSummary]) -> Vec<Row> {
        let mut rows = Vec::new();
        for image in images {
            let names: Vec<Option<&str>> = match image.names.as_slice() {
                [] => vec![None],
                names => names.iter().map(|name| Some(name.as_str())).collect(),
            };
            for name in names {
                let wanted = self
                    .reference
                    .as_ref()
                    .is_none_or(|reference| name.is_some_and(|name| names_match(reference, name)));
                if wanted && self.filter.iter().all(|filter| filter.fits(image, name)) {
                    rows.push(self.row(image, name));
                }
            }
        }
        rows
    }

    /// Prints the list.
    pub fn execute(self) -> anyhow::Result<u8> {
        let store = image::open_store(&Directories::from_environment())?;
        let mut rows = self.rows(&store.list()?);
        if self.quiet {
            rows.sort_by(|a, b| a.id.cmp(&b.id));
            rows.dedup_by(|a, b| a.id == b.id);
            let ids: String = rows.iter().map(|row| format!("{}\n", row.id)).collect();
            return crate::format::write_out(&ids);
        }
        let mut header = vec!["REPOSITORY", "TAG"];
        header.extend(self.digests.then_some("DIGEST"));
        header.extend(["IMAGE ID", "CREATED", "SIZE"]);
        self.format.print(&header, &rows, |row| {
            let mut cells = vec![row.repository.clone(), row.tag.clone()];
            cells.extend(self.digests.then(|| row.digest.clone()));
            cells.extend([row.id.clone(), row.created.clone(), row.size.clone()]);
            cells
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_mean_a_name_or_its_repository() {
        for (pattern, name, fits) in [
            ("redis", "redis:latest", true),
            ("redis:latest", "redis:latest", true),
            ("redis:7", "redis:latest", false),
            ("red*", "redis:latest", true),
            ("*:7", "redis:7", true),
            ("*/redis", "team/redis:7", true),
            ("*", "team/redis:7", false),
            ("r?dis", "redis:7", true),
        ] {
            assert_eq!(names_match(pattern, name), fits, "{pattern} {name}");
        }
    }

    #[test]
    fn filters_are_those_people_know() {
        assert_eq!("dangling=true".parse(), Ok(Filter::Dangling(true)));
        assert_eq!(
            "label=a=b".parse(),
            Ok(Filter::Label("a".into(), Some("b".into())))
        );
        assert!("since=x".parse::<Filter>().is_err());
    }
}
