//! What can go wrong in the agent, and how the host is told.
//!
//! A request that fails never ends PID 1: it becomes a ttRPC status with an [`ErrorDetail`] that a program
//! can act on, and a message that a person can.

use std::borrow::Cow;

use agent_protocol::{Enum as _, ErrorDetail, ErrorKind, InvalidMessage, frame::StatusCode};
use nix::errno::Errno;

/// Why a request failed.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// The message breaks a bound.
    #[error("invalid request: {0}")]
    Invalid(#[from] InvalidMessage),
    /// The bytes are no message.
    #[error("malformed request")]
    Malformed,
    /// The service has no such method.
    #[error("no method {method:?}")]
    UnknownMethod {
        /// The method asked for.
        method: String,
    },
    /// The host speaks another version.
    #[error("the host speaks protocol version {host}, the agent version {agent}", agent = agent_protocol::PROTOCOL_VERSION)]
    Version {
        /// The host's version.
        host: u32,
    },
    /// No such container.
    #[error("no container {id:?}")]
    NoContainer {
        /// Its id.
        id: String,
    },
    /// No such process.
    #[error("container {container_id:?} has no process {exec_id:?}")]
    NoProcess {
        /// The container's id.
        container_id: String,
        /// The process's id, empty for the first.
        exec_id: String,
    },
    /// The id is taken.
    #[error("{id:?} already exists")]
    Exists {
        /// The id.
        id: String,
    },
    /// Not possible in this state.
    #[error("{id:?} is {state}")]
    WrongState {
        /// The process or container.
        id: String,
        /// The state it is in.
        state: &'static str,
    },
    /// A part of the network can't be set up.
    #[error("network: {subject}: {}", errno.desc())]
    Network {
        /// The interface, address or route.
        subject: String,
        /// What the kernel said.
        errno: Errno,
    },
    /// The user isn't in the image's passwd or group file.
    #[error("unable to find {what} {name:?} in the image's {file}")]
    UnknownUser {
        /// `user` or `group`.
        what: &'static str,
        /// The name.
        name: String,
        /// The file searched.
        file: &'static str,
    },
    /// The root filesystem can't be put together.
    #[error("root filesystem: {step}: {errno}")]
    Rootfs {
        /// What was tried.
        step: String,
        /// What the kernel said.
        errno: Errno,
    },
    /// The process can't be set up as asked.
    #[error("{step}: {errno}")]
    Setup {
        /// What was tried.
        step: String,
        /// What the kernel said.
        errno: Errno,
    },
    /// A `startContainer` hook failed.
    #[error("{outcome}")]
    Hook {
        /// Which, and how.
        outcome: String,
    },
    /// The working directory can't be entered.
    #[error("working directory {path:?}: {errno}")]
    WorkingDirectory {
        /// The directory.
        path: String,
        /// What the kernel said.
        errno: Errno,
    },
    /// The command can't be executed; not found or not executable.
    #[error("exec: {command:?}: {}", exec_reason(command, *.errno))]
    Exec {
        /// The command.
        command: String,
        /// What `execve` said.
        errno: Errno,
    },
    /// A file of the container can't be read or written.
    #[error("{path}: {}", errno.desc())]
    File {
        /// Its path in the container.
        path: String,
        /// What the kernel said.
        errno: Errno,
    },
    /// The host declared streams but didn't attach them.
    #[error("stdio streams were not attached in time")]
    StreamsMissing,
}

/// In the words of runc, which others look for.
fn exec_reason(command: &str, errno: Errno) -> Cow<'static, str> {
    match errno {
        Errno::ENOENT if !command.contains('/') => "executable file not found in $PATH".into(),
        Errno::ENOENT => format!("stat {command}: no such file or directory").into(),
        Errno::EACCES => "permission denied".into(),
        Errno::ENOEXEC => "exec format error".into(),
        // Docker 20.10 makes exit code 126 of the last words.
        Errno::EISDIR => "is a directory: permission denied".into(),
        other => other.desc().into(),
    }
}

impl AgentError {
    /// For `map_err`: a failed step of a setup.
    pub fn setup(step: impl Into<String>) -> impl FnOnce(Errno) -> Self {
        move |errno| Self::Setup {
            step: step.into(),
            errno,
        }
    }

    /// For `map_err`: a failed step of building a root filesystem.
    pub fn rootfs(step: impl Into<String>) -> impl FnOnce(Errno) -> Self {
        move |errno| Self::Rootfs {
            step: step.into(),
            errno,
        }
    }

    fn kind(&self) -> (StatusCode, ErrorKind) {
        match self {
            Self::Invalid(_) | Self::Malformed => (StatusCode::InvalidArgument, ErrorKind::INVALID_REQUEST),
            Self::UnknownMethod { .. } => (StatusCode::Unimplemented, ErrorKind::INVALID_REQUEST),
            Self::Version { .. } => (StatusCode::FailedPrecondition, ErrorKind::VERSION_MISMATCH),
            Self::NoContainer { .. } => (StatusCode::NotFound, ErrorKind::CONTAINER_NOT_FOUND),
            Self::NoProcess { .. } => (StatusCode::NotFound, ErrorKind::PROCESS_NOT_FOUND),
            Self::Exists { .. } => (StatusCode::AlreadyExists, ErrorKind::ALREADY_EXISTS),
            Self::WrongState { .. } => (StatusCode::FailedPrecondition, ErrorKind::WRONG_STATE),
            Self::UnknownUser { .. } => (StatusCode::InvalidArgument, ErrorKind::UNKNOWN_USER),
            Self::Rootfs { .. } => (StatusCode::Internal, ErrorKind::ROOTFS),
            Self::WorkingDirectory { .. } => (StatusCode::InvalidArgument, ErrorKind::BAD_WORKING_DIRECTORY),
            Self::Exec {
                errno: Errno::ENOENT, ..
            } => (StatusCode::NotFound, ErrorKind::COMMAND_NOT_FOUND),
            Self::Exec { .. } => (StatusCode::InvalidArgument, ErrorKind::COMMAND_NOT_EXECUTABLE),
            Self::File {
                errno: Errno::ENOENT, ..
            } => (StatusCode::NotFound, ErrorKind::NOT_FOUND),
            Self::File { .. } => (StatusCode::FailedPrecondition, ErrorKind::FILE),
            Self::Setup { .. } => (StatusCode::Internal, ErrorKind::SETUP),
            Self::Hook { .. } => (StatusCode::FailedPrecondition, ErrorKind::HOOK),
            Self::Network { .. } => (StatusCode::FailedPrecondition, ErrorKind::NETWORK),
            Self::StreamsMissing => (StatusCode::FailedPrecondition, ErrorKind::INTERNAL),
        }
    }

    /// The status code and the detail for the host.
    pub fn to_status(&self) -> (StatusCode, ErrorDetail) {
        let (code, kind) = self.kind();
        let (subject, errno) = match self {
            Self::Rootfs { step, errno } | Self::Setup { step, errno } => (step.clone(), *errno as i32),
            Self::Network { subject, errno } => (subject.clone(), *errno as i32),
            Self::Exec { command, errno } => (command.clone(), *errno as i32),
            Self::WorkingDirectory { path, errno } | Self::File { path, errno } => {
                (path.clone(), *errno as i32)
            }
            Self::NoContainer { id } | Self::Exists { id } | Self::WrongState { id, .. } => (id.clone(), 0),
            Self::UnknownUser { name, .. } => (name.clone(), 0),
            _ => (String::new(), 0),
        };
        debug_assert!(kind.value() > 0, "every error has a kind");
        (
            code,
            ErrorDetail {
                kind: kind.into(),
                subject,
                errno,
                ..ErrorDetail::default()
            },
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn missing_command_is_told_apart_from_one_that_cannot_run() {
        let kind = |errno| {
            let (_, detail) = AgentError::Exec {
                command: "x".into(),
                errno,
            }
            .to_status();
            detail.kind.enum_value_or_default()
        };
        assert_eq!(kind(Errno::ENOENT), ErrorKind::COMMAND_NOT_FOUND);
        assert_eq!(kind(Errno::EACCES), ErrorKind::COMMAND_NOT_EXECUTABLE);
        assert_eq!(kind(Errno::ENOEXEC), ErrorKind::COMMAND_NOT_EXECUTABLE);
    }
}
