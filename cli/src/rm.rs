//! `hull rm`

use clap::Args;
use sandbox::{Directories, Runtime, SandboxError};

use crate::output;

/// Remove containers.
#[derive(Debug, Args)]
pub struct Rm {
    /// Also running ones, which are killed
    #[arg(short, long)]
    force: bool,
    /// Their anonymous volumes too; there are none, so this changes nothing
    #[arg(short, long)]
    volumes: bool,
    /// Names or ids
    #[arg(required = true)]
    containers: Vec<String>,
}

impl Rm {
    /// Removes them, all at once.
    pub fn execute(self) -> anyhow::Result<u8> {
        let runtime = Runtime::open(&Directories::from_environment())?;
        Ok(output::each_at_once(&self.containers, |name| {
            match runtime.find(name) {
                Err(SandboxError::DamagedState { .. }) if self.force => Ok(runtime.remove_damaged(name)?),
                found => Ok(runtime.remove(&found?, self.force)?),
            }
        }))
    }
}
