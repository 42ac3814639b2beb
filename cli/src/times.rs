//! Times as images, logs and people write them.

use std::time::{SystemTime, UNIX_EPOCH};

use jiff::{SignedDuration, Timestamp, civil, tz::TimeZone};

use crate::output;

/// A time in milliseconds since the epoch, in RFC 3339.
pub fn rfc3339(time_ms: u64) -> String {
    i64::try_from(time_ms)
        .ok()
        .and_then(|ms| Timestamp::from_millisecond(ms).ok())
        .map(|time| time.to_string())
        .unwrap_or_default()
}

/// The local time of day, `HH:MM`, of a time in milliseconds since the epoch.
pub fn clock(time_ms: u64) -> String {
    let time = i64::try_from(time_ms)
        .ok()
        .and_then(|ms| Timestamp::from_millisecond(ms).ok())
        .unwrap_or_default();
    let local = time.to_zoned(TimeZone::system());
    format!("{:02}:{:02}", local.hour(), local.minute())
}

/// How long ago an RFC 3339 time was; the text itself where it isn't one.
pub fn since_rfc3339(text: &str) -> String {
    match text.parse::<Timestamp>() {
        Ok(time) => output::since(u64::try_from(time.as_millisecond()).unwrap_or(0)),
        Err(_) if text.is_empty() => "N/A".to_owned(),
        Err(_) => output::printable(text),
    }
}

/// The time now.
pub fn now() -> Timestamp {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let since = SignedDuration::try_from(since).unwrap_or_default();
    Timestamp::from_duration(since).unwrap_or_default()
}

/// A point in time as `--since` and `--until` take it: RFC 3339 in full or in part, seconds since the epoch, or how
/// long ago (`10m`, `1h30m`). What names no zone is local time.
///
/// # Errors
/// It is none of these.
pub fn parse(text: &str) -> Result<Timestamp, String> {
    let wrong = || {
        format!(
            "{text:?} is no time: expected 2026-01-31T12:00:00Z, 2026-01-31T12:00, 2026-01-31, seconds since 1970, or how long ago, as in 1h30m"
        )
    };
    if let Some(time) = parse_seconds(text) {
        return time.ok_or_else(wrong);
    }
    if let Ok(time) = text.parse::<Timestamp>() {
        return Ok(time);
    }
    // A duration has no dash but one in front, a date has one in its middle.
    if let Ok(ago) = text.parse::<SignedDuration>() {
        return now().checked_sub(ago).map_err(|_| wrong());
    }
    let local = text
        .parse::<civil::DateTime>()
        .or_else(|_| text.parse::<civil::Date>().map(|date| date.at(0, 0, 0, 0)))
        .map_err(|_| wrong())?;
    TimeZone::system().to_timestamp(local).map_err(|_| wrong())
}

/// `SECONDS[.FRACTION]`; nothing if it isn't a number at all.
fn parse_seconds(text: &str) -> Option<Option<Timestamp>> {
    let (seconds, fraction) = text.split_once('.').unwrap_or((text, ""));
    let digits = |text: &str| text.bytes().all(|byte| byte.is_ascii_digit());
    if seconds.is_empty() || !digits(seconds) || !digits(fraction) {
        return None;
    }
    let nanoseconds: String = fraction.chars().chain("000000000".chars()).take(9).collect();
    let time = seconds
        .parse()
        .ok()
        .zip(nanoseconds.parse().ok())
        .and_then(|(seconds, nanoseconds)| Timestamp::new(seconds, nanoseconds).ok());
    Some(time)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_understood_as_docker_does() {
        for (text, shown) in [
            ("2026-01-31T12:00:00Z", "2026-01-31T12:00:00Z"),
            ("2026-01-31T12:00:00.5+01:00", "2026-01-31T11:00:00.5Z"),
            ("1700000000", "2023-11-14T22:13:20Z"),
            ("1700000000.25", "2023-11-14T22:13:20.25Z"),
        ] {
            assert_eq!(parse(text).unwrap().to_string(), shown, "{text}");
        }
        for text in ["2026-01-31T12:00:01", "2026-01-31T12:00", "2026-01-31"] {
            parse(text).unwrap();
        }
        for text in ["", "yesterday", "12:00", "99999999999999999999", "2026-13-01"] {
            assert!(parse(text).is_err(), "{text}");
        }
    }

    #[test]
    fn duration_is_how_long_ago() {
        for (text, seconds) in [("1h30m", 5400), ("90s", 90), ("1.5h", 5400)] {
            let ago = SignedDuration::from_secs(seconds);
            let (before, time, after) = (now(), parse(text).unwrap(), now());
            assert!(time + ago >= before && time + ago <= after, "{text}");
        }
    }

    #[test]
    fn milliseconds_become_rfc_3339() {
        assert_eq!(rfc3339(1_700_000_000_250), "2023-11-14T22:13:20.25Z");
        assert_eq!(since_rfc3339(""), "N/A");
    }
}
