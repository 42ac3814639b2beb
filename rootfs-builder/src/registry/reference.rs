//! `HOST[:PORT]/REPOSITORY[:TAG][@DIGEST]`.

use std::fmt;
use std::str::FromStr;

use super::{Configuration, RegistryError};
use crate::digest::Digest;

/// An image in a registry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reference {
    registry: String,
    repository: String,
    tag: Option<String>,
    digest: Option<Digest>,
}

impl Reference {
    /// Read a reference.
    ///
    /// # Errors
    /// It has no host, or characters that don't belong into one of its parts.
    pub fn parse(text: &str) -> Result<Self, RegistryError> {
        let wrong = |problem| RegistryError::Reference {
            text: text.chars().take(300).collect(),
            problem,
        };
        let (rest, digest) = match text.split_once('@') {
            Some((rest, digest)) => (
                rest,
                Some(
                    digest
                        .parse()
                        .map_err(|_| wrong("what follows the @ is not a sha256 or sha512 digest"))?,
                ),
            ),
            None => (text, None),
        };
        let (registry, path) = rest
            .split_once('/')
            .ok_or_else(|| wrong("it names no registry"))?;
        // As everywhere: the first part is a host if it could not be a part of a repository's name.
        if !(registry.contains(['.', ':']) || registry == "localhost" || registry.starts_with('[')) {
            return Err(wrong(
                "it names no registry (a host with a dot or a port, or localhost)",
            ));
        }
        if !is_host(registry) {
            return Err(wrong("the registry's name is not a host"));
        }
        let (repository, tag) = match path.rsplit_once(':') {
            Some((repository, tag)) => (repository, Some(tag)),
            None => (path, None),
        };
        let part = |part: &str| {
            part.bytes().all(|byte| {
                byte.is_ascii_lowercase() || byte.is_ascii_digit() || matches!(byte, b'.' | b'_' | b'-')
            }) && part
                .bytes()
                .next()
                .is_some_and(|byte| byte.is_ascii_alphanumeric())
        };
        if repository.len() > 255 || !repository.split('/').all(part) {
            return Err(wrong(
                "the repository must be lower-case letters, digits, dots, dashes and underscores",
            ));
        }
        let tag_byte = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-');
        if tag.is_some_and(|tag| tag.is_empty() || tag.len() > 128 || !tag.bytes().all(tag_byte)) {
            return Err(wrong(
                "the tag must be letters, digits, dots, dashes and underscores",
            ));
        }
        let tag = tag.map(str::to_owned);
        Ok(Self {
            registry: registry.to_owned(),
            repository: repository.to_owned(),
            tag,
            digest,
        })
    }

    /// What a name as people type it may stand for, in the order to try: itself, or, without a host, what `registries.conf` makes
    /// of it.
    ///
    /// # Errors
    /// It can't be a reference, or it has no host and no file says where to look.
    pub fn candidates(text: &str) -> Result<Vec<Self>, RegistryError> {
        // Whoever names a host needs no files.
        Self::parse(text).map_or_else(
            |_| Configuration::load()?.candidates(text),
            |reference| Ok(vec![reference]),
        )
    }

    /// The same image, in another place: `HOST[:PORT]/REPOSITORY`.
    pub(super) fn moved_to(&self, place: &str) -> Result<Self, RegistryError> {
        Ok(Self {
            tag: self.tag.clone(),
            digest: self.digest.clone(),
            ..Self::parse(place)?
        })
    }

    /// `HOST[:PORT]`.
    pub fn registry(&self) -> &str {
        &self.registry
    }

    /// The path of the repository in the registry.
    pub fn repository(&self) -> &str {
        &self.repository
    }

    pub(super) const fn digest(&self) -> Option<&Digest> {
        self.digest.as_ref()
    }

    /// What to ask the registry for.
    pub(super) fn wanted(&self) -> String {
        match &self.digest {
            Some(digest) => digest.to_string(),
            None => self.tag().to_owned(),
        }
    }

    fn tag(&self) -> &str {
        self.tag.as_deref().unwrap_or("latest")
    }

    /// The name the image gets in the store; a digest alone gives one that says so.
    pub fn local_name(&self) -> String {
        match (&self.tag, &self.digest) {
            (None, Some(digest)) => format!(
                "{}/{}:sha256-{}",
                self.registry,
                self.repository,
                &digest.hex()[..12]
            ),
            _ => format!("{}/{}:{}", self.registry, self.repository, self.tag()),
        }
    }
}

/// Whether this can be a `HOST[:PORT]`.
pub(super) fn is_host(text: &str) -> bool {
    let host_byte =
        |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'-' | b':' | b'[' | b']');
    !text.is_empty() && text.bytes().all(host_byte)
}

/// Whether `HOST[:PORT]` is this machine.
pub(super) fn is_local(host: &str) -> bool {
    let name = match host.strip_prefix('[') {
        Some(rest) => rest.split(']').next().unwrap_or(rest),
        None => host.split(':').next().unwrap_or(host),
    };
    name == "localhost"
        || name
            .parse::<std::net::IpAddr>()
            .is_ok_and(|address| address.is_loopback())
}

impl fmt::Display for Reference {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}/{}", self.registry, self.repository)?;
        self.tag
            .as_ref()
            .map_or(Ok(()), |tag| write!(formatter, ":{tag}"))?;
        self.digest
            .as_ref()
            .map_or(Ok(()), |digest| write!(formatter, "@{digest}"))
    }
}

impl FromStr for Reference {
    type Err = RegistryError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Self::parse(text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn references_are_taken_apart() {
        let digest = format!("sha256:{}", "a".repeat(64));
        for (text, registry, repository, wanted) in [
            ("registry.test/app", "registry.test", "app", "latest"),
            (
                "registry.test:5000/team/app:1.2",
                "registry.test:5000",
                "team/app",
                "1.2",
            ),
            ("localhost/app:x", "localhost", "app", "x"),
            ("[::1]:5000/app", "[::1]:5000", "app", "latest"),
            (
                &format!("registry.test/app:1@{digest}"),
                "registry.test",
                "app",
                digest.as_str(),
            ),
        ] {
            let reference = Reference::parse(text).expect(text);
            assert_eq!(
                (reference.registry(), reference.repository()),
                (registry, repository)
            );
            assert_eq!(reference.wanted(), wanted);
        }
    }

    #[test]
    fn what_is_no_reference_is_refused() {
        for text in [
            "",
            "app",
            "team/app",
            "registry.test/",
            "registry.test/App",
            "registry.test/../app",
            "registry.test/a:b:c",
            "registry.test/app:",
            "registry.test/app@sha256:12",
            "re gistry.test/app",
            "registry.test/app?x",
            "user@registry.test/app",
        ] {
            assert!(Reference::parse(text).is_err(), "{text}");
        }
    }

    #[test]
    fn only_this_machine_is_local() {
        for (host, local) in [
            ("localhost:5000", true),
            ("127.0.0.1:80", true),
            ("[::1]:80", true),
            ("127.0.0.1.test", false),
            ("registry.test", false),
            ("localhost.test:80", false),
        ] {
            assert_eq!(is_local(host), local, "{host}");
        }
    }
}
