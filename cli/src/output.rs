//! Tables and JSON, sizes and times as people read them.

use std::{
    io::{ErrorKind, Write as _},
    time::{SystemTime, UNIX_EPOCH},
};

use clap::ValueEnum;
use comfy_table::{Table, presets::NOTHING};
use serde::Serialize;

/// How a list is printed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// Aligned columns.
    Table,
    /// One JSON object a line.
    Json,
}

/// Aligned columns without lines, as docker prints them.
pub fn table(header: &[&str], rows: Vec<Vec<String>>) -> String {
    let mut table = Table::new();
    table
        .load_style(NOTHING)
        .set_header(header.to_vec())
        .add_rows(rows);
    for column in table.column_iter_mut() {
        column.set_padding((0, 3));
    }
    let text = table.to_string();
    text.lines().map(str::trim_end).collect::<Vec<_>>().join("\n")
}

/// Prints a list in one of the two formats. A reader that has gone is no error.
pub fn print<T: Serialize>(
    format: Format,
    header: &[&str],
    rows: &[T],
    cells: impl Fn(&T) -> Vec<String>,
) -> anyhow::Result<u8> {
    let text = match format {
        Format::Table => table(header, rows.iter().map(cells).collect()) + "\n",
        Format::Json => {
            let lines = rows
                .iter()
                .map(serde_json::to_string)
                .collect::<Result<Vec<_>, _>>()?;
            lines.into_iter().map(|line| line + "\n").collect()
        }
    };
    match std::io::stdout().write_all(text.as_bytes()) {
        Err(error) if error.kind() != ErrorKind::BrokenPipe => Err(error.into()),
        _ => Ok(0),
    }
}

/// Does something to each container and prints its name, as it was given, when that is done. What fails is told and
/// doesn't keep the others from their turn.
pub fn each(names: &[String], mut act: impl FnMut(&str) -> anyhow::Result<()>) -> u8 {
    each_printing(names, |name| act(name).map(|()| name.to_owned()))
}

/// As [`each`], with what is printed left to `act`.
pub fn each_printing(names: &[String], mut act: impl FnMut(&str) -> anyhow::Result<String>) -> u8 {
    names.iter().fold(0, |code, name| tell(act(name)).max(code))
}

/// As [`each`], for what takes a while: all at the same time, told in order.
pub fn each_at_once(names: &[String], act: impl Fn(&str) -> anyhow::Result<()> + Sync) -> u8 {
    if let [name] = names {
        return tell(act(name).map(|()| name.clone()));
    }
    std::thread::scope(|scope| {
        let act = &act;
        let running: Vec<_> = names
            .iter()
            .map(|name| scope.spawn(move || act(name).map(|()| name.clone())))
            .collect();
        running.into_iter().fold(0, |code, thread| {
            let result = thread
                .join()
                .unwrap_or_else(|_| Err(anyhow::anyhow!("a thread panicked")));
            tell(result).max(code)
        })
    })
}

fn tell(result: anyhow::Result<String>) -> u8 {
    match result {
        Ok(line) => {
            // A reader that has gone doesn't undo what was done.
            drop(writeln!(std::io::stdout(), "{line}"));
            0
        }
        Err(error) => {
            drop(writeln!(std::io::stderr(), "hull: {error:#}"));
            1
        }
    }
}

/// Prints lines. A reader that has gone is no error.
pub fn print_lines<'a>(lines: impl Iterator<Item = &'a str>) -> anyhow::Result<u8> {
    let text: String = lines.flat_map(|line| [line, "\n"]).collect();
    match std::io::stdout().write_all(text.as_bytes()) {
        Err(error) if error.kind() != ErrorKind::BrokenPipe => Err(error.into()),
        _ => Ok(0),
    }
}

/// A size as docker prints it: powers of ten, three digits.
pub fn size(bytes: u64) -> String {
    let mut unit = 1_u64;
    for name in ["B", "kB", "MB", "GB"] {
        if bytes < unit.saturating_mul(1000) || name == "GB" {
            let tenths = bytes.saturating_mul(10) / unit;
            return if name == "B" || tenths >= 1000 {
                format!("{}{name}", tenths / 10)
            } else {
                format!("{}.{}{name}", tenths / 10, tenths % 10)
            };
        }
        unit *= 1000;
    }
    String::new()
}

/// How long ago a time since the epoch was.
pub fn since(time_ms: u64) -> String {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    ago(now.as_secs().saturating_sub(time_ms / 1000))
}

fn ago(seconds: u64) -> String {
    let (number, unit) = match seconds {
        0..=1 => return "1 second ago".into(),
        2..60 => (seconds, "seconds"),
        60..120 => return "About a minute ago".into(),
        120..3600 => (seconds / 60, "minutes"),
        3600..7200 => return "About an hour ago".into(),
        7200..172_800 => (seconds / 3600, "hours"),
        172_800..1_209_600 => (seconds / 86_400, "days"),
        1_209_600..5_184_000 => (seconds / 604_800, "weeks"),
        5_184_000..63_072_000 => (seconds / 2_592_000, "months"),
        _ => (seconds / 31_536_000, "years"),
    };
    format!("{number} {unit} ago")
}

/// Text from an image or a guest, safe to print on a terminal.
pub fn printable(text: &str) -> String {
    text.chars()
        .map(|c| if c.is_control() { ' ' } else { c })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_and_times_are_those_people_know() {
        assert_eq!(size(999), "999B");
        assert_eq!(size(1_100_000), "1.1MB");
        assert_eq!(size(139_000_000), "139MB");
        assert_eq!(ago(5), "5 seconds ago");
        assert_eq!(ago(65), "About a minute ago");
        assert_eq!(ago(3 * 86_400), "3 days ago");
    }

    #[test]
    fn table_has_no_lines_and_no_trailing_spaces() {
        let text = table(&["A", "B"], vec![vec!["x".into(), "yy".into()]]);
        assert_eq!(text, "A   B\nx   yy");
    }
}
