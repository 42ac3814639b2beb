//! `hull exec`

use std::io::IsTerminal as _;

use anyhow::{Context as _, bail};
use clap::Args;
use sandbox::{
    Directories, ImageDefaults, ProcessSpec, Runtime, SandboxError, Signals, attach::AttachOptions,
};

use crate::{container_options::resolve_env, image, terminal};

/// Run a command in a running container.
#[derive(Debug, Args)]
pub struct Exec {
    /// Keep stdin open: the command reads what hull reads
    #[arg(short, long)]
    interactive: bool,
    /// Give the command a terminal
    #[arg(short, long)]
    tty: bool,
    /// Set an environment variable: NAME=VALUE, or NAME to take it from here
    #[arg(short, long)]
    env: Vec<String>,
    /// Working directory of the command
    #[arg(short, long)]
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
        let (container, command) = self
            .container_and_command
            .split_first()
            .context("no container given")?;
        let directories = Directories::from_environment();
        let runtime = Runtime::open(&directories)?;
        let record = runtime.find(container)?;
        // As the container's first process, unless told otherwise: its environment, directory and user.
        let image = image::open_store(&directories)
            .and_then(|store| Ok(store.resolve(&record.image_id)?))
            .map(|image| image::defaults(&image.config))
            .unwrap_or_default();
        let image = ImageDefaults {
            entrypoint: Vec::new(),
            cmd: Vec::new(),
            ..image
        };
        let process = ProcessSpec::compose(
            &image,
            None,
            command.to_vec(),
            &resolve_env(&self.env),
            self.workdir,
            self.user,
        )?;
        let window = if self.tty { terminal::size() } else { None };
        let process = ProcessSpec {
            terminal: self.tty,
            stdin: self.interactive,
            window,
            ..process
        };
        let signals = Signals::take()?;
        let raw = if self.tty {
            terminal::RawMode::enter()
        } else {
            None
        };
        let result = runtime.exec(
            &record,
            &process,
            AttachOptions {
                signals: &signals,
                window: terminal::size,
            },
        );
        drop(raw);
        Ok(result?.code)
    }
}
