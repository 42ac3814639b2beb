//! `hull pause`

use clap::Args;
use sandbox::{Directories, Runtime};

use crate::output;

/// Stop the CPUs of containers; `hull resume` lets them go on.
#[derive(Debug, Args)]
pub struct Pause {
    /// Names or ids
    #[arg(required = true)]
    containers: Vec<String>,
}

impl Pause {
    /// Pauses them.
    pub fn execute(self) -> anyhow::Result<u8> {
        let runtime = Runtime::open(&Directories::from_environment())?;
        Ok(output::each(&self.containers, |name| {
            Ok(runtime.pause(&runtime.find(name)?)?)
        }))
    }
}
