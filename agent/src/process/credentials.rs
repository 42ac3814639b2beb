//! Limits, identity and capabilities of a process, in the order in which the kernel allows to give them up.

use std::{ffi::CString, fs};

use agent_protocol::{Capabilities, Process, limits::CAPABILITY_MASK};
use nix::{
    errno::Errno,
    sys::{prctl, stat},
    unistd::{Gid, Uid, chdir, setgroups, setresgid, setresuid},
};

use super::{
    channel::{Failure, FailureKind},
    mounts::failed,
};
use crate::{sys, user::Identity};

/// Applies everything up to, and without, `execve`.
pub(super) fn apply(process: &Process, identity: &Identity) -> Result<(), Failure> {
    set_rlimits(process)?;
    if let Some(adjustment) = process.oom_score_adj {
        fs::write("/proc/self/oom_score_adj", adjustment.to_string())
            .map_err(|error| failed("setting oom_score_adj")(io_errno(&error)))?;
    }
    let seccomp = &process.seccomp_program;
    if !seccomp.is_empty() && !process.no_new_privileges {
        // Needs CAP_SYS_ADMIN, which is about to go.
        sys::set_seccomp(seccomp).map_err(failed("installing the seccomp filter"))?;
    }
    let wanted = wanted_capabilities(process, identity);
    for capability in 0..CAPABILITY_MASK.count_ones() {
        if wanted.bounding & (1 << capability) == 0 {
            match sys::drop_bounding(capability) {
                // A capability that this kernel doesn't know.
                Ok(()) | Err(Errno::EINVAL) => {}
                Err(errno) => return Err(failed("dropping capabilities")(errno)),
            }
        }
    }
    // Once as root, because the directory may be closed to the user, as docker and runc do.
    let entered = enter_directory(&process.cwd);
    prctl::set_keepcaps(true).map_err(failed("keeping capabilities"))?;
    set_identity(identity)?;
    enter_directory(&process.cwd)
        .or(entered)
        .map_err(|errno| Failure {
            kind: FailureKind::WorkingDirectory,
            subject: process.cwd.clone(),
            errno,
        })?;
    prctl::set_keepcaps(false).map_err(failed("clearing keepcaps"))?;
    sys::set_capabilities(wanted.effective, wanted.permitted, wanted.inheritable)
        .map_err(failed("setting capabilities"))?;
    for capability in 0..CAPABILITY_MASK.count_ones() {
        if wanted.ambient & (1 << capability) != 0 {
            sys::raise_ambient(capability).map_err(failed("raising ambient capabilities"))?;
        }
    }
    let mask = stat::Mode::from_bits_truncate(process.umask.unwrap_or(0o022));
    stat::umask(mask);
    if process.no_new_privileges {
        prctl::set_no_new_privs().map_err(failed("setting no_new_privs"))?;
        if !seccomp.is_empty() {
            sys::set_seccomp(seccomp).map_err(failed("installing the seccomp filter"))?;
        }
    }
    Ok(())
}

fn io_errno(error: &std::io::Error) -> Errno {
    error.raw_os_error().map_or(Errno::EIO, Errno::from_raw)
}

fn enter_directory(cwd: &str) -> Result<(), Errno> {
    match chdir(cwd) {
        Err(Errno::ENOENT) => {
            fs::create_dir_all(cwd).map_err(|error| io_errno(&error))?;
            chdir(cwd)
        }
        result => result,
    }
}

fn set_rlimits(process: &Process) -> Result<(), Failure> {
    for rlimit in &process.rlimits {
        let limit = libc::rlimit {
            rlim_cur: rlimit.soft,
            rlim_max: rlimit.hard,
        };
        sys::set_rlimit(rlimit.resource, &limit)
            .map_err(failed(format!("setting resource limit {}", rlimit.resource)))?;
    }
    Ok(())
}

/// What is left of the requested sets for this user.
fn wanted_capabilities(process: &Process, identity: &Identity) -> Capabilities {
    let mut wanted = process.capabilities.as_ref().cloned().unwrap_or_default();
    if wanted.root_only && identity.uid != 0 {
        (wanted.effective, wanted.permitted) = (wanted.ambient, wanted.ambient);
    }
    wanted
}

fn set_identity(identity: &Identity) -> Result<(), Failure> {
    let (uid, gid) = (Uid::from_raw(identity.uid), Gid::from_raw(identity.gid));
    let groups: Vec<Gid> = identity.groups.iter().copied().map(Gid::from_raw).collect();
    setgroups(&groups).map_err(failed("setting supplementary groups"))?;
    setresgid(gid, gid, gid).map_err(failed("setting the group"))?;
    setresuid(uid, uid, uid).map_err(failed("setting the user"))
}

/// The environment, with a HOME where the image gives none.
pub(super) fn environment(process: &Process, identity: &Identity) -> Result<Vec<CString>, Errno> {
    let mut env: Vec<CString> = process
        .env
        .iter()
        .map(|entry| CString::new(entry.as_str()).map_err(|_| Errno::EINVAL))
        .collect::<Result<_, _>>()?;
    if !process.env.iter().any(|entry| entry.starts_with("HOME=")) {
        env.push(CString::new(format!("HOME={}", identity.home)).map_err(|_| Errno::EINVAL)?);
    }
    Ok(env)
}

/// Executes the program, searching PATH as `execvp` does. Returns only on failure.
pub(super) fn execute(process: &Process, args: &[CString], env: &[CString]) -> Failure {
    let command = process.args.first().map_or("", String::as_str);
    let fail = |errno| Failure {
        kind: FailureKind::Exec,
        subject: command.to_owned(),
        errno,
    };
    if command.contains('/') {
        let Ok(path) = CString::new(command) else {
            return fail(Errno::EINVAL);
        };
        return fail(if is_directory(command) {
            Errno::EACCES
        } else {
            sys::execve(&path, args, env)
        });
    }
    let search = process.env.iter().find_map(|entry| entry.strip_prefix("PATH="));
    let mut result = Errno::ENOENT;
    for dir in search
        .unwrap_or("/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
        .split(':')
    {
        let dir = if dir.is_empty() { "." } else { dir };
        let candidate = format!("{dir}/{command}");
        if is_directory(&candidate) {
            continue;
        }
        let Ok(path) = CString::new(candidate) else {
            continue;
        };
        match sys::execve(&path, args, env) {
            Errno::ENOENT | Errno::ENOTDIR => {}
            // Found, and not to be executed: a later directory may still have one that can be.
            Errno::EACCES => result = Errno::EACCES,
            other => return fail(other),
        }
    }
    fail(result)
}

fn is_directory(path: &str) -> bool {
    fs::metadata(path).is_ok_and(|metadata| metadata.is_dir())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn identity(uid: u32) -> Identity {
        Identity {
            uid,
            gid: uid,
            groups: Vec::new(),
            home: "/home/x".into(),
        }
    }

    #[test]
    fn user_other_than_root_keeps_the_bounding_set_alone() {
        let process = Process {
            capabilities: Some(Capabilities {
                bounding: 7,
                effective: 7,
                permitted: 7,
                root_only: true,
                ..Capabilities::default()
            })
            .into(),
            ..Process::default()
        };
        let left = wanted_capabilities(&process, &identity(1000));
        assert_eq!((left.bounding, left.effective, left.permitted), (7, 0, 0));
        assert_eq!(wanted_capabilities(&process, &identity(0)).effective, 7);
    }

    #[test]
    fn home_is_added_unless_given() {
        let mut process = Process {
            env: vec!["A=b".into()],
            ..Process::default()
        };
        let env = environment(&process, &identity(1)).unwrap();
        assert!(env.contains(&CString::new("HOME=/home/x").unwrap()));
        process.env.push("HOME=/other".into());
        assert_eq!(environment(&process, &identity(1)).unwrap().len(), 2);
    }
}
