//! What can go wrong with a sandbox, told once and in the user's terms.

use std::{io, path::PathBuf, time::Duration};

use agent_protocol::{ErrorDetail, ErrorKind, InvalidMessage};
use vmm_api::{ClientError, StopReason};

use crate::{Status, oci_spec::SpecError};

/// Result of this library.
pub type Result<T> = std::result::Result<T, SandboxError>;

/// Why a sandbox could not be made, found or used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SandboxError {
    /// A file or directory of ours.
    #[error("{action} {}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// With what.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A system call without a path.
    #[error("{action}")]
    System {
        /// What was tried.
        action: &'static str,
        /// What the system said.
        source: io::Error,
    },
    /// A part of the installation is missing.
    #[error("{what} not found; looked at: {looked_at}; {remedy}")]
    ComponentMissing {
        /// Which part.
        what: &'static str,
        /// Where it was looked for.
        looked_at: String,
        /// The way out.
        remedy: &'static str,
    },
    /// /dev/kvm is missing or closed.
    #[error("/dev/kvm can't be used: {reason}; {remedy}")]
    Kvm {
        /// Why.
        reason: String,
        /// The way out.
        remedy: &'static str,
    },
    /// An option of the user is impossible.
    #[error("{option}: {problem}")]
    InvalidOption {
        /// The option, as on the command line.
        option: &'static str,
        /// What is wrong, and what would be right.
        problem: String,
    },
    /// A bundle says something wrong or impossible.
    #[error(transparent)]
    Spec(#[from] SpecError),
    /// No such volume.
    #[error("no such volume: {name}; `hull volume ls` lists them")]
    NoVolume {
        /// The name.
        name: String,
    },
    /// A container has the volume.
    #[error("volume {name} is in use by {containers}; remove the containers first")]
    VolumeInUse {
        /// The volume's name.
        name: String,
        /// The containers' names.
        containers: String,
    },
    /// The name is taken.
    #[error(
        "the container name {name:?} is already in use by container {id}; remove it first or choose another name"
    )]
    NameInUse {
        /// The name.
        name: String,
        /// Who has it.
        id: String,
    },
    /// The place where containers are kept can't be written.
    #[error(
        "containers can't be kept in {}; make it writable, name another place by HULL_ROOT, or use --rm",
        path.display()
    )]
    KeepingImpossible {
        /// Which place.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// No such container.
    #[error("no such container: {name}; `hull ps -a` lists what there is")]
    NotFound {
        /// What was asked for.
        name: String,
    },
    /// Several containers match.
    #[error("{name:?} is the beginning of more than one container id; give more of it")]
    Ambiguous {
        /// What was asked for.
        name: String,
    },
    /// Only possible for a running container.
    #[error("container {name} is not running; `hull start {name}` starts it")]
    NotRunning {
        /// Which.
        name: String,
    },
    /// Only possible for a container that isn't paused.
    #[error("container {name} is paused; `hull resume {name}` lets it run again")]
    Paused {
        /// Which.
        name: String,
    },
    /// Only possible for a paused container.
    #[error("container {name} is not paused")]
    NotPaused {
        /// Which.
        name: String,
    },
    /// Only possible for a container that doesn't run.
    #[error("container {name} is {status}; stop it first, or use --force")]
    StillRunning {
        /// Which.
        name: String,
        /// What it does.
        status: Status,
    },
    /// Somebody else starts, stops or removes it.
    #[error("container {name} is being started, stopped or removed by another command; try again")]
    Busy {
        /// Which.
        name: String,
    },
    /// Its network.
    #[error(transparent)]
    Network(#[from] crate::network::NetworkError),
    /// The container's files have no place on the disk.
    #[error("the container's writable layer can't be made")]
    WritableLayer {
        /// Why.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The client has given up.
    #[error("given up")]
    Cancelled,
    /// The monitor has gone.
    #[error(
        "the container's monitor has ended unexpectedly; `hull ps -a` shows what became of the container"
    )]
    MonitorGone,
    /// The monitor, or the guest behind it, doesn't answer.
    #[error("the container doesn't answer; `hull kill` ends it all the same")]
    Silent,
    /// What the monitor could not do, in its words.
    #[error("{message}")]
    Monitor {
        /// For people.
        message: String,
        /// For `run`'s exit code.
        exit_code: u8,
    },
    /// The VMM can't make the microVM as it is asked to.
    #[error("the microVM can't be made: {message}")]
    VmRefused {
        /// What is wrong, in the VMM's words.
        message: String,
    },
    /// The VMM broke off and said why.
    #[error("the VMM failed: {diagnosis}")]
    VmmDied {
        /// The last it said on its standard error.
        diagnosis: String,
    },
    /// The VMM could not be asked.
    #[error("the VMM failed")]
    Vmm {
        /// What the control socket said.
        source: ClientError,
    },
    /// The microVM stopped while it was needed.
    #[error("the microVM stopped{}{}", stop_reason(.reason.as_ref()), detail(.diagnosis))]
    VmStopped {
        /// Why, if the VMM could say it.
        reason: Option<StopReason>,
        /// What the VMM said on its standard error, and the guest on its console.
        diagnosis: String,
    },
    /// The guest didn't come up.
    #[error(
        "the microVM's agent was not ready within {} s{}; HULL_CONSOLE=FILE records the guest kernel's messages",
        timeout.as_secs(), detail(.diagnosis)
    )]
    AgentTimeout {
        /// The time-out that passed.
        timeout: Duration,
        /// What the VMM said.
        diagnosis: String,
    },
    /// The agent speaks another version.
    #[error(
        "the microVM's agent speaks another protocol version: {found}; install agent and hull of one release"
    )]
    AgentVersion {
        /// What it said.
        found: String,
    },
    /// The connection to the agent broke.
    #[error("lost the connection to the microVM's agent")]
    AgentConnection {
        /// What happened.
        source: io::Error,
    },
    /// The agent answered with something this protocol doesn't have.
    #[error("the microVM's agent broke the protocol: {problem}")]
    AgentProtocol {
        /// What is wrong.
        problem: String,
    },
    /// The agent refused.
    #[error("{message}")]
    Agent {
        /// For people.
        message: String,
        /// For programs.
        detail: Box<ErrorDetail>,
    },
    /// A request breaks a bound of the protocol.
    #[error("the container's configuration is not acceptable: {0}")]
    Unacceptable(#[from] InvalidMessage),
    /// A signal ended it before the container ran.
    #[error("interrupted by signal {signal}")]
    Interrupted {
        /// The signal's number.
        signal: i32,
    },
    /// A state file can't be understood.
    #[error("state file {} is damaged", path.display())]
    DamagedState {
        /// Which.
        path: PathBuf,
        /// Why.
        source: serde_json::Error,
    },
}

fn detail(diagnosis: &str) -> String {
    if diagnosis.is_empty() {
        String::new()
    } else {
        format!(": {diagnosis}")
    }
}

fn stop_reason(reason: Option<&StopReason>) -> String {
    match reason {
        None => ": its VMM was killed".to_owned(),
        Some(StopReason::GuestShutdown) => " itself (a kernel panic or a reboot)".to_owned(),
        Some(StopReason::Requested) => " on request".to_owned(),
        Some(StopReason::VcpuFailed { message } | StopReason::VmmFailed { message }) => {
            format!(": {message}")
        }
    }
}

impl SandboxError {
    /// For `map_err`: an operation on a path.
    pub(crate) fn io(action: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io { action, path, source }
    }

    /// For `map_err`: a system call.
    pub(crate) fn system<E: Into<io::Error>>(action: &'static str) -> impl FnOnce(E) -> Self {
        move |source| Self::System {
            action,
            source: source.into(),
        }
    }

    /// The exit code docker gives for it: 127 command not found, 126 not executable, 128 + signal, else 125.
    #[must_use]
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Agent { detail, .. } => match detail.kind.enum_value_or_default() {
                ErrorKind::COMMAND_NOT_FOUND => 127,
                ErrorKind::COMMAND_NOT_EXECUTABLE | ErrorKind::BAD_WORKING_DIRECTORY => 126,
                _ => 125,
            },
            Self::Monitor { exit_code, .. } => *exit_code,
            Self::Interrupted { signal } => u8::try_from(128 + signal).unwrap_or(125),
            _ => 125,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn agent_error(kind: ErrorKind) -> SandboxError {
        let detail = ErrorDetail {
            kind: kind.into(),
            ..ErrorDetail::default()
        };
        SandboxError::Agent {
            message: "x".into(),
            detail: Box::new(detail),
        }
    }

    #[test]
    fn exit_codes_are_those_people_know() {
        assert_eq!(agent_error(ErrorKind::COMMAND_NOT_FOUND).exit_code(), 127);
        assert_eq!(agent_error(ErrorKind::COMMAND_NOT_EXECUTABLE).exit_code(), 126);
        assert_eq!(agent_error(ErrorKind::ROOTFS).exit_code(), 125);
        assert_eq!(SandboxError::Interrupted { signal: 2 }.exit_code(), 130);
    }
}
