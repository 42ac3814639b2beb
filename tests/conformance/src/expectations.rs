//! Known failures of a runtime, each with its reason. They are held to both ways: a case that is listed and passes is reported
//! as loudly as one that fails and isn't.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result, bail};
use serde::Deserialize;

use crate::case::Case;

/// What is kept in this repository, by the runtime's file name.
const KEPT: &[(&str, &str)] = &[
    ("runc", include_str!("../expectations/runc.toml")),
    ("crun", include_str!("../expectations/crun.toml")),
    ("hull-oci", include_str!("../expectations/hull-oci.toml")),
];

/// Cases that fail, and why.
#[derive(Debug, Default)]
pub struct Expectations {
    failing: BTreeMap<String, String>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Listed {
    #[serde(default)]
    fails: BTreeMap<String, String>,
}

impl Expectations {
    /// Those of a file, or those kept for the runtime's name; `none` is none.
    ///
    /// # Errors
    /// The file can't be read, or is no list of expectations.
    pub fn load(runtime: &Path, file: Option<&Path>) -> Result<Self> {
        let (text, whence) = match file {
            Some(path) if path == Path::new("none") => return Ok(Self::default()),
            Some(path) => {
                let text = std::fs::read_to_string(path)
                    .with_context(|| format!("cannot read {}", path.display()))?;
                (text, path.display().to_string())
            }
            None => {
                let name = runtime.file_name().unwrap_or_default().to_string_lossy();
                match KEPT.iter().find(|(kept, _)| *kept == name) {
                    Some((_, text)) => ((*text).to_owned(), format!("expectations/{name}.toml")),
                    None => return Ok(Self::default()),
                }
            }
        };
        let listed: Listed =
            toml::from_str(&text).with_context(|| format!("{whence} is no list of expectations"))?;
        Ok(Self {
            failing: listed.fails,
        })
    }

    /// Every name is that of a case, and has a reason.
    ///
    /// # Errors
    /// One isn't, or hasn't.
    pub fn check_names(&self, cases: &[Case]) -> Result<()> {
        for (name, reason) in &self.failing {
            if !cases.iter().any(|case| case.name == *name) {
                bail!("a failure of {name} is expected, and there is no such case");
            }
            if reason.trim().is_empty() {
                bail!("the expected failure of {name} has no reason");
            }
        }
        Ok(())
    }

    /// Why a case fails, if it is known to.
    pub fn reason(&self, name: &str) -> Option<&str> {
        self.failing.get(name).map(String::as_str)
    }
}
