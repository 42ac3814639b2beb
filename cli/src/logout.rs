//! `hull logout`

use anyhow::bail;
use clap::Args;
use rootfs_builder::registry::Credentials;

use crate::{auth_file::AuthFile, login::registry_host};

/// Forget the credentials of a registry.
#[derive(Debug, Args)]
pub struct Logout {
    /// Of all registries
    #[arg(short, long)]
    all: bool,
    /// HOST[:PORT]
    #[arg(required_unless_present = "all")]
    registry: Option<String>,
}

impl Logout {
    /// Removes them from every file they are looked for in.
    pub fn execute(self) -> anyhow::Result<u8> {
        let host = self.registry.as_deref().map(registry_host).transpose()?;
        let mut removed = false;
        for file in AuthFile::all() {
            removed |= match host {
                Some(host) if !self.all => file.remove(host)?,
                _ => file.clear()?,
            };
        }
        let Some(host) = host.filter(|_| !self.all) else {
            println!("Removed login credentials for all registries");
            return Ok(0);
        };
        if !removed {
            bail!("not logged in to {host}");
        }
        if Credentials::find(host).is_ok_and(|found| found.is_some()) {
            bail!(
                "credentials for {host} are still found: a credential helper or REGISTRY_AUTH_FILE has them"
            );
        }
        println!("Removed login credentials for {host}");
        Ok(0)
    }
}
