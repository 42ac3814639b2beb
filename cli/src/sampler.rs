//! What containers use, twice looked at: as their guests count it and as this host does.
//!
//! A rate needs two looks, so a [`Sampler`] remembers the last one. Several containers are asked at a time; one whose guest doesn't answer delays its own line and those after it, not the rest.

use std::{
    collections::HashMap,
    fs,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use sandbox::{ContainerRecord, Runtime, SandboxId, Status};

/// Containers asked at the same time.
const AT_ONCE: usize = 8;
/// Ticks a second in `/proc/PID/stat`: part of the kernel's ABI, whatever its own clock does.
const USER_HZ: u64 = 100;

/// What a guest says of its container.
#[derive(Debug, Clone, Copy, Default)]
pub struct Guest {
    pub cpu_usage_us: u64,
    pub memory_current_bytes: u64,
    pub memory_total_bytes: u64,
    pub memory_available_bytes: u64,
    pub pids: u64,
    pub io_read_bytes: u64,
    pub io_write_bytes: u64,
    pub oom_kills: u64,
}

/// A container's figures.
#[derive(Debug, Clone)]
pub struct Usage {
    pub record: ContainerRecord,
    /// CPU time of its processes, as its guest counts it, in percent of one CPU; from the second look on.
    pub cpu_percent: Option<f64>,
    /// CPU time of the whole microVM on this host, in percent of one CPU; from the second look on.
    pub host_cpu_percent: Option<f64>,
    /// What its guest says; nothing if it doesn't answer.
    pub guest: Option<Guest>,
    /// Memory of this host that the microVM takes.
    pub host_memory_bytes: u64,
    /// How long it has been running.
    pub uptime: Duration,
}

impl Usage {
    /// The memory it was given.
    pub fn given_bytes(&self) -> u64 {
        self.record.spec.memory_mib.saturating_mul(1 << 20)
    }

    /// The memory its processes use, as its guest counts it.
    pub fn used_bytes(&self) -> u64 {
        self.guest.as_ref().map_or(0, |guest| guest.memory_current_bytes)
    }
}

/// A counter at a time.
#[derive(Debug, Clone, Copy)]
struct Look {
    at: Instant,
    cpu: Duration,
}

/// Per cent of one CPU between two looks.
#[expect(
    clippy::cast_precision_loss,
    reason = "microseconds between two looks are far below what a float counts exactly"
)]
fn percent(before: Option<Look>, now: Look) -> Option<f64> {
    let before = before?;
    let passed = now.at.checked_duration_since(before.at)?.as_micros();
    let used = now.cpu.saturating_sub(before.cpu).as_micros();
    (passed > 0).then(|| used as f64 * 100.0 / passed as f64)
}

#[derive(Debug, Default)]
struct Tracked {
    guest: Option<Look>,
    host: Option<Look>,
}

/// Looks at containers again and again.
#[derive(Debug)]
pub struct Sampler {
    runtime: Runtime,
    tracked: HashMap<SandboxId, Tracked>,
}

/// CPU time and resident memory of a process of this host.
fn host_usage(pid: i32) -> Option<(Duration, u64)> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The program's name may hold anything, parentheses too; the numbers come after the last one.
    let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
    let number = |index: usize| fields.get(index)?.parse::<u64>().ok();
    let ticks = number(11)? + number(12)?;
    let cpu = Duration::from_millis(ticks.saturating_mul(1000 / USER_HZ));
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let kib = status.lines().find_map(|line| {
        let value = line.strip_prefix("VmRSS:")?.split_whitespace().next()?;
        value.parse::<u64>().ok()
    });
    Some((cpu, kib.unwrap_or(0).saturating_mul(1024)))
}

fn uptime(record: &ContainerRecord) -> Duration {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let started = record.started_ms.map_or(now, Duration::from_millis);
    now.saturating_sub(started)
}

/// Asks a container's guest; nothing if it doesn't run or doesn't answer.
fn ask(runtime: &Runtime, record: &ContainerRecord) -> Option<Guest> {
    if record.status != Status::Running {
        return None;
    }
    let answer = runtime.stats(record).ok()?;
    Some(Guest {
        cpu_usage_us: answer.cpu_usage_us,
        memory_current_bytes: answer.memory_current_bytes,
        memory_total_bytes: answer.guest_memory_total_bytes,
        memory_available_bytes: answer.guest_memory_available_bytes,
        pids: answer.pids_current,
        io_read_bytes: answer.io_read_bytes,
        io_write_bytes: answer.io_write_bytes,
        oom_kills: answer.oom_kills,
    })
}

impl Tracked {
    fn look(&mut self, runtime: &Runtime, record: ContainerRecord) -> Usage {
        let guest = ask(runtime, &record);
        let at = Instant::now();
        let cpu_percent = guest.as_ref().and_then(|guest| {
            let now = Look {
                at,
                cpu: Duration::from_micros(guest.cpu_usage_us),
            };
            percent(self.guest.replace(now), now)
        });
        let vmm = record.run.as_ref().and_then(|run| run.vmm);
        let host = vmm.and_then(|vmm| host_usage(vmm.pid));
        let host_cpu_percent = host.and_then(|(cpu, _)| {
            let now = Look { at, cpu };
            percent(self.host.replace(now), now)
        });
        Usage {
            uptime: uptime(&record),
            cpu_percent,
            host_cpu_percent,
            guest,
            host_memory_bytes: host.map_or(0, |(_, bytes)| bytes),
            record,
        }
    }
}

impl Sampler {
    /// One that has not looked yet.
    pub fn new(runtime: Runtime) -> Self {
        Self {
            runtime,
            tracked: HashMap::new(),
        }
    }

    /// The containers themselves.
    pub const fn runtime(&self) -> &Runtime {
        &self.runtime
    }

    /// Looks at containers, in the order they are given; what isn't among them is forgotten.
    pub fn look(&mut self, records: Vec<ContainerRecord>) -> Vec<Usage> {
        let mut before = std::mem::take(&mut self.tracked);
        let mut work: Vec<(ContainerRecord, Tracked)> = records
            .into_iter()
            .map(|record| {
                let tracked = before.remove(&record.id).unwrap_or_default();
                (record, tracked)
            })
            .collect();
        let size = work.len().div_ceil(AT_ONCE).max(1);
        let runtime = &self.runtime;
        let mut chunks = Vec::new();
        while !work.is_empty() {
            let rest = work.split_off(size.min(work.len()));
            chunks.push(std::mem::replace(&mut work, rest));
        }
        let looked: Vec<(Usage, Tracked)> = std::thread::scope(|scope| {
            let threads: Vec<_> = chunks
                .into_iter()
                .map(|chunk| {
                    scope.spawn(move || {
                        let look = |(record, mut tracked): (ContainerRecord, Tracked)| {
                            let usage = tracked.look(runtime, record);
                            (usage, tracked)
                        };
                        chunk.into_iter().map(look).collect::<Vec<_>>()
                    })
                })
                .collect();
            threads
                .into_iter()
                .filter_map(|thread| thread.join().ok())
                .flatten()
                .collect()
        });
        let mut usages = Vec::new();
        for (usage, tracked) in looked {
            self.tracked.insert(usage.record.id.clone(), tracked);
            usages.push(usage);
        }
        usages
    }
}

/// A size in powers of two, as docker prints memory.
#[expect(clippy::cast_precision_loss, reason = "four digits are shown")]
pub fn binary_size(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut value = bytes as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    // Four significant digits, none of them a trailing zero.
    let decimals: usize = match value {
        _ if unit == 0 => 0,
        value if value < 10.0 => 3,
        value if value < 100.0 => 2,
        value if value < 1000.0 => 1,
        _ => 0,
    };
    let text = format!("{value:.decimals$}");
    let text = if text.contains('.') {
        text.trim_end_matches('0').trim_end_matches('.')
    } else {
        &text
    };
    format!("{text}{}", UNITS[unit])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rate_is_what_passed_between_two_looks() {
        let at = Instant::now();
        let look = |seconds: u64, cpu_ms: u64| Look {
            at: at + Duration::from_secs(seconds),
            cpu: Duration::from_millis(cpu_ms),
        };
        assert_eq!(percent(None, look(1, 500)), None);
        assert_eq!(percent(Some(look(0, 100)), look(2, 1100)), Some(50.0));
        // A microVM that was started anew counts from zero.
        assert_eq!(percent(Some(look(0, 5000)), look(1, 10)), Some(0.0));
        assert_eq!(percent(Some(look(1, 0)), look(1, 10)), None);
    }

    #[test]
    fn memory_is_printed_as_docker_does() {
        for (bytes, text) in [
            (0, "0B"),
            (1023, "1023B"),
            (1 << 20, "1MiB"),
            (3_565_158, "3.4MiB"),
            (512 << 20, "512MiB"),
            (16_508_780_544, "15.38GiB"),
        ] {
            assert_eq!(binary_size(bytes), text);
        }
    }

    #[test]
    fn this_process_takes_memory() {
        let own = i32::try_from(std::process::id()).unwrap();
        let (_, memory) = host_usage(own).unwrap();
        assert!(memory > 0);
        assert!(host_usage(-1).is_none());
    }
}
