//! A case: what the specification requires, and the check of it.

use std::fmt;

use anyhow::{Result, bail};

use crate::world::World;

/// How binding the sentence is that a case checks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Level {
    /// MUST, MUST NOT, REQUIRED, or what a field is defined to do.
    Must,
    /// SHOULD.
    Should,
    /// Not in the specification: what engines rely on, as runc does it.
    Practice,
}

impl fmt::Display for Level {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Must => "must",
            Self::Should => "should",
            Self::Practice => "practice",
        })
    }
}

/// The check of a case.
pub type Check = Box<dyn Fn(&World<'_>) -> Result<()> + Send + Sync>;

/// One requirement.
pub struct Case {
    /// `area.behaviour`
    pub name: String,
    /// Document and section of the specification.
    pub section: &'static str,
    /// The sentence, or what it says.
    pub requirement: String,
    pub level: Level,
    /// It looks at the container's process from the host, and so asks for more than what the container sees.
    pub host: bool,
    pub check: Check,
}

/// A case of level MUST.
pub fn must(
    name: impl Into<String>,
    section: &'static str,
    requirement: impl Into<String>,
    check: impl Fn(&World<'_>) -> Result<()> + Send + Sync + 'static,
) -> Case {
    Case {
        name: name.into(),
        section,
        requirement: requirement.into(),
        level: Level::Must,
        host: false,
        check: Box::new(check),
    }
}

impl Case {
    /// The same with level SHOULD.
    pub fn should(mut self) -> Self {
        self.level = Level::Should;
        self
    }

    /// The same, marked as what engines rely on and no document says.
    pub fn practice(mut self) -> Self {
        self.level = Level::Practice;
        self
    }

    /// The same, marked as looking at the process from the host.
    pub fn on_host(mut self) -> Self {
        self.host = true;
        self
    }
}

impl fmt::Debug for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Case")
            .field("name", &self.name)
            .finish_non_exhaustive()
    }
}

/// A check can't be made on this host; the text says why.
#[derive(Debug)]
pub struct Skip(pub String);

impl fmt::Display for Skip {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Skip {}

/// Ends a check without a verdict.
///
/// # Errors
/// Always: the reason.
pub fn skip<T>(why: impl Into<String>) -> Result<T> {
    Err(Skip(why.into()).into())
}

/// The cases whose names contain one of the texts; all if there are none.
///
/// # Errors
/// No case is left, or two have one name.
pub fn selected(cases: Vec<Case>, filters: &[String]) -> Result<Vec<Case>> {
    let mut names: Vec<&str> = cases.iter().map(|case| case.name.as_str()).collect();
    names.sort_unstable();
    if let Some(pair) = names.windows(2).find(|pair| pair[0] == pair[1]) {
        bail!("two cases are named {}", pair[0]);
    }
    let left: Vec<Case> = cases
        .into_iter()
        .filter(|case| filters.is_empty() || filters.iter().any(|text| case.name.contains(text)))
        .collect();
    if left.is_empty() {
        bail!(
            "no case's name contains {}; --list shows them",
            filters.join(" or ")
        );
    }
    Ok(left)
}
