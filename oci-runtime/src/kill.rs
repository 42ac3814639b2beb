//! `hull-oci kill`.

use anyhow::Result;
use clap::Args;
use sandbox::bundle::BundleError;

use crate::{Global, signal_name};

/// Send a signal to a container's process
#[derive(Debug, Args)]
pub(crate) struct Kill {
    /// To every process of the container
    #[arg(long, short, num_args = 0..=1, require_equals = true, default_value_t = false, default_missing_value = "true")]
    all: bool,
    /// The container's id
    id: String,
    /// Name or number
    #[arg(default_value = "SIGTERM", allow_hyphen_values = true)]
    signal: String,
}

impl Kill {
    pub(crate) fn execute(&self, global: &Global) -> Result<u8> {
        let signal = signal_name::parse(&self.signal)?;
        match global.bundles()?.signal(&self.id, signal, self.all) {
            // All of none have got it.
            Err(BundleError::NotRunning) if self.all => Ok(0),
            result => {
                result?;
                Ok(0)
            }
        }
    }
}
