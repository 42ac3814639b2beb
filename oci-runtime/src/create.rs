//! `hull-oci create`.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};
use clap::Args;
use oci_spec::runtime::Spec;
use sandbox::{
    Components, SandboxError,
    bundle::{BundleError, BundleState, BundleStdio, CreateBundle, PodRole},
    oci_spec::load,
};

use crate::{Global, console, pid_file};

/// What `create` and `run` have in common.
#[derive(Debug, Args)]
pub(crate) struct Making {
    /// The bundle's directory; the current one where it isn't given
    #[arg(
        long,
        short,
        default_value = ".",
        value_name = "DIR",
        hide_default_value = true
    )]
    pub(crate) bundle: PathBuf,
    /// Socket that gets the master of the container's terminal
    #[arg(long, value_name = "SOCKET")]
    pub(crate) console_socket: Option<PathBuf>,
    /// Socket that gets a descriptor of the container's process
    #[arg(long, value_name = "SOCKET")]
    pub(crate) pidfd_socket: Option<PathBuf>,
    /// File for the id of the container's process
    #[arg(long, value_name = "FILE")]
    pub(crate) pid_file: Option<PathBuf>,
    /// Accepted and without effect: the root is changed in the microVM
    #[arg(long, num_args = 0..=1, require_equals = true, default_value_t = false, default_missing_value = "true")]
    no_pivot: bool,
    /// Accepted and without effect: there are no keyrings of the host in the microVM
    #[arg(long, num_args = 0..=1, require_equals = true, default_value_t = false, default_missing_value = "true")]
    no_new_keyring: bool,
    /// Only 0: a descriptor of the host can't be passed into a microVM
    #[arg(long, default_value_t = 0, value_name = "N")]
    pub(crate) preserve_fds: u32,
    /// The container's id
    pub(crate) id: String,
}

/// Make a container; its process waits for `start`
#[derive(Debug, Args)]
pub(crate) struct Create {
    #[command(flatten)]
    making: Making,
}

/// Refuses what can't be passed on.
pub(crate) fn check_preserved(preserve_fds: u32) -> Result<()> {
    if preserve_fds != 0 {
        bail!(
            "--preserve-fds {preserve_fds}: descriptors of the host can't be passed into a microVM; share a file or a \
             directory by a mount instead"
        );
    }
    Ok(())
}

impl Making {
    /// The bundle's directory.
    pub(crate) fn bundle_dir(&self) -> &Path {
        &self.bundle
    }

    /// Reads the bundle's configuration.
    pub(crate) fn load(&self) -> Result<Spec> {
        let config = load(self.bundle_dir()).map_err(SandboxError::from)?;
        for warning in &config.warnings {
            tracing::warn!("{warning}");
        }
        Ok(config.spec)
    }

    /// Makes the container.
    pub(crate) fn create(&self, global: &Global, spec: &Spec, stdio: BundleStdio) -> Result<BundleState> {
        check_preserved(self.preserve_fds)?;
        let components = Components::find()?;
        let request = CreateBundle {
            id: &self.id,
            bundle: self.bundle_dir(),
            spec,
            stdio,
            systemd_cgroup: global.systemd_cgroup,
            pod: PodRole::Alone,
            layers: None,
            components: &components,
        };
        let state = global.bundles()?.create(request).map_err(explained)?;
        let written = self.announce(&state);
        if written.is_err() {
            global.bundles()?.delete(&self.id, true)?;
        }
        written.map(|()| state)
    }

    fn announce(&self, state: &BundleState) -> Result<()> {
        if let Some(path) = &self.pidfd_socket {
            console::send_pidfd(path, state.pid)?;
        }
        match &self.pid_file {
            Some(path) => pid_file::write(path, state.pid.unsigned_abs()),
            None => Ok(()),
        }
    }
}

/// What can't be executed, in runc's words around it.
pub(crate) fn explained(error: BundleError) -> anyhow::Error {
    match error {
        BundleError::Program { .. } => anyhow::Error::new(error).context("unable to start container process"),
        error => error.into(),
    }
}

/// Whether the container's process has a terminal.
pub(crate) fn has_terminal(spec: &Spec) -> bool {
    spec.process()
        .as_ref()
        .and_then(|process| process.terminal())
        .unwrap_or(false)
}

/// What a detached container is connected to: our own streams, or the terminal that is given away.
pub(crate) fn detached_stdio(terminal: bool, console_socket: Option<&Path>) -> Result<BundleStdio> {
    match (terminal, console_socket) {
        (true, None) => {
            bail!("cannot allocate tty if hull-oci will detach without setting console socket")
        }
        (false, Some(_)) => {
            bail!("cannot use console socket if hull-oci will not detach or allocate tty")
        }
        (true, Some(path)) => Ok(BundleStdio {
            console_socket: Some(console::connect_console(path)?),
            ..BundleStdio::default()
        }),
        (false, None) => Ok(BundleStdio::of_this_process()?),
    }
}

impl Create {
    pub(crate) fn execute(&self, global: &Global) -> Result<u8> {
        let create = || {
            let spec = self.making.load()?;
            let stdio = detached_stdio(has_terminal(&spec), self.making.console_socket.as_deref())?;
            self.making.create(global, &spec, stdio)
        };
        create().context("hull-oci create failed")?;
        Ok(0)
    }
}
