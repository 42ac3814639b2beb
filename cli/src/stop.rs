//! `hull stop`

use std::time::Duration;

use clap::Args;
use sandbox::{ContainerRecord, Directories, Runtime};

use crate::output;

/// How long a container has to end unless it was created with another time.
const DEFAULT_PATIENCE: Duration = Duration::from_secs(10);
/// As good as for ever, and still a time that can be added to a clock.
const FOR_EVER: Duration = Duration::from_secs(365 * 86_400);

/// Stop containers: ask, wait, then force.
#[derive(Debug, Args)]
pub struct Stop {
    /// Seconds to wait before forcing it; -1 waits for ever [default: the container's, or 10]
    #[arg(short, long, visible_alias = "timeout", allow_negative_numbers = true)]
    time: Option<i64>,
    /// Names or ids
    #[arg(required = true)]
    containers: Vec<String>,
}

/// How long a container has to end.
pub fn patience(time: Option<i64>, record: &ContainerRecord) -> Duration {
    match time.map(u64::try_from) {
        Some(Ok(seconds)) => Duration::from_secs(seconds).min(FOR_EVER),
        Some(Err(_)) => FOR_EVER,
        None => record.spec.stop_timeout_s.map_or(DEFAULT_PATIENCE, |seconds| {
            Duration::from_secs(seconds).min(FOR_EVER)
        }),
    }
}

impl Stop {
    /// Stops them, all at once.
    pub fn execute(self) -> anyhow::Result<u8> {
        let runtime = Runtime::open(&Directories::from_environment())?;
        Ok(output::each_at_once(&self.containers, |name| {
            let record = runtime.find(name)?;
            Ok(runtime.stop(&record, patience(self.time, &record))?)
        }))
    }
}
