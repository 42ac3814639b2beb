//! `hull-oci pause`.

use anyhow::Result;
use clap::Args;

use crate::Global;

/// Stop the vCPUs of a running container
#[derive(Debug, Args)]
pub(crate) struct Pause {
    /// The container's id
    id: String,
}

impl Pause {
    pub(crate) fn execute(&self, global: &Global) -> Result<u8> {
        global.bundles()?.pause(&self.id)?;
        Ok(0)
    }
}
