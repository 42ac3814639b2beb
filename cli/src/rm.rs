//! `hull rm`

use anyhow::bail;
use clap::Args;
use sandbox::{Directories, Runtime};

/// Remove containers.
#[derive(Debug, Args)]
pub struct Rm {
    /// Also running ones, which are killed
    #[arg(short, long)]
    force: bool,
    /// Names or ids
    #[arg(required = true)]
    containers: Vec<String>,
}

impl Rm {
    /// Removes them.
    pub fn execute(self) -> anyhow::Result<u8> {
        let runtime = Runtime::open(&Directories::from_environment())?;
        let mut code = 0;
        for name in &self.containers {
            if let Err(error) = self.remove(&runtime, name) {
                eprintln!("hull: {error:#}");
                code = 1;
            } else {
                println!("{name}");
            }
        }
        Ok(code)
    }

    fn remove(&self, runtime: &Runtime, name: &str) -> anyhow::Result<()> {
        let record = runtime.find(name)?;
        if !self.force {
            bail!(
                "container {} is running; stop it first, or use --force",
                record.name
            );
        }
        runtime.destroy(&record)?;
        Ok(())
    }
}
