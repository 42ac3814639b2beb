//! Where a container's output is kept.
//!
//! [`LogConfig`] is what a user asks for and what a container's record keeps.

use serde::{Deserialize, Serialize};

use crate::{Result, SandboxError};

/// How large one log file may grow unless told otherwise: with [`DEFAULT_MAX_FILES`], what a container that
/// prints for ever takes of the disk.
const DEFAULT_MAX_BYTES: u64 = 10_000_000;
/// How many files of it are kept.
const DEFAULT_MAX_FILES: u32 = 3;
/// Smaller files would be rotated at every line.
const MIN_MAX_BYTES: u64 = 4096;
/// More files than anybody looks through.
const MAX_MAX_FILES: u32 = 1000;

/// A log driver and its options.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "driver", rename_all = "kebab-case")]
pub enum LogConfig {
    /// Files of JSON lines beside the container's record, as docker writes them.
    JsonFile {
        /// Size at which a file is rotated.
        max_bytes: u64,
        /// How many files there are at most, the current one included.
        max_files: u32,
    },
    /// The system's journal.
    Journald {
        /// `SYSLOG_IDENTIFIER` of the entries; the container's short id where there is none.
        tag: Option<String>,
    },
    /// Nowhere.
    None,
}

impl Default for LogConfig {
    fn default() -> Self {
        Self::JsonFile {
            max_bytes: DEFAULT_MAX_BYTES,
            max_files: DEFAULT_MAX_FILES,
        }
    }
}

fn invalid(option: &'static str, problem: String) -> SandboxError {
    SandboxError::InvalidOption { option, problem }
}

/// A size as `--log-opt max-size` takes it: a number with a suffix k, m or g (powers of ten, as docker's).
fn parse_size(text: &str) -> Option<u64> {
    let lower = text.to_ascii_lowercase();
    let lower = lower.strip_suffix('b').unwrap_or(&lower);
    let digits = lower.trim_end_matches(['k', 'm', 'g']);
    let unit = match &lower[digits.len()..] {
        "" => 1,
        "k" => 1000,
        "m" => 1_000_000,
        "g" => 1_000_000_000,
        _ => return None,
    };
    digits.parse::<u64>().ok()?.checked_mul(unit)
}

impl LogConfig {
    /// Reads `--log-driver` and `--log-opt`.
    ///
    /// # Errors
    ///
    /// An unknown driver, or an option that the driver doesn't have.
    pub fn parse(driver: &str, options: &[String]) -> Result<Self> {
        let mut config = match driver {
            "json-file" | "local" | "k8s-file" => Self::default(),
            "journald" => Self::Journald { tag: None },
            "none" => Self::None,
            _ => {
                let problem = format!("{driver:?} is not one of json-file, journald and none");
                return Err(invalid("--log-driver", problem));
            }
        };
        for option in options {
            config.set(driver, option)?;
        }
        Ok(config)
    }

    fn set(&mut self, driver: &str, option: &str) -> Result<()> {
        let wrong = |problem: &str| invalid("--log-opt", format!("{option:?}: {problem}"));
        let (key, value) = option
            .split_once('=')
            .ok_or_else(|| wrong("expected NAME=VALUE"))?;
        match (self, key) {
            (Self::JsonFile { max_bytes, .. }, "max-size") => {
                *max_bytes = parse_size(value)
                    .filter(|bytes| *bytes >= MIN_MAX_BYTES)
                    .ok_or_else(|| wrong("expected a size of at least 4k, as in 10m"))?;
            }
            (Self::JsonFile { max_files, .. }, "max-file") => {
                *max_files = value
                    .parse()
                    .ok()
                    .filter(|files| (1..=MAX_MAX_FILES).contains(files))
                    .ok_or_else(|| wrong("expected a number from 1 to 1000"))?;
            }
            (Self::Journald { tag }, "tag") => *tag = Some(value.to_owned()),
            _ => return Err(wrong(&format!("the log driver {driver} has no such option"))),
        }
        Ok(())
    }

    /// The driver's name, as `--log-driver` takes it.
    #[must_use]
    pub fn driver_name(&self) -> &'static str {
        match self {
            Self::JsonFile { .. } => "json-file",
            Self::Journald { .. } => "journald",
            Self::None => "none",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(driver: &str, options: &[&str]) -> Result<LogConfig> {
        let options: Vec<String> = options.iter().copied().map(str::to_owned).collect();
        LogConfig::parse(driver, &options)
    }

    #[test]
    fn options_of_docker_are_understood() {
        let config = parse("json-file", &["max-size=1m", "max-file=2"]).unwrap();
        let expected = LogConfig::JsonFile {
            max_bytes: 1_000_000,
            max_files: 2,
        };
        assert_eq!(config, expected);
        assert_eq!(parse("none", &[]).unwrap(), LogConfig::None);
    }

    #[test]
    fn option_a_driver_does_not_have_is_refused_by_name() {
        for (driver, option) in [
            ("syslog", "tag=x"),
            ("none", "max-size=1m"),
            ("json-file", "max-size=1"),
            ("json-file", "max-file=0"),
            ("json-file", "max-size"),
            ("journald", "max-file=2"),
        ] {
            assert!(parse(driver, &[option]).is_err(), "{driver} {option}");
        }
    }

    #[test]
    fn configuration_survives_a_round_trip() {
        for config in [
            LogConfig::default(),
            LogConfig::Journald { tag: None },
            LogConfig::None,
        ] {
            let text = serde_json::to_string(&config).unwrap();
            assert_eq!(serde_json::from_str::<LogConfig>(&text).unwrap(), config);
        }
    }
}
