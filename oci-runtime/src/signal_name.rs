//! Signals by name or number, as `kill` takes them.

use anyhow::{Result, bail};

const NAMES: [&str; 31] = [
    "HUP", "INT", "QUIT", "ILL", "TRAP", "ABRT", "BUS", "FPE", "KILL", "USR1", "SEGV", "USR2", "PIPE",
    "ALRM", "TERM", "STKFLT", "CHLD", "CONT", "STOP", "TSTP", "TTIN", "TTOU", "URG", "XCPU", "XFSZ",
    "VTALRM", "PROF", "WINCH", "IO", "PWR", "SYS",
];
/// The first and the last real-time signal, as the C library has them.
const RTMIN: i32 = 34;
const RTMAX: i32 = 64;

/// Reads `15`, `TERM`, `sigterm`, `RTMIN+3`.
pub(crate) fn parse(text: &str) -> Result<i32> {
    if let Ok(number) = text.parse::<i32>() {
        if (0..=RTMAX).contains(&number) {
            return Ok(number);
        }
        bail!("unknown signal {text:?}");
    }
    let upper = text.to_ascii_uppercase();
    let name = upper.strip_prefix("SIG").unwrap_or(&upper);
    if let Some(position) = NAMES.iter().position(|known| *known == name) {
        return Ok(i32::try_from(position)? + 1);
    }
    let real_time = |offset: &str, base: i32, sign: i32| {
        let offset: i32 = if offset.is_empty() {
            0
        } else {
            offset.get(1..)?.parse().ok()?
        };
        let number = base.checked_add(sign * offset)?;
        (RTMIN..=RTMAX).contains(&number).then_some(number)
    };
    let found = match name {
        "POLL" => Some(29),
        "IOT" => Some(6),
        "CLD" => Some(17),
        name => name
            .strip_prefix("RTMIN")
            .filter(|rest| rest.is_empty() || rest.starts_with('+'))
            .and_then(|rest| real_time(rest, RTMIN, 1))
            .or_else(|| {
                name.strip_prefix("RTMAX")
                    .filter(|rest| rest.is_empty() || rest.starts_with('-'))
                    .and_then(|rest| real_time(rest, RTMAX, -1))
            }),
    };
    match found {
        Some(number) => Ok(number),
        None => bail!("unknown signal {text:?}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_numbers_are_understood() {
        for (text, number) in [
            ("9", 9),
            ("KILL", 9),
            ("SIGTERM", 15),
            ("sigusr1", 10),
            ("SYS", 31),
            ("RTMIN", 34),
            ("SIGRTMIN+3", 37),
            ("RTMAX-1", 63),
            ("0", 0),
        ] {
            assert_eq!(parse(text).unwrap(), number, "{text}");
        }
        for text in ["", "SIG", "NOPE", "-1", "65", "RTMIN+40", "RTMIN-1", "TERMX"] {
            assert!(parse(text).is_err(), "{text}");
        }
    }
}
