//! What can go wrong with a container made from a bundle, in the words that users of `runc` match on.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::SandboxError;

/// Result of this module.
pub type Result<T> = std::result::Result<T, BundleError>;

/// Why something could not be done with a container.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BundleError {
    /// No container has this id.
    #[error("container does not exist")]
    NotExist,
    /// Another container has this id.
    #[error("container with given ID already exists")]
    Exists,
    /// The id can't be one.
    #[error(
        "invalid container ID format: {id:?}; letters, digits and _ + - . are allowed, but not \".\" or \"..\""
    )]
    InvalidId {
        /// What was given.
        id: String,
    },
    /// Only possible while it runs.
    #[error("container not running")]
    NotRunning,
    /// Not possible while it is paused.
    #[error("container paused")]
    Paused,
    /// Only possible while it is paused.
    #[error("container not paused")]
    NotPaused,
    /// It was started before.
    #[error("cannot start an already running container")]
    AlreadyRunning,
    /// It has run to its end.
    #[error("cannot start a container that has stopped")]
    HasStopped,
    /// It has to be stopped first.
    #[error("cannot delete container {id} that is not stopped: {status}")]
    NotStopped {
        /// Which.
        id: String,
        /// Its state.
        status: super::BundleStatus,
    },
    /// No process runs in it.
    #[error("cannot exec in a stopped container")]
    ExecInStopped,
    /// Nothing runs in it at the moment.
    #[error("cannot exec in a paused container (use --ignore-paused to override)")]
    ExecInPaused,
    /// The process has ended.
    #[error("process already finished")]
    Finished,
    /// Another command holds it.
    #[error("container {id} is being created, started or deleted by another command; try again")]
    Busy {
        /// Which.
        id: String,
    },
    /// Its program can't be executed, in the wording of runc.
    #[error("{message}")]
    Program {
        /// What is wrong with which program.
        message: String,
        /// Whether it isn't there at all.
        missing: bool,
    },
    /// A hook failed.
    #[error("error running {kind} hook #{index}: {} {problem}", path.display())]
    Hook {
        /// Which kind.
        kind: &'static str,
        /// Its place in the list.
        index: usize,
        /// Its program.
        path: PathBuf,
        /// How it failed.
        problem: String,
    },
    /// The console socket doesn't take the terminal.
    #[error("the console socket can't be used")]
    ConsoleSocket {
        /// What the system said.
        source: std::io::Error,
    },
    /// The control groups on the host.
    #[error("control group {}: {action}", path.display())]
    Cgroup {
        /// Which one.
        path: PathBuf,
        /// What was tried.
        action: &'static str,
        /// What the system said.
        source: std::io::Error,
    },
    /// What the container's monitor could not do, in its words.
    #[error("{message}")]
    Monitor {
        /// For people.
        message: String,
    },
    /// Everything that isn't special to bundles.
    #[error(transparent)]
    Sandbox(#[from] SandboxError),
}

/// Longest message between processes; what a guest said may be part of it.
const MAX_MESSAGE_BYTES: usize = 8 * 1024;

/// An error on its way from a monitor to its client.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub(super) enum Refusal {
    NotRunning,
    Paused,
    NotPaused,
    AlreadyRunning,
    HasStopped,
    Finished,
    Program { message: String, missing: bool },
    Other { message: String },
}

/// An error and what caused it, on one line.
fn chain(error: &BundleError) -> String {
    let mut text = error.to_string();
    let mut source = std::error::Error::source(error);
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    let end = text.floor_char_boundary(MAX_MESSAGE_BYTES);
    text.truncate(end);
    text
}

impl From<&BundleError> for Refusal {
    fn from(error: &BundleError) -> Self {
        match error {
            BundleError::NotRunning => Self::NotRunning,
            BundleError::Paused => Self::Paused,
            BundleError::NotPaused => Self::NotPaused,
            BundleError::AlreadyRunning => Self::AlreadyRunning,
            BundleError::HasStopped => Self::HasStopped,
            BundleError::Finished => Self::Finished,
            BundleError::Program { message, missing } => Self::Program {
                message: message.clone(),
                missing: *missing,
            },
            other => Self::Other {
                message: chain(other),
            },
        }
    }
}

impl From<Refusal> for BundleError {
    fn from(refusal: Refusal) -> Self {
        match refusal {
            Refusal::NotRunning => Self::NotRunning,
            Refusal::Paused => Self::Paused,
            Refusal::NotPaused => Self::NotPaused,
            Refusal::AlreadyRunning => Self::AlreadyRunning,
            Refusal::HasStopped => Self::HasStopped,
            Refusal::Finished => Self::Finished,
            Refusal::Program { message, missing } => Self::Program { message, missing },
            Refusal::Other { message } => Self::Monitor { message },
        }
    }
}

impl BundleError {
    /// An agent's refusal, told apart where users of runc do.
    pub(super) fn from_agent(error: SandboxError) -> Self {
        use agent_protocol::ErrorKind;
        let SandboxError::Agent { message, detail } = &error else {
            return error.into();
        };
        match detail.kind.enum_value_or_default() {
            kind @ (ErrorKind::COMMAND_NOT_FOUND | ErrorKind::COMMAND_NOT_EXECUTABLE) => Self::Program {
                message: message.clone(),
                missing: kind == ErrorKind::COMMAND_NOT_FOUND,
            },
            ErrorKind::PROCESS_NOT_FOUND => Self::Finished,
            _ => error.into(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refusal_keeps_what_clients_tell_apart() {
        for error in [
            BundleError::NotRunning,
            BundleError::Paused,
            BundleError::NotPaused,
            BundleError::AlreadyRunning,
            BundleError::HasStopped,
            BundleError::Finished,
        ] {
            let told = BundleError::from(Refusal::from(&error));
            assert_eq!(told.to_string(), error.to_string());
        }
    }
}
