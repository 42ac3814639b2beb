//! Hooks of the specification that run on the host, with the container's state on their standard input.
//!
//! Where they run: all in the mount namespace of whoever runs the command. `prestart`, `createRuntime`, `poststart` and
//! `poststop` also in its network namespace; `createContainer` in the container's network namespace, which is all of the
//! container's namespaces that is on the host. `startContainer` runs in the guest, by the agent.
//!
//! They run before the microVM is booted, so that what they mount into the root filesystem is in it.

use std::{
    fs::File,
    io::{Read as _, Seek as _, Write as _},
    os::fd::{AsFd as _, OwnedFd},
    os::unix::process::{CommandExt as _, ExitStatusExt as _},
    path::Path,
    process::{Child, Command, ExitStatus},
    thread,
    time::Duration,
};

use nix::sched::{CloneFlags, setns};
use oci_spec::runtime::Hook;
use rustix::{
    fs::{MemfdFlags, memfd_create},
    process::{Pid, PidfdFlags, pidfd_open},
};

use super::{
    error::{BundleError, Result},
    record::{BundleState, BundleStatus},
};
use crate::{SandboxError, wait};

/// How much of what a hook prints goes into an error.
const MAX_OUTPUT_BYTES: u64 = 4096;

/// The state as the specification has it, which hooks read and `state` prints.
#[must_use]
pub fn state_json(state: &BundleState) -> serde_json::Value {
    let mut value = serde_json::json!({
        "ociVersion": state.oci_version,
        "id": state.id,
        "status": state.status.as_str(),
        "pid": state.pid,
        "bundle": state.bundle,
    });
    if !state.annotations.is_empty() {
        value["annotations"] = serde_json::json!(state.annotations);
    }
    value
}

/// Runs the hooks of one kind, in their order; the first that fails ends it.
pub(super) fn run(
    kind: &'static str,
    hooks: Option<&Vec<Hook>>,
    state: &BundleState,
    status: BundleStatus,
    network: Option<&OwnedFd>,
) -> Result<()> {
    let Some(hooks) = hooks.filter(|hooks| !hooks.is_empty()) else {
        return Ok(());
    };
    let mut json = state_json(state);
    json["status"] = serde_json::json!(status.as_str());
    let json = json.to_string();
    for (index, hook) in hooks.iter().enumerate() {
        run_one(hook, &state.bundle, &json, network).map_err(|problem| BundleError::Hook {
            kind,
            index,
            path: hook.path().clone(),
            problem,
        })?;
    }
    Ok(())
}

fn run_one(
    hook: &Hook,
    bundle: &Path,
    state: &str,
    network: Option<&OwnedFd>,
) -> std::result::Result<(), String> {
    let text = |error: std::io::Error| error.to_string();
    let input = memory_file(state).map_err(|error| error.to_string())?;
    let output = memory_file("").map_err(|error| error.to_string())?;
    let mut command = Command::new(hook.path());
    if let Some((name, arguments)) = hook.args().as_ref().and_then(|args| args.split_first()) {
        command.arg0(name).args(arguments);
    }
    if let Some(env) = hook.env() {
        let entries = env.iter().filter_map(|entry| entry.split_once('='));
        command.env_clear().envs(entries);
    }
    command
        .current_dir(bundle)
        .stdin(input)
        .stdout(output.try_clone().map_err(text)?)
        .stderr(output.try_clone().map_err(text)?);
    let child = match network {
        None => command.spawn(),
        Some(network) => spawn_in(&mut command, network),
    };
    let mut child = child.map_err(text)?;
    let timeout = hook.timeout().and_then(|seconds| u64::try_from(seconds).ok());
    let status = wait_for(&mut child, timeout.map(Duration::from_secs))?;
    if status.success() {
        return Ok(());
    }
    Err(format!("{}, output: {}", told(status), printed(output)))
}

/// Spawns from a thread that is in the network namespace, which its child inherits.
fn spawn_in(command: &mut Command, network: &OwnedFd) -> std::io::Result<Child> {
    thread::scope(|scope| {
        let spawned = scope.spawn(|| {
            setns(network.as_fd(), CloneFlags::CLONE_NEWNET)?;
            command.spawn()
        });
        spawned
            .join()
            .unwrap_or_else(|_| Err(std::io::Error::other("the thread that starts it has panicked")))
    })
}

fn memory_file(content: &str) -> std::io::Result<File> {
    let mut file = File::from(memfd_create("hook", MemfdFlags::CLOEXEC)?);
    file.write_all(content.as_bytes())?;
    file.rewind()?;
    Ok(file)
}

fn wait_for(child: &mut Child, timeout: Option<Duration>) -> std::result::Result<ExitStatus, String> {
    if let Some(timeout) = timeout {
        let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
        let pidfd = pid.and_then(|pid| pidfd_open(pid, PidfdFlags::empty()).ok());
        let ended = pidfd.is_some_and(|pidfd| wait::readable(pidfd.as_fd(), Some(timeout)).unwrap_or(false));
        if !ended {
            drop(child.kill());
            drop(child.wait());
            return Err(format!(
                "hook ran past specified timeout of {:.1}s",
                timeout.as_secs_f64()
            ));
        }
    }
    child.wait().map_err(|error| error.to_string())
}

fn told(status: ExitStatus) -> String {
    match status.signal() {
        Some(signal) => format!("signal: {signal}"),
        None => format!("exit status {}", status.code().unwrap_or(255)),
    }
}

fn printed(mut output: File) -> String {
    let mut bytes = Vec::new();
    drop(output.rewind());
    drop(output.take(MAX_OUTPUT_BYTES).read_to_end(&mut bytes));
    let text = String::from_utf8_lossy(&bytes);
    text.trim()
        .chars()
        .map(|c| if c.is_control() { ' ' } else { c })
        .collect()
}

/// Opens the network namespace of a process.
pub(super) fn network_of(pid: i32) -> Result<OwnedFd> {
    let path = format!("/proc/{pid}/ns/net");
    File::open(&path)
        .map(Into::into)
        .map_err(SandboxError::io("opening", path))
        .map_err(Into::into)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::bundle::home::sandbox_id;

    fn state() -> BundleState {
        BundleState {
            id: "web".into(),
            sandbox_id: sandbox_id("web"),
            oci_version: "1.2.0".into(),
            status: BundleStatus::Created,
            pid: 42,
            vmm_pid: None,
            bundle: "/tmp".into(),
            rootfs: "/tmp/rootfs".into(),
            annotations: BTreeMap::from([("a".into(), "b".into())]),
            terminal: false,
            owner: 0,
            created_ms: 0,
            exit: None,
            cgroups: Vec::new(),
            pod: crate::bundle::PodRole::Alone,
        }
    }

    fn hook(script: &str, timeout: Option<i64>) -> Vec<Hook> {
        let value = serde_json::json!({
            "path": "/bin/sh", "args": ["sh", "-c", script], "env": ["ONLY=this"], "timeout": timeout,
        });
        vec![serde_json::from_value(value).unwrap()]
    }

    fn run_hook(hooks: &Vec<Hook>) -> Result<()> {
        run("prestart", Some(hooks), &state(), BundleStatus::Creating, None)
    }

    #[test]
    fn hook_reads_the_state_and_has_only_its_environment() {
        let dir = tempfile::tempdir().unwrap();
        let seen = dir.path().join("seen");
        let script = format!("cat >{0}; printf %s $ONLY$HOME$PWD >>{0}", seen.display());
        run_hook(&hook(&script, None)).unwrap();
        let text = std::fs::read_to_string(seen).unwrap();
        let json = text.strip_suffix("this/tmp").unwrap();
        let json: serde_json::Value = serde_json::from_str(json).unwrap();
        assert_eq!(
            (
                &json["id"],
                &json["status"],
                &json["pid"],
                &json["annotations"]["a"]
            ),
            (&"web".into(), &"creating".into(), &42.into(), &"b".into())
        );
    }

    #[test]
    fn failure_is_told_with_the_hook_and_what_it_said() {
        let error = run_hook(&hook("echo no such bridge >&2; exit 3", None)).unwrap_err();
        let text = error.to_string();
        assert_eq!(
            text,
            "error running prestart hook #0: /bin/sh exit status 3, output: no such bridge"
        );
        let mut missing = hook("", None);
        missing[0].set_path("/nonexistent".into());
        assert!(
            run_hook(&missing)
                .unwrap_err()
                .to_string()
                .contains("No such file")
        );
    }

    #[test]
    fn hook_that_takes_too_long_is_killed() {
        let error = run_hook(&hook("sleep 1000", Some(1))).unwrap_err();
        assert!(error.to_string().contains("timeout of 1.0s"), "{error}");
    }
}
