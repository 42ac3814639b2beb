//! `hull logs`
//!
//! Following waits for the kernel to say that the folder of the container changed, or that its monitor ended; nothing is
//! looked at in between. It ends when the container has ended and everything it said was printed.

use std::{
    io::{self, BufWriter, ErrorKind, Write as _},
    os::fd::{AsFd as _, OwnedFd},
    path::Path,
    str::FromStr,
};

use anyhow::{Context as _, bail};
use clap::Args;
use jiff::Timestamp;
use rustix::{
    event::{PollFd, PollFlags, poll},
    fs::inotify::{self, CreateFlags, WatchFlags},
};
use sandbox::{ContainerRecord, Directories, Runtime, log_driver::LogConfig};

use crate::{
    log_reader::{Entry, LogReader},
    times,
};

/// Show what a container printed.
#[derive(Debug, Args)]
pub struct Logs {
    /// Go on as more is printed, until the container ends
    #[arg(short, long)]
    follow: bool,
    /// Only what was printed since a time (RFC 3339, seconds since 1970) or for so long, as in 10m
    #[arg(long, value_name = "TIME", value_parser = times::parse)]
    since: Option<Timestamp>,
    /// Only what was printed before a time, or longer ago than that
    #[arg(long, value_name = "TIME", value_parser = times::parse)]
    until: Option<Timestamp>,
    /// Only so many of the last lines
    #[arg(
        short = 'n',
        long,
        value_name = "LINES",
        default_value = "all",
        alias = "lines"
    )]
    tail: Tail,
    /// Show when each line was printed
    #[arg(short, long)]
    timestamps: bool,
    /// Accepted for docker's sake; the log has no more details
    #[arg(long, hide = true)]
    details: bool,
    /// Name or id
    container: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Tail(Option<u64>);

impl FromStr for Tail {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        // As docker: a negative number is all of them.
        if text == "all" || text.starts_with('-') && text[1..].parse::<u64>().is_ok() {
            return Ok(Self(None));
        }
        let lines = text.parse().map_err(|_| "expected a number of lines, or all")?;
        Ok(Self(Some(lines)))
    }
}

/// Where lines go, and what is left out of them.
struct Printer {
    since: Option<Timestamp>,
    until: Option<Timestamp>,
    timestamps: bool,
    stdout: BufWriter<io::Stdout>,
    stderr: BufWriter<io::Stderr>,
    /// Which of the two was written to last: one is flushed before the other, or they would change places.
    last_was_stderr: bool,
    /// Whether the next piece of stdout, of stderr, begins a line.
    at_start: [bool; 2],
}

/// Whether there is more to print.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum More {
    Yes,
    /// The rest is later than `--until`.
    No,
}

impl Printer {
    fn new(logs: &Logs) -> Self {
        Self {
            since: logs.since,
            until: logs.until,
            timestamps: logs.timestamps,
            stdout: BufWriter::new(io::stdout()),
            stderr: BufWriter::new(io::stderr()),
            last_was_stderr: false,
            at_start: [true; 2],
        }
    }

    fn print(&mut self, entry: &Entry) -> io::Result<More> {
        let time = if self.timestamps || self.since.is_some() || self.until.is_some() {
            entry.time.parse::<Timestamp>().ok()
        } else {
            None
        };
        if let (Some(time), Some(until)) = (time, self.until)
            && time > until
        {
            return Ok(More::No);
        }
        if let (Some(time), Some(since)) = (time, self.since)
            && time < since
        {
            return Ok(More::Yes);
        }
        let is_stderr = entry.stream == "stderr";
        if is_stderr != self.last_was_stderr {
            self.flush()?;
            self.last_was_stderr = is_stderr;
        }
        let at_start = &mut self.at_start[usize::from(is_stderr)];
        let output: &mut dyn io::Write = if is_stderr {
            &mut self.stderr
        } else {
            &mut self.stdout
        };
        if let (true, true, Some(time)) = (self.timestamps, *at_start, time) {
            write!(output, "{time:.9} ")?;
        }
        *at_start = entry.log.ends_with('\n');
        output.write_all(entry.log.as_bytes())?;
        Ok(More::Yes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.stdout.flush()?;
        self.stderr.flush()
    }

    /// Prints all there is now.
    fn drain(&mut self, reader: &mut LogReader) -> anyhow::Result<More> {
        while let Some(entry) = reader.next().context("reading the log")? {
            if self.print(&entry)? == More::No {
                self.flush()?;
                return Ok(More::No);
            }
        }
        self.flush()?;
        Ok(More::Yes)
    }
}

/// Says when a container's log or state may have changed.
struct Watch {
    inotify: OwnedFd,
    /// Readable once the monitor has ended, however it did.
    monitor: Option<OwnedFd>,
}

impl Watch {
    fn new(home: &Path, record: &ContainerRecord) -> anyhow::Result<Self> {
        let watching = || format!("watching {}", home.display());
        let inotify = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK).with_context(watching)?;
        let events = WatchFlags::MODIFY
            | WatchFlags::CREATE
            | WatchFlags::MOVED_TO
            | WatchFlags::DELETE_SELF
            | WatchFlags::ONLYDIR;
        inotify::add_watch(&inotify, home, events).with_context(watching)?;
        let monitor = record
            .run
            .as_ref()
            .and_then(|run| rustix::process::Pid::from_raw(run.monitor.pid))
            .and_then(|pid| rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty()).ok());
        Ok(Self { inotify, monitor })
    }

    /// Waits for a change, and forgets what was reported of it.
    fn wait(&self) -> anyhow::Result<()> {
        let mut fds = vec![PollFd::new(&self.inotify, PollFlags::IN)];
        // Its end is told once: afterwards only what is left is read.
        fds.extend(self.monitor.as_ref().map(|fd| PollFd::new(fd, PollFlags::IN)));
        match poll(&mut fds, None) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error).context("waiting for the log"),
        }
        let mut buffer = [0_u8; 4096];
        while rustix::io::read(self.inotify.as_fd(), &mut buffer).is_ok_and(|count| count > 0) {}
        Ok(())
    }
}

impl Logs {
    /// Prints it.
    pub fn execute(self) -> anyhow::Result<u8> {
        let runtime = Runtime::open(&Directories::from_environment())?;
        let record = runtime.find(&self.container)?;
        match &record.spec.log {
            LogConfig::JsonFile { .. } => {}
            LogConfig::Journald { .. } => bail!(
                "container {0} writes to the system's journal: `journalctl CONTAINER_NAME={0}` shows it",
                record.name
            ),
            LogConfig::None => bail!(
                "the output of container {} is not kept: it was made with --log-driver none",
                record.name
            ),
        }
        match self.print(&runtime, &record) {
            // Whoever reads has enough.
            Err(error) if is_broken_pipe(&error) => Ok(0),
            result => result,
        }
    }

    fn print(&self, runtime: &Runtime, record: &ContainerRecord) -> anyhow::Result<u8> {
        let path = runtime.log_path(&record.id);
        // Before the first look, or a change in between would be missed.
        let watch = if self.follow && record.status.is_live() {
            Some(Watch::new(&runtime.home(&record.id), record)?)
        } else {
            None
        };
        let mut reader = LogReader::open(&path, self.tail.0)
            .with_context(|| format!("reading the log {}", path.display()))?;
        let mut printer = Printer::new(self);
        let mut more = printer.drain(&mut reader)?;
        if let Some(watch) = watch {
            while more == More::Yes {
                // The order matters: what was printed before the end is there when the end is seen.
                let now = runtime.current(&record.id);
                let live = now.is_ok_and(|record| record.is_some_and(|record| record.status.is_live()));
                more = printer.drain(&mut reader)?;
                if !live {
                    break;
                }
                watch.wait()?;
            }
        }
        if reader.damaged() > 0 {
            eprintln!(
                "hull: {} damaged lines of the log were left out",
                reader.damaged()
            );
        }
        Ok(0)
    }
}

fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error
        .downcast_ref::<io::Error>()
        .is_some_and(|error| error.kind() == ErrorKind::BrokenPipe)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tail_is_a_number_or_all() {
        assert_eq!("all".parse(), Ok(Tail(None)));
        assert_eq!("-1".parse(), Ok(Tail(None)));
        assert_eq!("12".parse(), Ok(Tail(Some(12))));
        assert!("many".parse::<Tail>().is_err());
        assert!("-x".parse::<Tail>().is_err());
    }
}
