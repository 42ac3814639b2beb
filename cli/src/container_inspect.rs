//! A container as docker describes it, and its microVM.

use sandbox::{Runtime, SandboxRecord};
use serde_json::Value;

/// One container as JSON.
///
/// # Errors
/// It can't be described.
pub fn describe(_runtime: &Runtime, record: &SandboxRecord, _size: bool) -> anyhow::Result<Value> {
    Ok(serde_json::to_value(record)?)
}
