//! Why a process couldn't be set up, as its child side says it.

use std::borrow::Cow;

use nix::errno::Errno;

use crate::error::AgentError;

/// Which part of the setup failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FailureKind {
    /// A step before the program.
    Setup,
    /// The working directory.
    WorkingDirectory,
    /// `execve` itself.
    Exec,
    /// A hook before the program.
    Hook,
}

/// A failed setup.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    /// Which part.
    pub kind: FailureKind,
    /// What was tried; empty where the kind says it.
    pub subject: Cow<'static, str>,
    /// What the kernel said.
    pub errno: Errno,
}

/// For `map_err`: a failed step.
pub fn failed(step: impl Into<Cow<'static, str>>) -> impl FnOnce(Errno) -> Failure {
    move |errno| Failure {
        kind: FailureKind::Setup,
        subject: step.into(),
        errno,
    }
}

impl Failure {
    /// A hook that failed; the outcome says all.
    pub(super) fn of_hook(outcome: String) -> Self {
        Self {
            kind: FailureKind::Hook,
            subject: outcome.into(),
            errno: Errno::ECANCELED,
        }
    }

    /// For the host, which is told what it asked for.
    pub fn explain(self, command: &str, cwd: &str) -> AgentError {
        let Self { kind, subject, errno } = self;
        match kind {
            FailureKind::Setup => AgentError::Setup {
                step: subject.into_owned(),
                errno,
            },
            FailureKind::Hook => AgentError::Hook {
                outcome: subject.into_owned(),
            },
            FailureKind::WorkingDirectory => AgentError::WorkingDirectory {
                path: cwd.to_owned(),
                errno,
            },
            FailureKind::Exec => AgentError::Exec {
                command: command.to_owned(),
                errno,
            },
        }
    }
}
