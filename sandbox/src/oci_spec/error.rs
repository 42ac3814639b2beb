//! What is wrong with a bundle, with the field that says it.

use std::{io, path::PathBuf};

/// Why a container can't be made as its `config.json` says.
#[derive(Debug, thiserror::Error)]
pub enum SpecError {
    /// The file can't be read.
    #[error("{}", path.display())]
    Unreadable {
        /// Which file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The file is larger than any that an engine writes.
    #[error("{} is larger than {limit} bytes", path.display())]
    TooLarge {
        /// Which file.
        path: PathBuf,
        /// The bound.
        limit: u64,
    },
    /// The file is not what the specification describes.
    #[error("{}: {field}: {problem}", path.display())]
    Malformed {
        /// Which file.
        path: PathBuf,
        /// Where in it; `.` where it isn't JSON.
        field: String,
        /// What the parser said.
        problem: String,
    },
    /// A value the specification forbids, or that makes no sense.
    #[error("{field}: {problem}")]
    Invalid {
        /// Which field.
        field: String,
        /// What is wrong, and what would be right.
        problem: String,
    },
    /// A value that a container in a microVM can't have.
    #[error("{field}: {problem}")]
    Unsupported {
        /// Which field.
        field: String,
        /// Why, and the way out.
        problem: String,
    },
}

pub(super) type Result<T> = std::result::Result<T, SpecError>;

pub(super) fn invalid<T>(field: impl Into<String>, problem: impl Into<String>) -> Result<T> {
    Err(SpecError::Invalid {
        field: field.into(),
        problem: problem.into(),
    })
}

pub(super) fn unsupported<T>(field: impl Into<String>, problem: impl Into<String>) -> Result<T> {
    Err(SpecError::Unsupported {
        field: field.into(),
        problem: problem.into(),
    })
}
