//! How a process with memory of its own says why it couldn't be set up.

use std::os::fd::OwnedFd;

use nix::{
    errno::Errno,
    fcntl::OFlag,
    unistd::{pipe2, read, write},
};

use super::failure::{Failure, FailureKind};

/// Longest step that is told.
const MAX_STEP_BYTES: usize = 200;

/// A pipe that closes when the process executes its program.
#[derive(Debug)]
pub(super) struct Report {
    reader: OwnedFd,
    writer: OwnedFd,
}

impl Report {
    pub(super) fn new() -> Result<Self, Errno> {
        let (reader, writer) = pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK)?;
        Ok(Self { reader, writer })
    }

    /// The process's side. Allocates nothing.
    pub(super) fn send(&self, failure: &Failure) {
        let mut message = [0; MAX_STEP_BYTES + 5];
        message[0] = match failure.kind {
            FailureKind::Setup => 0,
            FailureKind::WorkingDirectory => 1,
            FailureKind::Exec => 2,
            FailureKind::Hook => 3,
        };
        message[1..5].copy_from_slice(&(failure.errno as i32).to_ne_bytes());
        let step = failure.subject.as_bytes();
        let length = step.len().min(MAX_STEP_BYTES);
        message[5..5 + length].copy_from_slice(&step[..length]);
        let _ = write(&self.writer, &message[..5 + length]);
    }

    /// The agent's side, when the process runs its program or has ended.
    pub(super) fn receive(&self) -> Option<Failure> {
        let mut message = [0; MAX_STEP_BYTES + 5];
        let length = read(&self.reader, &mut message)
            .ok()
            .filter(|length| *length >= 5)?;
        let kind = match message[0] {
            1 => FailureKind::WorkingDirectory,
            2 => FailureKind::Exec,
            3 => FailureKind::Hook,
            _ => FailureKind::Setup,
        };
        let errno = i32::from_ne_bytes([message[1], message[2], message[3], message[4]]);
        Some(Failure {
            kind,
            subject: String::from_utf8_lossy(&message[5..length]).into_owned().into(),
            errno: Errno::from_raw(errno),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failure_comes_over_as_it_was() {
        let report = Report::new().unwrap();
        assert_eq!(report.receive(), None);
        let failure = Failure {
            kind: FailureKind::WorkingDirectory,
            subject: "somewhere".into(),
            errno: Errno::EACCES,
        };
        report.send(&failure);
        assert_eq!(report.receive(), Some(failure));
    }
}
