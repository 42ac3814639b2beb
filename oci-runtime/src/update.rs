//! `hull-oci update`: other limits for a container that is there.

use std::{io::Read as _, path::PathBuf};

use anyhow::{Context as _, Result, bail};
use clap::Args;
use oci_spec::runtime::LinuxResources;
use serde_json::{Map, Value, json};

use crate::Global;

/// Change the limits of a container
#[derive(Debug, Args)]
pub(crate) struct Update {
    /// File with the limits as in config.json, `-` for standard input; no other flag counts then
    #[arg(long, short, value_name = "FILE")]
    resources: Option<PathBuf>,
    /// Weight of its I/O
    #[arg(long, value_name = "N")]
    blkio_weight: Option<u64>,
    /// Period of its CPU quota in microseconds
    #[arg(long, value_name = "US")]
    cpu_period: Option<u64>,
    /// CPU time in each period in microseconds
    #[arg(long, value_name = "US", allow_hyphen_values = true)]
    cpu_quota: Option<i64>,
    /// Relative weight of its CPU time
    #[arg(long, value_name = "N")]
    cpu_share: Option<u64>,
    /// CPUs of the host it may use
    #[arg(long, value_name = "LIST")]
    cpuset_cpus: Option<String>,
    /// Memory nodes of the host it may use
    #[arg(long, value_name = "LIST")]
    cpuset_mems: Option<String>,
    /// Most memory, `64m`
    #[arg(long, value_name = "BYTES", allow_hyphen_values = true)]
    memory: Option<String>,
    /// Memory it keeps when others want some
    #[arg(long, value_name = "BYTES", allow_hyphen_values = true)]
    memory_reservation: Option<String>,
    /// Most memory and swap together
    #[arg(long, value_name = "BYTES", allow_hyphen_values = true)]
    memory_swap: Option<String>,
    /// Most processes and threads
    #[arg(long, value_name = "N", allow_hyphen_values = true)]
    pids_limit: Option<i64>,
    /// Not available
    #[arg(long, hide = true, value_name = "US", allow_hyphen_values = true)]
    cpu_rt_period: Option<String>,
    /// Not available
    #[arg(long, hide = true, value_name = "US", allow_hyphen_values = true)]
    cpu_rt_runtime: Option<String>,
    /// Not available
    #[arg(long, hide = true, value_name = "US")]
    cpu_burst: Option<String>,
    /// Not available
    #[arg(long, hide = true, value_name = "N")]
    cpu_idle: Option<String>,
    /// Not available
    #[arg(long, hide = true, value_name = "SCHEMA")]
    l3_cache_schema: Option<String>,
    /// Not available
    #[arg(long, hide = true, value_name = "SCHEMA")]
    mem_bw_schema: Option<String>,
    /// The container's id
    id: String,
}

/// Reads `64m`, `1g`, `-1`.
fn bytes(text: &str) -> Result<i64> {
    let lower = text.trim().to_ascii_lowercase();
    let lower = lower
        .strip_suffix("ib")
        .or_else(|| lower.strip_suffix('b'))
        .unwrap_or(&lower);
    let (number, shift) = match lower.char_indices().next_back() {
        Some((at, 'k')) => (&lower[..at], 10),
        Some((at, 'm')) => (&lower[..at], 20),
        Some((at, 'g')) => (&lower[..at], 30),
        Some((at, 't')) => (&lower[..at], 40),
        _ => (lower, 0),
    };
    let number: i64 = number
        .parse()
        .with_context(|| format!("invalid size {text:?}; 64m is one"))?;
    number
        .checked_mul(1 << shift)
        .with_context(|| format!("size {text:?} is too large"))
}

impl Update {
    fn of_file(&self, path: &std::path::Path) -> Result<LinuxResources> {
        let mut text = Vec::new();
        if path.as_os_str() == "-" {
            std::io::stdin().read_to_end(&mut text)?;
        } else {
            text = std::fs::read(path)
                .with_context(|| format!("cannot read the resources {}", path.display()))?;
        }
        serde_json::from_slice(&text)
            .with_context(|| format!("{} has no resources as in config.json", path.display()))
    }

    fn of_flags(&self) -> Result<LinuxResources> {
        let unavailable = [
            ("--cpu-rt-period", &self.cpu_rt_period),
            ("--cpu-rt-runtime", &self.cpu_rt_runtime),
            ("--cpu-burst", &self.cpu_burst),
            ("--cpu-idle", &self.cpu_idle),
            ("--l3-cache-schema", &self.l3_cache_schema),
            ("--mem-bw-schema", &self.mem_bw_schema),
        ];
        if let Some((flag, _)) = unavailable.iter().find(|(_, value)| value.is_some()) {
            bail!("{flag} is not available for a container in a microVM");
        }
        let mut root = Map::new();
        let mut set = |group: &str, name: &str, value: Option<Value>| {
            if let Some(value) = value {
                let entry = root.entry(group).or_insert_with(|| json!({}));
                entry[name] = value;
            }
        };
        let size = |text: &Option<String>| text.as_deref().map(bytes).transpose();
        set("cpu", "period", self.cpu_period.map(Value::from));
        set("cpu", "quota", self.cpu_quota.map(Value::from));
        set("cpu", "shares", self.cpu_share.map(Value::from));
        set("cpu", "cpus", self.cpuset_cpus.clone().map(Value::from));
        set("cpu", "mems", self.cpuset_mems.clone().map(Value::from));
        set("memory", "limit", size(&self.memory)?.map(Value::from));
        set(
            "memory",
            "reservation",
            size(&self.memory_reservation)?.map(Value::from),
        );
        set("memory", "swap", size(&self.memory_swap)?.map(Value::from));
        set("pids", "limit", self.pids_limit.map(Value::from));
        set("blockIO", "weight", self.blkio_weight.map(Value::from));
        if root.is_empty() {
            bail!("no limit is given");
        }
        serde_json::from_value(Value::from(root)).context("impossible limits")
    }

    pub(crate) fn execute(&self, global: &Global) -> Result<u8> {
        let resources = match &self.resources {
            Some(path) => self.of_file(path)?,
            None => self.of_flags()?,
        };
        global.bundles()?.update(&self.id, &resources)?;
        Ok(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_units() {
        for (text, size) in [
            ("64m", 64 << 20),
            ("1GB", 1 << 30),
            ("512", 512),
            ("-1", -1),
            ("2KiB", 2048),
        ] {
            assert_eq!(bytes(text).unwrap(), size, "{text}");
        }
        assert!(bytes("much").is_err() && bytes("99999999t").is_err());
    }
}
