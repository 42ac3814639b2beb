//! `hull-oci start`.

use anyhow::Result;
use clap::Args;

use crate::{Global, create::explained};

/// Let the process of a created container run
#[derive(Debug, Args)]
pub(crate) struct Start {
    /// The container's id
    id: String,
}

impl Start {
    pub(crate) fn execute(&self, global: &Global) -> Result<u8> {
        global.bundles()?.start(&self.id).map_err(explained)?;
        Ok(0)
    }
}
