//! `hull-oci run`: create, start, and unless detached wait and delete.

use anyhow::{Context as _, Result};
use clap::Args;
use sandbox::{
    Window,
    bundle::{BundleStdio, Bundles},
};

use crate::{
    Global, console,
    create::{Making, detached_stdio, explained, has_terminal},
};

/// Make a container and run its process
#[derive(Debug, Args)]
pub(crate) struct Run {
    #[command(flatten)]
    making: Making,
    /// Leave it to itself
    #[arg(long, short, num_args = 0..=1, require_equals = true, default_value_t = false, default_missing_value = "true")]
    detach: bool,
    /// Don't delete it when it has ended
    #[arg(long, num_args = 0..=1, require_equals = true, default_value_t = false, default_missing_value = "true")]
    keep: bool,
    /// Accepted and without effect: orphans are in the microVM
    #[arg(long, num_args = 0..=1, require_equals = true, default_value_t = false, default_missing_value = "true")]
    no_subreaper: bool,
}

impl Run {
    pub(crate) fn execute(&self, global: &Global) -> Result<u8> {
        self.run(global).context("hull-oci run failed")
    }

    fn run(&self, global: &Global) -> Result<u8> {
        let spec = self.making.load()?;
        let terminal = has_terminal(&spec);
        let bundles = global.bundles()?;
        if self.detach {
            let stdio = detached_stdio(terminal, self.making.console_socket.as_deref())?;
            self.making.create(global, &spec, stdio)?;
            return self.start(&bundles).map(|()| 0);
        }
        let stdio = match &self.making.console_socket {
            None => BundleStdio::of_this_process()?,
            Some(_) => detached_stdio(terminal, self.making.console_socket.as_deref())?,
        };
        let foreign_console = stdio.console_socket.is_some();
        self.making.create(global, &spec, stdio)?;
        // Not before: a child inherits what is blocked.
        let signals = sandbox::Signals::take()?;
        let raw = (terminal && !foreign_console)
            .then(console::RawTerminal::enter)
            .flatten();
        let window: Option<Window> = raw.as_ref().map(|_| console::window as _);
        self.start(&bundles)?;
        let exit = bundles.attend(&self.making.id, &signals, window);
        drop(raw);
        let exit = exit?;
        if !self.keep {
            bundles.delete(&self.making.id, true)?;
        }
        Ok(exit.status.code())
    }

    fn start(&self, bundles: &Bundles) -> Result<()> {
        let started = bundles.start(&self.making.id).map_err(explained);
        if started.is_err() {
            bundles.delete(&self.making.id, true)?;
        }
        started
    }
}
