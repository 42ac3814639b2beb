//! `hull exec`

use std::{io::IsTerminal as _, path::PathBuf};

use anyhow::{Context as _, bail};
use clap::Args;
use sandbox::{
    ContainerRecord, DetachKeys, Directories, ImageDefaults, ProcessSpec, Runtime, SandboxError, Signals,
    attach::{AttachOptions, Left},
};

use crate::{
    container_options::{read_env, resolve_env},
    terminal,
};

/// Run a command in a running container.
#[derive(Debug, Args)]
pub struct Exec {
    /// Leave the command to itself
    #[arg(short, long)]
    detach: bool,
    /// Keys that detach from the command
    #[arg(long, value_name = "KEYS", default_value = "ctrl-p,ctrl-q")]
    detach_keys: String,
    /// Keep stdin open: the command reads what hull reads
    #[arg(short, long)]
    interactive: bool,
    /// Give the command a terminal
    #[arg(short, long)]
    tty: bool,
    /// Set an environment variable: NAME=VALUE, or NAME to take it from here
    #[arg(short, long)]
    env: Vec<String>,
    /// Read environment variables from a file, one a line
    #[arg(long, value_name = "FILE")]
    env_file: Vec<PathBuf>,
    /// Working directory of the command
    #[arg(short, long, value_name = "DIR")]
    workdir: Option<String>,
    /// User, and group, of the command: NAME|UID[:GROUP|GID]
    #[arg(short, long)]
    user: Option<String>,
    /// The container's name or id, and the command
    #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true, value_names = ["CONTAINER", "COMMAND"], num_args = 2..)]
    container_and_command: Vec<String>,
}

/// 126 and 127 as for `run`; everything else is 1.
pub fn failure_code(error: Option<&SandboxError>) -> u8 {
    match error.map(SandboxError::exit_code) {
        None | Some(125) => 1,
        Some(code) => code,
    }
}

impl Exec {
    /// Runs it; the exit code is the command's.
    pub fn execute(self) -> anyhow::Result<u8> {
        if self.tty && self.interactive && !std::io::stdin().is_terminal() {
            bail!("the input device is not a terminal; leave --tty out");
        }
        let keys = DetachKeys::parse(&self.detach_keys)?;
        let (container, command) = self
            .container_and_command
            .split_first()
            .context("no container given")?;
        let runtime = Runtime::open(&Directories::from_environment())?;
        let record = runtime.find(container)?;
        let process = self.process(&record, command)?;
        if self.detach {
            runtime.exec_detached(&record, &process)?;
            return Ok(0);
        }
        let signals = Signals::take()?;
        let typed = self.tty && self.interactive;
        let raw = if typed { terminal::RawMode::enter() } else { None };
        let options = AttachOptions {
            signals: &signals,
            window: terminal::size,
            detach_keys: typed.then_some(keys),
        };
        let left = runtime.exec(&record, &process, &options);
        drop(raw);
        Ok(match left? {
            Left::Exited(exit) => exit.code,
            Left::Detached => 0,
        })
    }

    /// As the container's first process, unless told otherwise: its environment, directory and user.
    fn process(&self, record: &ContainerRecord, command: &[String]) -> anyhow::Result<ProcessSpec> {
        let first = &record.spec.process;
        let defaults = ImageDefaults {
            env: first.env.clone(),
            working_dir: first.cwd.clone(),
            user: first.user.clone(),
            ..ImageDefaults::default()
        };
        let env = resolve_env(&read_env(&self.env_file, &self.env)?);
        let process = ProcessSpec::compose(
            &defaults,
            None,
            command.to_vec(),
            &env,
            self.workdir.clone(),
            self.user.clone(),
        )?;
        Ok(ProcessSpec {
            terminal: self.tty,
            stdin: self.interactive,
            window: if self.tty { terminal::size() } else { None },
            ..process
        })
    }
}
