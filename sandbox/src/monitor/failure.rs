//! Errors on their way from a monitor to its client: told as people will read them, with `run`'s exit code.

use std::error::Error;

use crate::SandboxError;

use super::protocol::Reply;

/// Longest message; what a guest said may be part of it.
const MAX_BYTES: usize = 8 * 1024;

/// An error and what caused it, on one line.
pub(crate) fn chain(error: &SandboxError) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    let end = text.floor_char_boundary(MAX_BYTES);
    text.truncate(end);
    text
}

/// The message that tells it.
pub(crate) fn reply(error: &SandboxError) -> Reply {
    Reply::Failed {
        message: chain(error),
        exit_code: error.exit_code(),
    }
}
