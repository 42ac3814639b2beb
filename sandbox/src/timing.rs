//! How long each step of a sandbox's life took.

use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

/// Durations of the steps, in order. A step that hasn't happened is zero.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Timing {
    /// The front-end: from its start until it asked for the sandbox (arguments, recovery, image look-up).
    pub client_us: u64,
    /// Starting the VMM and assembling the microVM, until its vCPUs run.
    pub vm_setup_us: u64,
    /// From the vCPUs' start until the agent's first instruction.
    pub kernel_us: u64,
    /// From the agent's first instruction until its servers listened and the host knew.
    pub agent_us: u64,
    /// Root filesystem, namespaces and process, until its program ran.
    pub container_us: u64,
    /// The program itself, until its exit was known and its output had arrived.
    pub run_us: u64,
    /// Stopping the microVM and removing what belonged to it.
    pub teardown_us: u64,
}

/// Measures consecutive steps.
#[derive(Debug)]
pub(crate) struct Stopwatch {
    last: Instant,
}

pub(crate) fn microseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

impl Stopwatch {
    pub(crate) fn start() -> Self {
        Self { last: Instant::now() }
    }

    /// The time since the last lap.
    pub(crate) fn lap(&mut self) -> Duration {
        let now = Instant::now();
        let lap = now - self.last;
        self.last = now;
        lap
    }
}

impl Timing {
    /// All steps together.
    #[must_use]
    pub fn total_us(&self) -> u64 {
        [
            self.client_us,
            self.vm_setup_us,
            self.kernel_us,
            self.agent_us,
            self.container_us,
            self.run_us,
            self.teardown_us,
        ]
        .into_iter()
        .fold(0, u64::saturating_add)
    }
}
