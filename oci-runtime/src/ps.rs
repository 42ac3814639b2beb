//! `hull-oci ps`.
//!
//! The processes of a container are in its microVM, with numbers of their own. The table shows them so. The JSON form is
//! for programs that look the numbers up on the host, so it has those of the host's processes that are the container.

use anyhow::{Result, bail};
use clap::Args;
use serde_json::json;

use crate::Global;

/// List the processes of a container
#[derive(Debug, Args)]
pub(crate) struct Ps {
    /// table or json
    #[arg(long, short, default_value = "table")]
    format: String,
    /// The container's id
    id: String,
    /// Options as of ps; -ef and aux are understood
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    options: Vec<String>,
}

impl Ps {
    pub(crate) fn execute(&self, global: &Global) -> Result<u8> {
        let bundles = global.bundles()?;
        match self.format.as_str() {
            "json" => {
                let state = bundles.state(&self.id)?;
                let pids: Vec<i32> = [Some(state.pid), state.vmm_pid]
                    .into_iter()
                    .flatten()
                    .filter(|pid| *pid != 0)
                    .collect();
                println!("{}", json!(pids));
                return Ok(0);
            }
            "table" => {}
            other => bail!("invalid format option: {other}; it is table or json"),
        }
        if let Some(option) = self.options.iter().find(|option| {
            !["ef", "eaf", "aux", "e", "f", "a", "x"].contains(&option.trim_start_matches('-'))
        }) {
            bail!(
                "ps option {option:?}: the processes are in a microVM and shown as by ps -ef; run ps in it by `exec` for more"
            );
        }
        let mut processes = bundles.processes(&self.id)?;
        processes.sort_by_key(|process| process.pid);
        println!(
            "{:<10} {:>6} {:>6} {:>8} {:<6} {:>8} CMD",
            "UID", "PID", "PPID", "STIME", "TTY", "TIME"
        );
        for process in processes {
            let user = if process.user.is_empty() {
                process.uid.to_string()
            } else {
                process.user
            };
            let started = i64::try_from(process.started_at_ms).unwrap_or(0);
            let started = jiff::Timestamp::from_millisecond(started)
                .unwrap_or_default()
                .to_zoned(jiff::tz::TimeZone::system());
            let seconds = process.cpu_time_us / 1_000_000;
            println!(
                "{:<10} {:>6} {:>6} {:>8} {:<6} {:>8} {}",
                printable(&user),
                process.pid,
                process.ppid,
                started.strftime("%H:%M"),
                terminal(process.tty),
                format!(
                    "{:02}:{:02}:{:02}",
                    seconds / 3600,
                    seconds / 60 % 60,
                    seconds % 60
                ),
                printable(&process.command)
            );
        }
        Ok(0)
    }
}

/// What a guest says can't move the cursor.
fn printable(text: &str) -> String {
    text.chars()
        .map(|c| if c.is_control() { '?' } else { c })
        .collect()
}

/// The controlling terminal by its device number.
fn terminal(device: u32) -> String {
    const PTS_MAJOR: u32 = 136;
    let (major, minor) = (
        (device >> 8) & 0xfff,
        (device & 0xff) | ((device >> 12) & 0xfff00),
    );
    match (device, major) {
        (0, _) => "?".to_owned(),
        (_, PTS_MAJOR) => format!("pts/{minor}"),
        _ => format!("{major}:{minor}"),
    }
}
