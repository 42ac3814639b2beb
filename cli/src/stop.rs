//! `hull stop`

use std::time::Duration;

use clap::Args;
use sandbox::{Directories, Result, Runtime, SandboxRecord};

use crate::{image, signal_name};

const SIGTERM: i32 = 15;
const SIGKILL: i32 = 9;

/// Stop containers: ask, wait, then force.
#[derive(Debug, Args)]
pub struct Stop {
    /// Seconds to wait before forcing it
    #[arg(short, long, default_value_t = 10)]
    time: u64,
    /// Names or ids
    #[arg(required = true)]
    containers: Vec<String>,
}

impl Stop {
    /// Stops them.
    pub fn execute(self) -> anyhow::Result<u8> {
        let directories = Directories::from_environment();
        let runtime = Runtime::open(&directories)?;
        let mut code = 0;
        for name in &self.containers {
            let stopped = runtime.find(name).and_then(|record| {
                let signal = stop_signal(&directories, &record);
                self.stop(&runtime, &record, signal)
            });
            match stopped {
                Ok(()) => println!("{name}"),
                Err(error) => {
                    eprintln!("hull: {:#}", anyhow::Error::from(error));
                    code = 1;
                }
            }
        }
        Ok(code)
    }

    fn stop(&self, runtime: &Runtime, record: &SandboxRecord, signal: i32) -> Result<()> {
        runtime.signal(record, signal, false)?;
        if runtime.wait_removed(record, Duration::from_secs(self.time)) {
            return Ok(());
        }
        // Gone in between is as good as stopped.
        let _ = runtime.signal(record, SIGKILL, true);
        if runtime.wait_removed(record, Duration::from_secs(10)) {
            Ok(())
        } else {
            runtime.destroy(record)
        }
    }
}

/// What the image says ends it.
fn stop_signal(directories: &Directories, record: &SandboxRecord) -> i32 {
    let image = image::open_store(directories)
        .ok()
        .and_then(|store| store.resolve(&record.image_id).ok());
    let named = image.and_then(|image| image.config.stop_signal);
    named
        .and_then(|name| signal_name::parse(&name).ok())
        .unwrap_or(SIGTERM)
}
