//! A share that is the upper layer of an overlay: what is different about it.
//!
//! Its root has two directories, one with the layer and one overlayfs works in. They are one share because files are moved
//! between them, and who mounts the overlay on the host later follows their names: the guest must never put something else
//! there. So nothing is made, moved, removed or changed in the root of such a share: requests are refused here, and the shares'
//! thread is forbidden it by Landlock, in which the two directories are the only places where it may make or remove anything.
//!
//! overlayfs' marks are attributes of the host only CAP_SYS_ADMIN may touch, which this thread doesn't have: the one that
//! matters, that a directory hides those below, is asked for at a socket. The others are never there: the host of such a share
//! doesn't use them, and overlayfs does without them.

use std::ffi::CStr;
use std::io;
use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use landlock::{
    AccessFs, BitFlags, CompatLevel, Compatible, PathBeneath, Ruleset, RulesetAttr, RulesetCreatedAttr,
    RulesetError,
};
use rustix::fs::{FileType, Mode, OFlags, openat};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use vmm_api::marks::{MAX_ANSWER_BYTES, MarkRequest, OPAQUE, OPAQUE_VALUES, answer_from_bytes};

use super::errno;
use super::inodes::stat_open;

/// What overlayfs' marks begin with.
const MARKS: &[u8] = b"trusted.overlay.";
/// Says that a directory has files of layers below; nothing here depends on it.
const IMPURE: &[u8] = b"trusted.overlay.impure";

/// Making, moving and removing of all kinds.
fn changes() -> BitFlags<AccessFs> {
    AccessFs::MakeBlock
        | AccessFs::MakeChar
        | AccessFs::MakeDir
        | AccessFs::MakeFifo
        | AccessFs::MakeReg
        | AccessFs::MakeSock
        | AccessFs::MakeSym
        | AccessFs::RemoveDir
        | AccessFs::RemoveFile
        | AccessFs::Refer
}

/// Whether a name is one of overlayfs' marks.
pub fn is_mark(name: &CStr) -> bool {
    name.to_bytes().starts_with(MARKS)
}

/// Forbids the calling thread, for good, to make, move or remove anything but beneath `roots`, and of those that are layers
/// only beneath their two directories.
pub fn confine<'a>(roots: impl Iterator<Item = (BorrowedFd<'a>, bool)>) -> Result<(), String> {
    let unable = |error: RulesetError| format!("Landlock, without which no layer is shared: {error}");
    let mut rules = Ruleset::default()
        .set_compatibility(CompatLevel::HardRequirement)
        .handle_access(changes())
        .and_then(Ruleset::create)
        .map_err(unable)?;
    let mut allow = |directory: BorrowedFd<'_>| -> Result<(), String> {
        let rule = PathBeneath::new(directory, changes()).set_compatibility(CompatLevel::HardRequirement);
        (&mut rules).add_rule(rule).map(drop).map_err(unable)
    };
    for (root, is_layer) in roots {
        if is_layer {
            for name in [vmm_api::UPPER_DIR, vmm_api::WORK_DIR] {
                let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                let directory = openat(root, name, flags, Mode::empty())
                    .map_err(|errno| format!("the layer's directory {name}: {errno}"))?;
                allow(directory.as_fd())?;
            }
        } else if is_directory(root) {
            allow(root)?;
        }
    }
    rules.restrict_self().map(drop).map_err(unable)
}

fn is_directory(root: BorrowedFd<'_>) -> bool {
    stat_open(root).is_ok_and(|found| FileType::from_raw_mode(found.stx_mode.into()) == FileType::Directory)
}

/// The way to who may deal with marks.
#[derive(Debug)]
pub struct Marks(pub OwnedFd);

impl Marks {
    /// The value of a mark.
    pub fn get(&self, of: BorrowedFd<'_>, name: &CStr) -> io::Result<Vec<u8>> {
        // Only directories hide something; there are no other marks.
        if name.to_bytes() != OPAQUE.as_bytes() || !is_directory(of) {
            return Err(errno(libc::ENODATA));
        }
        self.ask(of, &MarkRequest::Get)
    }

    /// Sets one.
    pub fn set(&self, of: BorrowedFd<'_>, name: &CStr, value: &[u8]) -> io::Result<()> {
        match name.to_bytes() {
            IMPURE => Ok(()),
            name if name == OPAQUE.as_bytes() && is_directory(of) && OPAQUE_VALUES.contains(&value) => {
                self.ask(of, &MarkRequest::Set(value.to_vec())).map(drop)
            }
            // overlayfs goes on without it.
            _ => Err(errno(libc::EPERM)),
        }
    }

    /// Removes one.
    pub fn remove(&self, of: BorrowedFd<'_>, name: &CStr) -> io::Result<()> {
        if name.to_bytes() != OPAQUE.as_bytes() || !is_directory(of) {
            return Err(errno(libc::ENODATA));
        }
        self.ask(of, &MarkRequest::Remove).map(drop)
    }

    fn ask(&self, of: BorrowedFd<'_>, request: &MarkRequest) -> io::Result<Vec<u8>> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        let passed = [of];
        ancillary.push(SendAncillaryMessage::ScmRights(&passed));
        let request = request.to_bytes();
        sendmsg(
            &self.0,
            &[IoSlice::new(&request)],
            &mut ancillary,
            SendFlags::NOSIGNAL,
        )?;
        let mut answer = [0; MAX_ANSWER_BYTES];
        let length = loop {
            match rustix::io::read(&self.0, &mut answer) {
                Err(rustix::io::Errno::INTR) => {}
                length => break length?,
            }
        };
        match answer_from_bytes(&answer[..length]) {
            Some(Ok(value)) => Ok(value),
            Some(Err(number)) => Err(errno(number)),
            // Nobody is there any more.
            None => Err(errno(libc::EIO)),
        }
    }
}
