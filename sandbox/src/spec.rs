//! What a front-end asks for, and the agent's request made of it.

use std::collections::BTreeMap;

use agent_protocol::{
    CgroupFile, CreateContainerRequest, Device, FileContent, Mount, Process, Resources, Sysctl, WindowSize,
    process,
};

use serde::{Deserialize, Serialize};

use crate::{
    Result, SandboxError, SandboxId,
    confinement::{Confinement, DeviceSpec},
    defaults,
    log_driver::LogConfig,
    network::{self, Endpoint, NetworkSpec},
    rootfs::{RootfsSpec, Writable},
    shares::{ShareMount, ShareSpec},
};

/// Smallest memory a microVM boots with.
pub const MIN_MEMORY_MIB: u64 = 64;
/// Most vCPUs of a microVM.
pub const MAX_VCPUS: u8 = 16;

/// What an image says about its process.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ImageDefaults {
    /// `ENTRYPOINT`.
    pub entrypoint: Vec<String>,
    /// `CMD`.
    pub cmd: Vec<String>,
    /// `ENV`.
    pub env: Vec<String>,
    /// `WORKDIR`, empty for `/`.
    pub working_dir: String,
    /// `USER`, empty for root.
    pub user: String,
}

/// A process to run.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ProcessSpec {
    /// Program and arguments.
    pub args: Vec<String>,
    /// `NAME=value`, later ones winning.
    pub env: Vec<String>,
    /// Absolute path.
    pub cwd: String,
    /// As an image says it, empty for root.
    pub user: String,
    /// Whether it gets a terminal.
    pub terminal: bool,
    /// Whether its stdin is ours; else it is empty.
    pub stdin: bool,
    /// The terminal's rows and columns.
    pub window: Option<(u16, u16)>,
}

/// A container to make. Kept with it, so a field added later has a default.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ContainerSpec {
    /// Its name; generated where there is none.
    pub name: Option<String>,
    /// The image as the user named it.
    pub image: String,
    /// The image's id.
    pub image_id: String,
    /// Its root filesystem.
    pub rootfs: RootfsSpec,
    /// Its first process.
    pub process: ProcessSpec,
    /// Its hostname; its short id where there is none.
    pub hostname: Option<String>,
    /// Whether its root filesystem is read-only.
    pub read_only: bool,
    /// Further tmpfs mounts: path and options.
    pub tmpfs: Vec<(String, Vec<String>)>,
    /// Directories and files of the host it has.
    pub shares: Vec<ShareSpec>,
    /// Where it sees them.
    pub share_mounts: Vec<ShareMount>,
    /// vCPUs of the microVM.
    pub vcpus: u8,
    /// Processor time, in thousandths of a CPU, where it is less than the vCPUs'.
    pub cpu_limit_milli: Option<u32>,
    /// Memory of the microVM.
    pub memory_mib: u64,
    /// What the user wants to find it by.
    pub labels: BTreeMap<String, String>,
    /// What its processes may do.
    pub confinement: Confinement,
    /// Size of `/dev/shm`; docker's 64 MiB where there is none.
    pub shm_bytes: Option<u64>,
    /// Kernel parameters of its namespaces.
    pub sysctls: BTreeMap<String, String>,
    /// Most processes and threads at once.
    pub pids_limit: Option<u64>,
    /// Devices of the microVM beside the default ones.
    pub devices: Vec<DeviceSpec>,
    /// Where its output is kept.
    pub log: LogConfig,
    /// Size of its writable layer on disk, which is kept with it; in memory where there is none.
    pub storage_bytes: Option<u64>,
    /// The signal that asks it to end; SIGTERM where there is none.
    pub stop_signal: Option<i32>,
    /// How long it has for that before it is killed.
    pub stop_timeout_s: Option<u64>,
    /// Whether it is removed when it has ended.
    pub auto_remove: bool,
    /// What it is connected to.
    pub network: NetworkSpec,
}

/// Applies `NAME=value` entries over others.
fn merge_env(base: &[String], over: &[String]) -> Vec<String> {
    let name = |entry: &str| entry.split('=').next().unwrap_or_default().to_owned();
    let mut merged: Vec<String> = Vec::new();
    for entry in base.iter().chain(over) {
        match merged.iter_mut().find(|have| name(have) == name(entry)) {
            Some(have) => have.clone_from(entry),
            None => merged.push(entry.clone()),
        }
    }
    merged
}

impl ProcessSpec {
    /// The process of an image, as docker composes it: a given entrypoint replaces the image's and its command,
    /// a given command replaces the image's command.
    ///
    /// # Errors
    ///
    /// Neither the image nor the user names a command, or the working directory is relative.
    pub fn compose(
        image: &ImageDefaults,
        entrypoint: Option<Vec<String>>,
        command: Vec<String>,
        env: &[String],
        cwd: Option<String>,
        user: Option<String>,
    ) -> Result<Self> {
        let (mut args, default_command) = match entrypoint {
            Some(entrypoint) => (entrypoint, Vec::new()),
            None => (image.entrypoint.clone(), image.cmd.clone()),
        };
        args.extend(if command.is_empty() {
            default_command
        } else {
            command
        });
        if args.first().is_none_or(String::is_empty) {
            return Err(SandboxError::InvalidOption {
                option: "COMMAND",
                problem: "the image names no command; give one after the image".into(),
            });
        }
        let cwd = cwd.unwrap_or_else(|| image.working_dir.clone());
        let cwd = if cwd.is_empty() { "/".to_owned() } else { cwd };
        if !cwd.starts_with('/') {
            return Err(SandboxError::InvalidOption {
                option: "--workdir",
                problem: format!("{cwd:?} is not an absolute path"),
            });
        }
        let base = merge_env(&[defaults::PATH.to_owned()], &image.env);
        let user = user.unwrap_or_else(|| image.user.clone());
        Ok(Self {
            args,
            env: merge_env(&base, env),
            cwd,
            user,
            ..Self::default()
        })
    }

    /// The agent's request, in a container confined like this.
    pub(crate) fn for_agent(&self, confinement: &Confinement) -> Result<Process> {
        let mut env = self.env.clone();
        if self.terminal && !env.iter().any(|entry| entry.starts_with("TERM=")) {
            env.push("TERM=xterm".into());
        }
        let window = self.window.map(|(rows, columns)| WindowSize {
            rows: rows.into(),
            columns: columns.into(),
            ..WindowSize::default()
        });
        let mut process = Process {
            args: self.args.clone(),
            env,
            cwd: self.cwd.clone(),
            user: Some(process::User::UserName(self.user.clone())),
            terminal: self.terminal,
            window_size: window.into(),
            attach_stdin: self.stdin,
            attach_stdout: true,
            attach_stderr: !self.terminal,
            ..Process::default()
        };
        confinement.apply(&mut process)?;
        Ok(process)
    }
}

impl ContainerSpec {
    /// Checks what a microVM can't be.
    pub(crate) fn check(&self) -> Result<()> {
        let invalid = |option, problem| Err(SandboxError::InvalidOption { option, problem });
        if self.vcpus == 0 || self.vcpus > MAX_VCPUS {
            return invalid(
                "--cpus",
                format!("{} is not between 1 and {MAX_VCPUS}", self.vcpus),
            );
        }
        if self.memory_mib < MIN_MEMORY_MIB {
            return invalid(
                "--memory",
                format!(
                    "{} MiB is too little for a microVM; the least is {MIN_MEMORY_MIB} MiB",
                    self.memory_mib
                ),
            );
        }
        let host_mib = host_memory_mib();
        if host_mib != 0 && self.memory_mib > host_mib {
            return invalid(
                "--memory",
                format!(
                    "{} MiB is more than the {host_mib} MiB this host has",
                    self.memory_mib
                ),
            );
        }
        // What the agent would be asked says whether every name and file in it can be understood.
        self.process.for_agent(&self.confinement).map(drop)
    }

    /// The hostname it gets.
    pub(crate) fn hostname(&self, id: &SandboxId) -> String {
        self.hostname.clone().unwrap_or_else(|| id.short().to_owned())
    }

    /// Where its files go. In memory it may hold half of the microVM's, so that a full one is an error of the writer
    /// and not the end of a process.
    fn writable(&self) -> Writable {
        match self.storage_bytes {
            Some(_) => Writable::Disk,
            None => Writable::Memory {
                bytes: self.memory_mib.saturating_mul(1 << 20) / 2,
            },
        }
    }

    /// The mounts of a container, in order.
    fn mounts(&self) -> Vec<Mount> {
        let mut mounts = defaults::mounts(self.shm_bytes, self.confinement.privileged);
        let kernel = mounts.len();
        mounts.extend(self.tmpfs.iter().map(|(path, options)| {
            Mount {
                destination: path.clone(),
                type_: "tmpfs".into(),
                source: "tmpfs".into(),
                options: ["nosuid", "nodev", "noexec"]
                    .into_iter()
                    .map(str::to_owned)
                    .chain(options.clone())
                    .collect(),
                ..Mount::default()
            }
        }));
        mounts.extend(self.share_mounts.iter().map(|mount| Mount {
            destination: mount.destination.clone(),
            type_: agent_protocol::SHARE_MOUNT_TYPE.into(),
            source: agent_protocol::SHARES_TAG.into(),
            options: mount.options.clone(),
            share: Some(mount.share),
            copy_up: mount.copy_up,
            ..Mount::default()
        }));
        // Outer ones first, so that a mount below another is not covered by it.
        mounts[kernel..].sort_by_key(|mount| {
            mount
                .destination
                .split('/')
                .filter(|part| !part.is_empty())
                .count()
        });
        mounts
    }

    /// Kernel parameters: docker's, and over them the user's.
    fn sysctls(&self) -> Vec<Sysctl> {
        // In a container's own network, as here, low ports and ping need no privilege; so has docker.
        let defaults = [
            ("net.ipv4.ip_unprivileged_port_start", "0"),
            ("net.ipv4.ping_group_range", "0 2147483647"),
        ];
        let defaults = defaults
            .into_iter()
            .filter(|(name, _)| !self.sysctls.contains_key(*name));
        let given = self
            .sysctls
            .iter()
            .map(|(name, value)| (name.as_str(), value.as_str()));
        defaults
            .chain(given)
            .map(|(name, value)| Sysctl {
                name: name.to_owned(),
                value: value.to_owned(),
                ..Sysctl::default()
            })
            .collect()
    }

    pub(crate) fn for_agent(
        &self,
        id: &SandboxId,
        endpoint: Option<&Endpoint>,
    ) -> Result<CreateContainerRequest> {
        let hostname = self.hostname(id);
        let mut process = self.process.for_agent(&self.confinement)?;
        if !process.env.iter().any(|entry| entry.starts_with("HOSTNAME=")) {
            process.env.push(format!("HOSTNAME={hostname}"));
        }
        let file = |path: &str, content: String| FileContent {
            path: path.to_owned(),
            content: content.into_bytes(),
            mode: 0o644,
            ..FileContent::default()
        };
        let open = self.confinement.privileged || self.confinement.unmasked_paths;
        let paths = |list: &[&str]| {
            list.iter()
                .filter(|_| !open)
                .map(|path| (*path).to_owned())
                .collect()
        };
        let device = |device: &DeviceSpec| Device {
            path: device.container_path.clone(),
            source: device.path.clone(),
            ..Device::default()
        };
        let name = self.name.as_deref().unwrap_or_default();
        let hosts = network::hosts(&hostname, name, &self.network, endpoint);
        let mut files = vec![
            file("/etc/hostname", format!("{hostname}\n")),
            file("/etc/hosts", hosts),
        ];
        let resolver = endpoint.and_then(|_| network::resolv_conf(&self.network));
        files.extend(resolver.map(|content| file("/etc/resolv.conf", content)));
        Ok(CreateContainerRequest {
            container_id: id.as_str().to_owned(),
            rootfs: Some(self.rootfs.for_agent(self.read_only, self.writable())).into(),
            mounts: self.mounts(),
            process: Some(process).into(),
            masked_paths: paths(&defaults::MASKED_PATHS),
            readonly_paths: paths(&defaults::READONLY_PATHS),
            resources: Some(Resources {
                pids_max: self.pids_limit.unwrap_or(0),
                files: self.cpu_limit_milli.map(cpu_max).into_iter().collect(),
                ..Resources::default()
            })
            .into(),
            sysctls: self.sysctls(),
            files,
            hostname,
            devices: self.devices.iter().map(device).collect(),
            all_devices: self.confinement.privileged,
            device_filter: !self.confinement.privileged && self.confinement.may_mount()?,
            ..CreateContainerRequest::default()
        })
    }
}

/// Limits a control group's processor time: so many microseconds in every tenth of a second.
fn cpu_max(milli: u32) -> CgroupFile {
    CgroupFile {
        name: "cpu.max".to_owned(),
        value: format!("{} 100000", u64::from(milli) * 100),
        ..CgroupFile::default()
    }
}

pub(crate) fn host_memory_mib() -> u64 {
    let meminfo = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let kib = meminfo.lines().find_map(|line| {
        line.strip_prefix("MemTotal:")?
            .split_whitespace()
            .next()?
            .parse()
            .ok()
    });
    kib.unwrap_or(0_u64) / 1024
}

#[cfg(test)]
mod tests {
    use agent_protocol::Bounded as _;

    use super::*;

    fn strings(list: &[&str]) -> Vec<String> {
        list.iter().copied().map(str::to_owned).collect()
    }

    fn image() -> ImageDefaults {
        ImageDefaults {
            entrypoint: strings(&["/entry"]),
            cmd: strings(&["serve"]),
            env: strings(&["A=1", "B=2"]),
            working_dir: "/data".into(),
            user: "redis".into(),
        }
    }

    fn compose(entrypoint: Option<&[&str]>, command: &[&str]) -> Vec<String> {
        let entrypoint = entrypoint.map(strings);
        ProcessSpec::compose(&image(), entrypoint, strings(command), &[], None, None)
            .unwrap()
            .args
    }

    #[test]
    fn command_replaces_the_images_command_and_entrypoint_replaces_both() {
        assert_eq!(compose(None, &[]), ["/entry", "serve"]);
        assert_eq!(compose(None, &["x", "y"]), ["/entry", "x", "y"]);
        assert_eq!(compose(Some(&["/bin/sh"]), &[]), ["/bin/sh"]);
        assert_eq!(compose(Some(&["/bin/sh"]), &["-c", "z"]), ["/bin/sh", "-c", "z"]);
    }

    #[test]
    fn environment_of_the_user_wins_over_the_images() {
        let spec =
            ProcessSpec::compose(&image(), None, vec![], &strings(&["B=3", "C=4"]), None, None).unwrap();
        assert_eq!(spec.env[0], defaults::PATH);
        assert_eq!(spec.env[1..], strings(&["A=1", "B=3", "C=4"]));
        assert_eq!((spec.cwd.as_str(), spec.user.as_str()), ("/data", "redis"));
    }

    #[test]
    fn image_without_a_command_needs_one() {
        let error =
            ProcessSpec::compose(&ImageDefaults::default(), None, vec![], &[], None, None).unwrap_err();
        assert!(matches!(
            error,
            SandboxError::InvalidOption {
                option: "COMMAND",
                ..
            }
        ));
    }

    #[test]
    fn impossible_sizes_are_refused_and_a_possible_one_makes_an_acceptable_request() {
        let mut spec = ContainerSpec {
            name: None,
            image: "x".into(),
            image_id: "y".into(),
            rootfs: RootfsSpec {
                layers: vec!["/l".into()],
                root_mode: 0o755,
                root_uid: 0,
                root_gid: 0,
                share: None,
            },
            process: ProcessSpec::compose(&image(), None, vec![], &[], None, None).unwrap(),
            hostname: None,
            read_only: false,
            tmpfs: vec![("/run".into(), strings(&["size=1m"]))],
            vcpus: 1,
            memory_mib: 128,
            ..ContainerSpec::default()
        };
        spec.check().unwrap();
        spec.for_agent(&SandboxId::random().unwrap(), None)
            .unwrap()
            .check()
            .unwrap();
        for (vcpus, memory_mib) in [(0, 128), (17, 128), (1, 3), (1, u64::MAX)] {
            (spec.vcpus, spec.memory_mib) = (vcpus, memory_mib);
            assert!(spec.check().is_err(), "{vcpus} {memory_mib}");
        }
    }
}
