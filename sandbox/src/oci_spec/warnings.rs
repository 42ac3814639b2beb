//! What an operator should be told though it doesn't stand in the way.

/// Most warnings of one configuration that are kept.
const MAX_WARNINGS: usize = 64;

/// Warnings, bounded.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Warnings(Vec<String>);

impl Warnings {
    pub(super) fn add(&mut self, warning: impl Into<String>) {
        if self.0.len() < MAX_WARNINGS {
            self.0.push(warning.into());
        }
    }
}

impl From<Warnings> for Vec<String> {
    fn from(warnings: Warnings) -> Self {
        warnings.0
    }
}
