//! Messages as `runc` writes them, because those who run it read them: a line of JSON or of `key="value"` each.
//!
//! With `--log` they go to that file, and what ends the command is also said in plain words on standard error.

use std::{
    fmt,
    fs::{File, OpenOptions},
    io::Write as _,
    sync::Arc,
};

use anyhow::{Context as _, Result, bail};
use tracing::{Event, Level, Subscriber, field::Visit};
use tracing_subscriber::{
    filter::LevelFilter,
    fmt::{FmtContext, FormatEvent, FormatFields, format::Writer},
    registry::LookupSpan,
};

use crate::Global;

/// How messages are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Format {
    Text,
    Json,
}

/// Where the last message goes.
#[derive(Debug)]
pub(crate) struct Log {
    to_file: bool,
}

/// Opens the log; every message of this process goes there from now on.
pub(crate) fn open(global: &Global) -> Result<Log> {
    let format = match global.log_format.as_str() {
        "text" | "" => Format::Text,
        "json" => Format::Json,
        other => bail!("invalid log-format: {other}; it is text or json"),
    };
    let level = if global.debug {
        LevelFilter::DEBUG
    } else {
        LevelFilter::WARN
    };
    let builder = tracing_subscriber::fmt()
        .with_max_level(level)
        .event_format(Lines(format));
    let path = global.log.as_ref().filter(|path| !path.as_os_str().is_empty());
    match path {
        Some(path) => {
            let file: File = OpenOptions::new()
                .create(true)
                .append(true)
                .open(path)
                .with_context(|| format!("cannot open the log {}", path.display()))?;
            builder.with_writer(Arc::new(file)).init();
        }
        None => builder.with_writer(std::io::stderr).init(),
    }
    Ok(Log {
        to_file: path.is_some(),
    })
}

impl Log {
    /// Says why the command ends.
    pub(crate) fn fatal(&self, message: &str) {
        tracing::error!("{message}");
        if self.to_file {
            drop(writeln!(std::io::stderr(), "{message}"));
        }
    }
}

/// One line for each message.
struct Lines(Format);

/// Collects a message with its fields behind it.
#[derive(Default)]
struct Text(String);

impl Visit for Text {
    fn record_debug(&mut self, field: &tracing::field::Field, value: &dyn fmt::Debug) {
        if field.name() == "message" {
            self.0.insert_str(0, &format!("{value:?}"));
        } else {
            self.0.push_str(&format!(" {}={value:?}", field.name()));
        }
    }
}

fn level(level: Level) -> &'static str {
    match level {
        Level::ERROR => "error",
        Level::WARN => "warning",
        Level::INFO => "info",
        _ => "debug",
    }
}

fn line(format: Format, at: &str, level: &str, message: &str) -> String {
    match format {
        Format::Json => {
            let text = |text: &str| serde_json::Value::from(text).to_string();
            format!(
                "{{\"level\":{},\"msg\":{},\"time\":{}}}",
                text(level),
                text(message),
                text(at)
            )
        }
        Format::Text => format!("time=\"{at}\" level={level} msg={message:?}"),
    }
}

impl<S, N> FormatEvent<S, N> for Lines
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(
        &self,
        _context: &FmtContext<'_, S, N>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        let mut text = Text::default();
        event.record(&mut text);
        let now = jiff::Timestamp::now().strftime("%Y-%m-%dT%H:%M:%SZ").to_string();
        writeln!(
            writer,
            "{}",
            line(self.0, &now, level(*event.metadata().level()), text.0.trim())
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_those_of_runc() {
        let at = "2026-01-02T03:04:05Z";
        assert_eq!(
            line(Format::Json, at, "error", "exec: \"x\": not found"),
            r#"{"level":"error","msg":"exec: \"x\": not found","time":"2026-01-02T03:04:05Z"}"#
        );
        assert_eq!(
            line(Format::Text, at, "warning", "container \"x\""),
            r#"time="2026-01-02T03:04:05Z" level=warning msg="container \"x\"""#
        );
    }
}
