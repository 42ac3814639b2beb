//! `hull-oci events`: statistics and want of memory, in runc's JSON lines.

use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use clap::Args;
use sandbox::{StatsResponse, bundle::BundleStatus};
use serde_json::{Value, json};

use crate::Global;

/// Print statistics of a container
#[derive(Debug, Args)]
pub(crate) struct Events {
    /// How often
    #[arg(long, default_value = "5s", value_name = "DURATION")]
    interval: String,
    /// Once, and end
    #[arg(long, num_args = 0..=1, require_equals = true, default_value_t = false, default_missing_value = "true")]
    stats: bool,
    /// The container's id
    id: String,
}

/// Reads `5s`, `500ms`, `1m`, `1h30m`, as Go writes them.
fn duration(text: &str) -> Result<Duration> {
    let mut rest = text;
    let mut total = Duration::ZERO;
    while !rest.is_empty() {
        let digits = rest
            .find(|c: char| !c.is_ascii_digit() && c != '.')
            .with_context(|| format!("duration {text:?} has no unit"))?;
        let number: f64 = rest[..digits]
            .parse()
            .with_context(|| format!("duration {text:?}"))?;
        let unit_end = rest[digits..]
            .find(|c: char| c.is_ascii_digit())
            .map_or(rest.len(), |end| digits + end);
        let seconds = match &rest[digits..unit_end] {
            "ms" => 0.001,
            "s" => 1.0,
            "m" => 60.0,
            "h" => 3600.0,
            unit => bail!("duration {text:?} has the unknown unit {unit:?}"),
        };
        total += Duration::try_from_secs_f64(number * seconds)?;
        rest = &rest[unit_end..];
    }
    if total.is_zero() {
        bail!("duration interval must be greater than 0");
    }
    Ok(total)
}

/// The statistics of a guest as runc lays them out.
fn data(stats: &StatsResponse) -> Value {
    let ns = |us: u64| us.saturating_mul(1000);
    json!({
        "cpu": {
            "usage": {
                "total": ns(stats.cpu_usage_us),
                "kernel": ns(stats.cpu_system_us),
                "user": ns(stats.cpu_user_us),
            },
            "throttling": {},
        },
        "cpuset": {},
        "memory": {
            "cache": stats.memory_file_bytes,
            "usage": {
                "limit": stats.guest_memory_total_bytes,
                "usage": stats.memory_current_bytes,
                "max": stats.memory_peak_bytes,
                "failcnt": 0,
            },
            "swap": { "limit": 0, "failcnt": 0 },
            "kernel": { "limit": 0, "failcnt": 0 },
            "kernelTCP": { "limit": 0, "failcnt": 0 },
            "raw": { "anon": stats.memory_anon_bytes, "file": stats.memory_file_bytes },
        },
        "pids": { "current": stats.pids_current },
        "blkio": {
            "ioServiceBytesRecursive": [
                { "op": "Read", "value": stats.io_read_bytes },
                { "op": "Write", "value": stats.io_write_bytes },
            ],
        },
        "hugetlb": {},
        "intel_rdt": {},
        "network_interfaces": null,
    })
}

impl Events {
    pub(crate) fn execute(&self, global: &Global) -> Result<u8> {
        let interval = duration(&self.interval)?;
        let bundles = global.bundles()?;
        let status = bundles.state(&self.id)?.status;
        if !status.is_live() {
            bail!("container with id {} is not running", self.id);
        }
        let line =
            |kind: &str, data: Value| println!("{}", json!({ "type": kind, "id": self.id, "data": data }));
        let mut oom_kills = 0;
        loop {
            let stats = match bundles.stats(&self.id) {
                Ok(stats) => stats,
                Err(error) if self.stats => return Err(error.into()),
                Err(error) => {
                    return match bundles.state(&self.id) {
                        Ok(state) if state.status == BundleStatus::Paused => {
                            std::thread::sleep(interval);
                            continue;
                        }
                        Ok(state) if state.status.is_live() => Err(error.into()),
                        _ => Ok(0),
                    };
                }
            };
            if stats.oom_kills > oom_kills {
                oom_kills = stats.oom_kills;
                line("oom", Value::Null);
            }
            line("stats", data(&stats));
            if self.stats {
                return Ok(0);
            }
            std::thread::sleep(interval);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_those_of_go() {
        assert_eq!(duration("5s").unwrap(), Duration::from_secs(5));
        assert_eq!(duration("1m30s").unwrap(), Duration::from_secs(90));
        assert_eq!(duration("1.5s").unwrap(), Duration::from_millis(1500));
        assert_eq!(duration("20ms").unwrap(), Duration::from_millis(20));
        for text in ["", "0s", "5", "5x", "s"] {
            assert!(duration(text).is_err(), "{text}");
        }
    }
}
