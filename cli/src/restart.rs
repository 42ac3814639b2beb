//! `hull restart`

use std::time::Instant;

use clap::Args;
use sandbox::{Components, Directories, Runtime, StartOptions, monitor::Launcher};

use crate::{output, stop};

/// Stop containers and start them again, each in a fresh microVM.
#[derive(Debug, Args)]
pub struct Restart {
    /// Seconds to wait before forcing it to stop; -1 waits for ever [default: the container's, or 10]
    #[arg(short, long, visible_alias = "timeout", allow_negative_numbers = true)]
    time: Option<i64>,
    /// Names or ids
    #[arg(required = true)]
    containers: Vec<String>,
}

impl Restart {
    /// Restarts them, all at once.
    pub fn execute(self, started: Instant) -> anyhow::Result<u8> {
        let runtime = Runtime::open(&Directories::from_environment())?;
        let components = Components::find()?;
        Ok(output::each_at_once(&self.containers, |name| {
            let record = runtime.find(name)?;
            runtime.stop(&record, stop::patience(self.time, &record))?;
            let options = StartOptions {
                launcher: Launcher::spawn()?,
                components: &components,
                attachment: None,
                signals: None,
                client_time: started.elapsed(),
            };
            runtime.start(&record, options)?;
            Ok(())
        }))
    }
}
