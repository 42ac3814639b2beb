//! System calls each thread may make, as allow-lists; anything else kills the process with `SIGSYS`.

use seccompiler::BpfProgram;
use std::sync::Arc;

/// Which thread a filter is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// The event loop while it may still configure and start the microVM.
    Setup,
    /// The event loop once the microVM runs.
    EventLoop,
    /// A vCPU.
    Vcpu,
    /// The control socket.
    Control,
}

/// Why a filter can't be used.
#[derive(Debug, thiserror::Error)]
pub enum SeccompError {
    /// The kernel refuses it.
    #[error("can't install a seccomp filter")]
    Install(#[source] seccompiler::Error),
}

/// One thread's filter, or none outside the jail.
#[derive(Debug, Clone, Default)]
pub struct Filter(Option<Arc<BpfProgram>>);

impl Filter {
    /// Confines the calling thread for good.
    ///
    /// # Errors
    /// [`SeccompError`].
    pub fn apply(&self) -> Result<(), SeccompError> {
        self.0.as_ref().map_or(Ok(()), |program| {
            seccompiler::apply_filter(program).map_err(SeccompError::Install)
        })
    }
}

/// All filters of the process.
#[derive(Debug, Clone, Default)]
pub struct Filters {
    filters: [Filter; 4],
}

impl Filters {
    /// No confinement, for tests and `--no-jail`.
    #[must_use]
    pub fn none() -> Self {
        Self::default()
    }

    /// The filter of one kind of thread.
    #[must_use]
    pub fn of(&self, role: Role) -> Filter {
        self.filters[role as usize].clone()
    }
}
