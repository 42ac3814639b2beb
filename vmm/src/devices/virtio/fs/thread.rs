//! The thread that serves shares: what it may do, from before the jail to its first guest.
//!
//! The jail gives up every privilege before the VMM hears of its configuration, so whoever is to act on the host's files must
//! exist by then: the command line says whether it will be needed ([`ShareThread::start`]). Credentials, capabilities and
//! filters are each thread's own; this one keeps what a file server can't do without ([`KEPT`]) and nothing that mounts, opens
//! by handle, makes devices, or leaves its root, which is the jail's empty one.
//!
//! It reaches files by descriptors only: the shares', and `/proc/thread-self/fd`, of which it holds a mount of its own as its
//! working directory. No other part of `/proc` can be reached from there, `..` included.

use std::io;
use std::os::fd::{BorrowedFd, RawFd};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;

use caps::CapSet;
use rustix::fs::{CWD, Mode};
use rustix::mount::{OpenTreeFlags, open_tree};
use rustix::process::{fchdir, umask};
use rustix::thread::{
    CapabilitiesSecureBits, CapabilitySet, CapabilitySets, Gid, Uid, capabilities, set_capabilities,
    set_capabilities_secure_bits, set_no_new_privs, set_thread_groups, set_thread_res_gid,
    set_thread_res_uid,
};
use thiserror::Error;

use super::FsError;
use super::worker::Service;

/// Ample for a path, a request's buffers and the server's own frames.
const STACK_BYTES: usize = 256 << 10;

/// The capabilities of a file server: to act on files whoever they belong to, and to make them as their users.
pub const KEPT: CapabilitySet = CapabilitySet::CHOWN
    .union(CapabilitySet::DAC_OVERRIDE)
    .union(CapabilitySet::FOWNER)
    .union(CapabilitySet::FSETID)
    .union(CapabilitySet::SETUID)
    .union(CapabilitySet::SETGID)
    .union(CapabilitySet::SETFCAP);

/// What the thread does when it begins to serve a guest, given the descriptors it keeps and the socket its orders come from;
/// whether that socket is its standard input now.
pub type Confine = Box<dyn FnOnce(&[RawFd], Option<BorrowedFd<'_>>) -> Result<bool, String> + Send>;

/// As whom the thread serves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ShareUser {
    /// With root's privileges reduced, as this user and group; files are made as the guest's users.
    Reduced {
        /// User id.
        uid: u32,
        /// Group id.
        gid: u32,
    },
    /// As who runs the VMM, with that user's rights.
    Own,
}

/// Why there is no thread for shares.
#[derive(Debug, Error)]
pub enum ShareThreadError {
    /// It can't be started.
    #[error("can't start the shares' thread")]
    Spawn(#[source] io::Error),
    /// It ended at once.
    #[error("the shares' thread panicked")]
    Panicked,
    /// A system call.
    #[error("can't prepare the shares' thread: {step}")]
    Step {
        /// Which.
        step: &'static str,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// Capabilities can't be dropped.
    #[error("can't drop capabilities of the shares' thread")]
    Capabilities(#[source] caps::errors::CapsError),
}

fn step<E: Into<io::Error>>(step: &'static str) -> impl FnOnce(E) -> ShareThreadError {
    move |source| ShareThreadError::Step {
        step,
        source: source.into(),
    }
}

/// The thread, waiting for a device or serving it.
#[derive(Debug)]
pub struct ShareThread {
    services: Sender<Service>,
    user: Option<ShareUser>,
}

impl ShareThread {
    /// Starts the thread and waits until it has only what it needs. To be called in the jail's own namespaces, while the
    /// host's `/proc` can still be seen.
    ///
    /// # Errors
    /// [`ShareThreadError`].
    pub fn start(user: ShareUser) -> Result<Self, ShareThreadError> {
        Self::spawn(Some(user), move || prepare(user))
    }

    /// Starts the thread as it is, for tests and without a jail.
    ///
    /// # Errors
    /// [`ShareThreadError::Spawn`].
    pub fn start_unconfined() -> Result<Self, ShareThreadError> {
        Self::spawn(None, || Ok(()))
    }

    fn spawn(
        user: Option<ShareUser>,
        prepare: impl FnOnce() -> Result<(), ShareThreadError> + Send + 'static,
    ) -> Result<Self, ShareThreadError> {
        let (services, receiver) = channel();
        let (prepared, wait) = channel();
        thread::Builder::new()
            .name("shares".to_owned())
            .stack_size(STACK_BYTES)
            .spawn(move || {
                let result = prepare();
                let serves = result.is_ok();
                if prepared.send(result).is_ok() && serves {
                    serve_all(&receiver);
                }
            })
            .map_err(ShareThreadError::Spawn)?;
        wait.recv().map_err(|_| ShareThreadError::Panicked)??;
        Ok(Self { services, user })
    }

    /// Hands a device's shares over.
    pub(super) fn serve(&self, service: Service) -> Result<(), FsError> {
        self.services.send(service).map_err(|_| FsError::ThreadGone)
    }

    /// Where the thread finds its descriptors by number.
    pub(super) fn descriptor_prefix(&self) -> &'static str {
        match self.user {
            // Its working directory.
            Some(_) => "",
            None => "/proc/thread-self/fd/",
        }
    }

    /// Whether it may make files as others.
    pub(super) fn changes_user(&self) -> bool {
        matches!(self.user, Some(ShareUser::Reduced { .. }))
    }
}

fn serve_all(services: &Receiver<Service>) {
    // One after another: a microVM that couldn't be built may be followed by one that can.
    while let Ok(service) = services.recv() {
        service.run();
    }
}

/// Makes the calling thread one that may serve shares: its working directory is its descriptors', its capabilities are [`KEPT`].
/// There is no way back.
///
/// # Errors
/// [`ShareThreadError`]; the thread must then end.
pub fn prepare(user: ShareUser) -> Result<(), ShareThreadError> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    let descriptors = open_tree(CWD, c"/proc/thread-self/fd", flags).map_err(step(
        "cloning /proc/thread-self/fd (is /proc mounted, and the kernel 5.2 or later?)",
    ))?;
    raw::unshare_fs().map_err(step("unshare"))?;
    fchdir(&descriptors).map_err(step("changing to its descriptors"))?;
    // Each file is made with exactly the mode the guest's kernel asks for.
    umask(Mode::empty());
    reduce_privileges(user)
}

fn reduce_privileges(user: ShareUser) -> Result<(), ShareThreadError> {
    if let ShareUser::Reduced { uid, gid } = user {
        // Changing user ids must neither take capabilities away nor bring any.
        let bits = CapabilitiesSecureBits::NO_SETUID_FIXUP
            | CapabilitiesSecureBits::NO_SETUID_FIXUP_LOCKED
            | CapabilitiesSecureBits::NO_ROOT
            | CapabilitiesSecureBits::NO_ROOT_LOCKED
            | CapabilitiesSecureBits::NO_CAP_AMBIENT_RAISE
            | CapabilitiesSecureBits::NO_CAP_AMBIENT_RAISE_LOCKED;
        set_capabilities_secure_bits(bits).map_err(step("secure bits"))?;
        caps::clear(None, CapSet::Bounding).map_err(ShareThreadError::Capabilities)?;
        let (uid, gid) = (Uid::from_raw(uid), Gid::from_raw(gid));
        set_thread_groups(&[]).map_err(step("groups"))?;
        set_thread_res_gid(gid, gid, gid).map_err(step("group"))?;
        set_thread_res_uid(uid, uid, uid).map_err(step("user"))?;
    } else {
        caps::clear(None, CapSet::Bounding).map_err(ShareThreadError::Capabilities)?;
    }
    caps::clear(None, CapSet::Ambient).map_err(ShareThreadError::Capabilities)?;
    let now = capabilities(None).map_err(step("reading capabilities"))?;
    let kept = now.permitted & KEPT;
    let sets = CapabilitySets {
        effective: kept,
        permitted: kept,
        inheritable: CapabilitySet::empty(),
    };
    set_capabilities(None, sets).map_err(step("dropping capabilities"))?;
    set_no_new_privs(true).map_err(step("no_new_privs"))
}

#[expect(
    unsafe_code,
    reason = "unshare is unsafe for descriptor tables, which are not unshared here"
)]
mod raw {
    use rustix::thread::{UnshareFlags, unshare_unsafe};
    use std::io;

    /// Gives the calling thread a root, a working directory and a file mode mask of its own.
    pub(super) fn unshare_fs() -> io::Result<()> {
        // SAFETY: the flags don't include FILES.
        Ok(unsafe { unshare_unsafe(UnshareFlags::FS) }?)
    }
}
