//! The command line of `hull-vmm`.

use std::{ffi::OsString, fmt, os::fd::RawFd, path::PathBuf};

/// Longest `--id`.
const MAX_ID_BYTES: usize = 128;

/// Printed by `--help`.
pub const HELP: &str = "\
hull-vmm: one process, one microVM

Usage:
  hull-vmm --control-fd N        serve the control protocol on an inherited Unix stream socket
  hull-vmm --control-socket PATH listen for control clients at PATH
  hull-vmm --config FILE         build and start what FILE (JSON) describes, run until the guest stops

Options:
  --uid UID   user id in the jail (with root; default 65534)
  --gid GID   group id in the jail (with root; default 65534)
  --id ID     a name to be seen in process lists; up to 128 bytes
  --shares    the microVM may have shares: a thread is set aside that can act on the host's files
  --no-jail   run unconfined, for debugging only
  --version   print the version
  --help      print this

The environment variable HULL_LOG sets the log filter (error, warn, info, debug, trace).
Sockets that FILE names, and PATH, are made and left for the caller to remove: the jail has no file system.
Exit status: 0 the guest stopped or was told to, 1 error of the VMM, 2 bad command line or configuration;
killed by SIGSYS: a system call outside the allow-list.
";

/// Where the microVM's description comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Mode {
    /// An inherited socket, connected or listening.
    ControlFd(RawFd),
    /// A socket to be made.
    ControlSocket(PathBuf),
    /// A file.
    Config(PathBuf),
}

/// Whom the jailed process runs as.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Identity {
    /// `--uid`.
    pub uid: Option<u32>,
    /// `--gid`.
    pub gid: Option<u32>,
}

/// A parsed command line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Command {
    /// Print the help text.
    Help,
    /// Print the version.
    Version,
    /// Run a microVM.
    Run {
        /// From what.
        mode: Mode,
        /// As whom.
        identity: Identity,
        /// Confined or not.
        jail: bool,
        /// Whether it may have shares.
        shares: bool,
    },
}

/// What is wrong with a command line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UsageError(String);

impl fmt::Display for UsageError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}; see hull-vmm --help", self.0)
    }
}

impl std::error::Error for UsageError {}

/// Parses the arguments after the program's name.
///
/// # Errors
/// [`UsageError`].
pub fn parse(arguments: impl IntoIterator<Item = OsString>) -> Result<Command, UsageError> {
    let mut arguments = arguments.into_iter();
    let mut mode = None;
    let mut identity = Identity::default();
    let mut jail = true;
    let mut shares = false;
    while let Some(argument) = arguments.next() {
        let name = argument.to_str().unwrap_or_default().to_owned();
        let mut value = || {
            arguments
                .next()
                .ok_or_else(|| UsageError(format!("{name} needs a value")))
        };
        let new_mode = match name.as_str() {
            "--help" | "-h" => return Ok(Command::Help),
            "--version" | "-V" => return Ok(Command::Version),
            "--no-jail" => {
                jail = false;
                continue;
            }
            "--shares" => {
                shares = true;
                continue;
            }
            "--id" => {
                if value()?.len() > MAX_ID_BYTES {
                    return Err(UsageError(format!("--id takes {MAX_ID_BYTES} bytes at most")));
                }
                continue;
            }
            "--uid" => {
                identity.uid = Some(number(&name, &value()?)?);
                continue;
            }
            "--gid" => {
                identity.gid = Some(number(&name, &value()?)?);
                continue;
            }
            "--control-fd" => Mode::ControlFd(number(&name, &value()?)?),
            "--control-socket" => Mode::ControlSocket(value()?.into()),
            "--config" => Mode::Config(value()?.into()),
            _ => return Err(UsageError(format!("unknown argument {}", argument.display()))),
        };
        if mode.replace(new_mode).is_some() {
            return Err(UsageError(
                "give one of --control-fd, --control-socket and --config".to_owned(),
            ));
        }
    }
    let mode = mode.ok_or_else(|| {
        UsageError("one of --control-fd, --control-socket and --config is needed".to_owned())
    })?;
    Ok(Command::Run {
        mode,
        identity,
        jail,
        shares,
    })
}

fn number<T: std::str::FromStr>(name: &str, value: &OsString) -> Result<T, UsageError> {
    let parsed = value.to_str().and_then(|value| value.parse().ok());
    parsed.ok_or_else(|| UsageError(format!("{name}: {} is no number it takes", value.display())))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse_words(words: &[&str]) -> Result<Command, UsageError> {
        parse(words.iter().map(OsString::from))
    }

    #[test]
    fn modes_and_options_are_understood() {
        assert_eq!(
            parse_words(&[
                "--control-fd",
                "3",
                "--id",
                "x",
                "--shares",
                "--uid",
                "7",
                "--gid",
                "8"
            ])
            .unwrap(),
            Command::Run {
                mode: Mode::ControlFd(3),
                identity: Identity {
                    uid: Some(7),
                    gid: Some(8)
                },
                jail: true,
                shares: true,
            }
        );
        assert_eq!(parse_words(&["--config", "x", "--help"]).unwrap(), Command::Help);
    }

    #[test]
    fn mistakes_are_named() {
        for (words, part) in [
            (&[][..], "is needed"),
            (&["--config"][..], "needs a value"),
            (&["--uid", "x", "--config", "f"][..], "--uid"),
            (&["--control-fd", "-"][..], "--control-fd"),
            (&["--config", "a", "--control-fd", "3"][..], "one of"),
            (&["--frobnicate"][..], "--frobnicate"),
        ] {
            let error = parse_words(words).unwrap_err().to_string();
            assert!(error.contains(part), "{error}");
        }
    }
}
