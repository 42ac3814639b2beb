//! Where a container's output is kept.
//!
//! [`LogConfig`] is what a user asks for and what a container's record keeps; [`LogWriter`] writes it, in the monitor.
//!
//! Invariant: a log that can't be written never stops a container. It is tried again with every output, and its user is
//! told once.

mod journald;
mod json_file;
mod lines;

use std::{io, path::Path};

use serde::{Deserialize, Serialize};

use crate::{ContainerRecord, Result, SandboxError};

use self::{journald::Journald, json_file::JsonFile, lines::LineBuffer};

/// How large one log file may grow unless told otherwise: with [`DEFAULT_MAX_FILES`], what a container that
/// prints for ever takes of the disk.
const DEFAULT_MAX_BYTES: u64 = 10_000_000;
/// How many files of it are kept.
const DEFAULT_MAX_FILES: u32 = 3;
/// Smaller files would be rotated at every line.
const MIN_MAX_BYTES: u64 = 4096;
/// Encoded output is written when it is as much: little enough to stay in the processor's cache and to need no fresh
/// memory each time.
const ENCODED_BYTES: usize = 64 << 10;
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

/// Which output.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OutputStream {
    /// Its standard output; of a terminal, everything.
    Stdout,
    /// Its standard error.
    Stderr,
}

impl OutputStream {
    fn name(self) -> &'static str {
        match self {
            Self::Stdout => "stdout",
            Self::Stderr => "stderr",
        }
    }
}

#[derive(Debug)]
enum Driver {
    JsonFile(JsonFile),
    Journald(Journald),
    None,
}

/// Writes a container's output to where its user wants it kept.
#[derive(Debug)]
pub(crate) struct LogWriter {
    driver: Driver,
    stdout: LineBuffer,
    stderr: LineBuffer,
    failed: bool,
}

impl LogWriter {
    /// Opens the log of a container; `path` is for drivers that write files.
    pub(crate) fn open(record: &ContainerRecord, path: &Path) -> Result<Self> {
        let driver = match &record.spec.log {
            LogConfig::JsonFile { max_bytes, max_files } => Driver::JsonFile(
                JsonFile::open(path, *max_bytes, *max_files)
                    .map_err(SandboxError::io("opening the log", path))?,
            ),
            LogConfig::Journald { tag } => Driver::Journald(Journald::connect(
                Path::new(journald::SOCKET),
                record,
                tag.as_deref(),
            )?),
            LogConfig::None => Driver::None,
        };
        Ok(Self::with(driver))
    }

    /// A log that keeps nothing.
    pub(crate) fn nowhere() -> Self {
        Self::with(Driver::None)
    }

    fn with(driver: Driver) -> Self {
        Self {
            driver,
            stdout: LineBuffer::default(),
            stderr: LineBuffer::default(),
            failed: false,
        }
    }

    /// Keeps output. The first failure since the log was last written is returned, for people to be told.
    pub(crate) fn write(&mut self, stream: OutputStream, bytes: &[u8]) -> Option<io::Error> {
        let mut lines = std::mem::take(match stream {
            OutputStream::Stdout => &mut self.stdout,
            OutputStream::Stderr => &mut self.stderr,
        });
        let failure = self.write_pieces(stream, |take| lines.push(bytes, take));
        match stream {
            OutputStream::Stdout => self.stdout = lines,
            OutputStream::Stderr => self.stderr = lines,
        }
        failure
    }

    /// Keeps what is left of both streams' last lines.
    pub(crate) fn finish(&mut self) -> Option<io::Error> {
        let (mut stdout, mut stderr) = (std::mem::take(&mut self.stdout), std::mem::take(&mut self.stderr));
        let first = self.write_pieces(OutputStream::Stdout, |take| stdout.finish(take));
        let second = self.write_pieces(OutputStream::Stderr, |take| stderr.finish(take));
        first.or(second)
    }

    fn write_pieces(
        &mut self,
        stream: OutputStream,
        pieces: impl FnOnce(&mut dyn FnMut(&[u8])),
    ) -> Option<io::Error> {
        let result = match &mut self.driver {
            Driver::None => return None,
            Driver::JsonFile(file) => {
                let time = jiff::Timestamp::now().to_string();
                let mut encoded = Vec::new();
                let mut result = Ok(());
                pieces(&mut |piece| {
                    json_file::encode(&mut encoded, stream.name(), &time, piece);
                    if encoded.len() >= ENCODED_BYTES {
                        // Whole lines; after a failure the rest is tried all the same.
                        let written = file.write(&encoded);
                        encoded.clear();
                        if written.is_err() {
                            result = written;
                        }
                    }
                });
                result.and(file.write(&encoded))
            }
            Driver::Journald(journal) => {
                let mut result = Ok(());
                let is_stderr = stream == OutputStream::Stderr;
                pieces(&mut |piece| {
                    if let Err(error) = journal.write(is_stderr, piece) {
                        result = Err(error);
                    }
                });
                result
            }
        };
        let had_failed = std::mem::replace(&mut self.failed, result.is_err());
        result.err().filter(|_| !had_failed)
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
