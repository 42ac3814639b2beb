//! Whether a container's program is there, looked at when the container is created: who made a mistake in its name learns it
//! then, and not when it is started.
//!
//! What the mounts of the container bring is only known when its process has its own mount namespace, so a program that a
//! mount could bring is not missing. `execve` has the last word.

use std::{
    fs::File,
    os::{fd::AsFd as _, unix::ffi::OsStrExt as _},
    path::{Component, Path, PathBuf},
};

use nix::{
    errno::Errno,
    fcntl::{OFlag, OpenHow, ResolveFlag, openat2},
    sys::stat::{Mode, SFlag, fstat},
};

use super::Program;
use crate::error::AgentError;

/// Permission to execute, for anybody.
const ANY_EXECUTE: u32 = 0o111;

/// What is at a place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Found {
    Nothing,
    Directory,
    NotExecutable,
    /// A program, or what only `execve` can tell.
    Perhaps,
}

/// An absolute path without `.` and `..`, which `..` of a link may make another; that is looked at, not trusted.
fn absolute(cwd: &str, path: &Path) -> PathBuf {
    let mut clean = PathBuf::from("/");
    for part in Path::new(cwd).join(path).components() {
        match part {
            Component::Normal(part) => clean.push(part),
            Component::ParentDir => {
                clean.pop();
            }
            _ => {}
        }
    }
    clean
}

fn open(root: &File, path: &Path, flags: OFlag) -> Result<File, Errno> {
    let beneath = path.strip_prefix("/").unwrap_or(path);
    let beneath = if beneath.as_os_str().is_empty() {
        Path::new(".")
    } else {
        beneath
    };
    let how = OpenHow::new()
        .flags(OFlag::O_PATH | OFlag::O_CLOEXEC | flags)
        .resolve(ResolveFlag::RESOLVE_IN_ROOT | ResolveFlag::RESOLVE_NO_MAGICLINKS);
    openat2(root.as_fd(), beneath, how).map(File::from)
}

fn look(root: &File, path: &Path) -> Found {
    let file = match open(root, path, OFlag::empty()) {
        Ok(file) => file,
        // A link may lead to what a mount brings.
        Err(Errno::ENOENT | Errno::ENOTDIR) => {
            return match open(root, path, OFlag::O_NOFOLLOW) {
                Ok(_) => Found::Perhaps,
                Err(_) => Found::Nothing,
            };
        }
        Err(_) => return Found::Perhaps,
    };
    let Ok(stat) = fstat(&file) else {
        return Found::Perhaps;
    };
    let kind = SFlag::from_bits_truncate(stat.st_mode) & SFlag::S_IFMT;
    if kind == SFlag::S_IFDIR {
        Found::Directory
    } else if kind == SFlag::S_IFREG && Mode::from_bits_truncate(stat.st_mode).bits() & ANY_EXECUTE == 0 {
        Found::NotExecutable
    } else {
        Found::Perhaps
    }
}

/// Fails if the program can't be there: neither in the root nor in what the mounts bring.
pub fn check<'a>(
    program: &Program,
    cwd: &str,
    root: &File,
    mounts: impl Iterator<Item = &'a str> + Clone,
) -> Result<(), AgentError> {
    let mut errno = Errno::ENOENT;
    for place in program.places() {
        let path = absolute(cwd, Path::new(std::ffi::OsStr::from_bytes(place.to_bytes())));
        let mut mounts = mounts
            .clone()
            .map(|destination| absolute("/", Path::new(destination)));
        if mounts.any(|mount| mount != Path::new("/") && path.starts_with(mount)) {
            return Ok(());
        }
        match look(root, &path) {
            Found::Perhaps => return Ok(()),
            Found::Nothing => {}
            Found::NotExecutable => errno = Errno::EACCES,
            // In a list of places to look at it is none; where it is the one that was named, that is said.
            Found::Directory if program.command().contains('/') => errno = Errno::EISDIR,
            Found::Directory => {}
        }
    }
    Err(AgentError::Exec {
        command: program.command().to_owned(),
        errno,
    })
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::PermissionsExt as _, os::unix::fs::symlink};

    use agent_protocol::Process;

    use super::*;
    use crate::user::Identity;

    struct World {
        dir: PathBuf,
        root: File,
    }

    impl Drop for World {
        fn drop(&mut self) {
            drop(fs::remove_dir_all(&self.dir));
        }
    }

    fn world(name: &str) -> World {
        let dir = std::env::temp_dir().join(format!("hull-lookup-{name}-{}", std::process::id()));
        fs::create_dir_all(dir.join("usr/bin")).unwrap();
        symlink("usr/bin", dir.join("bin")).unwrap();
        for (file, mode) in [("usr/bin/tool", 0o755), ("usr/bin/data", 0o644)] {
            fs::write(dir.join(file), "").unwrap();
            fs::set_permissions(dir.join(file), fs::Permissions::from_mode(mode)).unwrap();
        }
        symlink("/volume/tool", dir.join("usr/bin/elsewhere")).unwrap();
        World {
            root: File::open(&dir).unwrap(),
            dir,
        }
    }

    fn checked(world: &World, command: &str, mounts: &[&'static str]) -> Result<(), Errno> {
        let process = Process {
            args: vec![command.to_owned()],
            env: vec!["PATH=/sbin:/bin".into()],
            ..Process::default()
        };
        let identity = Identity {
            uid: 0,
            gid: 0,
            groups: Vec::new(),
            home: "/".into(),
        };
        let program = Program::new(&process, &identity).unwrap();
        match check(&program, "/usr", &world.root, mounts.iter().copied()) {
            Ok(()) => Ok(()),
            Err(AgentError::Exec { errno, .. }) => Err(errno),
            Err(other) => panic!("{other}"),
        }
    }

    #[test]
    fn program_is_found_where_execve_would_find_it() {
        let world = world("found");
        for command in ["tool", "/bin/tool", "bin/tool", "../bin/tool", "elsewhere"] {
            assert_eq!(checked(&world, command, &[]), Ok(()), "{command}");
        }
        assert_eq!(checked(&world, "missing", &[]), Err(Errno::ENOENT));
        assert_eq!(checked(&world, "/bin/missing", &[]), Err(Errno::ENOENT));
        assert_eq!(checked(&world, "data", &[]), Err(Errno::EACCES));
        assert_eq!(checked(&world, "/usr/bin", &[]), Err(Errno::EISDIR));
    }

    #[test]
    fn program_that_a_mount_could_bring_is_not_missing() {
        let world = world("mounts");
        assert_eq!(checked(&world, "/volume/x", &[]), Err(Errno::ENOENT));
        assert_eq!(checked(&world, "/volume/x", &["/proc", "/volume/"]), Ok(()));
        assert_eq!(checked(&world, "/volume2/x", &["/volume"]), Err(Errno::ENOENT));
    }
}
