//! `hull wait`

use clap::Args;
use sandbox::{Directories, Runtime};

use crate::output;

/// Wait until containers have ended, and print their exit codes.
#[derive(Debug, Args)]
pub struct Wait {
    /// Names or ids
    #[arg(required = true)]
    containers: Vec<String>,
}

impl Wait {
    /// Waits for one after the other; each code is printed as soon as it is known.
    pub fn execute(self) -> anyhow::Result<u8> {
        let runtime = Runtime::open(&Directories::from_environment())?;
        Ok(output::each_printing(&self.containers, |name| {
            let record = runtime.find(name)?;
            Ok(runtime.wait(&record)?.code.to_string())
        }))
    }
}
