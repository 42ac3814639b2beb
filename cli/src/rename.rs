//! `hull rename`

use clap::Args;
use sandbox::{Directories, Runtime};

/// Give a container another name.
#[derive(Debug, Args)]
pub struct Rename {
    /// Name or id
    container: String,
    /// Its new name
    name: String,
}

impl Rename {
    /// Renames it.
    pub fn execute(self) -> anyhow::Result<u8> {
        let runtime = Runtime::open(&Directories::from_environment())?;
        runtime.rename(&runtime.find(&self.container)?, &self.name)?;
        Ok(0)
    }
}
