//! A bundle: a root filesystem that holds the probe and a shell, and a configuration like that of `runc spec`.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde_json::{Value, json};

/// What engines let a process have when nothing else is asked for.
pub const CAPABILITIES: [&str; 14] = [
    "CAP_AUDIT_WRITE",
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_KILL",
    "CAP_MKNOD",
    "CAP_NET_BIND_SERVICE",
    "CAP_NET_RAW",
    "CAP_SETFCAP",
    "CAP_SETGID",
    "CAP_SETPCAP",
    "CAP_SETUID",
    "CAP_SYS_CHROOT",
];

/// A folder with `config.json` and `rootfs`.
#[derive(Debug, Clone)]
pub struct Bundle {
    dir: PathBuf,
    config: Value,
}

/// The programs each root filesystem has; compiled and copied once.
#[derive(Debug)]
pub struct Programs {
    dir: PathBuf,
}

impl Programs {
    /// Compiles the probe into a folder and puts a static shell beside it.
    ///
    /// # Errors
    /// No compiler or no static busybox; `cargo xtask setup` installs both.
    pub fn build(dir: &Path) -> Result<Self> {
        let source = dir.join("probe.c");
        fs::write(&source, include_str!("../guest/probe.c")).context("cannot write the probe's source")?;
        let mut compiler = std::process::Command::new("cc");
        compiler
            .args(["-O1", "-static", "-o"])
            .arg(dir.join("probe"))
            .arg(&source);
        let output = compiler
            .output()
            .context("cannot start cc; `cargo xtask setup` installs it")?;
        anyhow::ensure!(
            output.status.success(),
            "the probe does not compile: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        fs::copy("/bin/busybox", dir.join("busybox"))
            .context("cannot copy /bin/busybox; `cargo xtask setup` installs busybox-static")?;
        Ok(Self { dir: dir.to_owned() })
    }

    /// Where the probe is, to be run on the host (by hooks).
    pub fn probe(&self) -> PathBuf {
        self.dir.join("probe")
    }
}

impl Bundle {
    /// A fresh one; the container runs the probe's `report`.
    ///
    /// # Errors
    /// The folder can't be made.
    pub fn new(dir: PathBuf, programs: &Programs) -> Result<Self> {
        let rootfs = dir.join("rootfs");
        for name in [
            "bin",
            "dev",
            "etc",
            "proc",
            "root",
            "sys",
            "tmp",
            "var/tmp",
            "home/user",
        ] {
            fs::create_dir_all(rootfs.join(name))?;
        }
        for name in ["probe", "busybox"] {
            // A link: the programs are never written to.
            fs::hard_link(programs.dir.join(name), rootfs.join("bin").join(name))?;
        }
        for applet in [
            "sh", "cat", "echo", "sleep", "true", "false", "id", "ls", "mount", "ip",
        ] {
            symlink("busybox", rootfs.join("bin").join(applet))?;
        }
        fs::write(
            rootfs.join("etc/passwd"),
            "root:x:0:0::/root:/bin/sh\nuser:x:1000:1000::/home/user:/bin/sh\n",
        )?;
        fs::write(rootfs.join("etc/group"), "root:x:0:\nuser:x:1000:\n")?;
        Ok(Self {
            dir,
            config: base_config(),
        })
    }

    pub fn path(&self) -> &Path {
        &self.dir
    }

    /// A file of the root filesystem, on the host.
    pub fn rootfs(&self, name: &str) -> PathBuf {
        self.dir.join("rootfs").join(name.trim_start_matches('/'))
    }

    /// Sets a field by its JSON pointer; folders on the way are made.
    pub fn set(&mut self, pointer: &str, value: Value) -> &mut Self {
        let mut at = &mut self.config;
        for part in pointer.split('/').skip(1) {
            if at.is_null() {
                *at = json!({});
            }
            at = match at {
                Value::Array(list) => {
                    let index: usize = part.parse().unwrap_or(usize::MAX);
                    &mut list[index]
                }
                other => &mut other[part],
            };
        }
        *at = value;
        self
    }

    /// Appends to a list.
    pub fn push(&mut self, pointer: &str, value: Value) -> &mut Self {
        let mut list = self.config.pointer(pointer).cloned().unwrap_or(json!([]));
        if let Some(items) = list.as_array_mut() {
            items.push(value);
        }
        self.set(pointer, list)
    }

    /// Removes a field.
    pub fn remove(&mut self, pointer: &str) -> &mut Self {
        if let Some((parent, name)) = pointer.rsplit_once('/')
            && let Some(object) = self.config.pointer_mut(parent).and_then(Value::as_object_mut)
        {
            object.remove(name);
        }
        self
    }

    /// The probe with these operations as the container's process.
    pub fn probe(&mut self, operations: &[&str]) -> &mut Self {
        let mut arguments = vec!["/bin/probe"];
        arguments.extend_from_slice(operations);
        self.set("/process/args", json!(arguments))
    }

    /// A shell script as the container's process.
    pub fn shell(&mut self, script: &str) -> &mut Self {
        self.set("/process/args", json!(["/bin/sh", "-c", script]))
    }

    /// Adds a mount.
    pub fn mount(&mut self, destination: &str, kind: &str, source: &str, options: &[&str]) -> &mut Self {
        self.push(
            "/mounts",
            json!({"destination": destination, "type": kind, "source": source, "options": options}),
        )
    }

    /// Takes a type of namespace off the list.
    pub fn without_namespace(&mut self, kind: &str) -> &mut Self {
        if let Some(list) = self.config["linux"]["namespaces"].as_array_mut() {
            list.retain(|entry| entry["type"] != kind);
        }
        self
    }

    /// The same process capabilities in every set.
    pub fn capabilities(&mut self, names: &[&str]) -> &mut Self {
        let sets = json!({"bounding": names, "effective": names, "permitted": names});
        self.set("/process/capabilities", sets)
    }

    /// Writes `config.json`.
    ///
    /// # Errors
    /// It can't be written.
    pub fn write(&self) -> Result<()> {
        let text = serde_json::to_vec_pretty(&self.config)?;
        fs::write(self.dir.join("config.json"), text).context("cannot write config.json")
    }
}

fn base_config() -> Value {
    json!({
        "ociVersion": "1.0.2",
        "process": {
            "terminal": false,
            "user": {"uid": 0, "gid": 0},
            "args": ["/bin/probe", "report"],
            "env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "TERM=xterm"],
            "cwd": "/",
            "capabilities": {"bounding": CAPABILITIES, "effective": CAPABILITIES, "permitted": CAPABILITIES},
            "noNewPrivileges": true,
        },
        "root": {"path": "rootfs", "readonly": false},
        "hostname": "conformance",
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs",
             "options": ["nosuid", "strictatime", "mode=755", "size=65536k"]},
            {"destination": "/dev/pts", "type": "devpts", "source": "devpts",
             "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"]},
            {"destination": "/dev/shm", "type": "tmpfs", "source": "shm",
             "options": ["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"]},
            {"destination": "/dev/mqueue", "type": "mqueue", "source": "mqueue",
             "options": ["nosuid", "noexec", "nodev"]},
            {"destination": "/sys", "type": "sysfs", "source": "sysfs",
             "options": ["nosuid", "noexec", "nodev", "ro"]},
        ],
        "linux": {
            "resources": {"devices": [{"allow": false, "access": "rwm"}]},
            "namespaces": [
                {"type": "pid"}, {"type": "network"}, {"type": "ipc"}, {"type": "uts"}, {"type": "mount"},
            ],
            "maskedPaths": ["/proc/kcore", "/proc/timer_list", "/sys/firmware"],
            "readonlyPaths": ["/proc/sys", "/proc/sysrq-trigger"],
        },
    })
}
