//! `hull resume`

use clap::Args;
use sandbox::{Directories, Runtime};

use crate::output;

/// Let paused containers go on.
#[derive(Debug, Args)]
pub struct Resume {
    /// Names or ids
    #[arg(required = true)]
    containers: Vec<String>,
}

impl Resume {
    /// Resumes them.
    pub fn execute(self) -> anyhow::Result<u8> {
        let runtime = Runtime::open(&Directories::from_environment())?;
        Ok(output::each(&self.containers, |name| {
            Ok(runtime.resume(&runtime.find(name)?)?)
        }))
    }
}
