//! Ids and names of sandboxes.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::{Result, SandboxError};

/// 64 hexadecimal digits, as docker's container ids.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct SandboxId(String);

/// Random bytes of the kernel.
pub(crate) fn random_bytes<const N: usize>() -> Result<[u8; N]> {
    let mut bytes = [0; N];
    let mut filled = 0;
    while filled < N {
        filled += rustix::rand::getrandom(&mut bytes[filled..], rustix::rand::GetRandomFlags::empty())
            .map_err(SandboxError::system("getting random bytes"))?;
    }
    Ok(bytes)
}

impl SandboxId {
    /// A new random id.
    ///
    /// # Errors
    ///
    /// The kernel gives no random bytes.
    pub fn random() -> Result<Self> {
        let bytes: [u8; 32] = random_bytes()?;
        Ok(Self(bytes.iter().map(|byte| format!("{byte:02x}")).collect()))
    }

    /// The id that stands for something with this digest.
    pub(crate) fn from_digest(digest: [u8; 32]) -> Self {
        Self(digest.iter().map(|byte| format!("{byte:02x}")).collect())
    }

    /// Accepts the name of a sandbox's directory.
    pub(crate) fn from_dir_name(name: &str) -> Option<Self> {
        let valid = name.len() == 64
            && name
                .bytes()
                .all(|byte| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte));
        valid.then(|| Self(name.to_owned()))
    }

    /// The whole id.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The first twelve digits, as lists show it.
    #[must_use]
    pub fn short(&self) -> &str {
        &self.0[..12]
    }
}

impl fmt::Display for SandboxId {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&self.0)
    }
}

const ADJECTIVES: [&str; 32] = [
    "able", "amber", "brave", "brisk", "calm", "clear", "clever", "cosy", "deep", "eager", "fair", "fleet",
    "gentle", "glad", "golden", "keen", "kind", "lively", "lucid", "merry", "neat", "noble", "patient",
    "quick", "quiet", "ready", "sober", "steady", "sunny", "swift", "tidy", "warm",
];
const NOUNS: [&str; 32] = [
    "anchor", "barge", "beacon", "bosun", "bridge", "buoy", "cabin", "captain", "clipper", "compass",
    "cutter", "deck", "ferry", "galley", "harbour", "helm", "jetty", "keel", "lagoon", "lantern", "mast",
    "oar", "pilot", "quay", "rudder", "sail", "schooner", "sloop", "tide", "trawler", "voyage", "yard",
];

/// A name for a sandbox whose user gave none; short, and told apart from others of its kind by a number.
///
/// # Errors
///
/// The kernel gives no random bytes.
pub fn generate_name() -> Result<String> {
    let [adjective, noun, low, high]: [u8; 4] = random_bytes()?;
    let pick = |list: &[&'static str; 32], byte: u8| list[usize::from(byte) % list.len()];
    let number = u16::from_le_bytes([low, high]) % 1000;
    Ok(format!(
        "{}_{}{number}",
        pick(&ADJECTIVES, adjective),
        pick(&NOUNS, noun)
    ))
}

/// Checks a name a user gave.
pub(crate) fn check_name(name: &str) -> Result<()> {
    agent_protocol::limits::check_id("name", name).map_err(|error| SandboxError::InvalidOption {
        option: "--name",
        problem: format!("{name:?} {}", error.rule),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn id_is_a_directory_name_that_is_recognised() {
        let id = SandboxId::random().unwrap();
        assert_eq!(SandboxId::from_dir_name(id.as_str()), Some(id.clone()));
        assert_eq!(id.short().len(), 12);
        assert_eq!(SandboxId::from_dir_name("../etc"), None);
    }

    #[test]
    fn generated_names_are_valid_names() {
        check_name(&generate_name().unwrap()).unwrap();
        assert!(check_name("-x").is_err());
    }
}
