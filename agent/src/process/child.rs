//! What runs between `clone3` and `execve`, in the new process, with the agent's memory.
//!
//! Invariants: it never returns and never panics on purpose; it takes no lock of the agent. A process that joins a
//! container can be killed by it at any instruction, so on that path nothing is allocated or freed: the agent's
//! allocator can't be left locked. (A container's first process can be killed by nobody before it runs its program.)
//! Nothing of a container can look into it: the agent isn't dumpable, and a container that may look nevertheless
//! (`CAP_SYS_PTRACE`) stands still meanwhile (`cgroup::Staging`).

use std::{
    convert::Infallible,
    os::fd::{AsFd as _, OwnedFd},
    path::PathBuf,
};

use agent_protocol::CreateContainerRequest;
use nix::{
    errno::Errno,
    sched::{CloneFlags, setns, unshare},
    sys::signal::{SigHandler, SigSet, SigmaskHow, Signal, sigprocmask},
    unistd::{sethostname, setsid},
};

use super::{
    Credentials, Program,
    failure::{Failure, failed},
    mounts,
};
use crate::sys;

/// Where the process lives.
#[derive(Debug)]
pub enum Place {
    /// In namespaces of its own, as the first process of a container.
    New {
        /// The mounted root.
        root: PathBuf,
        /// Files to mount over it.
        files: Vec<(PathBuf, PathBuf)>,
        /// Its terminals, not mounted yet.
        devpts: OwnedFd,
        /// Everything else.
        request: Box<CreateContainerRequest>,
    },
    /// In those of a running container.
    Join {
        /// The container's first process.
        pidfd: OwnedFd,
    },
}

/// Everything a process needs, collected before it is made.
#[derive(Debug)]
pub struct Plan {
    /// Where it lives.
    pub place: Place,
    /// What it runs.
    pub program: Program,
    /// As whom, with which rights and limits.
    pub credentials: Credentials,
    /// Directory of its control group.
    pub cgroup: OwnedFd,
    /// stdin, stdout, stderr.
    pub stdio: [OwnedFd; 3],
    /// The number of the terminal in the container's devpts that all three are, if they are one.
    pub terminal: Option<u32>,
}

/// The namespaces of a container that are made with its first process. Its control group's namespace begins where the
/// process is when it asks for one, so it asks later.
pub(super) fn own_namespaces() -> CloneFlags {
    CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWPID | CloneFlags::CLONE_NEWIPC | CloneFlags::CLONE_NEWUTS
}

/// One try to start a process: what parent and child share.
#[derive(Debug)]
pub(super) struct Attempt<'a> {
    plan: &'a Plan,
    failure: Option<Failure>,
}

impl<'a> Attempt<'a> {
    pub(super) fn new(plan: &'a Plan) -> Self {
        Self { plan, failure: None }
    }

    #[expect(
        unsafe_code,
        reason = "makes a process that shares memory until it executes its program"
    )]
    pub(super) fn clone_child(&mut self, namespaces: CloneFlags) -> Result<i32, Errno> {
        // SAFETY: `run` keeps to the rules in this module's comment, and `self` outlives the call.
        unsafe { sys::clone_vfork(namespaces, self.plan.cgroup.as_fd(), run, (&raw mut *self).cast()) }
    }

    /// What the child left here.
    pub(super) fn failure(self) -> Option<Failure> {
        self.failure
    }
}

/// The child's first function.
#[expect(unsafe_code, reason = "takes the argument that clone_child gave")]
unsafe extern "C" fn run(argument: *mut libc::c_void) -> ! {
    // SAFETY: `clone_child` passes an `Attempt` that the suspended parent doesn't touch meanwhile.
    let attempt = unsafe { &mut *argument.cast::<Attempt<'_>>() };
    let Err(failure) = become_program(attempt.plan);
    attempt.failure = Some(failure);
    sys::exit_now(127)
}

fn become_program(plan: &Plan) -> Result<Infallible, Failure> {
    match &plan.place {
        Place::New { .. } => unshare(CloneFlags::CLONE_NEWCGROUP).map_err(failed("creating namespaces"))?,
        Place::Join { pidfd } => setns(
            pidfd,
            own_namespaces().difference(CloneFlags::CLONE_NEWPID) | CloneFlags::CLONE_NEWCGROUP,
        )
        .map_err(failed("joining the container"))?,
    }
    setsid().map_err(failed("setsid"))?;
    if let Place::New {
        root,
        files,
        devpts,
        request,
    } = &plan.place
    {
        sethostname(&request.hostname).map_err(failed("setting the hostname"))?;
        mounts::enter(root, files, devpts, request)?;
        if let Some(number) = plan.terminal {
            mounts::bind_console(number)?;
        }
        plan.credentials.make_directory();
        if request.rootfs.read_only {
            mounts::seal_root()?;
        }
    }
    if plan.terminal.is_some() {
        sys::set_controlling_terminal(plan.stdio[0].as_fd()).map_err(failed("taking the terminal"))?;
    }
    place_descriptors(plan).map_err(failed("arranging descriptors"))?;
    reset_signals().map_err(failed("resetting signals"))?;
    plan.credentials.apply()?;
    Err(plan.program.execute())
}

/// The Rust runtime ignores SIGPIPE; programs expect the default.
fn reset_signals() -> Result<(), Errno> {
    sys::set_signal(Signal::SIGPIPE, SigHandler::SigDfl)?;
    sigprocmask(SigmaskHow::SIG_SETMASK, Some(&SigSet::empty()), None)
}

/// All descriptors but these three close with `execve`.
fn place_descriptors(plan: &Plan) -> Result<(), Errno> {
    for (target, fd) in (0..).zip(&plan.stdio) {
        sys::duplicate_to(fd.as_fd(), target)?;
    }
    sys::cloexec_from(3)
}
