//! The lines of `hull top`.

use std::time::Duration;

use serde::Serialize;

use crate::{
    output,
    sampler::{Sampler, Usage, binary_size},
};

/// The columns' names.
pub(super) const HEADER: [&str; 10] = [
    "NAME", "STATUS", "CPU %", "GIVEN", "USED", "HOST MEM", "READ", "WRITTEN", "PIDS", "UPTIME",
];

/// A microVM's line.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "PascalCase")]
pub(super) struct Row {
    #[serde(rename = "ID")]
    pub id: String,
    pub name: String,
    pub image: String,
    pub status: String,
    #[serde(rename = "CPUPerc")]
    pub cpu_percent: f64,
    pub memory_given_bytes: u64,
    pub memory_used_bytes: u64,
    pub host_memory_bytes: u64,
    pub io_read_bytes: u64,
    pub io_write_bytes: u64,
    #[serde(rename = "PIDs")]
    pub pids: u64,
    pub uptime_seconds: u64,
    /// Whether its guest answered.
    pub answers: bool,
}

impl Row {
    pub fn of(usage: &Usage) -> Self {
        let guest = usage.guest.unwrap_or_default();
        Self {
            id: usage.record.id.short().to_owned(),
            name: usage.record.name.clone(),
            image: usage.record.spec.image.clone(),
            status: usage.record.status.to_string(),
            cpu_percent: usage.host_cpu_percent.unwrap_or(0.0),
            memory_given_bytes: usage.given_bytes(),
            memory_used_bytes: guest.memory_current_bytes,
            host_memory_bytes: usage.host_memory_bytes,
            io_read_bytes: guest.io_read_bytes,
            io_write_bytes: guest.io_write_bytes,
            pids: guest.pids,
            uptime_seconds: usage.uptime.as_secs(),
            answers: usage.guest.is_some(),
        }
    }

    pub fn cells(&self) -> [String; 10] {
        let told = |text: String| if self.answers { text } else { "--".to_owned() };
        [
            self.name.clone(),
            self.status.clone(),
            format!("{:.1}", self.cpu_percent),
            binary_size(self.memory_given_bytes),
            told(binary_size(self.memory_used_bytes)),
            binary_size(self.host_memory_bytes),
            told(output::size(self.io_read_bytes)),
            told(output::size(self.io_write_bytes)),
            told(self.pids.to_string()),
            uptime(Duration::from_secs(self.uptime_seconds)),
        ]
    }
}

/// `3d04h`, `4h05m`, `5m06s`, `7s`.
fn uptime(time: Duration) -> String {
    let seconds = time.as_secs();
    let (days, hours, minutes) = (seconds / 86_400, seconds / 3600 % 24, seconds / 60 % 60);
    match (days, hours, minutes) {
        (0, 0, 0) => format!("{seconds}s"),
        (0, 0, _) => format!("{minutes}m{:02}s", seconds % 60),
        (0, ..) => format!("{hours}h{minutes:02}m"),
        _ => format!("{days}d{hours:02}h"),
    }
}

/// What lines are sorted by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Sort {
    Cpu,
    Memory,
    Io,
    Pids,
    Uptime,
    Name,
}

impl Sort {
    /// The column it is about.
    pub const fn column(self) -> usize {
        match self {
            Self::Name => 0,
            Self::Cpu => 2,
            Self::Memory => 5,
            Self::Io => 6,
            Self::Pids => 8,
            Self::Uptime => 9,
        }
    }

    /// Sorts: the most first, but names from A to Z; the other way round if `reverse`.
    pub fn apply(self, rows: &mut [Row], reverse: bool) {
        rows.sort_by(|a, b| {
            let order = match self {
                Self::Cpu => b.cpu_percent.total_cmp(&a.cpu_percent),
                Self::Memory => b.host_memory_bytes.cmp(&a.host_memory_bytes),
                Self::Io => (b.io_read_bytes.saturating_add(b.io_write_bytes))
                    .cmp(&a.io_read_bytes.saturating_add(a.io_write_bytes)),
                Self::Pids => b.pids.cmp(&a.pids),
                Self::Uptime => b.uptime_seconds.cmp(&a.uptime_seconds),
                Self::Name => a.name.cmp(&b.name),
            };
            let order = if reverse { order.reverse() } else { order };
            order.then_with(|| a.name.cmp(&b.name))
        });
    }
}

/// Looks at all running microVMs.
pub(super) fn look(sampler: &mut Sampler) -> anyhow::Result<Vec<Usage>> {
    let mut records = sampler.runtime().list()?;
    records.retain(|record| record.status.is_live());
    Ok(sampler.look(records))
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub(in crate::top) fn row(name: &str, cpu_percent: f64, memory: u64) -> Row {
        Row {
            id: name.to_owned(),
            name: name.to_owned(),
            image: "busybox".to_owned(),
            status: "running".to_owned(),
            cpu_percent,
            memory_given_bytes: 512 << 20,
            memory_used_bytes: memory / 2,
            host_memory_bytes: memory,
            io_read_bytes: 0,
            io_write_bytes: 0,
            pids: 1,
            uptime_seconds: 61,
            answers: true,
        }
    }

    #[test]
    fn most_come_first_and_names_in_order() {
        let mut rows = vec![row("b", 1.0, 5), row("a", 9.0, 1), row("c", 1.0, 9)];
        let names = |rows: &[Row]| rows.iter().map(|row| row.name.clone()).collect::<String>();
        Sort::Cpu.apply(&mut rows, false);
        assert_eq!(names(&rows), "abc");
        Sort::Memory.apply(&mut rows, false);
        assert_eq!(names(&rows), "cba");
        Sort::Memory.apply(&mut rows, true);
        assert_eq!(names(&rows), "abc");
        Sort::Name.apply(&mut rows, true);
        assert_eq!(names(&rows), "cba");
    }

    #[test]
    fn guest_that_does_not_answer_has_no_figures_of_its_own() {
        let mut silent = row("a", 1.0, 1 << 20);
        silent.answers = false;
        let cells = silent.cells();
        assert_eq!((cells[4].as_str(), cells[5].as_str()), ("--", "1MiB"));
    }

    #[test]
    fn uptime_has_two_units() {
        for (seconds, text) in [(7, "7s"), (67, "1m07s"), (3_661, "1h01m"), (90_061, "1d01h")] {
            assert_eq!(uptime(Duration::from_secs(seconds)), text);
        }
    }
}
