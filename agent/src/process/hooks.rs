//! `startContainer` hooks: programs of the container that run in it, as its user, right before its program.
//!
//! They run in the container's first process's place: made and waited for by the process that is about to execute the
//! program, so that they have its namespaces, rights and filters, and see it as their parent, as with runc.

use std::{
    convert::Infallible,
    ffi::CString,
    io::Write as _,
    os::fd::{AsFd as _, OwnedFd},
    time::Duration,
};

use agent_protocol::{CreateContainerRequest, Hook};
use nix::{
    errno::Errno,
    sys::{
        memfd::{MFdFlags, memfd_create},
        signal::{Signal, kill},
        wait::{WaitPidFlag, WaitStatus, waitpid},
    },
    time::{ClockId, clock_gettime},
    unistd::{Pid, Whence, lseek},
};

use super::failure::Failure;
use crate::sys::{self, Birth, StringArray};

/// One of them, ready to run.
#[derive(Debug)]
struct Prepared {
    name: String,
    path: CString,
    args: StringArray,
    env: StringArray,
    timeout: Option<Duration>,
}

/// All of a container's, in their order.
#[derive(Debug)]
pub struct Hooks {
    hooks: Vec<Prepared>,
    /// What they read on their standard input.
    state: Option<OwnedFd>,
}

/// What the new process is given.
struct Attempt<'a> {
    hook: &'a Prepared,
    state: &'a OwnedFd,
    errno: Option<Errno>,
}

impl Prepared {
    fn new(hook: &Hook) -> Result<Self, Errno> {
        let encode = |text: &String| CString::new(text.as_str()).map_err(|_| Errno::EINVAL);
        let encode_all = |list: &[String]| list.iter().map(encode).collect::<Result<Vec<_>, _>>();
        let args = if hook.args.is_empty() {
            std::slice::from_ref(&hook.path)
        } else {
            &hook.args
        };
        Ok(Self {
            name: hook.path.clone(),
            path: encode(&hook.path)?,
            args: StringArray::new(encode_all(args)?),
            env: StringArray::new(encode_all(&hook.env)?),
            timeout: (hook.timeout_s != 0).then(|| Duration::from_secs(hook.timeout_s.into())),
        })
    }

    fn failed(&self, outcome: &str) -> Failure {
        Failure::of_hook(format!("startContainer hook {}: {outcome}", self.name))
    }

    /// Runs it to its end.
    fn run(&self, state: &OwnedFd) -> Result<(), Failure> {
        lseek(state, 0, Whence::SeekSet).map_err(|errno| self.failed(errno.desc()))?;
        let mut attempt = Attempt {
            hook: self,
            state,
            errno: None,
        };
        let pid = attempt.start().map_err(|errno| self.failed(errno.desc()))?;
        let pid = Pid::from_raw(pid);
        match (self.wait(pid), attempt.errno) {
            (_, Some(errno)) => Err(self.failed(errno.desc())),
            (Ok(Some(WaitStatus::Exited(_, 0))), None) => Ok(()),
            (Ok(Some(WaitStatus::Exited(_, status))), None) => {
                Err(self.failed(&format!("exited with status {status}")))
            }
            (Ok(Some(WaitStatus::Signaled(_, signal, _))), None) => {
                Err(self.failed(&format!("was ended by {signal}")))
            }
            (Ok(_), None) => {
                let _ = kill(pid, Signal::SIGKILL);
                let _ = waitpid(pid, None);
                Err(self.failed("took longer than its timeout"))
            }
            (Err(errno), None) => Err(self.failed(errno.desc())),
        }
    }

    /// `None`: it took too long.
    fn wait(&self, pid: Pid) -> Result<Option<WaitStatus>, Errno> {
        const PAUSE: Duration = Duration::from_millis(2);
        let Some(timeout) = self.timeout else {
            return waitpid(pid, None).map(Some);
        };
        let now = || clock_gettime(ClockId::CLOCK_MONOTONIC).map(Duration::from);
        let deadline = now()? + timeout;
        loop {
            match waitpid(pid, Some(WaitPidFlag::WNOHANG))? {
                WaitStatus::StillAlive if now()? >= deadline => return Ok(None),
                WaitStatus::StillAlive => std::thread::sleep(PAUSE),
                status => return Ok(Some(status)),
            }
        }
    }
}

impl Attempt<'_> {
    #[expect(
        unsafe_code,
        reason = "makes a process that shares memory until it executes its program"
    )]
    fn start(&mut self) -> Result<i32, Errno> {
        let birth = Birth::plain();
        // SAFETY: `execute` touches its argument alone, which outlives the call, and allocates nothing.
        unsafe { sys::clone_vfork(&birth, execute, (&raw mut *self).cast()) }
    }

    fn become_hook(&self) -> Result<Infallible, Errno> {
        sys::duplicate_to(self.state.as_fd(), 0)?;
        Err(sys::execve(&self.hook.path, &self.hook.args, &self.hook.env))
    }
}

#[expect(unsafe_code, reason = "takes the argument that clone_vfork gave")]
unsafe extern "C" fn execute(argument: *mut libc::c_void) -> ! {
    // SAFETY: `start` passes an `Attempt` that the suspended parent doesn't touch meanwhile.
    let attempt = unsafe { &mut *argument.cast::<Attempt<'_>>() };
    let Err(errno) = attempt.become_hook();
    attempt.errno = Some(errno);
    sys::exit_now(127)
}

impl Hooks {
    /// Those that a request asks for.
    pub fn new(request: &CreateContainerRequest) -> Result<Self, Errno> {
        if request.start_hooks.is_empty() {
            return Ok(Self {
                hooks: Vec::new(),
                state: None,
            });
        }
        let state = memfd_create(c"state", MFdFlags::MFD_CLOEXEC)?;
        let mut file = std::fs::File::from(state);
        file.write_all(&request.hook_state)
            .map_err(|error| error.raw_os_error().map_or(Errno::EIO, Errno::from_raw))?;
        Ok(Self {
            hooks: request
                .start_hooks
                .iter()
                .map(Prepared::new)
                .collect::<Result<_, _>>()?,
            state: Some(file.into()),
        })
    }

    /// Runs all, unless one fails.
    pub(super) fn run(&self) -> Result<(), Failure> {
        let Some(state) = &self.state else {
            return Ok(());
        };
        self.hooks.iter().try_for_each(|hook| hook.run(state))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(hook: Hook) -> Result<(), Failure> {
        let request = CreateContainerRequest {
            start_hooks: vec![hook],
            hook_state: b"{\"status\":\"created\"}".to_vec(),
            ..CreateContainerRequest::default()
        };
        Hooks::new(&request).unwrap().run()
    }

    fn shell(script: &str, timeout_s: u32) -> Hook {
        Hook {
            path: "/bin/sh".into(),
            args: vec!["sh".into(), "-c".into(), script.into()],
            env: vec!["WORD=created".into()],
            timeout_s,
            ..Hook::default()
        }
    }

    #[test]
    fn hook_reads_the_state_and_has_its_environment() {
        run(shell(
            "read -r state; case \"$state\" in *$WORD*) exit 0;; esac; exit 3",
            0,
        ))
        .unwrap();
    }

    #[test]
    fn hook_that_fails_or_takes_too_long_is_told_by_name() {
        let text = |hook| run(hook).unwrap_err().subject.into_owned();
        assert_eq!(
            text(shell("exit 3", 0)),
            "startContainer hook /bin/sh: exited with status 3"
        );
        assert!(text(shell("sleep 100", 1)).contains("timeout"));
        let mut missing = shell("", 5);
        missing.path = "/no/such/hook".into();
        assert!(text(missing).contains("/no/such/hook: No such file"));
    }
}
