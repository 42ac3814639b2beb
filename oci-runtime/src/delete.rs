//! `hull-oci delete`.

use anyhow::Result;
use clap::Args;

use crate::Global;

/// Remove a container that has stopped or was never started
#[derive(Debug, Args)]
pub(crate) struct Delete {
    /// Kill it first; and it is no error that there is none
    #[arg(long, short, num_args = 0..=1, require_equals = true, default_value_t = false, default_missing_value = "true")]
    force: bool,
    /// The container's id
    id: String,
}

impl Delete {
    pub(crate) fn execute(&self, global: &Global) -> Result<u8> {
        global.bundles()?.delete(&self.id, self.force)?;
        Ok(0)
    }
}
