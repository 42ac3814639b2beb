//! What the person waiting sees: one bar on a terminal, a line now and then elsewhere.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// How a build reports what it does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ProgressMode {
    /// A bar where standard error is a terminal, plain lines elsewhere.
    #[default]
    Auto,
    /// Plain lines.
    Plain,
    /// Nothing.
    Silent,
}

/// Time between plain lines.
const PLAIN_INTERVAL: Duration = Duration::from_secs(15);

/// Progress of one build.
#[derive(Debug)]
pub(crate) struct Progress {
    output: Output,
    done: u64,
    expected: u64,
}

#[derive(Debug)]
enum Output {
    Bar(ProgressBar),
    Plain { last: Instant },
    Silent,
}

impl Progress {
    pub(crate) fn new(mode: ProgressMode) -> Self {
        let output = match mode {
            ProgressMode::Silent => Output::Silent,
            ProgressMode::Auto if std::io::stderr().is_terminal() => {
                let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr());
                bar.enable_steady_tick(Duration::from_millis(200));
                Output::Bar(bar)
            }
            ProgressMode::Auto | ProgressMode::Plain => Output::Plain { last: Instant::now() },
        };
        Self {
            output,
            done: 0,
            expected: 0,
        }
    }

    /// A new phase; `expected` steps if that is known.
    pub(crate) fn phase(&mut self, what: &str, expected: Option<u64>) {
        self.done = 0;
        self.expected = expected.unwrap_or(0);
        match &mut self.output {
            Output::Bar(bar) => {
                let template = if expected.is_some() {
                    "guest kernel: {prefix} [{bar:30}] {pos}/{len} {elapsed} (about {eta} left) {wide_msg}"
                } else {
                    "guest kernel: {prefix} {spinner} {elapsed} {wide_msg}"
                };
                // The templates are constants; if one did not parse, the default style would do.
                if let Ok(style) = ProgressStyle::with_template(template) {
                    bar.set_style(style.progress_chars("=> "));
                }
                bar.set_prefix(what.to_owned());
                bar.set_message("");
                bar.set_position(0);
                match expected {
                    Some(length) => bar.set_length(length),
                    None => bar.unset_length(),
                }
                bar.reset_eta();
            }
            Output::Plain { last } => {
                *last = Instant::now();
                eprintln!("guest kernel: {what}");
            }
            Output::Silent => {}
        }
    }

    /// One step is done.
    pub(crate) fn step(&mut self, what: &str) {
        self.done += 1;
        match &mut self.output {
            Output::Bar(bar) => {
                if self.expected > 0 && self.done > self.expected {
                    bar.set_length(self.done);
                }
                bar.set_position(self.done);
                bar.set_message(what.to_owned());
            }
            Output::Plain { last } if last.elapsed() >= PLAIN_INTERVAL => {
                *last = Instant::now();
                match (self.done * 100).checked_div(self.expected) {
                    Some(percent) => eprintln!(
                        "guest kernel: {} % ({} steps, now {what})",
                        percent.min(99),
                        self.done
                    ),
                    None => eprintln!("guest kernel: {} steps, now {what}", self.done),
                }
            }
            Output::Plain { .. } | Output::Silent => {}
        }
    }

    /// Something the person should know now.
    pub(crate) fn note(&self, text: &str) {
        match &self.output {
            Output::Bar(bar) => bar.println(format!("guest kernel: {text}")),
            Output::Plain { .. } => eprintln!("guest kernel: {text}"),
            Output::Silent => {}
        }
    }

    /// Steps of this phase so far.
    pub(crate) fn done(&self) -> u64 {
        self.done
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if let Output::Bar(bar) = &self.output {
            bar.finish_and_clear();
        }
    }
}
