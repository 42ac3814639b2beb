//! `linux.seccomp`: the filter as the program the agent installs; the compiler is `crate::seccomp`.

use ::oci_spec::runtime::{LinuxSeccomp, LinuxSeccompAction, LinuxSeccompFilterFlag};

use super::error::{Result, SpecError, invalid, unsupported};
use crate::seccomp;

const FIELD: &str = "linux.seccomp";
/// `SECCOMP_FILTER_FLAG_*`.
const FLAG_TSYNC: u32 = 1;
const FLAG_LOG: u32 = 2;
const FLAG_SPEC_ALLOW: u32 = 4;

/// What the agent installs.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Filter {
    pub(super) programs: Vec<Vec<u8>>,
    pub(super) flags: u32,
}

pub(super) fn translate(profile: &LinuxSeccomp) -> Result<Filter> {
    if profile
        .listener_path()
        .as_ref()
        .is_some_and(|path| !path.as_os_str().is_empty())
    {
        return unsupported(
            format!("{FIELD}.listenerPath"),
            "an agent on the host can't answer for system calls of a microVM's kernel; take the listener out of the profile",
        );
    }
    if profile
        .listener_metadata()
        .as_deref()
        .is_some_and(|text| !text.is_empty())
    {
        return invalid(
            format!("{FIELD}.listenerMetadata"),
            "is for a linux.seccomp.listenerPath, and there is none",
        );
    }
    let mut actions = std::iter::once(profile.default_action())
        .chain(profile.syscalls().iter().flatten().map(|entry| entry.action()));
    if actions.any(|action| action == LinuxSeccompAction::ScmpActNotify) {
        return unsupported(
            format!("{FIELD}.syscalls"),
            "SCMP_ACT_NOTIFY asks an agent on the host, which can't answer for a microVM's kernel",
        );
    }
    check_answers(profile)?;
    let mut flags = 0;
    for flag in profile.flags().iter().flatten() {
        flags |= match flag {
            LinuxSeccompFilterFlag::SeccompFilterFlagTsync => FLAG_TSYNC,
            LinuxSeccompFilterFlag::SeccompFilterFlagLog => FLAG_LOG,
            LinuxSeccompFilterFlag::SeccompFilterFlagSpecAllow => FLAG_SPEC_ALLOW,
            LinuxSeccompFilterFlag::SeccompFilterFlagWaitKillableRecv => {
                return invalid(
                    format!("{FIELD}.flags"),
                    "SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV is for a linux.seccomp.listenerPath, and there is none",
                );
            }
        };
    }
    let programs = seccomp::oci_programs(profile).map_err(|problem| SpecError::Invalid {
        field: FIELD.into(),
        problem: format!("the profile {problem}"),
    })?;
    Ok(Filter { programs, flags })
}

/// Each entry is about something, and an error is given only where an action has one.
fn check_answers(profile: &LinuxSeccomp) -> Result<()> {
    let has_error = |action| {
        matches!(
            action,
            LinuxSeccompAction::ScmpActErrno | LinuxSeccompAction::ScmpActTrace
        )
    };
    let problem = "is for SCMP_ACT_ERRNO and SCMP_ACT_TRACE; other actions have no error";
    if profile.default_errno_ret().is_some() && !has_error(profile.default_action()) {
        return invalid(format!("{FIELD}.defaultErrnoRet"), problem);
    }
    for (index, entry) in profile.syscalls().iter().flatten().enumerate() {
        if entry.names().is_empty() {
            return invalid(format!("{FIELD}.syscalls[{index}].names"), "is empty");
        }
        if entry.errno_ret().is_some() && !has_error(entry.action()) {
            return invalid(format!("{FIELD}.syscalls[{index}].errnoRet"), problem);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn filter(profile: Value) -> Result<Filter> {
        translate(&serde_json::from_value(profile).unwrap())
    }

    #[test]
    fn profile_that_allows_everything_costs_nothing() {
        let filter = filter(json!({"defaultAction": "SCMP_ACT_ALLOW"})).unwrap();
        assert_eq!(filter, Filter::default());
    }

    #[test]
    fn flags_are_the_kernels() {
        let filter = filter(json!({
            "defaultAction": "SCMP_ACT_ERRNO",
            "architectures": ["SCMP_ARCH_X86_64"],
            "flags": ["SECCOMP_FILTER_FLAG_LOG", "SECCOMP_FILTER_FLAG_SPEC_ALLOW"],
            "syscalls": [{"names": ["read"], "action": "SCMP_ACT_ALLOW"}]
        }))
        .unwrap();
        assert_eq!((filter.programs.len(), filter.flags), (1, 6));
    }

    #[test]
    fn what_needs_an_agent_on_the_host_is_refused() {
        for profile in [
            json!({"defaultAction": "SCMP_ACT_ALLOW", "listenerPath": "/run/x.sock"}),
            json!({"defaultAction": "SCMP_ACT_ALLOW", "listenerMetadata": "x"}),
            json!({"defaultAction": "SCMP_ACT_NOTIFY"}),
            json!({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"names": ["x"], "action": "SCMP_ACT_NOTIFY"}]}),
            json!({"defaultAction": "SCMP_ACT_ALLOW", "flags": ["SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV"]}),
        ] {
            let error = filter(profile).unwrap_err().to_string();
            assert!(error.starts_with("linux.seccomp"), "{error}");
        }
    }
}
