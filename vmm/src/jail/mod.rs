//! What confines the process, from the first moment a guest or client could influence it.
//!
//! Order of [`enter`], which matters:
//!
//! ```text
//!   fds::close_all_but        (first thing in main) nothing inherited but the named socket and stdio
//!   [user namespace]          only without root: gives the right to do the following
//!   namespaces                mount, net, IPC, UTS, cgroup
//!   [shares' thread]          only if there will be shares: it gives up less than the rest does
//!   empty root                a read-only tmpfs without a single entry, by pivot_root; the old root is unmounted
//!   rlimits                   no core dump, few descriptors and threads; file size once the disks are known
//!   bounding set, ids         capabilities out of the bounding set, groups, gid, uid
//!   capabilities              all five sets empty
//!   no_new_privs
//!   Landlock                  no file, no network, no signal or abstract socket out, where the kernel has it
//!   seccomp                   by each thread for itself: [`seccomp`]; narrower before the guest starts
//! ```
//!
//! Thread: the only one, before any other is started; all later threads inherit everything.
//!
//! Deliberately absent: a PID namespace (it takes a fork, and the process that waits would double the number of processes;
//! Landlock's signal scope, the unique user and seccomp stand in) and a parent-death signal (a microVM outlives whoever
//! started it). A launcher that makes the VMM the first process of a PID namespace is welcome to.

pub mod fds;
pub mod limits;
mod namespaces;
mod privileges;
pub mod seccomp;
pub mod signals;

use crate::devices::virtio::fs::ShareThreadError;
use std::io;

/// Whom a jailed process of root runs as unless told otherwise: `nobody`.
const DEFAULT_ID: u32 = 65_534;

/// Why the jail can't be entered.
#[derive(Debug, thiserror::Error)]
pub enum JailError {
    /// User namespaces are off.
    #[error(
        "can't make a user namespace: run as root, or allow unprivileged user namespaces (kernel.unprivileged_userns_clone, \
         user.max_user_namespaces)"
    )]
    UserNamespace(#[source] io::Error),
    /// Another user's id without root.
    #[error("--uid {uid} --gid {gid}: only root can run the jail as somebody else")]
    Identity {
        /// `--uid`.
        uid: u32,
        /// `--gid`.
        gid: u32,
    },
    /// Root in the jail.
    #[error("--uid and --gid must not be 0: the jail is for an unprivileged user")]
    RootIdentity,
    /// A step failed.
    #[error("can't enter the jail: {step}")]
    Step {
        /// Which.
        step: &'static str,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// Capabilities can't be dropped.
    #[error("can't drop capabilities")]
    Capabilities(#[source] caps::errors::CapsError),
    /// The thread that serves shares.
    #[error(transparent)]
    Shares(#[from] ShareThreadError),
    /// Landlock is there and refuses.
    #[error("can't apply Landlock")]
    Landlock(#[source] landlock::RulesetError),
}

/// As whom a jailed process runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Identity {
    /// It was root before; else it is who it was.
    pub is_root: bool,
    /// User id.
    pub uid: u32,
    /// Group id.
    pub gid: u32,
}

/// Names the failed step.
fn step<E: Into<io::Error>>(step: &'static str) -> impl FnOnce(E) -> JailError {
    move |source| JailError::Step {
        step,
        source: source.into(),
    }
}

/// Whom the process shall run as.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct JailSpec {
    uid: Option<u32>,
    gid: Option<u32>,
    shares: bool,
}

impl JailSpec {
    /// The ids asked for, if any.
    #[must_use]
    pub fn new(uid: Option<u32>, gid: Option<u32>) -> Self {
        Self {
            uid,
            gid,
            shares: false,
        }
    }

    /// The same for a process one thread of which serves shares: it may have more descriptors.
    #[must_use]
    pub fn with_shares(self, shares: bool) -> Self {
        Self { shares, ..self }
    }
}

/// Confines the process; there is no way back.
///
/// # Errors
/// [`JailError`]; the process must then end, since it may be confined in part.
pub fn enter(spec: &JailSpec) -> Result<(), JailError> {
    enter_beside(spec, |_| Ok(())).map(drop)
}

/// As [`enter`]; `beside` is called in the new namespaces, with all privileges in them and the host's files still in sight. It is
/// told as whom the process will run, and may start threads that have other rights than this one will.
///
/// # Errors
/// [`JailError`], as [`enter`].
pub fn enter_beside<T>(
    spec: &JailSpec,
    beside: impl FnOnce(Identity) -> Result<T, JailError>,
) -> Result<T, JailError> {
    let own = (
        rustix::process::geteuid().as_raw(),
        rustix::process::getegid().as_raw(),
    );
    let is_root = own.0 == 0;
    let default = if is_root { (DEFAULT_ID, DEFAULT_ID) } else { own };
    let (uid, gid) = (spec.uid.unwrap_or(default.0), spec.gid.unwrap_or(default.1));
    if uid == 0 || gid == 0 {
        return Err(JailError::RootIdentity);
    }
    if is_root {
        namespaces::enter().map_err(step("namespaces"))?;
    } else {
        if (uid, gid) != own {
            return Err(JailError::Identity { uid, gid });
        }
        namespaces::enter_user(uid, gid).map_err(JailError::UserNamespace)?;
        namespaces::enter().map_err(step("namespaces"))?;
    }
    let result = beside(Identity { is_root, uid, gid })?;
    namespaces::enter_empty_root().map_err(step("empty root"))?;
    // Threads are counted per user: a bound makes sense only for a user that is this microVM's own.
    limits::apply(spec.uid.is_some() && is_root, spec.shares).map_err(step("resource limits"))?;
    privileges::drop_bounding_set()?;
    if is_root {
        privileges::become_user(uid, gid).map_err(step("user and group"))?;
    }
    privileges::drop_capabilities()?;
    rustix::thread::set_no_new_privs(true).map_err(step("no_new_privs"))?;
    privileges::apply_landlock()?;
    Ok(result)
}
