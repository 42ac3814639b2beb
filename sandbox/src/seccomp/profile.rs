//! A profile: what is done to which call, and its JSON format as docker, podman and runc read it.

use std::collections::HashMap;

use serde::Deserialize;

use super::{
    KERNEL, action,
    bpf::{Comparison, Condition, Decision},
};
use crate::capabilities;

/// Rules of one profile; names that no table has are harmless.
const MAX_RULES: usize = 4096;

/// What is done if all conditions hold.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Rule {
    pub conditions: Vec<Condition>,
    pub action: u32,
}

/// What is done to which call.
#[derive(Debug, Clone)]
pub(super) struct Profile {
    pub default_action: u32,
    rules: HashMap<String, Vec<Rule>>,
}

impl Profile {
    pub(super) fn new(default_action: u32) -> Self {
        Self {
            default_action,
            rules: HashMap::new(),
        }
    }

    pub(super) fn add(&mut self, name: &str, rule: Rule) {
        let rules = self.rules.entry(name.to_owned()).or_default();
        if !rules.contains(&rule) {
            rules.push(rule);
        }
    }

    /// Whether no call is treated otherwise than without a profile.
    pub(super) fn allows_everything(&self) -> bool {
        let mut actions = self.rules.values().flatten().map(|rule| rule.action);
        self.default_action == action::ALLOW && actions.all(|action| action == action::ALLOW)
    }

    pub(super) fn knows(&self, name: &str) -> bool {
        self.rules.contains_key(name)
    }

    /// What is decided about a call.
    pub(super) fn decide(&self, name: &str) -> Decision {
        let rules = self.rules.get(name).map_or(&[][..], Vec::as_slice);
        // A rule without conditions is what is done where no other holds.
        let otherwise = rules
            .iter()
            .find(|rule| rule.conditions.is_empty())
            .map_or(self.default_action, |rule| rule.action);
        let conditional = rules
            .iter()
            .filter(|rule| !rule.conditions.is_empty() && rule.action != otherwise)
            .map(|rule| (rule.conditions.clone(), rule.action));
        Decision {
            rules: conditional.collect(),
            otherwise,
        }
    }
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Document {
    default_action: String,
    default_errno_ret: Option<u32>,
    #[serde(default)]
    syscalls: Option<Vec<Entry>>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Entry {
    #[serde(default)]
    names: Vec<String>,
    /// The old form.
    #[serde(default)]
    name: String,
    action: String,
    errno_ret: Option<u32>,
    #[serde(default)]
    args: Option<Vec<Argument>>,
    #[serde(default)]
    includes: Option<Filter>,
    #[serde(default)]
    excludes: Option<Filter>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Argument {
    index: u8,
    value: u64,
    #[serde(default)]
    value_two: u64,
    op: String,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Filter {
    #[serde(default)]
    caps: Option<Vec<String>>,
    #[serde(default)]
    arches: Option<Vec<String>>,
    #[serde(default)]
    min_kernel: Option<String>,
}

fn parse_action(name: &str, errno: Option<u32>) -> Result<u32, String> {
    let data = |default| errno.unwrap_or(default) & 0xffff;
    Ok(match name {
        "SCMP_ACT_ALLOW" => action::ALLOW,
        "SCMP_ACT_ERRNO" => action::ERRNO | data(action::EPERM),
        "SCMP_ACT_KILL" | "SCMP_ACT_KILL_THREAD" => action::KILL_THREAD,
        "SCMP_ACT_KILL_PROCESS" => action::KILL_PROCESS,
        "SCMP_ACT_TRAP" => action::TRAP,
        "SCMP_ACT_TRACE" => action::TRACE | data(action::EPERM),
        "SCMP_ACT_LOG" => action::LOG,
        other => return Err(format!("has the action {other:?}, which is not supported")),
    })
}

fn parse_condition(argument: &Argument) -> Result<Condition, String> {
    let comparison = match argument.op.as_str() {
        "SCMP_CMP_EQ" => Comparison::Equal,
        "SCMP_CMP_NE" => Comparison::NotEqual,
        "SCMP_CMP_LT" => Comparison::Less,
        "SCMP_CMP_LE" => Comparison::LessOrEqual,
        "SCMP_CMP_GT" => Comparison::Greater,
        "SCMP_CMP_GE" => Comparison::GreaterOrEqual,
        "SCMP_CMP_MASKED_EQ" => Comparison::MaskedEqual { mask: argument.value },
        other => return Err(format!("has the comparison {other:?}, which is not known")),
    };
    if argument.index > 5 {
        return Err(format!("has the argument index {}, above 5", argument.index));
    }
    let masked = matches!(comparison, Comparison::MaskedEqual { .. });
    Ok(Condition {
        argument: argument.index,
        comparison,
        value: if masked {
            argument.value_two
        } else {
            argument.value
        },
    })
}

impl Filter {
    fn has_all_caps(&self, bounding: u64) -> bool {
        let mut names = self.caps.iter().flatten();
        names.all(|name| capabilities::number(name).is_some_and(|number| bounding & (1 << number) != 0))
    }

    fn includes(&self, bounding: u64) -> bool {
        let arches = self.arches.as_deref().unwrap_or_default();
        let arch = arches.is_empty() || arches.iter().any(|arch| is_ours(arch));
        arch && self.has_all_caps(bounding) && self.min_kernel.as_deref().is_none_or(has_kernel)
    }

    fn excludes(&self, bounding: u64) -> bool {
        let caps = self.caps.as_deref().unwrap_or_default();
        let arches = self.arches.as_deref().unwrap_or_default();
        !caps.is_empty() && self.has_all_caps(bounding)
            || arches.iter().any(|arch| is_ours(arch))
            || self.min_kernel.as_deref().is_some_and(has_kernel)
    }
}

fn is_ours(arch: &str) -> bool {
    matches!(arch, "amd64" | "x32" | "x86" | "386")
}

fn has_kernel(version: &str) -> bool {
    let mut parts = version.split('.').map(|part| part.parse().unwrap_or(u32::MAX));
    (parts.next().unwrap_or(0), parts.next().unwrap_or(0)) <= KERNEL
}

impl Profile {
    /// Reads a profile for a container with these capabilities in its bounding set.
    pub(super) fn parse(text: &str, bounding: u64) -> Result<Self, String> {
        let document: Document =
            serde_json::from_str(text).map_err(|error| format!("is not a profile in JSON: {error}"))?;
        let mut profile = Self::new(parse_action(
            &document.default_action,
            document.default_errno_ret,
        )?);
        let mut count = 0;
        for entry in document.syscalls.iter().flatten() {
            let included = entry
                .includes
                .as_ref()
                .is_none_or(|filter| filter.includes(bounding));
            let excluded = entry
                .excludes
                .as_ref()
                .is_some_and(|filter| filter.excludes(bounding));
            if !included || excluded {
                continue;
            }
            let action = parse_action(&entry.action, entry.errno_ret)?;
            let conditions = entry
                .args
                .iter()
                .flatten()
                .map(parse_condition)
                .collect::<Result<Vec<_>, _>>()?;
            let old = Some(&entry.name).filter(|name| !name.is_empty());
            for name in entry.names.iter().chain(old) {
                for conditions in alternatives(&conditions) {
                    count += 1;
                    if count > MAX_RULES {
                        return Err(format!("has more than {MAX_RULES} rules"));
                    }
                    profile.add(name, Rule { conditions, action });
                }
            }
        }
        Ok(profile)
    }
}

/// Conditions on one argument twice are alternatives, as runc takes them; otherwise all must hold.
fn alternatives(conditions: &[Condition]) -> Vec<Vec<Condition>> {
    let repeated = conditions.iter().enumerate().any(|(index, one)| {
        conditions[..index]
            .iter()
            .any(|other| other.argument == one.argument)
    });
    if repeated {
        conditions.iter().map(|one| vec![*one]).collect()
    } else {
        vec![conditions.to_vec()]
    }
}
