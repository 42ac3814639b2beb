//! The keys that leave a container without ending it.

use crate::{Result, SandboxError};

/// A sequence of keys, as `--detach-keys` takes it: `ctrl-p,ctrl-q`, or single characters.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DetachKeys {
    keys: Vec<u8>,
}

impl Default for DetachKeys {
    fn default() -> Self {
        // Ctrl-P, Ctrl-Q.
        Self { keys: vec![16, 17] }
    }
}

impl DetachKeys {
    /// Reads a sequence; an empty one never detaches.
    ///
    /// # Errors
    ///
    /// A key that has no code.
    pub fn parse(text: &str) -> Result<Self> {
        let key = |name: &str| {
            let code = match (name.strip_prefix("ctrl-"), name.as_bytes()) {
                (Some(control), _) => match control.as_bytes() {
                    [letter @ b'a'..=b'z'] => Some(letter - b'a' + 1),
                    [sign @ (b'@' | b'[' | b'\\' | b']' | b'^' | b'_')] => Some(sign - b'@'),
                    _ => None,
                },
                (None, [character @ 0x20..=0x7e]) => Some(*character),
                _ => None,
            };
            code.ok_or_else(|| SandboxError::InvalidOption {
                option: "--detach-keys",
                problem: format!(
                    "{name:?} is no key; expected a list such as ctrl-p,ctrl-q of characters and ctrl- with a-z, @, [, \\, ], ^ or _"
                ),
            })
        };
        if text.is_empty() {
            return Ok(Self { keys: Vec::new() });
        }
        let keys = text.split(',').map(key).collect::<Result<_>>()?;
        Ok(Self { keys })
    }
}

/// Looks for the sequence in what is typed. Keys that may begin it are held back until they turn out not to.
#[derive(Debug)]
pub(crate) struct KeyFilter {
    keys: Vec<u8>,
    held: Vec<u8>,
}

impl KeyFilter {
    pub(crate) fn new(keys: DetachKeys) -> Self {
        Self {
            keys: keys.keys,
            held: Vec::new(),
        }
    }

    /// Takes one byte; what is not part of the sequence goes to `out`. True: the sequence is complete.
    pub(crate) fn feed(&mut self, byte: u8, out: &mut Vec<u8>) -> bool {
        self.held.push(byte);
        while !self.held.is_empty() && !self.keys.starts_with(&self.held) {
            out.push(self.held.remove(0));
        }
        !self.keys.is_empty() && self.held.len() == self.keys.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What reaches the container, and how many bytes were looked at when the sequence was complete.
    fn typed(keys: &str, bytes: &[u8]) -> (Vec<u8>, Option<usize>) {
        let mut filter = KeyFilter::new(DetachKeys::parse(keys).unwrap());
        let mut out = Vec::new();
        let detached = bytes.iter().position(|byte| filter.feed(*byte, &mut out));
        (out, detached.map(|index| index + 1))
    }

    #[test]
    fn default_is_ctrl_p_ctrl_q() {
        assert_eq!(DetachKeys::parse("ctrl-p,ctrl-q").unwrap(), DetachKeys::default());
    }

    #[test]
    fn everything_before_the_sequence_is_forwarded_and_nothing_behind_is_looked_at() {
        assert_eq!(
            typed("ctrl-p,ctrl-q", b"ls\n\x10\x11exit\n"),
            (b"ls\n".to_vec(), Some(5))
        );
    }

    #[test]
    fn beginning_that_goes_on_otherwise_loses_no_byte() {
        assert_eq!(
            typed("ctrl-p,ctrl-q", b"\x10a\x11\x10\x10\x11"),
            (b"\x10a\x11\x10".to_vec(), Some(6))
        );
        assert_eq!(typed("a,a,b", b"aaab"), (b"a".to_vec(), Some(4)));
    }

    #[test]
    fn empty_sequence_never_detaches() {
        assert_eq!(typed("", b"\x10\x11"), (b"\x10\x11".to_vec(), None));
    }

    #[test]
    fn key_without_a_code_is_refused_by_name() {
        for keys in ["ctrl-", "ctrl-pp", "ctrl-1", "é", "ctrl-p,", "a,,b"] {
            assert!(DetachKeys::parse(keys).is_err(), "{keys}");
        }
        assert!(DetachKeys::parse("ctrl-[,x").is_ok());
    }

    proptest::proptest! {
        #[test]
        fn bytes_forwarded_and_the_sequence_are_all_that_was_typed(bytes in proptest::collection::vec(15_u8..19, 0..60)) {
            let (mut out, detached) = typed("ctrl-p,ctrl-q", &bytes);
            match detached {
                Some(length) => {
                    out.extend([16, 17]);
                    proptest::prop_assert_eq!(&out[..], &bytes[..length]);
                }
                // A last Ctrl-P may be held.
                None => proptest::prop_assert!(bytes.starts_with(&out) && bytes.len() - out.len() <= 1),
            }
        }
    }
}
