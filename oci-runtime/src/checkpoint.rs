//! `hull-oci checkpoint` and `hull-oci restore`: understood, and refused until microVMs can be saved.

use anyhow::{Result, bail};
use clap::Args;

/// Not supported yet
#[derive(Debug, Args)]
pub(crate) struct Checkpoint {
    /// Whatever runc takes
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    _arguments: Vec<String>,
}

/// Not supported yet
#[derive(Debug, Args)]
pub(crate) struct Restore {
    /// Whatever runc takes
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    _arguments: Vec<String>,
}

impl Checkpoint {
    #[expect(clippy::unused_self, reason = "a verb as all are")]
    pub(crate) fn execute(&self) -> Result<u8> {
        bail!("checkpoint is not supported yet: a microVM can't be saved; the container runs on")
    }
}

impl Restore {
    #[expect(clippy::unused_self, reason = "a verb as all are")]
    pub(crate) fn execute(&self) -> Result<u8> {
        bail!("restore is not supported yet: there is no checkpoint of a microVM to restore from")
    }
}
