//! What can go wrong in a shim, and what containerd is told of it.

use std::{
    io,
    path::{Path, PathBuf},
};

use containerd_shim_protos::ttrpc::{self, Code};
use sandbox::{SandboxError, bundle::BundleError};

/// Result of everything here.
pub type Result<T, E = ShimError> = std::result::Result<T, E>;

/// Everything that can go wrong.
#[derive(Debug, thiserror::Error)]
pub enum ShimError {
    #[error("{problem}; containerd starts this program, see docs/containerd.md")]
    Usage { problem: String },
    #[error("{what} {path}")]
    Io {
        what: &'static str,
        path: PathBuf,
        source: io::Error,
    },
    #[error("{what}")]
    System { what: &'static str, source: io::Error },
    #[error("{path} can't be understood")]
    Config {
        path: PathBuf,
        source: serde_json::Error,
    },
    #[error("{what} from containerd can't be understood: {problem}")]
    Message { what: &'static str, problem: String },
    #[error("there is no container {id:?} here")]
    NoContainer { id: String },
    #[error("container {id:?} has no process {exec_id:?}")]
    NoProcess { id: String, exec_id: String },
    #[error("{what} {id:?} exists already")]
    Exists { what: &'static str, id: String },
    #[error("{what} is {status}: {refused}")]
    WrongState {
        what: String,
        status: &'static str,
        refused: &'static str,
    },
    #[error("process already finished")]
    Finished,
    #[error("{what}")]
    Unsupported { what: &'static str },
    #[error("{field}: {problem}")]
    Refused { field: String, problem: String },
    #[error("mounting {kind} at {target} failed")]
    Mount {
        kind: String,
        target: PathBuf,
        source: io::Error,
    },
    #[error(transparent)]
    Bundle(#[from] BundleError),
    #[error(transparent)]
    Sandbox(#[from] SandboxError),
    #[error("serving at {path}: {problem}")]
    Serve { path: PathBuf, problem: String },
}

impl ShimError {
    /// For `map_err`, where a system call on a path failed.
    pub fn io(what: &'static str, path: impl AsRef<Path>) -> impl FnOnce(io::Error) -> Self {
        let path = path.as_ref().to_owned();
        move |source| Self::Io { what, path, source }
    }

    /// For `map_err`, where another system call failed.
    pub fn system<E: Into<io::Error>>(what: &'static str) -> impl FnOnce(E) -> Self {
        move |source| Self::System {
            what,
            source: source.into(),
        }
    }

    /// The error and what caused it, on one line.
    pub fn chain(&self) -> String {
        let mut text = self.to_string();
        let mut cause = std::error::Error::source(self);
        while let Some(error) = cause {
            text.push_str(": ");
            text.push_str(&error.to_string());
            cause = error.source();
        }
        text
    }

    /// The class of error containerd and its clients act by.
    fn code(&self) -> Code {
        match self {
            Self::NoContainer { .. } | Self::NoProcess { .. } | Self::Finished => Code::NOT_FOUND,
            Self::Exists { .. } => Code::ALREADY_EXISTS,
            Self::WrongState { .. } => Code::FAILED_PRECONDITION,
            Self::Unsupported { .. } => Code::UNIMPLEMENTED,
            Self::Usage { .. } | Self::Config { .. } | Self::Message { .. } | Self::Refused { .. } => {
                Code::INVALID_ARGUMENT
            }
            Self::Bundle(error) => bundle_code(error),
            Self::Sandbox(_)
            | Self::Io { .. }
            | Self::System { .. }
            | Self::Mount { .. }
            | Self::Serve { .. } => Code::UNKNOWN,
        }
    }
}

fn bundle_code(error: &BundleError) -> Code {
    match error {
        BundleError::NotExist | BundleError::Finished | BundleError::NotRunning => Code::NOT_FOUND,
        BundleError::Exists => Code::ALREADY_EXISTS,
        BundleError::InvalidId { .. } => Code::INVALID_ARGUMENT,
        BundleError::Paused
        | BundleError::NotPaused
        | BundleError::AlreadyRunning
        | BundleError::HasStopped
        | BundleError::NotStopped { .. }
        | BundleError::ExecInStopped
        | BundleError::ExecInPaused => Code::FAILED_PRECONDITION,
        _ => Code::UNKNOWN,
    }
}

impl From<ShimError> for ttrpc::Error {
    fn from(error: ShimError) -> Self {
        Self::RpcStatus(ttrpc::get_status(error.code(), error.chain()))
    }
}
