//! A container's control group: its limits, its statistics, and the way to kill all of it.

use std::{
    fs::{self, OpenOptions},
    os::fd::OwnedFd,
    path::{Path, PathBuf},
};

use agent_protocol::{Resources, StatsResponse};
use nix::errno::Errno;

use crate::{error::AgentError, init::CGROUP_DIR};

/// A control group of version 2. Dropping it removes it, which works once it is empty.
#[derive(Debug)]
pub struct Cgroup {
    dir: PathBuf,
}

fn io_errno(error: &std::io::Error) -> Errno {
    error.raw_os_error().map_or(Errno::EIO, Errno::from_raw)
}

impl Cgroup {
    /// Creates the group of a container and sets its limits.
    pub fn create(container_id: &str, resources: &Resources) -> Result<Self, AgentError> {
        let dir = Path::new(CGROUP_DIR).join(format!("container-{container_id}"));
        fs::create_dir(&dir)
            .map_err(|error| AgentError::setup("creating the control group")(io_errno(&error)))?;
        let this = Self { dir };
        for (file, limit) in [
            ("memory.max", resources.memory_max_bytes),
            ("pids.max", resources.pids_max),
        ] {
            if limit != 0 {
                fs::write(this.dir.join(file), limit.to_string())
                    .map_err(|error| AgentError::setup(format!("setting {file}"))(io_errno(&error)))?;
            }
        }
        Ok(this)
    }

    /// The file a process joins by.
    pub fn open_procs(&self) -> Result<OwnedFd, AgentError> {
        let file = OpenOptions::new()
            .write(true)
            .open(self.dir.join("cgroup.procs"))
            .map_err(|error| AgentError::setup("opening cgroup.procs")(io_errno(&error)))?;
        Ok(file.into())
    }

    /// All processes in it, as the microVM numbers them.
    pub fn pids(&self) -> Vec<u32> {
        let text = fs::read_to_string(self.dir.join("cgroup.procs")).unwrap_or_default();
        text.lines().filter_map(|line| line.parse().ok()).collect()
    }

    /// Kills everything in it at once.
    pub fn kill(&self) -> Result<(), Errno> {
        fs::write(self.dir.join("cgroup.kill"), "1").map_err(|error| io_errno(&error))
    }

    /// How often the kernel killed something in it for want of memory.
    pub fn oom_kills(&self) -> u64 {
        keyed(&self.read("memory.events"), "oom_kill")
    }

    fn read(&self, file: &str) -> String {
        fs::read_to_string(self.dir.join(file)).unwrap_or_default()
    }

    fn number(&self, file: &str) -> u64 {
        self.read(file).trim().parse().unwrap_or(0)
    }

    /// The statistics, as the guest's kernel counts them.
    pub fn stats(&self) -> StatsResponse {
        let (cpu, memory, io) = (
            self.read("cpu.stat"),
            self.read("memory.stat"),
            self.read("io.stat"),
        );
        let meminfo = fs::read_to_string("/proc/meminfo").unwrap_or_default();
        let kib = |key: &str| keyed(&meminfo, key).saturating_mul(1024);
        StatsResponse {
            cpu_usage_us: keyed(&cpu, "usage_usec"),
            cpu_user_us: keyed(&cpu, "user_usec"),
            cpu_system_us: keyed(&cpu, "system_usec"),
            memory_current_bytes: self.number("memory.current"),
            memory_peak_bytes: self.number("memory.peak"),
            memory_file_bytes: keyed(&memory, "file"),
            memory_anon_bytes: keyed(&memory, "anon"),
            oom_kills: self.oom_kills(),
            pids_current: self.number("pids.current"),
            io_read_bytes: summed(&io, "rbytes="),
            io_write_bytes: summed(&io, "wbytes="),
            guest_memory_total_bytes: kib("MemTotal:"),
            guest_memory_available_bytes: kib("MemAvailable:"),
            ..StatsResponse::default()
        }
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        let _ = self.kill();
        drop(fs::remove_dir(&self.dir));
    }
}

/// The number after `key` at the beginning of a line.
fn keyed(text: &str, key: &str) -> u64 {
    text.lines()
        .find_map(|line| {
            let mut words = line.split_whitespace();
            (words.next() == Some(key))
                .then(|| words.next().and_then(|word| word.parse().ok()))
                .flatten()
        })
        .unwrap_or(0)
}

/// The sum of all words that begin with `prefix`.
fn summed(text: &str, prefix: &str) -> u64 {
    text.split_whitespace()
        .filter_map(|word| word.strip_prefix(prefix)?.parse::<u64>().ok())
        .fold(0, u64::saturating_add)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keyed_number_is_found_by_its_whole_key() {
        let text = "oom 3\noom_kill 2\noom_kill_x 9\n";
        assert_eq!(keyed(text, "oom_kill"), 2);
        assert_eq!(keyed(text, "absent"), 0);
    }

    #[test]
    fn io_of_all_disks_is_summed() {
        assert_eq!(
            summed("254:0 rbytes=10 wbytes=1\n254:16 rbytes=5 wbytes=0\n", "rbytes="),
            15
        );
    }
}
