//! Makes processes: everything from a request to a running program. `child` has the part in the new process.
//!
//! A process is made by one `clone3` that copies nothing: the child borrows the agent's memory, with the calling
//! thread suspended, until it executes its program. So its failure needs no channel: it is a value in shared memory.
//! An exec's process must be born in the container's PID namespace; for that moment, the calling thread has it as the
//! namespace of its children.

mod child;
mod credentials;
mod failure;
pub mod lookup;
mod mounts;
mod program;
mod scheduling;

use std::os::fd::{AsFd as _, OwnedFd};

use nix::{
    errno::Errno,
    sched::{CloneFlags, setns},
};

pub use child::{Place, Plan};
pub use credentials::Credentials;
pub use program::Program;

use crate::{error::AgentError, log::log};
use child::Attempt;

/// Starts the planned process; returns its id once it runs its program.
///
/// The process may be reaped before this returns.
pub fn launch(plan: &Plan) -> Result<i32, AgentError> {
    let mut attempt = Attempt::new(plan);
    let cloned = match &plan.place {
        Place::New { .. } => attempt.clone_child(child::own_namespaces()),
        Place::Join { pidfd } => {
            let own = own_pid_namespace().map_err(AgentError::setup("opening the agent's PID namespace"))?;
            setns(pidfd, CloneFlags::CLONE_NEWPID).map_err(AgentError::setup("joining the container"))?;
            let cloned = attempt.clone_child(CloneFlags::empty());
            if let Err(errno) = setns(own.as_fd(), CloneFlags::CLONE_NEWPID) {
                // This thread could only make processes in the container from now on.
                log!("leaving the container's PID namespace: {errno}");
                std::process::abort();
            }
            cloned
        }
    };
    match (attempt.failure(), cloned) {
        (Some(failure), _) => Err(failure.explain(plan.program.command(), plan.credentials.cwd())),
        (None, cloned) => cloned.map_err(AgentError::setup("clone")),
    }
}

fn own_pid_namespace() -> Result<OwnedFd, Errno> {
    use nix::{
        fcntl::{OFlag, open},
        sys::stat::Mode,
    };
    open(
        "/proc/self/ns/pid",
        OFlag::O_RDONLY | OFlag::O_CLOEXEC,
        Mode::empty(),
    )
}
