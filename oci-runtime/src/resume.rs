//! `hull-oci resume`.

use anyhow::Result;
use clap::Args;

use crate::Global;

/// Let a paused container run again
#[derive(Debug, Args)]
pub(crate) struct Resume {
    /// The container's id
    id: String,
}

impl Resume {
    pub(crate) fn execute(&self, global: &Global) -> Result<u8> {
        global.bundles()?.resume(&self.id)?;
        Ok(0)
    }
}
