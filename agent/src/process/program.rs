//! The program of a process: where it may be, its arguments and its environment, ready for `execve`.

use std::ffi::CString;

use agent_protocol::Process;
use nix::errno::Errno;

use super::failure::{Failure, FailureKind, failed};
use crate::{
    sys::{self, StringArray},
    user::Identity,
};

const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Everything `execve` needs, made before the process.
#[derive(Debug)]
pub struct Program {
    command: String,
    /// In the order in which they are tried.
    candidates: Vec<CString>,
    args: StringArray,
    env: StringArray,
}

fn c_strings<'a>(strings: impl IntoIterator<Item = &'a String>) -> Result<Vec<CString>, Errno> {
    strings
        .into_iter()
        .map(|string| CString::new(string.as_str()).map_err(|_| Errno::EINVAL))
        .collect()
}

/// The environment, with a HOME where the image gives none.
fn environment(process: &Process, identity: &Identity) -> Result<Vec<CString>, Errno> {
    let mut env = c_strings(&process.env)?;
    if !process.env.iter().any(|entry| entry.starts_with("HOME=")) {
        env.push(CString::new(format!("HOME={}", identity.home)).map_err(|_| Errno::EINVAL)?);
    }
    Ok(env)
}

/// Where the command may be, as `execvp` looks for it.
fn candidates(command: &str, process: &Process) -> Result<Vec<CString>, Errno> {
    let path = |path: String| CString::new(path).map_err(|_| Errno::EINVAL);
    if command.contains('/') {
        return Ok(vec![path(command.to_owned())?]);
    }
    let search = process.env.iter().find_map(|entry| entry.strip_prefix("PATH="));
    search
        .unwrap_or(DEFAULT_PATH)
        .split(':')
        .map(|dir| if dir.is_empty() { "." } else { dir })
        .map(|dir| path(format!("{dir}/{command}")))
        .collect()
}

impl Program {
    /// Prepares a process's program.
    pub fn new(process: &Process, identity: &Identity) -> Result<Self, Errno> {
        let command = process.args.first().cloned().unwrap_or_default();
        Ok(Self {
            candidates: candidates(&command, process)?,
            args: StringArray::new(c_strings(&process.args)?),
            env: StringArray::new(environment(process, identity)?),
            command,
        })
    }

    /// As the user named it.
    pub fn command(&self) -> &str {
        &self.command
    }

    /// Executes it. Returns only on failure; allocates nothing.
    pub(super) fn execute(&self) -> Failure {
        let searched = !self.command.contains('/');
        let mut result = Errno::ENOENT;
        for candidate in &self.candidates {
            if sys::is_directory(candidate) {
                if !searched {
                    result = Errno::EACCES;
                }
                continue;
            }
            match sys::execve(candidate, &self.args, &self.env) {
                Errno::ENOENT => {}
                Errno::ENOTDIR if searched => {}
                // Found, and not to be executed: a later directory may still have one that can be.
                Errno::EACCES => result = Errno::EACCES,
                other => {
                    result = other;
                    break;
                }
            }
        }
        Failure {
            kind: FailureKind::Exec,
            ..failed("")(result)
        }
    }

    /// Where it may be, in the order in which that is tried.
    pub(super) fn places(&self) -> impl Iterator<Item = &std::ffi::CStr> {
        self.candidates.iter().map(CString::as_c_str)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn identity() -> Identity {
        Identity {
            uid: 1,
            gid: 1,
            groups: Vec::new(),
            home: "/home/x".into(),
        }
    }

    #[test]
    fn home_is_added_unless_given() {
        let mut process = Process {
            env: vec!["A=b".into()],
            ..Process::default()
        };
        let env = environment(&process, &identity()).unwrap();
        assert!(env.contains(&CString::new("HOME=/home/x").unwrap()));
        process.env.push("HOME=/other".into());
        assert_eq!(environment(&process, &identity()).unwrap().len(), 2);
    }

    #[test]
    fn command_without_a_slash_is_looked_for_in_path() {
        let mut process = Process {
            args: vec!["ls".into()],
            env: vec!["PATH=/a::/b".into()],
            ..Process::default()
        };
        let program = Program::new(&process, &identity()).unwrap();
        assert_eq!(
            program.places().collect::<Vec<_>>(),
            [c"/a/ls", c"./ls", c"/b/ls"]
        );
        process.args = vec!["./ls".into()];
        let program = Program::new(&process, &identity()).unwrap();
        assert_eq!(program.places().collect::<Vec<_>>(), [c"./ls"]);
    }
}
