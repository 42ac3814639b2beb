//! `hull top CONTAINER`: its processes, with the columns of docker's top.

use std::time::Duration;

use sandbox::{ContainerRecord, Runtime};
use serde::Serialize;

use crate::{
    format::{PrintFormat, write_out},
    output, times,
};

/// Major number of the kernel's pseudoterminals.
const PTS_MAJOR: u32 = 136;

#[derive(Serialize)]
#[serde(rename_all = "PascalCase")]
struct Row {
    #[serde(rename = "UID")]
    user: String,
    #[serde(rename = "PID")]
    pid: u32,
    #[serde(rename = "PPID")]
    ppid: u32,
    #[serde(rename = "C")]
    cpu_percent: u64,
    #[serde(rename = "STIME")]
    started: String,
    #[serde(rename = "TTY")]
    terminal: String,
    #[serde(rename = "TIME")]
    cpu_time: String,
    #[serde(rename = "CMD")]
    command: String,
    state: String,
    rss_bytes: u64,
}

/// The terminal of a device number, as ps shows it.
fn terminal(device: u32) -> String {
    // As the kernel encodes it: 8 low bits of the minor, 12 of the major, the rest of the minor.
    let (major, minor) = (device >> 8 & 0xfff, device & 0xff | device >> 12 & 0xf_ff00);
    match (device, major) {
        (0, _) => "?".to_owned(),
        (_, PTS_MAJOR) => format!("pts/{minor}"),
        _ => format!("{major}:{minor}"),
    }
}

/// `HH:MM:SS`.
fn clock(time: Duration) -> String {
    let seconds = time.as_secs();
    format!(
        "{:02}:{:02}:{:02}",
        seconds / 3600,
        seconds / 60 % 60,
        seconds % 60
    )
}

fn rows(runtime: &Runtime, record: &ContainerRecord) -> anyhow::Result<Vec<Row>> {
    let now_ms = u64::try_from(times::now().as_millisecond()).unwrap_or(0);
    let processes = runtime.processes(record)?;
    Ok(processes
        .into_iter()
        .map(|process| {
            let age_us = now_ms.saturating_sub(process.started_at_ms).saturating_mul(1000);
            Row {
                user: if process.user.is_empty() {
                    process.uid.to_string()
                } else {
                    output::printable(&process.user)
                },
                pid: process.pid,
                ppid: process.ppid,
                cpu_percent: process.cpu_time_us.saturating_mul(100) / age_us.max(1),
                started: times::clock(process.started_at_ms),
                terminal: terminal(process.tty),
                cpu_time: clock(Duration::from_micros(process.cpu_time_us)),
                command: output::printable(&process.command),
                state: output::printable(&process.state),
                rss_bytes: process.rss_bytes,
            }
        })
        .collect())
}

const HEADER: [&str; 8] = ["UID", "PID", "PPID", "C", "STIME", "TTY", "TIME", "CMD"];

/// Prints them.
///
/// # Errors
/// The container doesn't run.
pub(super) fn print(runtime: &Runtime, record: &ContainerRecord, format: &PrintFormat) -> anyhow::Result<u8> {
    let rows = rows(runtime, record)?;
    let text = format.render(&HEADER, &rows, |row| {
        vec![
            row.user.clone(),
            row.pid.to_string(),
            row.ppid.to_string(),
            row.cpu_percent.to_string(),
            row.started.clone(),
            row.terminal.clone(),
            row.cpu_time.clone(),
            row.command.clone(),
        ]
    })?;
    write_out(&text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn terminals_are_named_as_ps_does() {
        for (device, name) in [
            (0, "?"),
            (136 << 8 | 3, "pts/3"),
            (136 << 8 | 1 << 20 | 1, "pts/257"),
            (4 << 8 | 1, "4:1"),
        ] {
            assert_eq!(terminal(device), name);
        }
    }

    #[test]
    fn time_has_hours_minutes_and_seconds() {
        assert_eq!(clock(Duration::from_secs(3 * 3600 + 62)), "03:01:02");
    }
}
