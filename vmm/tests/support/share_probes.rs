//! Tries to cross what confines the thread that serves shares: each probe runs on a thread prepared as that one is, in a process
//! that has entered the jail beside it.

use rustix::{
    fs::{AtFlags, CWD, Mode, OFlags, fstat, mkdirat, open, openat, statx},
    io::Errno,
    mount::{MountFlags, mount},
    thread::{CapabilitySet, CapabilitySets, capabilities, set_capabilities},
};
use std::{
    fs::{self, File},
    os::fd::{AsRawFd, OwnedFd},
    path::Path,
    sync::mpsc::channel,
    thread,
};
use vmm::{
    devices::virtio::fs::{KEPT, ShareUser, prepare},
    jail::{self, JailSpec, fds},
};

type Outcome = Result<(), String>;
type Probe = (&'static str, fn() -> Outcome);

/// The probes by name.
pub const PROBES: &[Probe] = &[
    (
        "shares_thread_has_only_its_capabilities",
        has_only_its_capabilities,
    ),
    ("shares_thread_has_an_empty_root", has_an_empty_root),
    (
        "shares_thread_sees_only_its_descriptors",
        sees_only_its_descriptors,
    ),
    (
        "shares_thread_cannot_mount_or_open_by_handle",
        cannot_mount_or_open_by_handle,
    ),
    ("shares_thread_makes_no_device", makes_no_device),
    (
        "descriptors_of_others_cannot_be_opened_anew",
        descriptors_of_others_cannot_be_opened_anew,
    ),
];

fn text(error: impl std::fmt::Display) -> String {
    error.to_string()
}

fn expect(what: &str, result: Result<impl Sized, Errno>, errnos: &[Errno]) -> Outcome {
    match result {
        Err(errno) if errnos.contains(&errno) => Ok(()),
        Err(errno) => Err(format!("{what}: {errno}")),
        Ok(_) => Err(format!("{what} worked")),
    }
}

/// Runs a probe on the thread; `held` is open before the jail, as a share's root is.
fn on_thread(held: &Path, probe: impl FnOnce(OwnedFd) -> Outcome + Send + 'static) -> Outcome {
    let held = open(held, OFlags::PATH, Mode::empty()).map_err(text)?;
    let (entered, wait) = channel();
    let worker = jail::enter_beside(&JailSpec::new(None, None).with_shares(true), |identity| {
        let user = if identity.is_root {
            ShareUser::Reduced {
                uid: identity.uid,
                gid: identity.gid,
            }
        } else {
            ShareUser::Own
        };
        let (prepared, ready) = channel();
        let worker = thread::spawn(move || {
            let result = prepare(user).map_err(|error| vmm::control::driver::chain(&error));
            let _ = prepared.send(());
            result?;
            wait.recv().map_err(text)?;
            probe(held)
        });
        let _ = ready.recv();
        Ok(worker)
    })
    .map_err(|error| vmm::control::driver::chain(&error))?;
    entered.send(()).map_err(text)?;
    worker.join().map_err(|_| "the thread panicked".to_owned())?
}

fn share() -> Result<tempfile::TempDir, String> {
    tempfile::tempdir().map_err(text)
}

fn has_only_its_capabilities() -> Outcome {
    on_thread(Path::new("/"), |_| {
        let sets = capabilities(None).map_err(text)?;
        if sets.permitted != KEPT || sets.effective != KEPT || !sets.inheritable.is_empty() {
            return Err(format!("{sets:?}"));
        }
        for capability in [
            CapabilitySet::SYS_ADMIN,
            CapabilitySet::DAC_READ_SEARCH,
            CapabilitySet::MKNOD,
            CapabilitySet::SYS_PTRACE,
        ] {
            let more = CapabilitySets {
                effective: KEPT | capability,
                permitted: KEPT | capability,
                inheritable: CapabilitySet::empty(),
            };
            expect("raising", set_capabilities(None, more), &[Errno::PERM])?;
        }
        Ok(())
    })
}

fn has_an_empty_root() -> Outcome {
    on_thread(Path::new("/"), |_| {
        for path in ["/etc/passwd", "/proc/self/status", "/dev/kvm", "/../etc"] {
            expect(path, open(path, OFlags::PATH, Mode::empty()), &[Errno::NOENT])?;
        }
        expect(
            "making a directory",
            mkdirat(CWD, "/x", Mode::RWXU),
            &[Errno::ROFS, Errno::NOSPC],
        )
    })
}

/// Its working directory is the list of its descriptors and nothing else of `/proc`.
fn sees_only_its_descriptors() -> Outcome {
    on_thread(Path::new("/"), |_| {
        let identity = |path: &str| {
            let found = openat(CWD, path, OFlags::PATH, Mode::empty()).and_then(fstat);
            found.map(|found| (found.st_dev, found.st_ino)).map_err(text)
        };
        let here = identity(".")?;
        for path in ["..", "../..", "../../../.."] {
            if identity(path)? != here {
                return Err(format!("{path} leads elsewhere"));
            }
        }
        for path in ["../status", "../../../1/root", "self", "../root"] {
            let opened = openat(CWD, path, OFlags::PATH, Mode::empty());
            expect(path, opened, &[Errno::NOENT, Errno::NOTDIR])?;
        }
        Ok(())
    })
}

fn cannot_mount_or_open_by_handle() -> Outcome {
    let share = share()?;
    fs::set_permissions(share.path(), std::os::unix::fs::PermissionsExt::from_mode(0o777)).map_err(text)?;
    on_thread(share.path(), |held| {
        let path = format!("{}/.", held.as_raw_fd());
        let mounted = mount("tmpfs", path.as_str(), "tmpfs", MountFlags::empty(), None);
        expect("mounting", mounted, &[Errno::PERM])?;
        let readable = openat(&held, ".", OFlags::RDONLY, Mode::empty()).map_err(text)?;
        let handle = super::raw::open_by_handle(readable.as_raw_fd());
        expect("opening by handle", handle, &[Errno::PERM])
    })
}

fn makes_no_device() -> Outcome {
    let share = share()?;
    fs::set_permissions(share.path(), std::os::unix::fs::PermissionsExt::from_mode(0o777)).map_err(text)?;
    on_thread(share.path(), |held| {
        let device = rustix::fs::makedev(1, 3);
        let kind = rustix::fs::FileType::CharacterDevice;
        let made = rustix::fs::mknodat(&held, "null", kind, Mode::RWXU, device);
        expect("making a device", made, &[Errno::PERM, Errno::ACCESS])?;
        // What it is there for works.
        mkdirat(&held, "directory", Mode::RWXU).map_err(text)?;
        statx(
            &held,
            "directory",
            AtFlags::empty(),
            rustix::fs::StatxFlags::BASIC_STATS,
        )
        .map(drop)
        .map_err(text)
    })
}

/// An image's layer is open for reading in the same process. By the number of such a descriptor a file could be opened for
/// writing, by who may write any file; so this thread's table doesn't have it.
fn descriptors_of_others_cannot_be_opened_anew() -> Outcome {
    let layer = tempfile::NamedTempFile::new().map_err(text)?;
    let layer = File::open(layer.path()).map_err(text)?;
    let number = layer.as_raw_fd();
    let share = share()?;
    let result = on_thread(share.path(), move |held| {
        let anew = |number: i32, flags| openat(CWD, number.to_string(), flags, Mode::empty());
        if rustix::thread::capabilities(None).map_err(text)?.effective == KEPT {
            // It could be: that is what there is to prevent.
            anew(number, OFlags::RDWR).map_err(|errno| format!("before: {errno}"))?;
        }
        fds::own_table(&[held.as_raw_fd()], None).map_err(text)?;
        expect("opening", anew(number, OFlags::RDONLY), &[Errno::NOENT])?;
        anew(held.as_raw_fd(), OFlags::RDONLY).map(drop).map_err(text)
    });
    // Open for everybody else.
    layer.metadata().map(drop).map_err(text)?;
    result
}
