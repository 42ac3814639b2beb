//! The end of a process that stands for another one: by the same code, or by the same signal.

use std::time::{SystemTime, UNIX_EPOCH};

use agent_protocol::{WaitProcessResponse, wait_process_response::Outcome};
use nix::sys::{
    resource::{Resource, setrlimit},
    signal::{SigSet, Signal, raise},
};

use super::record::{BundleExit, ProcessExit};

/// What a container ends by whose microVM was ended.
pub(super) const KILLED: ProcessExit = ProcessExit::Signal(9);

impl From<&WaitProcessResponse> for ProcessExit {
    fn from(response: &WaitProcessResponse) -> Self {
        match response.outcome {
            Some(Outcome::ExitCode(code)) => Self::Code(u8::try_from(code).unwrap_or(255)),
            Some(Outcome::Signal(signal)) => Self::Signal(u8::try_from(signal).unwrap_or(9)),
            _ => Self::Code(255),
        }
    }
}

impl BundleExit {
    /// Now, in this way.
    pub(super) fn now(status: ProcessExit, oom_killed: bool, error: Option<String>) -> Self {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Self {
            status,
            at_ns: u64::try_from(now.as_nanos()).unwrap_or(0),
            oom_killed,
            error,
        }
    }
}

/// Ends this process as the other one ended.
pub(super) fn end_like(exit: ProcessExit) -> ! {
    if let ProcessExit::Signal(number) = exit {
        // Its memory is nobody's to look at.
        let _ = setrlimit(Resource::RLIMIT_CORE, 0, 0);
        if let Ok(signal) = Signal::try_from(i32::from(number)) {
            // It is blocked: first it waits, then it is let through alone.
            let mut mask = SigSet::empty();
            mask.add(signal);
            let _ = raise(signal);
            let _ = mask.thread_unblock();
        }
    }
    std::process::exit(exit.code().into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn outcome_keeps_a_signal_apart_from_a_code() {
        let response = |outcome| WaitProcessResponse {
            outcome: Some(outcome),
            ..WaitProcessResponse::default()
        };
        let exit = ProcessExit::from(&response(Outcome::Signal(15)));
        assert_eq!((exit, exit.code()), (ProcessExit::Signal(15), 143));
        let exit = ProcessExit::from(&response(Outcome::ExitCode(143)));
        assert_eq!((exit, exit.code()), (ProcessExit::Code(143), 143));
    }
}
