//! `hull-oci spec`: a configuration to begin with.

use std::{fs::OpenOptions, io::Write as _, path::PathBuf};

use anyhow::{Context as _, Result};
use clap::Args;
use serde_json::{Value, json};

use crate::SPEC_VERSION;

/// Write a config.json to begin with
#[derive(Debug, Args)]
pub(crate) struct Spec {
    /// The directory to write it into
    #[arg(long, short, default_value = ".", value_name = "DIR")]
    bundle: PathBuf,
    /// For a user who isn't root
    #[arg(long, num_args = 0..=1, require_equals = true, default_value_t = false, default_missing_value = "true")]
    rootless: bool,
}

fn mount(destination: &str, kind: &str, source: &str, options: &[&str]) -> Value {
    json!({ "destination": destination, "type": kind, "source": source, "options": options })
}

/// The configuration.
fn template(rootless: bool) -> Value {
    let held = ["CAP_AUDIT_WRITE", "CAP_KILL", "CAP_NET_BIND_SERVICE"];
    let mut namespaces: Vec<Value> = ["pid", "network", "ipc", "uts", "mount", "cgroup"]
        .iter()
        .map(|kind| json!({ "type": kind }))
        .collect();
    let mut linux = json!({
        "resources": { "devices": [{ "allow": false, "access": "rwm" }] },
        "maskedPaths": [
            "/proc/acpi", "/proc/asound", "/proc/kcore", "/proc/keys", "/proc/latency_stats",
            "/proc/timer_list", "/proc/timer_stats", "/proc/sched_debug", "/sys/firmware", "/proc/scsi",
        ],
        "readonlyPaths": [
            "/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger",
        ],
    });
    if rootless {
        let id = |host: u32| json!([{ "containerID": 0, "hostID": host, "size": 1 }]);
        namespaces.push(json!({ "type": "user" }));
        linux["uidMappings"] = id(rustix::process::geteuid().as_raw());
        linux["gidMappings"] = id(rustix::process::getegid().as_raw());
        linux["resources"] = json!({});
    }
    linux["namespaces"] = namespaces.into();
    json!({
        "ociVersion": SPEC_VERSION,
        "process": {
            "terminal": true,
            "user": { "uid": 0, "gid": 0 },
            "args": ["sh"],
            "env": [
                "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
                "TERM=xterm",
            ],
            "cwd": "/",
            "capabilities": { "bounding": held, "effective": held, "permitted": held },
            "rlimits": [{ "type": "RLIMIT_NOFILE", "hard": 1024, "soft": 1024 }],
            "noNewPrivileges": true,
        },
        "root": { "path": "rootfs", "readonly": true },
        "hostname": "hull",
        "mounts": [
            mount("/proc", "proc", "proc", &[]),
            mount("/dev", "tmpfs", "tmpfs", &["nosuid", "strictatime", "mode=755", "size=65536k"]),
            mount("/dev/pts", "devpts", "devpts", &["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620"]),
            mount("/dev/shm", "tmpfs", "shm", &["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"]),
            mount("/dev/mqueue", "mqueue", "mqueue", &["nosuid", "noexec", "nodev"]),
            mount("/sys", "sysfs", "sysfs", &["nosuid", "noexec", "nodev", "ro"]),
            mount("/sys/fs/cgroup", "cgroup", "cgroup", &["nosuid", "noexec", "nodev", "relatime", "ro"]),
        ],
        "linux": linux,
    })
}

impl Spec {
    pub(crate) fn execute(&self) -> Result<u8> {
        let path = self.bundle.join("config.json");
        let mut file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .open(&path)
            .with_context(|| format!("cannot create {}; remove an existing one first", path.display()))?;
        let text = serde_json::to_string_pretty(&template(self.rootless))?;
        file.write_all(text.as_bytes())
            .with_context(|| format!("cannot write {}", path.display()))?;
        Ok(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn template_is_a_configuration_as_the_specification_has_it() {
        for rootless in [false, true] {
            let spec: oci_spec::runtime::Spec = serde_json::from_value(template(rootless)).unwrap();
            assert_eq!(spec.version(), SPEC_VERSION);
            assert!(spec.process().is_some() && spec.root().is_some());
        }
    }

    #[test]
    fn existing_configuration_is_not_overwritten() {
        let dir = tempfile::tempdir().unwrap();
        let spec = Spec {
            bundle: dir.path().to_owned(),
            rootless: false,
        };
        spec.execute().unwrap();
        assert!(spec.execute().unwrap_err().to_string().contains("config.json"));
    }
}
