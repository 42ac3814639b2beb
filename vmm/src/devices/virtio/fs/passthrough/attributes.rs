//! What a file is besides its content: reading and changing attributes, extended ones too.

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::mem;
use std::os::fd::OwnedFd;

use fuse_backend_rs::api::filesystem::{GetxattrReply, ListxattrReply, SetattrValid};
use rustix::fs::{
    AtFlags, CWD, FileType, Gid, Mode, OFlags, StatFs, Statx, Timespec, Timestamps, Uid, XattrFlags, chmodat,
    chownat, ftruncate, getxattr, getxattr_query, listxattr, listxattr_query, openat, removexattr, setxattr,
    utimensat,
};

use super::errno;
use super::identity::WithoutSetId;
use super::inodes::ROOT;

/// Largest value of an extended attribute, and longest list of their names: the kernel's bounds.
const MAX_EXTENDED_BYTES: usize = 64 << 10;
/// Where the number of a device goes in a file's number.
const DEVICE_SHIFT: u32 = 48;
/// "now" and "leave it" in a time stamp.
const UTIME_NOW: i64 = 0x3fff_ffff;
const UTIME_OMIT: i64 = 0x3fff_fffe;

/// The host's devices in the order they were met. All shares are one device to the guest, where a file's number alone must
/// tell it from others.
#[derive(Debug, Default)]
pub struct Devices(Vec<(u32, u32)>);

impl Devices {
    fn index(&mut self, device: (u32, u32)) -> u64 {
        let known = self.0.iter().position(|known| *known == device);
        let index = known.unwrap_or_else(|| {
            if self.0.len() < usize::from(u16::MAX) {
                self.0.push(device);
            }
            self.0.len() - 1
        });
        index as u64
    }
}

/// As the crate takes it.
pub fn to_stat(found: &Statx, devices: &mut Devices) -> libc::stat64 {
    let device = devices.index((found.stx_dev_major, found.stx_dev_minor));
    let mut stat = empty_stat();
    stat.st_ino = found.stx_ino ^ (device << DEVICE_SHIFT);
    stat.st_mode = found.stx_mode.into();
    stat.st_nlink = found.stx_nlink.into();
    stat.st_uid = found.stx_uid;
    stat.st_gid = found.stx_gid;
    stat.st_rdev = libc::makedev(found.stx_rdev_major, found.stx_rdev_minor);
    stat.st_size = found.stx_size.cast_signed();
    stat.st_blksize = found.stx_blksize.into();
    stat.st_blocks = found.stx_blocks.cast_signed();
    (stat.st_atime, stat.st_atime_nsec) = (found.stx_atime.tv_sec, found.stx_atime.tv_nsec.into());
    (stat.st_mtime, stat.st_mtime_nsec) = (found.stx_mtime.tv_sec, found.stx_mtime.tv_nsec.into());
    (stat.st_ctime, stat.st_ctime_nsec) = (found.stx_ctime.tv_sec, found.stx_ctime.tv_nsec.into());
    stat
}

/// The directory that lists the shares.
pub fn root(shares: usize) -> libc::stat64 {
    let mut stat = empty_stat();
    stat.st_ino = ROOT;
    stat.st_mode = libc::S_IFDIR | 0o555;
    stat.st_nlink = 2 + shares as u64;
    stat.st_blksize = 4096;
    stat
}

#[expect(unsafe_code, reason = "plain C structures without a constructor")]
fn empty_stat() -> libc::stat64 {
    // SAFETY: numbers only, for which zero is a value.
    unsafe { mem::zeroed() }
}

/// As the crate takes it.
#[expect(unsafe_code, reason = "plain C structures without a constructor")]
pub fn to_statvfs(found: &StatFs) -> libc::statvfs64 {
    // SAFETY: numbers only, for which zero is a value.
    let mut out: libc::statvfs64 = unsafe { mem::zeroed() };
    out.f_bsize = found.f_bsize.cast_unsigned();
    out.f_frsize = if found.f_frsize == 0 {
        out.f_bsize
    } else {
        found.f_frsize.cast_unsigned()
    };
    out.f_blocks = found.f_blocks;
    out.f_bfree = found.f_bfree;
    out.f_bavail = found.f_bavail;
    out.f_files = found.f_files;
    out.f_ffree = found.f_ffree;
    out.f_namemax = found.f_namelen.cast_unsigned();
    out
}

/// Changes what `valid` names: the owner first, since that takes bits off the mode.
pub fn change(
    descriptor: &OwnedFd,
    kind: FileType,
    open: Option<&File>,
    path: &str,
    wanted: &libc::stat64,
    valid: SetattrValid,
) -> io::Result<()> {
    if valid.intersects(SetattrValid::UID | SetattrValid::GID) {
        let uid = valid
            .contains(SetattrValid::UID)
            .then(|| Uid::from_raw(wanted.st_uid));
        let gid = valid
            .contains(SetattrValid::GID)
            .then(|| Gid::from_raw(wanted.st_gid));
        chownat(descriptor, c"", uid, gid, AtFlags::EMPTY_PATH)?;
    }
    if valid.contains(SetattrValid::SIZE) {
        let _without = WithoutSetId::new(valid.contains(SetattrValid::KILL_SUIDGID))?;
        let size = u64::try_from(wanted.st_size).map_err(|_| errno(libc::EINVAL))?;
        set_size(kind, open, path, size)?;
    }
    if valid.contains(SetattrValid::MODE) {
        if kind == FileType::Symlink {
            return Err(errno(libc::EOPNOTSUPP));
        }
        chmodat(
            CWD,
            path,
            Mode::from_raw_mode(wanted.st_mode & 0o7777),
            AtFlags::empty(),
        )?;
    }
    let times = Timestamps {
        last_access: time(
            valid,
            SetattrValid::ATIME,
            SetattrValid::ATIME_NOW,
            (wanted.st_atime, wanted.st_atime_nsec),
        ),
        last_modification: time(
            valid,
            SetattrValid::MTIME,
            SetattrValid::MTIME_NOW,
            (wanted.st_mtime, wanted.st_mtime_nsec),
        ),
    };
    let untouched = |time: &Timespec| time.tv_nsec == UTIME_OMIT;
    if !(untouched(&times.last_access) && untouched(&times.last_modification)) {
        utimensat(CWD, path, &times, AtFlags::empty())?;
    }
    Ok(())
}

fn set_size(kind: FileType, open: Option<&File>, path: &str, size: u64) -> io::Result<()> {
    if let Some(file) = open {
        match ftruncate(file, size) {
            // Open for reading only, while the guest's kernel has let `truncate` through by the file's permissions.
            Err(rustix::io::Errno::INVAL | rustix::io::Errno::BADF) => {}
            result => return Ok(result?),
        }
    }
    if kind != FileType::RegularFile {
        return Err(errno(libc::EINVAL));
    }
    let flags = OFlags::WRONLY | OFlags::CLOEXEC | OFlags::NOCTTY | OFlags::NONBLOCK;
    Ok(ftruncate(openat(CWD, path, flags, Mode::empty())?, size)?)
}

fn time(
    valid: SetattrValid,
    set: SetattrValid,
    now: SetattrValid,
    (tv_sec, tv_nsec): (i64, i64),
) -> Timespec {
    let special = |tv_nsec| Timespec { tv_sec: 0, tv_nsec };
    if valid.contains(now) {
        special(UTIME_NOW)
    } else if valid.contains(set) {
        // Beyond a second it is refused, and special values are not the guest's to give.
        Timespec {
            tv_sec,
            tv_nsec: tv_nsec.clamp(0, 999_999_999),
        }
    } else {
        special(UTIME_OMIT)
    }
}

pub fn set_extended(path: &str, name: &CStr, value: &[u8], flags: u32) -> io::Result<()> {
    let flags = XattrFlags::from_bits(flags).ok_or_else(|| errno(libc::EINVAL))?;
    Ok(setxattr(path, name, value, flags)?)
}

pub fn get_extended(path: &str, name: &CStr, size: u32) -> io::Result<GetxattrReply> {
    if size == 0 {
        let length = getxattr_query(path, name)?;
        return Ok(GetxattrReply::Count(u32::try_from(length).unwrap_or(u32::MAX)));
    }
    let mut value = vec![0; buffer_bytes(size)];
    let length = getxattr(path, name, value.as_mut_slice())?;
    value.truncate(length);
    Ok(GetxattrReply::Value(value))
}

pub fn list_extended(path: &str, size: u32) -> io::Result<ListxattrReply> {
    if size == 0 {
        let length = listxattr_query(path)?;
        return Ok(ListxattrReply::Count(u32::try_from(length).unwrap_or(u32::MAX)));
    }
    let mut names = vec![0; buffer_bytes(size)];
    let length = listxattr(path, names.as_mut_slice())?;
    names.truncate(length);
    // Those that `getxattr` refuses are not shown.
    let shown = names
        .split_inclusive(|byte| *byte == 0)
        .filter(|name| !name.starts_with(b"system."));
    Ok(ListxattrReply::Names(shown.flatten().copied().collect()))
}

pub fn remove_extended(path: &str, name: &CStr) -> io::Result<()> {
    Ok(removexattr(path, name)?)
}

fn buffer_bytes(size: u32) -> usize {
    (size as usize).min(MAX_EXTENDED_BYTES)
}
