//! `hull kill`

use clap::Args;
use sandbox::{Directories, Runtime};

use crate::{output, signal_name};

/// Send a signal to containers.
#[derive(Debug, Args)]
pub struct Kill {
    /// The signal, by name or number
    #[arg(short, long, default_value = "KILL", value_parser = signal_name::parse)]
    signal: i32,
    /// Names or ids
    #[arg(required = true)]
    containers: Vec<String>,
}

impl Kill {
    /// Sends it.
    pub fn execute(self) -> anyhow::Result<u8> {
        let runtime = Runtime::open(&Directories::from_environment())?;
        Ok(output::each_at_once(&self.containers, |name| {
            Ok(runtime.signal(&runtime.find(name)?, self.signal, false)?)
        }))
    }
}
