//! Names of images: `repository[:tag]`, as people type them.

use std::fmt;

use super::Error;

const NAME_MAX_BYTES: usize = 200;

/// A name with its tag.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct ImageName(String);

impl ImageName {
    /// Check a name and add the tag people leave out.
    ///
    /// # Errors
    /// It is empty, too long, or has characters that don't belong into a name.
    pub fn parse(text: &str) -> Result<Self, Error> {
        let wrong = |problem| Error::Name {
            name: text.chars().take(NAME_MAX_BYTES).collect(),
            problem,
        };
        if text.len() > NAME_MAX_BYTES {
            return Err(wrong("too long"));
        }
        let (repository, tag) = match text.rsplit_once(':') {
            Some((repository, tag)) if !tag.contains('/') => (repository, tag),
            _ => (text, "latest"),
        };
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-');
        let starts_well = |part: &str| {
            part.bytes()
                .next()
                .is_some_and(|byte| byte.is_ascii_alphanumeric() || byte == b'_')
        };
        if !starts_well(tag) || !tag.bytes().all(plain) {
            return Err(wrong(
                "the tag must be letters, digits, dots, dashes and underscores",
            ));
        }
        // A colon before the last slash belongs to a registry's port.
        let component =
            |part: &str| starts_well(part) && part.bytes().all(|byte| plain(byte) || byte == b':');
        if !repository.split('/').all(component) {
            return Err(wrong(
                "it must be letters, digits, dots, dashes and underscores, in parts separated by slashes",
            ));
        }
        Ok(Self(format!("{repository}:{tag}")))
    }

    /// The name as a file name: nothing but the slash and the percent sign is special, and both are escaped.
    pub(super) fn to_file_name(&self) -> String {
        self.0.replace('%', "%25").replace('/', "%2F")
    }

    pub(super) fn from_file_name(name: &str) -> String {
        name.replace("%2F", "/").replace("%25", "%")
    }
}

impl fmt::Display for ImageName {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_get_the_tag_people_leave_out() {
        for (text, full) in [
            ("redis", "redis:latest"),
            ("redis:7", "redis:7"),
            ("registry.test:5000/a/redis", "registry.test:5000/a/redis:latest"),
            ("registry.test:5000/a/redis:7", "registry.test:5000/a/redis:7"),
        ] {
            let name = ImageName::parse(text).expect(text);
            assert_eq!(name.to_string(), full);
            assert_eq!(ImageName::from_file_name(&name.to_file_name()), full);
        }
    }

    #[test]
    fn names_that_would_be_paths_are_refused() {
        for text in [
            "",
            ":",
            "a:",
            ":a",
            "../a",
            "a/../b",
            "a//b",
            "/a",
            "a b",
            "a\0b",
            "a%2Fb",
            ".a",
            &"a".repeat(300),
        ] {
            assert!(ImageName::parse(text).is_err(), "{text}");
        }
    }
}
