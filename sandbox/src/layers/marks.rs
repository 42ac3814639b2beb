//! Reads and writes overlayfs' marks for a microVM's shares, which takes a right (CAP_SYS_ADMIN) that the VMM never has.
//!
//! Owner: the monitor, by a thread of its own for each layer, which ends when the VMM has closed its end.
//!
//! Invariant: whatever comes over the socket, nothing is touched but this one attribute of directories reached through the
//! share's own mount, which is attached nowhere and known to the VMM alone.

use std::{
    io::{self, IoSliceMut},
    mem::MaybeUninit,
    os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd},
    sync::mpsc::channel,
    thread,
};

use nix::sys::signal::SigSet;
use rustix::{
    fs::{AtFlags, FileType, StatxFlags, XattrFlags, getxattr, removexattr, setxattr, statx},
    io::Errno,
    net::{
        AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendFlags, SocketFlags,
        SocketType, recvmsg, send, socketpair,
    },
};
use vmm_api::marks::{MAX_REQUEST_BYTES, MAX_VALUE_BYTES, MarkAnswer, MarkRequest, OPAQUE, answer_to_bytes};

/// Enough for a request and what the calls need.
const STACK_BYTES: usize = 128 << 10;

/// Starts the thread for the share whose mount `root` is in; the VMM's end of the socket.
pub(crate) fn serve(root: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let mount = mount_of(root)?.ok_or(Errno::NOTDIR)?;
    // Kept open, so that no other mount gets its number.
    let root = root.try_clone_to_owned()?;
    let (ours, theirs) = socketpair(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        SocketFlags::CLOEXEC,
        None,
    )?;
    let (ready, wait) = channel();
    thread::Builder::new()
        .name("marks".into())
        .stack_size(STACK_BYTES)
        .spawn(move || {
            // Signals are for the thread that waits for them.
            let _ = ready.send(SigSet::all().thread_block());
            while let Some((request, directory)) = receive(&ours) {
                let answer = answer(request.as_ref(), directory.as_ref(), mount);
                let sent = send(&ours, &answer_to_bytes(&answer), SendFlags::NOSIGNAL);
                if sent.is_err() {
                    break;
                }
            }
            drop(root);
        })?;
    wait.recv().map_err(|_| io::ErrorKind::BrokenPipe)??;
    Ok(theirs)
}

/// The mount a directory was reached through; `None` for anything but a directory.
fn mount_of(file: BorrowedFd<'_>) -> rustix::io::Result<Option<u64>> {
    let found = statx(
        file,
        c"",
        AtFlags::EMPTY_PATH,
        StatxFlags::TYPE | StatxFlags::MNT_ID,
    )?;
    let is_directory = FileType::from_raw_mode(found.stx_mode.into()) == FileType::Directory;
    let known = StatxFlags::from_bits_retain(found.stx_mask).contains(StatxFlags::MNT_ID);
    Ok((is_directory && known).then_some(found.stx_mnt_id))
}

/// The next request, if it is one, and the first descriptor with it; `None` at the end.
fn receive(socket: &OwnedFd) -> Option<(Option<MarkRequest>, Option<OwnedFd>)> {
    let mut bytes = [0; MAX_REQUEST_BYTES + 1];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let received = loop {
        let mut slices = [IoSliceMut::new(&mut bytes)];
        match recvmsg(socket, &mut slices, &mut ancillary, RecvFlags::CMSG_CLOEXEC) {
            Err(Errno::INTR) => {}
            Err(_) => return None,
            Ok(received) if received.bytes == 0 => return None,
            Ok(received) => break received,
        }
    };
    // All of them are taken, and closed here, but one.
    let passed = ancillary.drain().filter_map(|message| match message {
        RecvAncillaryMessage::ScmRights(passed) => Some(passed),
        _ => None,
    });
    let passed: Vec<OwnedFd> = passed.flatten().collect();
    let request = bytes.get(..received.bytes).and_then(MarkRequest::from_bytes);
    Some((request, passed.into_iter().next()))
}

fn answer(request: Option<&MarkRequest>, directory: Option<&OwnedFd>, mount: u64) -> MarkAnswer {
    let (Some(request), Some(directory)) = (request, directory) else {
        return Err(Errno::INVAL.raw_os_error());
    };
    act(request, directory, mount).map_err(Errno::raw_os_error)
}

fn act(request: &MarkRequest, directory: &OwnedFd, mount: u64) -> rustix::io::Result<Vec<u8>> {
    if mount_of(directory.as_fd())? != Some(mount) {
        return Err(Errno::PERM);
    }
    // Descriptors that only name a file have no other way to its attributes.
    let path = format!("/proc/self/fd/{}", directory.as_raw_fd());
    match request {
        MarkRequest::Get => {
            let mut value = vec![0; MAX_VALUE_BYTES];
            let length = getxattr(&path, OPAQUE, value.as_mut_slice())?;
            value.truncate(length);
            return Ok(value);
        }
        MarkRequest::Set(value) => setxattr(&path, OPAQUE, value, XattrFlags::empty())?,
        MarkRequest::Remove => removexattr(&path, OPAQUE)?,
    }
    Ok(Vec::new())
}

#[cfg(test)]
mod tests {
    use std::{fs, io::IoSlice, path::Path};

    use rustix::{
        fs::{CWD, Mode, OFlags, open},
        mount::{OpenTreeFlags, open_tree},
        net::{SendAncillaryBuffer, SendAncillaryMessage, recv, sendmsg},
    };
    use vmm_api::marks::{MAX_ANSWER_BYTES, answer_from_bytes};

    use super::*;

    fn ask(socket: &OwnedFd, bytes: &[u8], passed: &[BorrowedFd<'_>]) -> MarkAnswer {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        if !passed.is_empty() {
            ancillary.push(SendAncillaryMessage::ScmRights(passed));
        }
        sendmsg(socket, &[IoSlice::new(bytes)], &mut ancillary, SendFlags::empty()).unwrap();
        let mut answer = [0; MAX_ANSWER_BYTES];
        let (length, _) = recv(socket, &mut answer, RecvFlags::empty()).unwrap();
        answer_from_bytes(&answer[..length]).unwrap()
    }

    fn path_only(at: impl std::os::fd::AsFd, name: &str) -> OwnedFd {
        rustix::fs::openat(at, name, OFlags::PATH | OFlags::NOFOLLOW, Mode::empty()).unwrap()
    }

    #[test]
    fn only_the_one_mark_of_directories_of_the_share_is_touched() {
        if !rustix::process::geteuid().is_root() {
            eprintln!("skipped: only root has these attributes");
            return;
        }
        let dir = tempfile::tempdir_in(".").unwrap();
        let plain = |name: &str| dir.path().join(name);
        fs::create_dir_all(plain("fs/d")).unwrap();
        fs::write(plain("fs/file"), "").unwrap();
        let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
        let root = open_tree(CWD, dir.path(), flags).unwrap();
        let socket = serve(root.as_fd()).unwrap();
        let inside = path_only(&root, "fs/d");
        let inside = inside.as_fd();

        let none = Err(Errno::NODATA.raw_os_error());
        assert_eq!(ask(&socket, &MarkRequest::Get.to_bytes(), &[inside]), none);
        let set = MarkRequest::Set(b"y".to_vec()).to_bytes();
        assert_eq!(ask(&socket, &set, &[inside]), Ok(Vec::new()));
        assert_eq!(
            ask(&socket, &MarkRequest::Get.to_bytes(), &[inside]),
            Ok(b"y".to_vec())
        );
        let mut value = [0; 8];
        let on_host: &Path = &plain("fs/d");
        assert_eq!(getxattr(on_host, OPAQUE, &mut value).unwrap(), 1);

        let denied = Err(Errno::PERM.raw_os_error());
        let file = path_only(&root, "fs/file");
        assert_eq!(ask(&socket, &set, &[file.as_fd()]), denied, "a file");
        let elsewhere = open(plain("fs"), OFlags::RDONLY, Mode::empty()).unwrap();
        assert_eq!(
            ask(&socket, &set, &[elsewhere.as_fd()]),
            denied,
            "the same directory by another mount"
        );
        let invalid = Err(Errno::INVAL.raw_os_error());
        assert_eq!(ask(&socket, &set, &[]), invalid, "no directory");
        assert_eq!(ask(&socket, b"\x02/etc", &[inside]), invalid, "another value");
        assert_eq!(ask(&socket, &[9; 64], &[inside, inside]), invalid, "noise");

        assert_eq!(
            ask(&socket, &MarkRequest::Remove.to_bytes(), &[inside]),
            Ok(Vec::new())
        );
        assert_eq!(ask(&socket, &MarkRequest::Get.to_bytes(), &[inside]), none);
    }
}
