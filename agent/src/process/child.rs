//! What runs between `fork` and `execve`.
//!
//! Two forks: the intermediate joins the control group and makes or joins the namespaces; its child is in
//! the PID namespace and becomes the program. The intermediate then exits, so that the process is the
//! agent's own child and is reaped by it.
//!
//! Invariants: one thread; no lock of the agent is taken; it never returns; no descriptor but stdio and
//! the channel is open when anything of the container can look at the process, and it isn't dumpable then.

use std::{
    convert::Infallible,
    ffi::CString,
    os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd},
    path::PathBuf,
};

use agent_protocol::{CreateContainerRequest, Process};
use nix::{
    errno::Errno,
    fcntl::{FcntlArg, FdFlag, OFlag, fcntl, open},
    sched::{CloneFlags, setns, unshare},
    sys::{
        prctl,
        signal::{SigHandler, SigSet, SigmaskHow, Signal, sigprocmask},
        socket::{MsgFlags, recv},
        stat::{Mode, fstat, makedev},
    },
    unistd::{Gid, Uid, fchown, sethostname, setsid, write},
};

use super::{
    channel::{self, Failure, Message},
    credentials,
    mounts::{self, failed},
};
use crate::{
    sys::{self, Fork},
    user::Identity,
};

/// Where the process lives.
#[derive(Debug)]
pub enum Place {
    /// In namespaces of its own, as the first process of a container.
    New {
        /// The mounted root.
        root: PathBuf,
        /// Files to mount over it.
        files: Vec<(PathBuf, PathBuf)>,
        /// Everything else.
        request: Box<CreateContainerRequest>,
    },
    /// In those of a running container.
    Join {
        /// The container's first process.
        pidfd: OwnedFd,
    },
}

/// Everything a process needs, collected before the fork.
#[derive(Debug)]
pub struct Plan {
    /// Where it lives.
    pub place: Place,
    /// What it runs.
    pub process: Process,
    /// As whom.
    pub identity: Identity,
    /// `cgroup.procs` of its control group, open for writing.
    pub cgroup_procs: OwnedFd,
    /// stdin, stdout, stderr; with a terminal they are the terminal's.
    pub stdio: [OwnedFd; 3],
}

/// Number of the channel in the child, after stdio.
const CHANNEL_FD: i32 = 3;

fn namespaces() -> CloneFlags {
    CloneFlags::CLONE_NEWNS
        | CloneFlags::CLONE_NEWPID
        | CloneFlags::CLONE_NEWIPC
        | CloneFlags::CLONE_NEWUTS
        | CloneFlags::CLONE_NEWCGROUP
}

/// Becomes the planned process. Called in the forked child.
pub(super) fn run(plan: &Plan, channel: &OwnedFd) -> ! {
    // A borrow, as the objects belong to the parent's copy; they are closed by number below.
    let mut channel = channel.as_fd();
    let Err(failure) = intermediate(plan, &mut channel);
    let reported = channel::send(channel, &Message::Failure(failure));
    sys::exit_now(if reported.is_ok() { 1 } else { 2 })
}

/// `channel` follows the channel to its new number.
fn intermediate(plan: &Plan, channel: &mut BorrowedFd<'_>) -> Result<Infallible, Failure> {
    reset_signals().map_err(failed("resetting signals"))?;
    prctl::set_dumpable(false).map_err(failed("setting dumpable"))?;
    write(&plan.cgroup_procs, b"0").map_err(failed("joining the control group"))?;
    match &plan.place {
        Place::New { .. } => unshare(namespaces()).map_err(failed("creating namespaces"))?,
        Place::Join { pidfd } => setns(pidfd, namespaces()).map_err(failed("joining the container"))?,
    }
    place_descriptors(plan, channel).map_err(failed("arranging descriptors"))?;
    match sys::fork().map_err(failed("fork"))? {
        Fork::Parent { child } => {
            let sent = channel::send(*channel, &Message::Pid(child));
            sys::exit_now(i32::from(sent.is_err()))
        }
        Fork::Child => become_program(plan, *channel),
    }
}

/// The Rust runtime ignores SIGPIPE; programs expect the default.
fn reset_signals() -> Result<(), Errno> {
    sigprocmask(SigmaskHow::SIG_SETMASK, Some(&SigSet::empty()), None)?;
    for signal in Signal::iterator().filter(|signal| !matches!(signal, Signal::SIGKILL | Signal::SIGSTOP)) {
        sys::set_signal(signal, SigHandler::SigDfl)?;
    }
    Ok(())
}

fn place_descriptors(plan: &Plan, channel: &mut BorrowedFd<'_>) -> Result<(), Errno> {
    for (target, fd) in (0..).zip(&plan.stdio) {
        sys::duplicate_to(fd.as_fd(), target)?;
    }
    if channel.as_raw_fd() != CHANNEL_FD {
        sys::duplicate_to(*channel, CHANNEL_FD)?;
        *channel = sys::borrow_fd(CHANNEL_FD);
    }
    fcntl(*channel, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC))?;
    sys::close_from(CHANNEL_FD + 1)
}

fn become_program(plan: &Plan, channel: BorrowedFd<'_>) -> Result<Infallible, Failure> {
    setsid().map_err(failed("setsid"))?;
    if let Place::New { root, files, request } = &plan.place {
        sethostname(&request.hostname).map_err(failed("setting the hostname"))?;
        mounts::enter(root, files, request)?;
    }
    if plan.process.terminal {
        attach_terminal(plan, channel)?;
    }
    if let Place::New { request, .. } = &plan.place
        && request.rootfs.read_only
    {
        mounts::seal_root()?;
    }
    let invalid = |_| Errno::EINVAL;
    let args: Vec<CString> = plan
        .process
        .args
        .iter()
        .map(|arg| CString::new(arg.as_str()).map_err(invalid))
        .collect::<Result<_, _>>()
        .map_err(failed("encoding arguments"))?;
    let env = credentials::environment(&plan.process, &plan.identity)
        .map_err(failed("encoding the environment"))?;
    credentials::apply(&plan.process, &plan.identity)?;

    channel::send(channel, &Message::Ready).map_err(failed("reporting readiness"))?;
    let mut order = [0; 1];
    let received = loop {
        match recv(channel.as_raw_fd(), &mut order, MsgFlags::empty()) {
            Err(Errno::EINTR) => {}
            other => break other,
        }
    };
    if received != Ok(1) || order != channel::START {
        // The agent gave the process up.
        sys::exit_now(1);
    }
    sys::cloexec_from(CHANNEL_FD).map_err(failed("closing descriptors"))?;
    Err(credentials::execute(&plan.process, &args, &env))
}

/// Gives the process a terminal of the container's own devpts and its other end to the agent.
fn attach_terminal(plan: &Plan, channel: BorrowedFd<'_>) -> Result<(), Failure> {
    let flags = OFlag::O_RDWR | OFlag::O_NOCTTY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    let master = open("/dev/pts/ptmx", flags, Mode::empty()).map_err(failed("opening /dev/pts/ptmx"))?;
    let is_ptmx = fstat(&master).is_ok_and(|metadata| metadata.st_rdev == makedev(5, 2));
    if !is_ptmx {
        return Err(failed("checking /dev/pts/ptmx")(Errno::ENODEV));
    }
    let (terminal, number) = sys::open_terminal_peer(master.as_fd()).map_err(failed("opening a terminal"))?;
    let (uid, gid) = (Uid::from_raw(plan.identity.uid), Gid::from_raw(plan.identity.gid));
    fchown(&terminal, Some(uid), Some(gid)).map_err(failed("changing the terminal's owner"))?;
    if let Some(size) = plan.process.window_size.as_ref() {
        let clamp = |value: u32| u16::try_from(value).unwrap_or(u16::MAX);
        sys::set_window_size(terminal.as_fd(), clamp(size.rows), clamp(size.columns))
            .map_err(failed("setting the terminal's size"))?;
    }
    sys::set_controlling_terminal(terminal.as_fd()).map_err(failed("taking the terminal"))?;
    for target in 0..3 {
        sys::duplicate_to(terminal.as_fd(), target).map_err(failed("arranging descriptors"))?;
    }
    if matches!(plan.place, Place::New { .. }) {
        mounts::bind_console(&format!("/dev/pts/{number}"))?;
    }
    channel::send(channel, &Message::Terminal(master)).map_err(failed("handing the terminal over"))
}
