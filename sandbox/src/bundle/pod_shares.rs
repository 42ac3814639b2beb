//! What a pod's microVM shares of the host, which changes with its containers.
//!
//! Owner: the monitor of the pod's sandbox container, which tells the VMM. A directory that several containers have is shared
//! once, so that it is one directory for the guest: with one content at any time, and locks that hold between them.
//!
//! Invariants: an index is used once, so that what the guest remembers of a share never is another's; a share goes with the
//! last container that has it.

use std::{
    collections::BTreeMap,
    io::{self, ErrorKind, IoSlice},
    os::fd::{AsFd, OwnedFd},
    path::PathBuf,
    time::Duration,
};

use rustix::{
    fs::fstat,
    net::{
        AddressFamily, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketFlags, SocketType,
        sendmsg, socketpair, sockopt,
    },
};
use serde::{Deserialize, Serialize};
use vmm_api::{SHARE_MESSAGE_BYTES, ShareOrder, ShareReply};

use super::error::Result;
use crate::{
    SandboxError,
    shares::{self, ShareSpec},
};

/// How long the VMM may take to answer; it may be waiting for a file of the host.
const ANSWER_PATIENCE: Duration = Duration::from_secs(10);

/// A share that a container of the pod needs; its descriptor comes along.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct WantedShare {
    source: PathBuf,
    read_only: bool,
    recursive: bool,
    exclusive: bool,
}

impl From<&ShareSpec> for WantedShare {
    fn from(spec: &ShareSpec) -> Self {
        Self {
            source: spec.source.clone(),
            read_only: spec.read_only,
            recursive: spec.recursive,
            exclusive: spec.exclusive,
        }
    }
}

/// What makes two shares one: the path alone may lead elsewhere by now.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Source {
    path: PathBuf,
    device: u64,
    inode: u64,
    recursive: bool,
}

#[derive(Debug)]
struct Live {
    source: Source,
    /// The mount, which is writable as soon as a container needs it so.
    root: OwnedFd,
    read_only: bool,
    /// A container's own root filesystem.
    exclusive: bool,
    /// How many mounts of containers it is.
    users: usize,
}

/// The shares of a pod's microVM that came after its boot.
#[derive(Debug)]
pub(super) struct PodShares {
    orders: OwnedFd,
    live: BTreeMap<u32, Live>,
    next: u32,
}

impl PodShares {
    /// With the VMM's end of the socket; the first `taken` indices are those of the configuration.
    pub(super) fn new(taken: usize) -> Result<(Self, OwnedFd)> {
        let problem = SandboxError::system("creating a socket pair");
        let (ours, theirs) = socketpair(
            AddressFamily::UNIX,
            SocketType::SEQPACKET,
            SocketFlags::CLOEXEC,
            None,
        )
        .map_err(problem)?;
        for timeout in [sockopt::Timeout::Recv, sockopt::Timeout::Send] {
            sockopt::set_socket_timeout(&ours, timeout, Some(ANSWER_PATIENCE))
                .map_err(SandboxError::system("preparing a socket"))?;
        }
        let this = Self {
            orders: ours,
            live: BTreeMap::new(),
            next: u32::try_from(taken).unwrap_or(u32::MAX),
        };
        Ok((this, theirs))
    }

    /// Shares what a container needs; the index of each. Either all of it or nothing.
    pub(super) fn add_all(&mut self, wanted: Vec<(WantedShare, OwnedFd)>) -> Result<Vec<u32>> {
        let mut indices = Vec::with_capacity(wanted.len());
        for (share, root) in wanted {
            let path = share.source.clone();
            match self.add(share, root) {
                Ok(index) => indices.push(index),
                Err(error) => {
                    self.remove_all(&indices);
                    return Err(SandboxError::io("sharing", path)(error).into());
                }
            }
        }
        Ok(indices)
    }

    fn add(&mut self, share: WantedShare, root: OwnedFd) -> io::Result<u32> {
        let stat = fstat(&root)?;
        let source = Source {
            path: share.source,
            device: stat.st_dev,
            inode: stat.st_ino,
            recursive: share.recursive,
        };
        let same = |live: &&mut Live| !share.exclusive && !live.exclusive && live.source == source;
        if let Some((index, live)) = self
            .live
            .iter_mut()
            .map(|(index, live)| (*index, live))
            .find(|(_, live)| same(live))
        {
            // What the host itself has mounted read-only stays so.
            if live.read_only && !share.read_only && !shares::is_read_only(root.as_fd())? {
                // The guest's kernel keeps those from writing who may only read.
                shares::allow_writing(live.root.as_fd())?;
                live.read_only = false;
            }
            live.users += 1;
            return Ok(index);
        }
        let index = self.next;
        self.next = index
            .checked_add(1)
            .ok_or_else(|| io::Error::from(ErrorKind::QuotaExceeded))?;
        let order = ShareOrder::Add {
            index,
            exclusive: share.exclusive,
        };
        self.order(order, index, Some(&root))?;
        let live = Live {
            source,
            root,
            read_only: share.read_only,
            exclusive: share.exclusive,
            users: 1,
        };
        self.live.insert(index, live);
        Ok(index)
    }

    /// A container doesn't need these any more, each of them once.
    pub(super) fn remove_all(&mut self, indices: &[u32]) {
        for index in indices {
            let Some(live) = self.live.get_mut(index) else {
                continue;
            };
            live.users -= 1;
            if live.users > 0 {
                continue;
            }
            self.live.remove(index);
            if let Err(error) = self.order(ShareOrder::Remove { index: *index }, *index, None) {
                tracing::warn!(index, %error, "the VMM doesn't give a share up");
            }
        }
    }

    fn order(&self, order: ShareOrder, index: u32, root: Option<&OwnedFd>) -> io::Result<()> {
        let bytes = order.to_bytes();
        let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        let fds: Vec<_> = root.iter().map(|root| root.as_fd()).collect();
        if !fds.is_empty() {
            ancillary.push(SendAncillaryMessage::ScmRights(&fds));
        }
        sendmsg(
            &self.orders,
            &[IoSlice::new(&bytes)],
            &mut ancillary,
            SendFlags::NOSIGNAL,
        )?;
        loop {
            let mut reply = [0; SHARE_MESSAGE_BYTES];
            let length = rustix::io::retry_on_intr(|| rustix::io::read(&self.orders, &mut reply))?;
            let reply = reply
                .get(..length)
                .and_then(ShareReply::from_bytes)
                .ok_or_else(|| io::Error::from(ErrorKind::UnexpectedEof))?;
            match reply {
                // Of an order that wasn't waited for to its end.
                ShareReply { index: other, .. } if other != index => {}
                ShareReply { errno: 0, .. } => return Ok(()),
                ShareReply { errno, .. } => return Err(io::Error::from_raw_os_error(errno)),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{path::Path, sync::mpsc, thread};

    use rustix::{
        fs::{CWD, Mode, OFlags, openat},
        mount::{MountFlags, MountPropagationFlags, mount_bind, mount_change, mount_remount},
    };

    use super::*;

    /// Answers as the VMM does; what was ordered.
    fn vmm(socket: OwnedFd, errno: i32) -> mpsc::Receiver<ShareOrder> {
        let (sender, receiver) = mpsc::channel();
        thread::spawn(move || {
            let mut bytes = [0; SHARE_MESSAGE_BYTES];
            while let Ok(SHARE_MESSAGE_BYTES) = rustix::io::read(&socket, &mut bytes) {
                let order = ShareOrder::from_bytes(&bytes).unwrap();
                let (ShareOrder::Add { index, .. } | ShareOrder::Remove { index }) = order;
                sender.send(order).unwrap();
                // A late answer of another order comes first.
                for index in [index.wrapping_sub(1), index] {
                    let reply = ShareReply { index, errno };
                    rustix::io::write(&socket, &reply.to_bytes()).unwrap();
                }
            }
        });
        receiver
    }

    fn wanted(path: &Path, exclusive: bool) -> (WantedShare, OwnedFd) {
        let spec = ShareSpec {
            source: path.to_owned(),
            exclusive,
            ..ShareSpec::default()
        };
        let root = openat(CWD, path, OFlags::PATH, Mode::empty()).unwrap();
        (WantedShare::from(&spec), root)
    }

    #[test]
    fn directory_of_several_containers_is_shared_once_and_goes_with_the_last() {
        let (one, two) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let (mut shares, theirs) = PodShares::new(3).unwrap();
        let orders = vmm(theirs, 0);
        let first = shares
            .add_all(vec![wanted(one.path(), false), wanted(two.path(), true)])
            .unwrap();
        let second = shares
            .add_all(vec![wanted(one.path(), false), wanted(two.path(), true)])
            .unwrap();
        assert_eq!(
            (first.as_slice(), second.as_slice()),
            ([3, 4].as_slice(), [3, 5].as_slice())
        );
        shares.remove_all(&first);
        shares.remove_all(&second);
        let third = shares.add_all(vec![wanted(one.path(), false)]).unwrap();
        assert_eq!(third, [6]);
        drop(shares);
        let orders: Vec<ShareOrder> = orders.iter().collect();
        let add = |index, exclusive| ShareOrder::Add { index, exclusive };
        let remove = |index| ShareOrder::Remove { index };
        let expected = [
            add(3, false),
            add(4, true),
            add(5, true),
            remove(4),
            remove(3),
            remove(5),
            add(6, false),
        ];
        assert_eq!(orders, expected);
    }

    /// Adds a share as a container's monitor asks for it; the mount that the VMM has of it.
    fn add_mount(shares: &mut PodShares, source: &Path, read_only: bool) -> OwnedFd {
        let spec = ShareSpec {
            source: source.to_owned(),
            read_only,
            recursive: true,
            ..ShareSpec::default()
        };
        let wanted = WantedShare::from(&spec);
        let root = shares::open_all(&[spec]).unwrap().remove(0).root;
        let index = shares.add_all(vec![(wanted, root)]).unwrap()[0];
        shares.live[&index].root.try_clone().unwrap()
    }

    #[test]
    fn what_the_host_has_read_only_stays_so_when_another_container_may_write() {
        if !rustix::process::geteuid().is_root() {
            eprintln!("skipped: only root makes mounts");
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let (plain, below, held) = (
            dir.path().join("plain"),
            dir.path().join("plain/below"),
            dir.path().join("held"),
        );
        std::fs::create_dir_all(&below).unwrap();
        std::fs::create_dir(&held).unwrap();
        let checked = thread::spawn(move || {
            // The mounts go with this thread's namespace.
            nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS).unwrap();
            mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC).unwrap();
            for mounted in [&below, &held] {
                mount_bind(mounted, mounted).unwrap();
                mount_remount(mounted, MountFlags::BIND | MountFlags::RDONLY, c"").unwrap();
            }
            let (mut shares, theirs) = PodShares::new(0).unwrap();
            let _orders = vmm(theirs, 0);
            let write = |root: &OwnedFd, name: &str| {
                let flags = OFlags::WRONLY | OFlags::CREATE;
                openat(root, name, flags, Mode::from_raw_mode(0o600)).map(drop)
            };
            let read_only = Err(rustix::io::Errno::ROFS);
            let root = add_mount(&mut shares, &plain, true);
            assert_eq!(write(&root, "file"), read_only);
            let root = add_mount(&mut shares, &plain, false);
            assert_eq!(write(&root, "file"), Ok(()));
            assert_eq!(write(&root, "below/file"), read_only);
            add_mount(&mut shares, &held, true);
            let root = add_mount(&mut shares, &held, false);
            assert_eq!(write(&root, "file"), read_only);
            assert_eq!(shares.live.len(), 2, "each is shared once");
        });
        checked.join().unwrap();
    }

    #[test]
    fn share_that_the_vmm_refuses_is_named_and_takes_the_others_back() {
        let dir = tempfile::tempdir().unwrap();
        let (mut shares, theirs) = PodShares::new(1).unwrap();
        let _orders = vmm(theirs, 23);
        let error = shares.add_all(vec![wanted(dir.path(), false)]).unwrap_err();
        assert!(
            error.to_string().contains(&dir.path().display().to_string()),
            "{error}"
        );
        assert!(shares.live.is_empty());
    }
}
