//! `hooks`, by kind. Those of the host are run by who makes the container; `startContainer` runs in the guest.

use std::{path::PathBuf, time::Duration};

use ::oci_spec::runtime::{Hook as SpecHook, Hooks as SpecHooks};
use agent_protocol::Hook as AgentHook;

use super::error::{Result, invalid};

/// Most hooks of one kind.
const MAX_HOOKS: usize = 64;

/// A program to run at some point of a container's life.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hook {
    /// Absolute path of the program.
    pub path: PathBuf,
    /// As `execv` takes them, the name included; the path where there are none.
    pub args: Vec<String>,
    /// Its whole environment.
    pub env: Vec<String>,
    /// How long it may take; for ever where there is none.
    pub timeout: Option<Duration>,
}

/// A container's hooks, each kind in its order.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Hooks {
    /// On the host, when the container's namespaces are there; the old name of `create_runtime`, run before it.
    pub prestart: Vec<Hook>,
    /// On the host, when the container's namespaces are there.
    pub create_runtime: Vec<Hook>,
    /// On the host, before the container has its root.
    pub create_container: Vec<Hook>,
    /// In the container, before its program.
    pub start_container: Vec<Hook>,
    /// On the host, when the container's program runs.
    pub poststart: Vec<Hook>,
    /// On the host, when the container is deleted.
    pub poststop: Vec<Hook>,
}

pub(super) fn translate(hooks: Option<&SpecHooks>) -> Result<Hooks> {
    let Some(hooks) = hooks else {
        return Ok(Hooks::default());
    };
    let prestart = hooks.prestart();
    Ok(Hooks {
        prestart: kind("prestart", prestart.as_deref())?,
        create_runtime: kind("createRuntime", hooks.create_runtime().as_deref())?,
        create_container: kind("createContainer", hooks.create_container().as_deref())?,
        start_container: kind("startContainer", hooks.start_container().as_deref())?,
        poststart: kind("poststart", hooks.poststart().as_deref())?,
        poststop: kind("poststop", hooks.poststop().as_deref())?,
    })
}

fn kind(name: &str, hooks: Option<&[SpecHook]>) -> Result<Vec<Hook>> {
    let hooks = hooks.unwrap_or_default();
    if hooks.len() > MAX_HOOKS {
        return invalid(
            format!("hooks.{name}"),
            format!("has more than {MAX_HOOKS} entries"),
        );
    }
    hooks
        .iter()
        .enumerate()
        .map(|(index, hook)| one(&format!("hooks.{name}[{index}]"), hook))
        .collect()
}

fn one(field: &str, hook: &SpecHook) -> Result<Hook> {
    if !hook.path().is_absolute() {
        return invalid(
            format!("{field}.path"),
            format!("{:?} is not an absolute path", hook.path().display().to_string()),
        );
    }
    let timeout = match hook.timeout() {
        None => None,
        Some(seconds) => match u64::try_from(seconds) {
            Ok(seconds) if seconds > 0 => Some(Duration::from_secs(seconds)),
            _ => return invalid(format!("{field}.timeout"), format!("{seconds} is not above zero")),
        },
    };
    Ok(Hook {
        path: hook.path().clone(),
        args: hook.args().clone().unwrap_or_default(),
        env: hook.env().clone().unwrap_or_default(),
        timeout,
    })
}

impl Hook {
    /// For the agent, which runs it in the container.
    pub(super) fn for_agent(&self) -> AgentHook {
        let seconds = |timeout: Duration| u32::try_from(timeout.as_secs()).unwrap_or(u32::MAX);
        AgentHook {
            path: self.path.to_string_lossy().into_owned(),
            args: self.args.clone(),
            env: self.env.clone(),
            timeout_s: self.timeout.map_or(0, seconds),
            ..AgentHook::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn hooks(value: Value) -> Result<Hooks> {
        translate(Some(&serde_json::from_value(value).unwrap()))
    }

    #[test]
    fn kinds_and_their_order_are_kept() {
        let hooks = hooks(json!({
            "prestart": [{"path": "/a"}, {"path": "/b", "args": ["b", "x"], "env": ["K=v"], "timeout": 3}],
            "startContainer": [{"path": "/in"}],
            "poststop": [{"path": "/z"}]
        }))
        .unwrap();
        assert_eq!(hooks.prestart.len(), 2);
        assert_eq!(hooks.prestart[1].timeout, Some(Duration::from_secs(3)));
        assert_eq!(hooks.start_container[0].for_agent().path, "/in");
        assert_eq!(hooks.poststop[0].path, PathBuf::from("/z"));
        assert!(
            hooks.create_runtime.is_empty()
                && hooks.create_container.is_empty()
                && hooks.poststart.is_empty()
        );
    }

    #[test]
    fn relative_path_and_useless_timeout_are_refused() {
        for (hook, word) in [
            (json!({"path": "a"}), "hooks.poststart[0].path"),
            (json!({"path": "/a", "timeout": 0}), "hooks.poststart[0].timeout"),
            (json!({"path": "/a", "timeout": -1}), "hooks.poststart[0].timeout"),
        ] {
            let error = hooks(json!({"poststart": [hook]})).unwrap_err().to_string();
            assert!(error.starts_with(word), "{error}");
        }
    }
}
