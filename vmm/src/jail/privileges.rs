//! Users, capabilities and Landlock.

use super::JailError;
use caps::CapSet;
use landlock::{
    ABI, Access, AccessFs, AccessNet, CompatLevel, Compatible, Ruleset, RulesetAttr, RulesetStatus, Scope,
};
use rustix::thread::{Gid, Uid, set_thread_groups, set_thread_res_gid, set_thread_res_uid};
use std::io;

/// Takes every capability out of the bounding set, so that not even executing a file could bring one back.
pub(super) fn drop_bounding_set() -> Result<(), JailError> {
    caps::clear(None, CapSet::Bounding).map_err(JailError::Capabilities)
}

/// Becomes an unprivileged user without supplementary groups. The process has one thread.
pub(super) fn become_user(uid: u32, gid: u32) -> io::Result<()> {
    let (uid, gid) = (Uid::from_raw(uid), Gid::from_raw(gid));
    set_thread_groups(&[])?;
    set_thread_res_gid(gid, gid, gid)?;
    set_thread_res_uid(uid, uid, uid)?;
    Ok(())
}

/// Empties the sets of the process. Changing the user has done so already for a process of root.
pub(super) fn drop_capabilities() -> Result<(), JailError> {
    for set in [
        CapSet::Ambient,
        CapSet::Inheritable,
        CapSet::Effective,
        CapSet::Permitted,
    ] {
        caps::clear(None, set).map_err(JailError::Capabilities)?;
    }
    Ok(())
}

/// Forbids all that Landlock can forbid; what is open already stays usable. A kernel without Landlock leaves the other layers.
pub(super) fn apply_landlock() -> Result<(), JailError> {
    let status = Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(ABI::V7))
        .and_then(|ruleset| ruleset.handle_access(AccessNet::from_all(ABI::V7)))
        .and_then(|ruleset| ruleset.scope(Scope::from_all(ABI::V7)))
        .and_then(Ruleset::create)
        .and_then(landlock::RulesetCreated::restrict_self)
        .map_err(JailError::Landlock)?;
    match status.ruleset {
        RulesetStatus::FullyEnforced => {}
        RulesetStatus::PartiallyEnforced => tracing::debug!("this kernel knows only part of Landlock"),
        RulesetStatus::NotEnforced => tracing::info!("this kernel has no Landlock; the other layers hold"),
    }
    Ok(())
}
