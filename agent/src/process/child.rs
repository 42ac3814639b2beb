//! What runs between `clone3` and `execve`, in the new process, with the agent's memory.
//!
//! Invariants: it never returns and never panics on purpose; it takes no lock of the agent. A process that joins a
//! container can be killed by it at any instruction, so on that path nothing is allocated or freed: the agent's
//! allocator can't be left locked. (A container's first process can be killed by nobody before it runs its program: if it
//! is born in the PID namespace of another container, that one stands still meanwhile.)
//! Nothing of a container can look into it: the agent isn't dumpable, and a container that may look nevertheless
//! (`CAP_SYS_PTRACE`) stands still meanwhile (`containers::pod`).

use std::{
    convert::Infallible,
    os::fd::{AsFd as _, OwnedFd},
};

use agent_protocol::{ClockOffset, CreateContainerRequest, TimeNamespace};
use nix::{
    errno::Errno,
    sched::{CloneFlags, setns, unshare},
    sys::signal::{SigHandler, SigSet, SigmaskHow, Signal, sigprocmask},
    unistd::{sethostname, setsid},
};

use super::{
    Credentials, Hooks, Program, Stage,
    failure::{Failure, failed},
    mounts,
    report::Report,
    user_namespace::Handshake,
};
use crate::sys::{self, Birth};

/// Where the process lives.
#[derive(Debug)]
pub enum Place {
    /// In namespaces of its own, as the first process of a container.
    New {
        /// What is ready to be mounted.
        stage: Box<Stage>,
        /// Namespaces of other containers, in place of its own.
        joined: Joined,
        /// Programs to run before its own.
        hooks: Hooks,
        /// Everything else.
        request: Box<CreateContainerRequest>,
    },
    /// In those of a running container.
    Join {
        /// The container's first process.
        pidfd: OwnedFd,
        /// Namespaces of the container beside those that all have.
        further: CloneFlags,
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

/// The first processes of the containers whose namespaces a container has.
#[derive(Debug, Default)]
pub struct Joined {
    /// For System V objects and message queues.
    pub ipc: Option<OwnedFd>,
    /// For the host's name.
    pub uts: Option<OwnedFd>,
    /// For processes.
    pub pid: Option<OwnedFd>,
}

impl Joined {
    /// The namespaces a container has of its own.
    pub(super) fn own_namespaces(&self) -> CloneFlags {
        let joined = [
            (&self.ipc, CloneFlags::CLONE_NEWIPC),
            (&self.uts, CloneFlags::CLONE_NEWUTS),
            (&self.pid, CloneFlags::CLONE_NEWPID),
        ];
        joined
            .into_iter()
            .filter(|(container, _)| container.is_some())
            .fold(own_namespaces(), |own, (_, kind)| own.difference(kind))
    }

    /// Joins those that a process can join after its birth.
    fn enter(&self) -> Result<(), Errno> {
        for (container, kind) in [
            (&self.ipc, CloneFlags::CLONE_NEWIPC),
            (&self.uts, CloneFlags::CLONE_NEWUTS),
        ] {
            if let Some(container) = container {
                setns(container, kind)?;
            }
        }
        Ok(())
    }
}

/// `CLONE_NEWTIME`, which nix lacks.
pub const NEW_TIME: CloneFlags = CloneFlags::from_bits_retain(libc::CLONE_NEWTIME);

/// The namespaces of a container that are made with its first process. Its control group's namespace begins where the
/// process is when it asks for one, so it asks later.
pub(super) fn own_namespaces() -> CloneFlags {
    CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWPID | CloneFlags::CLONE_NEWIPC | CloneFlags::CLONE_NEWUTS
}

/// One try to start a process: what parent and child share.
#[derive(Debug)]
pub(super) struct Attempt<'a> {
    plan: &'a Plan,
    /// For a process that is born in a user namespace.
    handshake: Option<&'a Handshake>,
    /// For one with memory of its own.
    report: Option<&'a Report>,
    failure: Option<Failure>,
}

impl<'a> Attempt<'a> {
    pub(super) fn new(plan: &'a Plan) -> Self {
        Self {
            plan,
            handshake: None,
            report: None,
            failure: None,
        }
    }

    pub(super) fn with_handshake(mut self, handshake: Option<&'a Handshake>) -> Self {
        self.handshake = handshake;
        self
    }

    pub(super) fn with_report(mut self, report: Option<&'a Report>) -> Self {
        self.report = report;
        self
    }

    #[expect(
        unsafe_code,
        reason = "makes a process that shares memory until it executes its program"
    )]
    pub(super) fn clone_child(&mut self, namespaces: CloneFlags) -> Result<i32, Errno> {
        let birth = Birth {
            namespaces,
            cgroup: Some(self.plan.cgroup.as_fd()),
            pid: self.handshake.map(|handshake| &handshake.pid),
            own_memory: self.report.is_some(),
        };
        // SAFETY: `run` keeps to the rules in this module's comment, and `self` outlives the call.
        unsafe { sys::clone_vfork(&birth, run, (&raw mut *self).cast()) }
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
    let Err(failure) = become_program(attempt.plan, attempt.handshake);
    if let Some(report) = attempt.report {
        report.send(&failure);
    }
    attempt.failure = Some(failure);
    sys::exit_now(127)
}

fn become_program(plan: &Plan, handshake: Option<&Handshake>) -> Result<Infallible, Failure> {
    match &plan.place {
        Place::New { request, joined, .. } => {
            if let Some(handshake) = handshake {
                handshake.become_root()?;
            }
            unshare(CloneFlags::CLONE_NEWCGROUP).map_err(failed("creating namespaces"))?;
            joined.enter().map_err(failed("joining another container"))?;
            if let Some(time) = request.time_namespace.as_ref() {
                enter_time(time)?;
            }
        }
        Place::Join { pidfd, further } => {
            // There it would lack the rights.
            if further.contains(CloneFlags::CLONE_NEWUSER) {
                plan.credentials.apply_limits()?;
            }
            let namespaces =
                own_namespaces().difference(CloneFlags::CLONE_NEWPID) | CloneFlags::CLONE_NEWCGROUP;
            setns(pidfd, namespaces | *further).map_err(failed("joining the container"))?;
            if further.contains(CloneFlags::CLONE_NEWUSER) {
                sys::set_identity(0, 0, &[]).map_err(failed("becoming root in the user namespace"))?;
            }
        }
    }
    setsid().map_err(failed("setsid"))?;
    if let Place::New {
        stage,
        request,
        joined,
        ..
    } = &plan.place
    {
        if joined.uts.is_none() {
            set_names(request)?;
        }
        mounts::enter(stage, request)?;
        if let Some(number) = plan.terminal {
            mounts::bind_console(number)?;
        }
        plan.credentials.make_directory();
        mounts::seal(request)?;
    }
    if plan.terminal.is_some() {
        sys::set_controlling_terminal(plan.stdio[0].as_fd()).map_err(failed("taking the terminal"))?;
    }
    place_descriptors(plan).map_err(failed("arranging descriptors"))?;
    reset_signals().map_err(failed("resetting signals"))?;
    match (handshake, &plan.place) {
        (Some(handshake), _) => handshake.be_limited()?,
        (None, Place::Join { further, .. }) if further.contains(CloneFlags::CLONE_NEWUSER) => {}
        _ => plan.credentials.apply_limits()?,
    }
    plan.credentials.apply()?;
    if let Place::New { hooks, .. } = &plan.place {
        hooks.run()?;
    }
    Err(plan.program.execute())
}

fn set_names(request: &CreateContainerRequest) -> Result<(), Failure> {
    sethostname(&request.hostname).map_err(failed("setting the hostname"))?;
    if !request.domainname.is_empty() {
        sys::set_domain_name(&request.domainname).map_err(failed("setting the domain's name"))?;
    }
    Ok(())
}

/// Makes a time namespace, which the process is in from the moment it executes its program.
fn enter_time(namespace: &TimeNamespace) -> Result<(), Failure> {
    unshare(NEW_TIME).map_err(failed("creating a time namespace"))?;
    let line =
        |clock: &str, offset: &ClockOffset| format!("{clock} {} {}\n", offset.seconds, offset.nanoseconds);
    let offsets = line("monotonic", &namespace.monotonic) + &line("boottime", &namespace.boottime);
    std::fs::write("/proc/self/timens_offsets", offsets).map_err(|error| {
        let errno = error.raw_os_error().map_or(Errno::EIO, Errno::from_raw);
        failed("setting the time namespace's offsets")(errno)
    })
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
