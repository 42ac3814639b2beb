//! What a configuration's resources are taken from: descriptors that came with a frame, or paths of a trusted command line.

use rustix::fs::{FileType, OFlags, StatVfsMountFlags, fcntl_getfl, fstat, fstatvfs};
use rustix::net::{AddressFamily, SocketType, sockopt};
use std::{
    fs::{File, OpenOptions},
    io,
    os::{
        fd::{AsFd, OwnedFd},
        unix::net::{UnixListener, UnixStream},
    },
    path::{Path, PathBuf},
};
use vmm_api::ResourceRef;

/// How a file will be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// It is read.
    Read,
    /// It is read and must not be writable through this descriptor: the guest's writes shall fail in the host kernel too.
    ReadOnly,
    /// It is read and written.
    ReadWrite,
    /// It is written at its end.
    Append,
}

/// Why a resource can't be used.
#[derive(Debug, thiserror::Error)]
pub enum ResourceError {
    /// No file there.
    #[error("{field}: can't open {}", path.display())]
    Open {
        /// Field of the configuration.
        field: String,
        /// The path.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// Paths are for the command line.
    #[error("{field}: a path is only accepted from --config; send a file descriptor")]
    PathNotAllowed {
        /// Field of the configuration.
        field: String,
    },
    /// No such descriptor.
    #[error("{field}: the frame carried no file descriptor {index}, or it is used twice")]
    NoSuchFd {
        /// Field of the configuration.
        field: String,
        /// As configured.
        index: u32,
    },
    /// A descriptor for `--config`.
    #[error("{field}: file descriptors come over the control socket; give a path")]
    FdNotAllowed {
        /// Field of the configuration.
        field: String,
    },
    /// The wrong kind of file.
    #[error("{field}: {expected} is needed")]
    Kind {
        /// Field of the configuration.
        field: String,
        /// What it should be.
        expected: &'static str,
    },
    /// A read-only disk through a writable descriptor.
    #[error("{field}: read_only is set but the descriptor is writable; open it O_RDONLY")]
    Writable {
        /// Field of the configuration.
        field: String,
    },
    /// The descriptor's mode is not enough.
    #[error("{field}: the descriptor is not open for {needed}")]
    Mode {
        /// Field of the configuration.
        field: String,
        /// What is needed.
        needed: &'static str,
    },
    /// A read-only share through a mount that isn't.
    #[error("{field}: read_only is set but the descriptor's mount is writable; make the mount read-only")]
    WritableMount {
        /// Field of the configuration.
        field: String,
    },
    /// A share by path.
    #[error("{field}: a share comes over the control socket, as an O_PATH descriptor of a mount made for it")]
    SharePath {
        /// Field of the configuration.
        field: String,
    },
    /// The descriptor can't be examined.
    #[error("{field}: can't examine the descriptor")]
    Examine {
        /// Field of the configuration.
        field: String,
        /// What the system said.
        #[source]
        source: io::Error,
    },
}

/// Where resources come from.
#[derive(Debug)]
pub struct Resources(Source);

#[derive(Debug)]
enum Source {
    Fds(Vec<Option<OwnedFd>>),
    Paths,
}

impl Resources {
    /// Descriptors of a frame.
    #[must_use]
    pub fn from_fds(fds: Vec<OwnedFd>) -> Self {
        Self(Source::Fds(fds.into_iter().map(Some).collect()))
    }

    /// Paths, for `--config`.
    #[must_use]
    pub fn from_paths() -> Self {
        Self(Source::Paths)
    }

    /// A file, or a block device where it is read or written in place.
    ///
    /// # Errors
    /// [`ResourceError`].
    pub fn file(
        &mut self,
        reference: &ResourceRef,
        access: Access,
        field: &str,
    ) -> Result<File, ResourceError> {
        let file = match self.locate(reference, field)? {
            Located::Fd(fd) => File::from(fd),
            Located::Path(path) => open(path, access).map_err(|source| ResourceError::Open {
                field: field.to_owned(),
                path: path.to_owned(),
                source,
            })?,
        };
        check_mode(&file, access, field)?;
        if access != Access::Append {
            let kind = FileType::from_raw_mode(fstat(&file).map_err(examine(field))?.st_mode);
            if !matches!(kind, FileType::RegularFile | FileType::BlockDevice) {
                let expected = "a regular file or a block device";
                return Err(ResourceError::Kind {
                    field: field.to_owned(),
                    expected,
                });
            }
        }
        Ok(file)
    }

    /// The root of a share: a directory or regular file, which the host's kernel must not let anybody write through this
    /// descriptor if the share is read-only.
    ///
    /// # Errors
    /// [`ResourceError`].
    pub fn share(
        &mut self,
        reference: &ResourceRef,
        read_only: bool,
        field: &str,
    ) -> Result<OwnedFd, ResourceError> {
        if matches!(reference, ResourceRef::Path(_)) {
            return Err(ResourceError::SharePath {
                field: field.to_owned(),
            });
        }
        let Located::Fd(fd) = self.locate(reference, field)? else {
            return Err(ResourceError::SharePath {
                field: field.to_owned(),
            });
        };
        let kind = FileType::from_raw_mode(fstat(&fd).map_err(examine(field))?.st_mode);
        let flags = fcntl_getfl(&fd).map_err(examine(field))?;
        let is_right = matches!(kind, FileType::Directory | FileType::RegularFile);
        if !is_right || !flags.contains(OFlags::PATH) {
            return Err(ResourceError::Kind {
                field: field.to_owned(),
                expected: "an O_PATH descriptor of a directory or regular file",
            });
        }
        let mount = fstatvfs(&fd).map_err(examine(field))?;
        if read_only && !mount.f_flag.contains(StatVfsMountFlags::RDONLY) {
            return Err(ResourceError::WritableMount {
                field: field.to_owned(),
            });
        }
        Ok(fd)
    }

    /// A descriptor whose kind whoever gets it checks: one that can't be opened by name.
    ///
    /// # Errors
    /// [`ResourceError`].
    pub fn descriptor(&mut self, reference: &ResourceRef, field: &str) -> Result<OwnedFd, ResourceError> {
        match self.locate(reference, field)? {
            Located::Fd(fd) => Ok(fd),
            Located::Path(_) => Err(ResourceError::Kind {
                field: field.to_owned(),
                expected: "an open descriptor, over the control socket,",
            }),
        }
    }

    /// A connected Unix socket that keeps messages apart.
    ///
    /// # Errors
    /// [`ResourceError`].
    pub fn packet_socket(&mut self, reference: &ResourceRef, field: &str) -> Result<OwnedFd, ResourceError> {
        let fd = self.descriptor(reference, field)?;
        let is_right = sockopt::socket_domain(&fd) == Ok(AddressFamily::UNIX)
            && sockopt::socket_type(&fd) == Ok(SocketType::SEQPACKET);
        if is_right {
            return Ok(fd);
        }
        Err(ResourceError::Kind {
            field: field.to_owned(),
            expected: "a connected Unix socket of the type SOCK_SEQPACKET",
        })
    }

    /// A connected Unix stream.
    ///
    /// # Errors
    /// [`ResourceError`].
    pub fn stream(&mut self, reference: &ResourceRef, field: &str) -> Result<UnixStream, ResourceError> {
        match self.locate(reference, field)? {
            Located::Fd(fd) => {
                check_socket(&fd, false, field)?;
                Ok(UnixStream::from(fd))
            }
            Located::Path(path) => UnixStream::connect(path).map_err(|source| ResourceError::Open {
                field: field.to_owned(),
                path: path.to_owned(),
                source,
            }),
        }
    }

    /// A listening Unix stream.
    ///
    /// # Errors
    /// [`ResourceError`].
    pub fn listener(&mut self, reference: &ResourceRef, field: &str) -> Result<UnixListener, ResourceError> {
        match self.locate(reference, field)? {
            Located::Fd(fd) => {
                check_socket(&fd, true, field)?;
                Ok(UnixListener::from(fd))
            }
            Located::Path(path) => UnixListener::bind(path).map_err(|source| ResourceError::Open {
                field: field.to_owned(),
                path: path.to_owned(),
                source,
            }),
        }
    }

    fn locate<'a>(&mut self, reference: &'a ResourceRef, field: &str) -> Result<Located<'a>, ResourceError> {
        match (&mut self.0, reference) {
            (Source::Fds(fds), ResourceRef::Fd(index)) => {
                let slot = usize::try_from(*index).ok().and_then(|slot| fds.get_mut(slot));
                slot.and_then(Option::take)
                    .map(Located::Fd)
                    .ok_or_else(|| ResourceError::NoSuchFd {
                        field: field.to_owned(),
                        index: *index,
                    })
            }
            (Source::Paths, ResourceRef::Path(path)) => Ok(Located::Path(path)),
            (Source::Fds(_), ResourceRef::Path(_)) => Err(ResourceError::PathNotAllowed {
                field: field.to_owned(),
            }),
            (Source::Paths, ResourceRef::Fd(_)) => Err(ResourceError::FdNotAllowed {
                field: field.to_owned(),
            }),
        }
    }
}

enum Located<'a> {
    Fd(OwnedFd),
    Path(&'a Path),
}

fn examine(field: &str) -> impl Fn(rustix::io::Errno) -> ResourceError {
    move |errno| ResourceError::Examine {
        field: field.to_owned(),
        source: errno.into(),
    }
}

fn open(path: &Path, access: Access) -> io::Result<File> {
    match access {
        Access::Read | Access::ReadOnly => File::open(path),
        Access::ReadWrite => OpenOptions::new().read(true).write(true).open(path),
        Access::Append => OpenOptions::new().append(true).create(true).open(path),
    }
}

fn check_mode(file: &File, access: Access, field: &str) -> Result<(), ResourceError> {
    let mode = fcntl_getfl(file).map_err(examine(field))? & OFlags::ACCMODE;
    let readable = mode == OFlags::RDONLY || mode == OFlags::RDWR;
    let writable = mode == OFlags::WRONLY || mode == OFlags::RDWR;
    let missing = |needed| {
        Err(ResourceError::Mode {
            field: field.to_owned(),
            needed,
        })
    };
    match access {
        Access::ReadOnly if writable => Err(ResourceError::Writable {
            field: field.to_owned(),
        }),
        Access::Read | Access::ReadOnly | Access::ReadWrite if !readable => missing("reading"),
        Access::ReadWrite | Access::Append if !writable => missing("writing"),
        _ => Ok(()),
    }
}

fn check_socket(fd: &OwnedFd, listening: bool, field: &str) -> Result<(), ResourceError> {
    let expected = if listening {
        "a listening Unix stream socket"
    } else {
        "a connected Unix stream socket"
    };
    let fd = fd.as_fd();
    let is_right = sockopt::socket_domain(fd) == Ok(AddressFamily::UNIX)
        && sockopt::socket_type(fd) == Ok(SocketType::STREAM)
        && sockopt::socket_acceptconn(fd) == Ok(listening);
    if is_right {
        Ok(())
    } else {
        Err(ResourceError::Kind {
            field: field.to_owned(),
            expected,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn one(fd: impl Into<OwnedFd>) -> Resources {
        Resources::from_fds(vec![fd.into()])
    }

    #[test]
    fn kinds_are_checked() {
        let (a, _b) = UnixStream::pair().unwrap();
        assert!(matches!(
            one(a).file(&ResourceRef::Fd(0), Access::Read, "x"),
            Err(ResourceError::Kind { .. })
        ));
        let (a, _b) = UnixStream::pair().unwrap();
        assert!(matches!(
            one(a).listener(&ResourceRef::Fd(0), "x"),
            Err(ResourceError::Kind { .. })
        ));
        let file = tempfile::tempfile().unwrap();
        assert!(matches!(
            one(file).stream(&ResourceRef::Fd(0), "x"),
            Err(ResourceError::Kind { .. })
        ));
        let null = File::open("/dev/null").unwrap();
        assert!(matches!(
            one(null).file(&ResourceRef::Fd(0), Access::Read, "x"),
            Err(ResourceError::Kind { .. })
        ));
        let (a, _b) = UnixStream::pair().unwrap();
        one(a).stream(&ResourceRef::Fd(0), "x").unwrap();
    }

    #[test]
    fn modes_are_checked() {
        let path = tempfile::NamedTempFile::new().unwrap();
        let read_only = File::open(path.path()).unwrap();
        let error = one(read_only)
            .file(&ResourceRef::Fd(0), Access::ReadWrite, "disk")
            .unwrap_err();
        assert!(matches!(
            error,
            ResourceError::Mode {
                needed: "writing",
                ..
            }
        ));
    }

    #[test]
    fn missing_path_is_named() {
        let reference = ResourceRef::Path("/nowhere/vmlinux".into());
        let error = Resources::from_paths()
            .file(&reference, Access::Read, "kernel")
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("kernel") && error.contains("/nowhere/vmlinux"),
            "{error}"
        );
    }
}
