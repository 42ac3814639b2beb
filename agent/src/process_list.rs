//! What the kernel says of a container's processes, for `top`.

use std::{fs, fs::File};

use agent_protocol::{
    ProcessInfo,
    limits::{MAX_COMMAND_BYTES, MAX_PIDS},
};

use crate::user;

/// As many as fit into an answer.
const MAX_DESCRIBED: usize = if MAX_PIDS < 2048 { MAX_PIDS } else { 2048 };

/// What is known of these processes; those that have ended meanwhile are left out.
pub fn describe(pids: &[u32], root: &File) -> Vec<ProcessInfo> {
    let users = user::Names::read(root);
    let clock = Clock::read();
    pids.iter()
        .take(MAX_DESCRIBED)
        .filter_map(|pid| {
            let file = |name: &str| fs::read(format!("/proc/{pid}/{name}")).ok();
            let stat = String::from_utf8_lossy(&file("stat")?).into_owned();
            let status = String::from_utf8_lossy(&file("status")?).into_owned();
            let mut info = parse_stat(&stat, &clock)?;
            info.pid = *pid;
            info.uid = parse_uid(&status)?;
            info.user = users.name_of(info.uid).unwrap_or_default();
            if let Some(command) = file("cmdline").map(|bytes| command_line(&bytes))
                && !command.is_empty()
            {
                info.command = command;
            }
            Some(info)
        })
        .collect()
}

struct Clock {
    ticks_per_second: u64,
    page_bytes: u64,
    /// CLOCK_REALTIME at boot.
    boot_ms: u64,
}

impl Clock {
    fn read() -> Self {
        use nix::unistd::{SysconfVar, sysconf};
        let number = |variable, default| {
            let value = sysconf(variable).ok().flatten();
            value
                .and_then(|value| u64::try_from(value).ok())
                .unwrap_or(default)
        };
        let now = std::time::SystemTime::now()
            .duration_since(std::time::UNIX_EPOCH)
            .unwrap_or_default();
        let since_boot = crate::init::boot_time_ns() / 1_000_000;
        Self {
            ticks_per_second: number(SysconfVar::CLK_TCK, 100).max(1),
            page_bytes: number(SysconfVar::PAGE_SIZE, 4096),
            boot_ms: u64::try_from(now.as_millis())
                .unwrap_or(0)
                .saturating_sub(since_boot),
        }
    }
}

/// `/proc/<pid>/stat`, whose second field is in parentheses and may hold anything.
fn parse_stat(stat: &str, clock: &Clock) -> Option<ProcessInfo> {
    let (start, end) = (stat.find('(')?, stat.rfind(')')?);
    let name = stat.get(start + 1..end)?;
    let fields: Vec<&str> = stat.get(end + 1..)?.split_whitespace().collect();
    let number = |index: usize| {
        fields
            .get(index)
            .and_then(|field| field.parse::<u64>().ok())
            .unwrap_or(0)
    };
    let ticks_to = |ticks: u64, unit: u64| ticks.saturating_mul(unit) / clock.ticks_per_second;
    Some(ProcessInfo {
        state: (*fields.first()?).chars().take(1).collect(),
        ppid: u32::try_from(number(1)).unwrap_or(0),
        tty: u32::try_from(number(4)).unwrap_or(0),
        cpu_time_us: ticks_to(number(11).saturating_add(number(12)), 1_000_000),
        started_at_ms: clock.boot_ms.saturating_add(ticks_to(number(19), 1000)),
        rss_bytes: number(21).saturating_mul(clock.page_bytes),
        command: format!("[{}]", printable(name)),
        ..ProcessInfo::default()
    })
}

fn parse_uid(status: &str) -> Option<u32> {
    let line = status.lines().find_map(|line| line.strip_prefix("Uid:"))?;
    // Real, effective, saved, of the filesystem.
    line.split_whitespace().nth(1)?.parse().ok()
}

fn printable(text: &str) -> String {
    text.chars()
        .map(|c| if c.is_control() { '?' } else { c })
        .take(MAX_COMMAND_BYTES / 8)
        .collect()
}

/// Arguments with blanks between them.
fn command_line(bytes: &[u8]) -> String {
    let bytes = bytes.get(..MAX_COMMAND_BYTES / 4).unwrap_or(bytes);
    let text = String::from_utf8_lossy(bytes).replace('\0', " ");
    let mut text: String = text
        .trim_end()
        .chars()
        .map(|c| if c.is_control() { '?' } else { c })
        .collect();
    while text.len() > MAX_COMMAND_BYTES {
        text.pop();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn name_with_parentheses_and_blanks_is_one_field() {
        let clock = Clock {
            ticks_per_second: 100,
            page_bytes: 4096,
            boot_ms: 1000,
        };
        let stat = "7 (a) b (c)) S 3 7 7 34816 7 4194560 1 0 0 0 150 50 0 0 20 0 1 0 200 4096 3 18446744073709551615";
        let info = parse_stat(stat, &clock).unwrap();
        assert_eq!((info.ppid, info.tty, info.state.as_str()), (3, 34816, "S"));
        assert_eq!(
            (info.cpu_time_us, info.started_at_ms, info.rss_bytes),
            (2_000_000, 3000, 3 * 4096)
        );
        assert_eq!(info.command, "[a) b (c)]");
        assert!(parse_stat("7 a S", &clock).is_none());
    }

    #[test]
    fn command_line_is_bounded_and_printable() {
        assert_eq!(command_line(b"sh\0-c\0a\x1bb\0"), "sh -c a?b");
        assert!(command_line(&[0xff; 5000]).len() <= MAX_COMMAND_BYTES);
    }
}
