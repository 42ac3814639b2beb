//! `hull kill`

use clap::Args;
use sandbox::{Directories, Runtime};

use crate::signal_name;

/// Send a signal to containers.
#[derive(Debug, Args)]
pub struct Kill {
    /// The signal, by name or number
    #[arg(short, long, default_value = "KILL", value_parser = signal_name::parse)]
    signal: i32,
    /// Names or ids
    #[arg(required = true)]
    containers: Vec<String>,
}

impl Kill {
    /// Sends it.
    pub fn execute(self) -> anyhow::Result<u8> {
        let runtime = Runtime::open(&Directories::from_environment())?;
        let mut code = 0;
        for name in &self.containers {
            let sent = runtime
                .find(name)
                .and_then(|record| runtime.signal(&record, self.signal, false));
            match sent {
                Ok(()) => println!("{name}"),
                Err(error) => {
                    eprintln!("hull: {:#}", anyhow::Error::from(error));
                    code = 1;
                }
            }
        }
        Ok(code)
    }
}
