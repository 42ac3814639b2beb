//! The mount namespace of the process in the pid file: the container's root filesystem, and what is bound into it.
//!
//! Engines enter that namespace to read and write a running container's files (`podman cp`), and trust that its root is the
//! container's. Were it the host's, they would read and write the host. The container's own mounts are in the guest's kernel;
//! here are those that are files of the host.
//!
//! Owner: the monitor's first thread: the root at creation, what is bound into it at start, when the guest has made the mount
//! points. The monitor itself stays where it was: its own root and working directory are the host's, only who enters its
//! namespace is in the container's. The namespace holds nothing of the host's, so that no mount of the host is kept by a
//! container.
//!
//! Invariant: what the guest can change in the root filesystem, links above all, leads nowhere else: destinations are resolved
//! inside of it.

use std::os::fd::{AsFd as _, OwnedFd};

use agent_protocol::CreateContainerRequest;
use nix::sched::{CloneFlags, unshare};
use rustix::{
    fs::{CWD, Mode, OFlags, ResolveFlags, open, openat2},
    io::Errno,
    mount::{MountPropagationFlags, MoveMountFlags, UnmountFlags, mount_change, move_mount, unmount},
    process::{chroot, fchdir, pivot_root},
};

use super::error::Result;
use crate::{
    SandboxError,
    oci_spec::Translated,
    shares::{OpenShare, open_all},
};

/// Mounts that wait to be shown.
#[derive(Debug)]
pub(super) struct MountView {
    root: OwnedFd,
    /// Where they go, in order.
    bound: Vec<(String, OwnedFd)>,
}

impl MountView {
    /// The mounts of a container; `None` if its root is no directory of the host.
    pub(super) fn planned(translated: &Translated) -> Result<Option<Self>> {
        let request = &translated.request;
        let Some(root) = root_share(request) else {
            return Ok(None);
        };
        let mut shares: Vec<Option<OwnedFd>> = open_all(&translated.shares)?
            .into_iter()
            .map(|OpenShare { root, .. }| Some(root))
            .collect();
        let mut take = |index: u32| shares.get_mut(usize::try_from(index).ok()?)?.take();
        let Some(root) = take(root) else { return Ok(None) };
        let bound = request
            .mounts
            .iter()
            .filter_map(|mount| Some((mount.destination.clone(), take(mount.share?)?)))
            .collect();
        Ok(Some(Self { root, bound }))
    }

    /// Makes the root that of this process's mount namespace.
    pub(super) fn show_root(&self) -> Result<()> {
        self.enter()
            .map_err(SandboxError::system::<Errno>(
                "making the container's mounts visible",
            ))
            .map_err(Into::into)
    }

    /// Attaches what is bound into it.
    pub(super) fn show_bound(&mut self) {
        for (destination, mount) in self.bound.drain(..) {
            bind(&self.root, &destination, &mount);
        }
    }

    fn enter(&self) -> std::result::Result<(), Errno> {
        let directory = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let host = open("/", directory, Mode::empty())?;
        let here = open(".", directory, Mode::empty())?;
        unshare(CloneFlags::CLONE_NEWNS).map_err(|errno| Errno::from_raw_os_error(errno as i32))?;
        mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)?;
        let whole = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
        move_mount(self.root.as_fd(), "", CWD, "/", whole)?;
        // The mount that covers the root is the root now; what it covered goes.
        fchdir(&self.root)?;
        pivot_root(".", ".")?;
        unmount(".", UnmountFlags::DETACH)?;
        fchdir(&host)?;
        chroot(".")?;
        fchdir(&here)
    }
}

/// The share that is the root filesystem.
fn root_share(request: &CreateContainerRequest) -> Option<u32> {
    request.rootfs.as_ref()?.share
}

/// Attaches a mount inside of a root. The guest may have put something else there meanwhile, then it isn't shown.
fn bind(root: &OwnedFd, destination: &str, mount: &OwnedFd) {
    let inside = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
    let place = openat2(
        root,
        destination,
        OFlags::PATH | OFlags::CLOEXEC,
        Mode::empty(),
        inside,
    );
    let both = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
    if let Err(errno) = place.and_then(|place| move_mount(mount, "", &place, "", both)) {
        tracing::debug!(destination, %errno, "a share is not shown on the host");
    }
}
