//! `hull-oci state`.

use anyhow::Result;
use clap::Args;
use sandbox::bundle::{BundleState, state_json};
use serde_json::{Value, json};

use crate::Global;

/// Print a container's state as JSON
#[derive(Debug, Args)]
pub(crate) struct State {
    /// The container's id
    id: String,
}

/// The time as all runtimes write it.
pub(crate) fn time(ms: u64) -> String {
    let at = i64::try_from(ms).unwrap_or(0);
    jiff::Timestamp::from_millisecond(at)
        .unwrap_or_default()
        .to_string()
}

/// The specification's fields, and those that runc has beside them.
pub(crate) fn extended(state: &BundleState) -> Value {
    let mut value = state_json(state);
    value["rootfs"] = json!(state.rootfs);
    value["created"] = json!(time(state.created_ms));
    value["owner"] = json!(owner(state.owner));
    value
}

/// A user's name, empty for root as with runc.
fn owner(uid: u32) -> String {
    if uid == 0 {
        return String::new();
    }
    let passwd = std::fs::read_to_string("/etc/passwd").unwrap_or_default();
    let wanted = uid.to_string();
    let name = passwd.lines().find_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        (fields.nth(1)? == wanted).then(|| name.to_owned())
    });
    name.unwrap_or_else(|| format!("#{uid}"))
}

impl State {
    pub(crate) fn execute(&self, global: &Global) -> Result<u8> {
        let state = global.bundles()?.state(&self.id)?;
        println!("{}", serde_json::to_string_pretty(&extended(&state))?);
        Ok(0)
    }
}
