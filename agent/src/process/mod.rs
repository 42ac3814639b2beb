//! Makes processes: everything from a request to a running program. `child` has the part in the new process.
//!
//! A process is made by one `clone3` that copies nothing: the child borrows the agent's memory, with the calling
//! thread suspended, until it executes its program. So its failure needs no channel: it is a value in shared memory.
//! An exec's process must be born in the container's PID namespace; for that moment, the calling thread has it as the
//! namespace of its children.

mod child;
mod copy_up;
mod credentials;
mod failure;
mod hooks;
pub mod lookup;
mod mount_options;
mod mounts;
mod program;
mod report;
mod scheduling;
mod user_namespace;

use std::{
    os::fd::{AsFd as _, OwnedFd},
    thread,
};

use agent_protocol::UserNamespace;
use nix::{
    errno::Errno,
    sched::{CloneFlags, setns},
};

pub use child::{Joined, NEW_TIME, Place, Plan};
pub use credentials::Credentials;
pub use hooks::Hooks;
pub use mounts::Stage;
pub use program::Program;
pub use user_namespace::outside;

use crate::{error::AgentError, log::log};
use child::Attempt;
use report::Report;
use user_namespace::Handshake;

/// Starts the planned process; returns its id once it runs its program.
///
/// The process may be reaped before this returns.
pub fn launch(plan: &Plan) -> Result<i32, AgentError> {
    let mut report = None;
    let (attempt, cloned) = match &plan.place {
        Place::New { request, joined, .. } => match request.user_namespace.as_ref() {
            Some(namespace) => launch_mapped(plan, namespace)?,
            None => {
                let mut attempt = Attempt::new(plan);
                let namespaces = joined.own_namespaces();
                let cloned = match &joined.pid {
                    Some(container) => born_in(container, || attempt.clone_child(namespaces))?,
                    None => attempt.clone_child(namespaces),
                };
                (attempt.failure(), cloned)
            }
        },
        Place::Join { pidfd, further } => {
            if further.contains(NEW_TIME) {
                report = Some(Report::new().map_err(AgentError::setup("creating a pipe"))?);
            }
            let mut attempt = Attempt::new(plan).with_report(report.as_ref());
            let cloned = born_in(pidfd, || attempt.clone_child(CloneFlags::empty()))?;
            (attempt.failure(), cloned)
        }
    };
    let failure = attempt.or_else(|| report.and_then(|report| report.receive()));
    match (failure, cloned) {
        (Some(failure), _) => Err(failure.explain(plan.program.command(), plan.credentials.cwd())),
        (None, cloned) => cloned.map_err(AgentError::setup("clone")),
    }
}

/// Makes a process in the PID namespace of a container that runs.
fn born_in(
    container: &OwnedFd,
    make: impl FnOnce() -> Result<i32, Errno>,
) -> Result<Result<i32, Errno>, AgentError> {
    let own = own_pid_namespace().map_err(AgentError::setup("opening the agent's PID namespace"))?;
    setns(container, CloneFlags::CLONE_NEWPID).map_err(AgentError::setup("joining the container"))?;
    let made = make();
    if let Err(errno) = setns(own.as_fd(), CloneFlags::CLONE_NEWPID) {
        // This thread could only make processes in the container from now on.
        log!("leaving the container's PID namespace: {errno}");
        std::process::abort();
    }
    Ok(made)
}

/// What became of an attempt: what the process said, and its id.
type Outcome = (Option<failure::Failure>, Result<i32, Errno>);

/// Starts a process in a user namespace of its own, while another thread does what it can't.
fn launch_mapped(plan: &Plan, namespace: &UserNamespace) -> Result<Outcome, AgentError> {
    let handshake = Handshake::new().map_err(AgentError::setup("creating a pipe"))?;
    let credentials = &plan.credentials;
    Ok(thread::scope(|scope| {
        let mapper = thread::Builder::new()
            .name("user namespace".into())
            .stack_size(128 * 1024)
            .spawn_scoped(scope, || handshake.serve(namespace, credentials));
        let mut attempt = Attempt::new(plan).with_handshake(Some(&handshake));
        let cloned = match mapper {
            Ok(_) => attempt.clone_child(child::own_namespaces() | CloneFlags::CLONE_NEWUSER),
            Err(error) => Err(error.raw_os_error().map_or(Errno::EAGAIN, Errno::from_raw)),
        };
        handshake.end();
        (attempt.failure(), cloned)
    }))
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
