//! `hull-oci exec`.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};
use clap::Args;
use oci_spec::runtime::{Capability, LinuxCapabilities, Process, Spec};
use sandbox::{
    SandboxError, Window,
    bundle::{BundleStdio, ExecBundle},
    oci_spec::load_process,
};

use crate::{
    Global, console,
    create::{check_preserved, detached_stdio, explained},
    pid_file,
};

/// Run a further process in a running container
#[derive(Debug, Args)]
pub(crate) struct Exec {
    /// Socket that gets the master of the process's terminal
    #[arg(long, value_name = "SOCKET")]
    console_socket: Option<PathBuf>,
    /// Socket that gets a descriptor of the process
    #[arg(long, value_name = "SOCKET")]
    pidfd_socket: Option<PathBuf>,
    /// Working directory in the container
    #[arg(long, value_name = "DIR")]
    cwd: Option<String>,
    /// Environment variable
    #[arg(long, short, value_name = "NAME=VALUE")]
    env: Vec<String>,
    /// Give it a terminal
    #[arg(long, short, num_args = 0..=1, require_equals = true, default_value_t = false, default_missing_value = "true")]
    tty: bool,
    /// As whom
    #[arg(long, short, value_name = "UID[:GID]")]
    user: Option<String>,
    /// Further groups
    #[arg(long, short = 'g', value_name = "GID")]
    additional_gids: Vec<u32>,
    /// File with the process as in config.json
    #[arg(long, short, value_name = "FILE")]
    process: Option<PathBuf>,
    /// Leave it to itself
    #[arg(long, short, num_args = 0..=1, require_equals = true, default_value_t = false, default_missing_value = "true")]
    detach: bool,
    /// File for the id of the process that stands for it
    #[arg(long, value_name = "FILE")]
    pid_file: Option<PathBuf>,
    /// SELinux label
    #[arg(long, value_name = "LABEL")]
    process_label: Option<String>,
    /// `AppArmor` profile
    #[arg(long, value_name = "PROFILE")]
    apparmor: Option<String>,
    /// A setuid program gains nothing
    #[arg(long, num_args = 0..=1, require_equals = true, default_value_t = false, default_missing_value = "true")]
    no_new_privs: bool,
    /// Capability beside those of the container's process
    #[arg(long, short, value_name = "CAP")]
    cap: Vec<String>,
    /// Only 0: a descriptor of the host can't be passed into a microVM
    #[arg(long, default_value_t = 0, value_name = "N")]
    preserve_fds: u32,
    /// Not available: a process is in the control group of its container
    #[arg(long, value_name = "PATH")]
    cgroup: Vec<String>,
    /// Also in a paused container, where it waits until that goes on
    #[arg(long, num_args = 0..=1, require_equals = true, default_value_t = false, default_missing_value = "true")]
    ignore_paused: bool,
    /// The container's id
    id: String,
    /// The command
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    command: Vec<String>,
}

impl Exec {
    pub(crate) fn execute(&self, global: &Global) -> Result<u8> {
        self.run(global).context("exec failed")
    }

    fn run(&self, global: &Global) -> Result<u8> {
        check_preserved(self.preserve_fds)?;
        if let Some(cgroup) = self.cgroup.iter().find(|path| !matches!(path.as_str(), "" | "/")) {
            bail!("--cgroup {cgroup}: a further process is in the control group of its container's microVM");
        }
        let bundles = global.bundles()?;
        let process = match &self.process {
            Some(path) => read_process(path)?,
            None => self.compose(&bundles.spec(&self.id)?)?,
        };
        let terminal = process.terminal().unwrap_or(false);
        let exec = |stdio| ExecBundle {
            process: &process,
            stdio,
            exec_id: None,
            ignore_paused: self.ignore_paused,
        };
        if self.detach {
            let stdio = detached_stdio(terminal, self.console_socket.as_deref())?;
            let pid = bundles.exec_detached(&self.id, exec(stdio)).map_err(explained)?;
            self.announce(pid)?;
            return Ok(0);
        }
        let stdio = match &self.console_socket {
            Some(path) if terminal => BundleStdio {
                console_socket: Some(console::connect_console(path)?),
                ..BundleStdio::default()
            },
            Some(_) => bail!("cannot use console socket if hull-oci will not detach or allocate tty"),
            None => BundleStdio::of_this_process()?,
        };
        self.announce(std::process::id())?;
        let raw = terminal.then(console::RawTerminal::enter).flatten();
        let window: Option<Window> = terminal.then_some(console::window);
        let exit = bundles.exec_attached(&self.id, exec(stdio), window);
        drop(raw);
        Ok(exit.map_err(explained)?.code())
    }

    fn announce(&self, pid: u32) -> Result<()> {
        if let Some(path) = &self.pidfd_socket {
            console::send_pidfd(path, i32::try_from(pid)?)?;
        }
        match &self.pid_file {
            Some(path) => pid_file::write(path, pid),
            None => Ok(()),
        }
    }

    /// The container's own process with what is asked for over it, as runc makes it.
    fn compose(&self, spec: &Spec) -> Result<Process> {
        if self.command.is_empty() {
            bail!("process args cannot be empty");
        }
        let mut process = spec.process().clone().unwrap_or_default();
        process.set_args(Some(self.command.clone()));
        process.set_terminal(Some(self.tty));
        // Its size was the other terminal's.
        process.set_console_size(None);
        if let Some(cwd) = &self.cwd {
            process.set_cwd(cwd.into());
        }
        if let Some(profile) = &self.apparmor {
            process.set_apparmor_profile(Some(profile.clone()));
        }
        if let Some(label) = &self.process_label {
            process.set_selinux_label(Some(label.clone()));
        }
        if self.no_new_privs {
            process.set_no_new_privileges(Some(true));
        }
        if !self.cap.is_empty() {
            let capabilities = add_capabilities(process.capabilities().clone(), &self.cap)?;
            process.set_capabilities(Some(capabilities));
        }
        let mut env = process.env().clone().unwrap_or_default();
        env.extend(self.env.iter().cloned());
        process.set_env(Some(env));
        if let Some(user) = &self.user {
            let (uid, gid) = user.split_once(':').unwrap_or((user, ""));
            let number = |what: &str, text: &str| -> Result<u32> {
                text.parse()
                    .with_context(|| format!("parsing {text} as int for {what} failed"))
            };
            process.user_mut().set_uid(number("uid", uid)?);
            if !gid.is_empty() {
                process.user_mut().set_gid(number("gid", gid)?);
            }
        }
        if !self.additional_gids.is_empty() {
            let user = process.user_mut();
            let mut groups = user.additional_gids().clone().unwrap_or_default();
            groups.extend(&self.additional_gids);
            user.set_additional_gids(Some(groups));
        }
        Ok(process)
    }
}

fn read_process(path: &Path) -> Result<Process> {
    let loaded = load_process(path).map_err(SandboxError::from)?;
    for warning in &loaded.warnings {
        tracing::warn!("{warning}");
    }
    Ok(loaded.process)
}

/// Adds capabilities to all sets but the inheritable and, where it holds none, the ambient one.
fn add_capabilities(held: Option<LinuxCapabilities>, names: &[String]) -> Result<LinuxCapabilities> {
    let mut capabilities = held.unwrap_or_default();
    let mut wanted = Vec::new();
    for name in names {
        let capability: Capability = serde_json::from_value(serde_json::Value::from(name.as_str()))
            .with_context(|| format!("--cap: unknown capability {name:?}"))?;
        wanted.push(capability);
    }
    let added = |set: &Option<std::collections::HashSet<Capability>>| {
        let mut set = set.clone().unwrap_or_default();
        set.extend(wanted.iter().copied());
        Some(set)
    };
    capabilities.set_bounding(added(capabilities.bounding()));
    capabilities.set_effective(added(capabilities.effective()));
    capabilities.set_permitted(added(capabilities.permitted()));
    if capabilities.ambient().as_ref().is_some_and(|set| !set.is_empty()) {
        capabilities.set_ambient(added(capabilities.ambient()));
    }
    Ok(capabilities)
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        exec: Exec,
    }

    fn compose(line: &str) -> Result<Process> {
        Line::try_parse_from(line.split(' '))?
            .exec
            .compose(&Spec::default())
    }

    #[test]
    fn process_is_the_containers_with_the_flags_over_it() {
        let process =
            compose("exec -t -u 7:8 -g 9 -e A=b --cwd /tmp --no-new-privs -c CAP_SYS_PTRACE id ls -l")
                .unwrap();
        assert_eq!(process.args().clone().unwrap(), ["ls", "-l"]);
        assert_eq!((process.user().uid(), process.user().gid()), (7, 8));
        assert_eq!(process.user().additional_gids().clone().unwrap(), [9]);
        assert_eq!(process.cwd(), Path::new("/tmp"));
        assert!(process.env().clone().unwrap().contains(&"A=b".to_owned()));
        let capabilities = process.capabilities().clone().unwrap();
        assert!(
            capabilities
                .bounding()
                .clone()
                .unwrap()
                .contains(&Capability::SysPtrace)
        );
        assert!(
            !capabilities
                .inheritable()
                .clone()
                .unwrap_or_default()
                .contains(&Capability::SysPtrace)
        );
    }

    #[test]
    fn impossible_users_capabilities_and_commands_are_refused() {
        for line in ["exec -u x id ls", "exec -c NOPE id ls", "exec id"] {
            assert!(compose(line).is_err(), "{line}");
        }
    }
}
