//! When the guest reached which phase of its boot, measured from the first `KVM_RUN`.

use std::{
    sync::{Mutex, OnceLock, PoisonError},
    time::Instant,
};
use vmm_api::BootPhase;

/// A guest may write marks for ever; these many are kept.
const MAX_MARKS: usize = 64;

/// Clock and marks.
#[derive(Debug, Default)]
pub struct BootTimer {
    first_run: OnceLock<Instant>,
    marks: Mutex<Vec<BootPhase>>,
}

impl BootTimer {
    /// Starts the clock unless it runs.
    pub fn note_first_run(&self) {
        self.first_run.get_or_init(Instant::now);
    }

    /// When the guest first ran.
    #[must_use]
    pub fn first_run(&self) -> Option<Instant> {
        self.first_run.get().copied()
    }

    /// Notes that the guest has reached `phase`.
    pub fn mark(&self, phase: u8) {
        let Some(first_run) = self.first_run.get() else {
            return;
        };
        let since_first_run_ns = u64::try_from(first_run.elapsed().as_nanos()).unwrap_or(u64::MAX);
        let mut marks = self.marks.lock().unwrap_or_else(PoisonError::into_inner);
        if marks.len() < MAX_MARKS {
            marks.push(BootPhase {
                phase,
                since_first_run_ns,
            });
        }
    }

    /// The marks in the order they came.
    #[must_use]
    pub fn marks(&self) -> Vec<BootPhase> {
        self.marks.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn marks_before_the_first_run_and_beyond_the_bound_are_dropped() {
        let timer = BootTimer::default();
        timer.mark(1);
        timer.note_first_run();
        (0..200).for_each(|phase| timer.mark(phase));
        assert_eq!(timer.marks().len(), MAX_MARKS);
        assert_eq!(timer.marks()[0].phase, 0);
    }
}
