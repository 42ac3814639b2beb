//! Mounts as descriptors: made detached, changed, attached. Thin wrappers; each checks its result, none keeps state.
#![expect(
    unsafe_code,
    reason = "the mount system calls of Linux 5.2 and later have no wrapper"
)]

use std::{
    ffi::{CStr, CString},
    os::fd::{AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd, RawFd},
    path::Path,
};

use nix::errno::Errno;

/// `MOUNT_ATTR_*`
pub const ATTRIBUTE_RDONLY: u64 = 0x1;
pub const ATTRIBUTE_NOSUID: u64 = 0x2;
pub const ATTRIBUTE_NODEV: u64 = 0x4;
pub const ATTRIBUTE_NOEXEC: u64 = 0x8;
pub const ATTRIBUTE_ATIME: u64 = 0x70;
pub const ATTRIBUTE_NOATIME: u64 = 0x10;
pub const ATTRIBUTE_STRICTATIME: u64 = 0x20;
pub const ATTRIBUTE_NODIRATIME: u64 = 0x80;
pub const ATTRIBUTE_NOSYMFOLLOW: u64 = 0x20_0000;

/// What is to be changed of a mount.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Attributes {
    /// To be there.
    pub set: u64,
    /// To be gone.
    pub clear: u64,
}

impl Attributes {
    /// Adds a later wish, which wins.
    pub fn merge(&mut self, later: Self) {
        self.set = (self.set & !later.clear) | later.set;
        self.clear = (self.clear & !(later.set & !ATTRIBUTE_ATIME)) | later.clear;
    }

    /// Whether there is nothing to change.
    pub fn is_empty(self) -> bool {
        self == Self::default()
    }
}

fn path_string(path: &Path) -> Result<CString, Errno> {
    use std::os::unix::ffi::OsStrExt as _;
    CString::new(path.as_os_str().as_bytes()).map_err(|_| Errno::EINVAL)
}

/// Takes over what a system call has returned.
///
/// # Safety
///
/// It is an error or a descriptor that nobody else owns.
unsafe fn owned(result: libc::c_long) -> Result<OwnedFd, Errno> {
    let fd = RawFd::try_from(Errno::result(result)?).map_err(|_| Errno::EBADF)?;
    // SAFETY: the caller's promise.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// A detached copy of the mount at `path`, with what is mounted below it or without, to be attached by [`move_mount`] in
/// another root.
pub fn open_tree_clone(path: &Path, recursive: bool) -> Result<OwnedFd, Errno> {
    let path = path_string(path)?;
    let below = if recursive {
        libc::AT_RECURSIVE.unsigned_abs()
    } else {
        0
    };
    let flags = libc::OPEN_TREE_CLONE | libc::OPEN_TREE_CLOEXEC | below;
    // SAFETY: `path` is a NUL-terminated string that outlives the call; a new descriptor or an error comes out.
    unsafe {
        owned(libc::syscall(
            libc::SYS_open_tree,
            libc::AT_FDCWD,
            path.as_ptr(),
            flags,
        ))
    }
}

/// Attaches a detached mount at `path`.
pub fn move_mount(tree: BorrowedFd<'_>, path: &Path) -> Result<(), Errno> {
    const MOVE_MOUNT_F_EMPTY_PATH: u32 = 4;
    let path = path_string(path)?;
    // SAFETY: both strings are NUL-terminated and outlive the call.
    Errno::result(unsafe {
        libc::syscall(
            libc::SYS_move_mount,
            tree.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_FDCWD,
            path.as_ptr(),
            MOVE_MOUNT_F_EMPTY_PATH,
        )
    })
    .map(drop)
}

/// Attaches a detached mount at what `target` refers to.
pub fn move_mount_to(tree: BorrowedFd<'_>, target: BorrowedFd<'_>) -> Result<(), Errno> {
    const MOVE_MOUNT_F_EMPTY_PATH: u32 = 0x4;
    const MOVE_MOUNT_T_EMPTY_PATH: u32 = 0x40;
    // SAFETY: both strings are empty and NUL-terminated.
    Errno::result(unsafe {
        libc::syscall(
            libc::SYS_move_mount,
            tree.as_raw_fd(),
            c"".as_ptr(),
            target.as_raw_fd(),
            c"".as_ptr(),
            MOVE_MOUNT_F_EMPTY_PATH | MOVE_MOUNT_T_EMPTY_PATH,
        )
    })
    .map(drop)
}

/// `struct mount_attr`
#[repr(C)]
struct MountAttributes {
    set: u64,
    clear: u64,
    propagation: u64,
    user_namespace: u64,
}

fn set_attributes_at(
    directory: RawFd,
    path: &CStr,
    flags: i32,
    attributes: Attributes,
    recursive: bool,
) -> Result<(), Errno> {
    let wanted = MountAttributes {
        set: attributes.set,
        clear: attributes.clear,
        propagation: 0,
        user_namespace: 0,
    };
    let flags = flags | if recursive { libc::AT_RECURSIVE } else { 0 };
    // SAFETY: a NUL-terminated string and the attributes with their size live across the call.
    Errno::result(unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            directory,
            path.as_ptr(),
            flags,
            &raw const wanted,
            size_of::<MountAttributes>(),
        )
    })
    .map(drop)
}

/// Changes the mount at `path`, and everything below it where that is wanted.
pub fn set_attributes(path: &Path, attributes: Attributes, recursive: bool) -> Result<(), Errno> {
    set_attributes_at(libc::AT_FDCWD, &path_string(path)?, 0, attributes, recursive)
}

/// Changes a detached mount.
pub fn set_tree_attributes(
    tree: BorrowedFd<'_>,
    attributes: Attributes,
    recursive: bool,
) -> Result<(), Errno> {
    set_attributes_at(tree.as_raw_fd(), c"", libc::AT_EMPTY_PATH, attributes, recursive)
}

/// A new filesystem, mounted nowhere yet; its options are `key=value`, or flags.
pub fn detached_mount(
    kind: &CStr,
    options: &[(&CStr, Option<&CStr>)],
    attributes: u64,
) -> Result<OwnedFd, Errno> {
    const FSCONFIG_SET_FLAG: u32 = 0;
    const FSCONFIG_SET_STRING: u32 = 1;
    const FSCONFIG_CMD_CREATE: u32 = 6;
    const CLOEXEC: u32 = 1;
    // SAFETY: all strings are NUL-terminated and live across the calls; a new descriptor or an error comes out.
    unsafe {
        let context = owned(libc::syscall(libc::SYS_fsopen, kind.as_ptr(), CLOEXEC))?;
        let configure = |command: u32, key: *const libc::c_char, value: *const libc::c_char| {
            Errno::result(libc::syscall(
                libc::SYS_fsconfig,
                context.as_raw_fd(),
                command,
                key,
                value,
                0,
            ))
        };
        for (key, value) in options {
            match value {
                Some(value) => configure(FSCONFIG_SET_STRING, key.as_ptr(), value.as_ptr())?,
                None => configure(FSCONFIG_SET_FLAG, key.as_ptr(), std::ptr::null())?,
            };
        }
        configure(FSCONFIG_CMD_CREATE, std::ptr::null(), std::ptr::null())?;
        owned(libc::syscall(
            libc::SYS_fsmount,
            context.as_raw_fd(),
            CLOEXEC,
            attributes,
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn later_wish_wins() {
        let mut wish = Attributes {
            set: ATTRIBUTE_RDONLY,
            clear: 0,
        };
        wish.merge(Attributes {
            set: 0,
            clear: ATTRIBUTE_RDONLY,
        });
        assert_eq!((wish.set, wish.clear), (0, ATTRIBUTE_RDONLY));
        wish.merge(Attributes {
            set: ATTRIBUTE_RDONLY,
            clear: 0,
        });
        assert_eq!((wish.set, wish.clear), (ATTRIBUTE_RDONLY, 0));
    }

    #[test]
    fn access_times_are_always_chosen_as_a_whole() {
        let mut wish = Attributes {
            set: ATTRIBUTE_NOATIME,
            clear: ATTRIBUTE_ATIME,
        };
        wish.merge(Attributes {
            set: ATTRIBUTE_STRICTATIME,
            clear: ATTRIBUTE_ATIME,
        });
        assert_eq!((wish.set, wish.clear), (ATTRIBUTE_STRICTATIME, ATTRIBUTE_ATIME));
    }
}
