//! Runs one tool of the build: output line by line to a log and a callback, the tail of it into the error.

use std::collections::VecDeque;
use std::fs::OpenOptions;
use std::io::{self, BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::error::{Error, IoContext, Result};

/// Lines of a failed tool's output that go into the error.
const TAIL_LINES: usize = 15;

/// A command whose children die with us: `make` gets SIGTERM (and removes half-written targets) when the driver is gone.
pub(crate) fn tied_to_us(program: &str) -> Command {
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "TERM", "--", program]);
    command.env("LC_ALL", "C").env("TZ", "UTC").stdin(Stdio::null());
    command
}

/// Runs a command to its end. `line` sees every line of output; all of it is appended to `log`.
pub(crate) fn run(command: &mut Command, log: &Path, mut line: impl FnMut(&str)) -> Result<()> {
    let mut log_file = OpenOptions::new()
        .create(true)
        .append(true)
        .open(log)
        .context("open", log)?;
    let shown = describe(command);
    let (reader, writer) = io::pipe().context("make a pipe for", &shown)?;
    let second = writer.try_clone().context("make a pipe for", &shown)?;
    let mut child = command
        .stdout(writer)
        .stderr(second)
        .spawn()
        .context("start", &shown)?;
    // The command keeps its copies of the pipe's end; without this the reader would never see the end.
    command.stdout(Stdio::null()).stderr(Stdio::null());

    let mut tail = VecDeque::with_capacity(TAIL_LINES);
    let mut lines = BufReader::new(reader);
    let mut buffer = Vec::new();
    let mut log_error = None;
    loop {
        buffer.clear();
        if lines
            .read_until(b'\n', &mut buffer)
            .context("read the output of", &shown)?
            == 0
        {
            break;
        }
        if let Err(error) = log_file.write_all(&buffer) {
            log_error.get_or_insert(error);
        }
        let text = String::from_utf8_lossy(&buffer);
        let text = text.trim_end();
        line(text);
        if tail.len() == TAIL_LINES {
            tail.pop_front();
        }
        tail.push_back(text.to_owned());
    }
    let status = child.wait().context("wait for", &shown)?;
    if !status.success() {
        return Err(Error::CommandFailed {
            command: shown.display().to_string(),
            status: status.to_string(),
            log: log.to_owned(),
            tail: tail.into_iter().collect::<Vec<_>>().join("\n"),
        });
    }
    match log_error {
        Some(error) => Err(error).context("write", log),
        None => Ok(()),
    }
}

fn describe(command: &Command) -> PathBuf {
    let mut words = vec![command.get_program().to_string_lossy().into_owned()];
    words.extend(command.get_args().map(|word| word.to_string_lossy().into_owned()));
    // What is run, not how it is tied to us.
    if words.first().is_some_and(|first| first == "setpriv") {
        words.drain(..4.min(words.len()));
    }
    PathBuf::from(words.join(" "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failed_command_carries_its_name_and_the_end_of_its_output() {
        let folder = tempfile::tempdir().unwrap();
        let log = folder.path().join("log");
        let mut seen = 0;
        let error = run(
            tied_to_us("sh").args(["-c", "echo one; echo two >&2; exit 3"]),
            &log,
            |_| seen += 1,
        )
        .unwrap_err();
        let text = error.to_string();
        assert_eq!(seen, 2);
        assert!(text.starts_with("sh -c"), "{text}");
        assert!(text.contains("two"), "{text}");
        assert_eq!(std::fs::read_to_string(&log).unwrap().lines().count(), 2);
    }
}
