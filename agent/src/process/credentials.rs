//! Limits, identity and capabilities of a process, in the order in which the kernel allows to give them up.
//!
//! [`Credentials::apply`] runs in the new process and allocates nothing.

use std::{
    ffi::{CStr, CString},
    fs,
    os::unix::ffi::OsStrExt as _,
    path::Path,
};

use agent_protocol::{Capabilities, Process, limits::CAPABILITY_MASK};
use nix::{
    errno::Errno,
    fcntl::{OFlag, open},
    sys::{
        prctl,
        stat::{self, Mode},
    },
    unistd::{chdir, write},
};

use super::{
    failure::{Failure, FailureKind, failed},
    scheduling::Scheduling,
};
use crate::{sys, user::Identity};

/// Who a process is and what it may do.
#[derive(Debug)]
pub struct Credentials {
    scheduling: Scheduling,
    rlimits: Vec<(u32, libc::rlimit)>,
    oom_score_adj: Option<Vec<u8>>,
    seccomp: Vec<Vec<libc::sock_filter>>,
    seccomp_flags: u32,
    no_new_privileges: bool,
    capabilities: Capabilities,
    uid: u32,
    gid: u32,
    groups: Vec<u32>,
    cwd: CString,
    umask: Mode,
}

/// How many files a process may have open unless it says otherwise: the kernel's own defaults.
const DEFAULT_OPEN_FILES: (u32, libc::rlimit) = (
    libc::RLIMIT_NOFILE,
    libc::rlimit {
        rlim_cur: 1024,
        rlim_max: 4096,
    },
);

impl Credentials {
    /// What a process asks for, and who it turned out to be.
    pub fn new(process: &Process, identity: &Identity) -> Result<Self, Errno> {
        let rlimit = |limit: &agent_protocol::Rlimit| {
            (
                limit.resource,
                libc::rlimit {
                    rlim_cur: limit.soft,
                    rlim_max: limit.hard,
                },
            )
        };
        Ok(Self {
            scheduling: Scheduling::new(process),
            // The agent's own is for the streams of hundreds of processes; the later of two counts.
            rlimits: std::iter::once(DEFAULT_OPEN_FILES)
                .chain(process.rlimits.iter().map(rlimit))
                .collect(),
            oom_score_adj: process.oom_score_adj.map(|value| value.to_string().into_bytes()),
            seccomp: process
                .seccomp_programs
                .iter()
                .map(|program| sys::bpf_program(program))
                .collect(),
            seccomp_flags: process.seccomp_flags,
            no_new_privileges: process.no_new_privileges,
            capabilities: wanted_capabilities(process, identity),
            uid: identity.uid,
            gid: identity.gid,
            groups: identity.groups.clone(),
            cwd: CString::new(process.cwd.as_str()).map_err(|_| Errno::EINVAL)?,
            umask: Mode::from_bits_truncate(process.umask.unwrap_or(0o022)),
        })
    }

    /// The working directory.
    pub fn cwd(&self) -> &str {
        self.cwd.to_str().unwrap_or_default()
    }

    /// Creates the working directory of a container's first process, as docker does; what fails, fails to be entered.
    pub(super) fn make_directory(&self) {
        let path = Path::new(std::ffi::OsStr::from_bytes(self.cwd.to_bytes()));
        if !path.exists() {
            drop(fs::create_dir_all(path));
        }
    }

    /// Sets what needs rights in the microVM's user namespace: limits and priorities.
    pub(super) fn apply_limits(&self) -> Result<(), Failure> {
        self.scheduling.apply(0)?;
        for (resource, limit) in &self.rlimits {
            sys::set_rlimit(0, *resource, limit).map_err(failed("setting a resource limit"))?;
        }
        if let Some(value) = &self.oom_score_adj {
            set_oom_score(c"/proc/self/oom_score_adj", value).map_err(failed("setting oom_score_adj"))?;
        }
        Ok(())
    }

    /// The same for another process, which can't.
    pub(super) fn limit(&self, pid: i32) -> Result<(), Errno> {
        self.scheduling.apply(pid).map_err(|failure| failure.errno)?;
        for (resource, limit) in &self.rlimits {
            sys::set_rlimit(pid, *resource, limit)?;
        }
        let Some(value) = &self.oom_score_adj else {
            return Ok(());
        };
        let path = CString::new(format!("/proc/{pid}/oom_score_adj")).map_err(|_| Errno::EINVAL)?;
        set_oom_score(&path, value)
    }

    /// Applies everything else up to, and without, `execve`.
    pub(super) fn apply(&self) -> Result<(), Failure> {
        self.scheduling.enter_domain()?;
        if !self.no_new_privileges {
            // Needs CAP_SYS_ADMIN, which is about to go.
            self.install_seccomp()?;
        }
        for capability in 0..CAPABILITY_MASK.count_ones() {
            if self.capabilities.bounding & (1 << capability) == 0 {
                match sys::drop_bounding(capability) {
                    // A capability that this kernel doesn't know.
                    Ok(()) | Err(Errno::EINVAL) => {}
                    Err(errno) => return Err(failed("dropping capabilities")(errno)),
                }
            }
        }
        self.become_user()?;
        let Capabilities {
            effective,
            permitted,
            inheritable,
            ambient,
            ..
        } = self.capabilities;
        sys::set_capabilities(effective, permitted, inheritable).map_err(failed("setting capabilities"))?;
        // What `runc spec` writes has ambient ones that can't be raised, as they aren't inheritable; runc goes on without.
        let ambient = ambient & permitted & inheritable;
        for capability in 0..CAPABILITY_MASK.count_ones() {
            if ambient & (1 << capability) != 0 {
                sys::raise_ambient(capability).map_err(failed("raising ambient capabilities"))?;
            }
        }
        stat::umask(self.umask);
        if self.no_new_privileges {
            prctl::set_no_new_privs().map_err(failed("setting no_new_privs"))?;
            self.install_seccomp()?;
        }
        Ok(())
    }

    fn install_seccomp(&self) -> Result<(), Failure> {
        self.seccomp
            .iter()
            .try_for_each(|program| sys::set_seccomp(program, self.seccomp_flags))
            .map_err(failed("installing the seccomp filter"))
    }

    fn become_user(&self) -> Result<(), Failure> {
        // Once as root, because the directory may be closed to the user, as docker and runc do.
        let entered = chdir(self.cwd.as_c_str());
        prctl::set_keepcaps(true).map_err(failed("keeping capabilities"))?;
        sys::set_identity(self.uid, self.gid, &self.groups).map_err(failed("setting user and groups"))?;
        chdir(self.cwd.as_c_str()).or(entered).map_err(|errno| Failure {
            kind: FailureKind::WorkingDirectory,
            ..failed("")(errno)
        })?;
        prctl::set_keepcaps(false).map_err(failed("clearing keepcaps"))
    }
}

fn set_oom_score(path: &CStr, value: &[u8]) -> Result<(), Errno> {
    let file = open(path, OFlag::O_WRONLY | OFlag::O_CLOEXEC, Mode::empty())?;
    write(&file, value).map(drop)
}

/// What is left of the requested sets for this user.
fn wanted_capabilities(process: &Process, identity: &Identity) -> Capabilities {
    let mut wanted = process.capabilities.as_ref().cloned().unwrap_or_default();
    if wanted.root_only && identity.uid != 0 {
        (wanted.effective, wanted.permitted) = (wanted.ambient, wanted.ambient);
    }
    wanted
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
}
