//! The microVM a container is in, as its monitor sees it: its own, or that of its pod.

use std::{
    os::fd::{AsFd as _, BorrowedFd},
    time::{Duration, Instant},
};

use super::{
    error::{BundleError, Result},
    pod::Pod,
    protocol::{Reply, Request},
};
use crate::{SandboxError, monitor::Connection, network::Wiring, vmm_client::Vmm};

/// How long the pod's monitor may take to see a container off.
const LEAVE_PATIENCE: Duration = Duration::from_secs(15);

/// Where a container is.
#[derive(Debug)]
pub(super) enum Machine {
    /// In a microVM of this monitor's.
    Own(Box<OwnMachine>),
    /// In that of its pod.
    Pods(PodLink),
}

/// A microVM that ends with this process.
#[derive(Debug)]
pub(super) struct OwnMachine {
    // The order of fields is the order of destruction.
    pub(super) vmm: Vmm,
    /// Interfaces it can have.
    pub(super) devices: usize,
    /// From the start on.
    pub(super) wiring: Wiring,
    /// What makes it a pod's.
    pub(super) pod: Option<Pod>,
}

/// The connection to the monitor that has the microVM. It ends with either monitor, and the container with it.
#[derive(Debug)]
pub(super) struct PodLink {
    connection: Connection,
}

impl PodLink {
    pub(super) fn new(connection: Connection) -> Self {
        Self { connection }
    }

    pub(super) fn as_fd(&self) -> BorrowedFd<'_> {
        self.connection.as_fd()
    }

    /// Has the container removed from the microVM, and waits until it is.
    fn leave(&mut self) {
        if self.connection.send(&Request::Leave, &[]).is_err() {
            return;
        }
        let deadline = Instant::now() + LEAVE_PATIENCE;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            match self.connection.wait::<Reply>(Some(left)) {
                Ok(Some((Reply::Done | Reply::Failed(_), _)) | None) => return,
                Ok(Some(_)) => {}
                Err(error) => {
                    tracing::debug!(%error, "leaving a pod's microVM");
                    return;
                }
            }
        }
    }
}

impl Machine {
    pub(super) fn own(&mut self) -> Option<&mut OwnMachine> {
        match self {
            Self::Own(own) => Some(own),
            Self::Pods(_) => None,
        }
    }

    pub(super) fn pod(&mut self) -> Option<&mut Pod> {
        self.own()?.pod.as_mut()
    }

    /// Whether containers stop by themselves, as the microVM may have several.
    pub(super) fn is_pods(&self) -> bool {
        match self {
            Self::Own(own) => own.pod.is_some(),
            Self::Pods(_) => true,
        }
    }

    /// Readable when it has gone.
    pub(super) fn end_fds(&self) -> Vec<BorrowedFd<'_>> {
        match self {
            Self::Own(own) => vec![own.vmm.control_fd(), own.vmm.as_fd()],
            // Nothing comes over it that nobody waits for.
            Self::Pods(link) => vec![link.as_fd()],
        }
    }

    /// Ends what hangs: the microVM, if it is this container's. A pod's goes on.
    pub(super) fn kill(&mut self) -> bool {
        match self {
            Self::Own(own) => {
                own.vmm.kill();
                true
            }
            Self::Pods(_) => false,
        }
    }

    /// Why it has stopped, once it has.
    pub(super) fn stopped(&mut self) -> BundleError {
        match self {
            Self::Own(own) => own.vmm.stopped().into(),
            Self::Pods(_) => BundleError::Monitor {
                message: "the microVM of its pod has ended".into(),
            },
        }
    }

    /// Stops the vCPUs, or lets them run again.
    pub(super) fn set_paused(&mut self, paused: bool) -> Result<()> {
        let Some(own) = self.own() else {
            return Err(SandboxError::MonitorGone.into());
        };
        if paused {
            own.vmm.pause()?;
        } else {
            own.vmm.resume()?;
        }
        Ok(())
    }

    /// Takes what belongs to the container away, and waits until it is gone.
    pub(super) fn end(&mut self) {
        match self {
            Self::Own(own) => {
                own.vmm.end();
                drop(std::mem::take(&mut own.wiring));
            }
            Self::Pods(link) => link.leave(),
        }
    }
}
