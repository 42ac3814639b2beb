//! features.md and features-linux.md: the document a runtime gives of itself, and that it keeps what it promises there.

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::equal;
use crate::case::{Case, must, skip};
use crate::world::World;

const FEATURES: &str = "features.md";
const VERSION: &str = "features.md#specification-version";
const LINUX: &str = "features-linux.md";

/// The options a runtime MUST implement (config.md, "Linux mount options").
const REQUIRED_OPTIONS: &[&str] = &[
    "async",
    "atime",
    "bind",
    "defaults",
    "dev",
    "diratime",
    "dirsync",
    "exec",
    "iversion",
    "lazytime",
    "loud",
    "noatime",
    "nodev",
    "nodiratime",
    "noexec",
    "noiversion",
    "nolazytime",
    "norelatime",
    "nostrictatime",
    "nosuid",
    "private",
    "rbind",
    "relatime",
    "remount",
    "ro",
    "rprivate",
    "rshared",
    "rslave",
    "runbindable",
    "rw",
    "shared",
    "silent",
    "slave",
    "strictatime",
    "suid",
    "sync",
    "unbindable",
];

pub fn cases() -> Vec<Case> {
    vec![
        must(
            "features.is_a_json_document",
            FEATURES,
            "A runtime MAY provide a JSON document about its implemented features to runtime callers",
            |world| {
                ensure!(features(world)?.is_object(), "it is no object");
                Ok(())
            },
        ),
        must(
            "features.oci_version_min_is_accepted",
            VERSION,
            "ociVersionMin (REQUIRED): the runtime MUST accept this value as the ociVersion property of config.json",
            |world| version_accepted(world, "ociVersionMin"),
        ),
        must(
            "features.oci_version_max_is_accepted",
            VERSION,
            "ociVersionMax (REQUIRED): the runtime MUST accept this value as the ociVersion property of config.json",
            |world| version_accepted(world, "ociVersionMax"),
        ),
        must(
            "features.oci_version_max_is_not_below_min",
            VERSION,
            "The value MUST NOT be less than the value of the ociVersionMin property",
            |world| {
                let features = features(world)?;
                let (min, max) = (
                    release(&features["ociVersionMin"])?,
                    release(&features["ociVersionMax"])?,
                );
                ensure!(max >= min, "ociVersionMin {min:?}, ociVersionMax {max:?}");
                Ok(())
            },
        ),
        must(
            "features.hooks",
            "features.md#hooks",
            "The runtime MUST support the elements in this array as the hooks property of config.json",
            |world| {
                let features = features(world)?;
                for kind in [
                    "prestart",
                    "createRuntime",
                    "createContainer",
                    "startContainer",
                    "poststart",
                    "poststop",
                ] {
                    ensure!(
                        list(&features, "/hooks").contains(&kind),
                        "{kind} is not in hooks: {}",
                        features["hooks"]
                    );
                }
                Ok(())
            },
        ),
        must(
            "features.mount_options_name_all_required_ones",
            "features.md#mount-options",
            "mountOptions: the recognized names of the mount options",
            |world| {
                let features = features(world)?;
                let named = list(&features, "/mountOptions");
                let missing: Vec<&&str> = REQUIRED_OPTIONS
                    .iter()
                    .filter(|option| !named.contains(option))
                    .collect();
                ensure!(missing.is_empty(), "not in mountOptions: {missing:?}");
                Ok(())
            },
        ),
        must(
            "features.mount_options_are_accepted",
            "features.md#mount-options",
            "The runtime MUST recognize the elements in this array as the options of mounts objects in config.json",
            mount_options_accepted,
        ),
        must(
            "features.namespaces_are_recognized",
            LINUX,
            "namespaces: the runtime MUST recognize the elements in this array as the type of linux.namespaces objects in config.json",
            |world| {
                let features = features(world)?;
                let named = list(&features, "/linux/namespaces");
                for kind in ["cgroup", "ipc", "mount", "network", "pid", "uts"] {
                    ensure!(
                        named.contains(&kind),
                        "{kind} is not in linux.namespaces: {named:?}"
                    );
                }
                let mut bundle = world.bundle()?;
                // A user namespace needs mappings: a case of its own.
                let all: Vec<Value> = named
                    .iter()
                    .filter(|kind| **kind != "user")
                    .map(|kind| json!({"type": kind}))
                    .collect();
                bundle.set("/linux/namespaces", json!(all));
                world.report(&mut bundle).map(drop)
            },
        ),
        must(
            "features.capabilities_are_recognized",
            LINUX,
            "capabilities: the runtime MUST recognize the elements in this array in the process.capabilities object of config.json",
            |world| {
                let features = features(world)?;
                let named = list(&features, "/linux/capabilities");
                ensure!(named.len() >= 38, "only {} capabilities are named", named.len());
                for name in crate::bundle::CAPABILITIES {
                    ensure!(named.contains(&name), "{name} is not in linux.capabilities");
                }
                // Those that this host may give away; a runtime need not be able to give more than it has.
                let own = own_capabilities()?;
                let given: Vec<&str> = named
                    .into_iter()
                    .filter(|name| own.iter().any(|one| one == name))
                    .collect();
                let mut bundle = world.bundle()?;
                bundle.capabilities(&given);
                world.report(&mut bundle).map(drop)
            },
        ),
        must(
            "features.seccomp_names_are_recognized",
            LINUX,
            "actions, operators, archs: the runtime MUST recognize the elements in this array in linux.seccomp",
            seccomp_recognized,
        ),
        must(
            "features.types_are_those_defined",
            FEATURES,
            "The null value MUST NOT be confused with an empty value",
            |world| {
                let features = features(world)?;
                for (pointer, is_right) in [
                    ("/hooks", Value::is_array as fn(&Value) -> bool),
                    ("/mountOptions", Value::is_array),
                    ("/linux", Value::is_object),
                    ("/linux/namespaces", Value::is_array),
                    ("/linux/capabilities", Value::is_array),
                    ("/linux/cgroup", Value::is_object),
                    ("/linux/cgroup/v1", Value::is_boolean),
                    ("/linux/cgroup/v2", Value::is_boolean),
                    ("/linux/cgroup/systemd", Value::is_boolean),
                    ("/linux/seccomp", Value::is_object),
                    ("/linux/seccomp/enabled", Value::is_boolean),
                    ("/linux/apparmor/enabled", Value::is_boolean),
                    ("/linux/selinux/enabled", Value::is_boolean),
                    ("/annotations", Value::is_object),
                ] {
                    if let Some(value) = features.pointer(pointer) {
                        ensure!(value.is_null() || is_right(value), "{pointer} is {value}");
                    }
                }
                Ok(())
            },
        ),
        must(
            "features.annotations_are_strings",
            "features.md#annotations",
            "Annotations MUST be a key-value map that follows the same convention as the annotations property of config.json",
            |world| {
                let features = features(world)?;
                for (key, value) in features["annotations"].as_object().into_iter().flatten() {
                    ensure!(!key.is_empty() && value.is_string(), "{key:?}: {value}");
                }
                Ok(())
            },
        ),
    ]
}

fn features(world: &World<'_>) -> Result<Value> {
    let output = world.invoke(&["features"])?;
    // It MAY provide one.
    if !output.ok() && output.stderr.contains("unknown command") {
        return skip("the runtime provides no features document");
    }
    let text = output.expect_ok()?;
    serde_json::from_str(&text).with_context(|| format!("`features` printed {text:?}"))
}

fn list<'v>(features: &'v Value, pointer: &str) -> Vec<&'v str> {
    let items = features.pointer(pointer).and_then(Value::as_array);
    items.into_iter().flatten().filter_map(Value::as_str).collect()
}

fn release(version: &Value) -> Result<Vec<u32>> {
    let text = version.as_str().context("a version is missing")?;
    let release = text.split(['-', '+']).next().unwrap_or_default();
    release
        .split('.')
        .map(|part| {
            part.parse()
                .with_context(|| format!("{text:?} is no semantic version"))
        })
        .collect()
}

fn version_accepted(world: &World<'_>, name: &str) -> Result<()> {
    let version = features(world)?[name].clone();
    equal("how many numbers it has", release(&version)?.len(), 3)?;
    let mut bundle = world.bundle()?;
    bundle.set("/ociVersion", version);
    world.report(&mut bundle).map(drop)
}

fn mount_options_accepted(world: &World<'_>) -> Result<()> {
    let features = features(world)?;
    // Each kind on the mount it is for; those that contradict each other on mounts of their own. Deprecated ones, and ones
    // that want a mapping or other data, aside.
    let aside = [
        "mand",
        "nomand",
        "idmap",
        "ridmap",
        "remount",
        "acl",
        "noacl",
        "copy-symlink",
        "tmpcopyup",
    ];
    let options = list(&features, "/mountOptions");
    let options: Vec<&str> = options
        .into_iter()
        .filter(|option| !aside.contains(option))
        .collect();
    let source = super::mounts::folder(world, "source")?;
    // A few at a time: how many mounts a container may have is not what this is about.
    for some in options.chunks(20) {
        let mut bundle = world.bundle()?;
        for option in some {
            bundle.mount(&format!("/data/{option}"), "bind", &source, &["rbind", option]);
        }
        world.report(&mut bundle)?;
    }
    Ok(())
}

fn seccomp_recognized(world: &World<'_>) -> Result<()> {
    let features = features(world)?;
    if features.pointer("/linux/seccomp/enabled") != Some(&json!(true)) {
        return skip("the runtime says it has no seccomp");
    }
    let mut entries = Vec::new();
    // A call the process doesn't make, with one condition after the other.
    for (number, operator) in list(&features, "/linux/seccomp/operators")
        .into_iter()
        .enumerate()
    {
        entries.push(json!({"names": ["lookup_dcookie"], "action": "SCMP_ACT_ERRNO", "args": [{"index": 0, "value": 1000 + number, "valueTwo": 0, "op": operator}]}));
    }
    let harmless = [
        "acct",
        "swapon",
        "swapoff",
        "reboot",
        "quotactl",
        "nfsservctl",
        "vhangup",
        "pivot_root",
        "settimeofday",
        "iopl",
        "ioperm",
        "create_module",
    ];
    let actions = list(&features, "/linux/seccomp/actions");
    ensure!(
        actions.contains(&"SCMP_ACT_ERRNO") && actions.contains(&"SCMP_ACT_ALLOW"),
        "actions: {actions:?}"
    );
    for (action, name) in actions
        .iter()
        .filter(|action| **action != "SCMP_ACT_NOTIFY")
        .zip(harmless)
    {
        // The default action again would be refused by some as without effect.
        if *action != "SCMP_ACT_ALLOW" {
            entries.push(json!({"names": [name], "action": action}));
        }
    }
    let mut bundle = world.bundle()?;
    // Filters of little- and of big-endian machines don't go into one; those of this machine do.
    let architectures: Vec<&str> = list(&features, "/linux/seccomp/archs")
        .into_iter()
        .filter(|arch| arch.contains("X86") || arch.ends_with("X32"))
        .collect();
    ensure!(
        architectures.contains(&"SCMP_ARCH_X86_64"),
        "archs: {architectures:?}"
    );
    bundle.set(
        "/linux/seccomp",
        json!({
            "defaultAction": "SCMP_ACT_ALLOW", "architectures": architectures, "syscalls": entries,
        }),
    );
    world.report(&mut bundle).map(drop)
}

/// The capabilities of this process, by name.
fn own_capabilities() -> Result<Vec<String>> {
    let all = [
        "CHOWN",
        "DAC_OVERRIDE",
        "DAC_READ_SEARCH",
        "FOWNER",
        "FSETID",
        "KILL",
        "SETGID",
        "SETUID",
        "SETPCAP",
        "LINUX_IMMUTABLE",
        "NET_BIND_SERVICE",
        "NET_BROADCAST",
        "NET_ADMIN",
        "NET_RAW",
        "IPC_LOCK",
        "IPC_OWNER",
        "SYS_MODULE",
        "SYS_RAWIO",
        "SYS_CHROOT",
        "SYS_PTRACE",
        "SYS_PACCT",
        "SYS_ADMIN",
        "SYS_BOOT",
        "SYS_NICE",
        "SYS_RESOURCE",
        "SYS_TIME",
        "SYS_TTY_CONFIG",
        "MKNOD",
        "LEASE",
        "AUDIT_WRITE",
        "AUDIT_CONTROL",
        "SETFCAP",
        "MAC_OVERRIDE",
        "MAC_ADMIN",
        "SYSLOG",
        "WAKE_ALARM",
        "BLOCK_SUSPEND",
        "AUDIT_READ",
        "PERFMON",
        "BPF",
        "CHECKPOINT_RESTORE",
    ];
    let status = std::fs::read_to_string("/proc/self/status")?;
    let digits = status
        .lines()
        .find_map(|line| line.strip_prefix("CapPrm:"))
        .context("no CapPrm in /proc/self/status")?;
    let bits = u64::from_str_radix(digits.trim(), 16)?;
    Ok(all
        .iter()
        .enumerate()
        .filter(|(bit, _)| bits & (1 << bit) != 0)
        .map(|(_, name)| format!("CAP_{name}"))
        .collect())
}
