//! An OCI bundle's `config.json` as a container in a microVM.
//!
//! Every field is honoured in the guest, mapped to the microVM or the host, or refused with an error that names it;
//! `docs/oci-conformance.md` says for each which, `docs/adr/0014-oci-configuration.md` why. Nothing here starts anything:
//! [`load`] reads, [`translate`] decides, and the callers do. There is a module for each part of the configuration.
//!
//! Invariant: what [`translate`] returns keeps the bounds of the agent's protocol.

mod annotations;
mod cgroup_path;
mod devices;
mod error;
mod hooks;
mod load;
mod mounts;
mod namespaces;
mod pod;
mod process;
mod refused;
mod resources;
mod seccomp;
mod sysctl;
#[cfg(test)]
mod tests;
mod vm;
mod warnings;

use std::{collections::BTreeMap, path::Path};

use ::oci_spec::runtime::{LinuxResources, Process, Spec};
use agent_protocol::{Bounded as _, CreateContainerRequest, Resources, Rootfs};

pub use annotations::wants_shared_rootfs;
pub use cgroup_path::HostCgroup;
pub use error::SpecError;
pub use hooks::{Hook, Hooks};
pub use load::{Config, LoadedProcess, MAX_CONFIG_BYTES, load, load_process};
pub use namespaces::Network;
pub use pod::{PodPart, is_pod_microvm};

use crate::shares::ShareSpec;
use error::{Result, invalid};
use pod::PodLimits;
use warnings::Warnings;

/// How mounts below the root may spread, as mount(8) and runc name it.
const PROPAGATIONS: [&str; 8] = [
    "private",
    "rprivate",
    "slave",
    "rslave",
    "shared",
    "rshared",
    "unbindable",
    "runbindable",
];
const SYS_ADMIN: u64 = 1 << 21;

/// What the host is like, and what the caller lets a container have.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Policy {
    /// CPUs of the host: no microVM gets more by itself.
    pub host_cpus: u32,
    /// Memory of the host.
    pub host_memory_mib: u64,
    /// The host's name, which a container without a UTS namespace of its own has.
    pub hostname: String,
    /// Memory of a microVM where no limit says it.
    pub default_memory_mib: u64,
    /// Whether `linux.cgroupsPath` is systemd's.
    pub systemd_cgroup: bool,
}

impl Policy {
    /// As this host is.
    #[must_use]
    pub fn of_host() -> Self {
        let hostname = nix::unistd::gethostname().unwrap_or_default();
        Self {
            host_cpus: std::thread::available_parallelism()
                .ok()
                .and_then(|count| u32::try_from(count.get()).ok())
                .unwrap_or(1),
            host_memory_mib: crate::spec::host_memory_mib(),
            hostname: hostname.to_string_lossy().into_owned(),
            default_memory_mib: 256,
            systemd_cgroup: false,
        }
    }
}

/// A configuration, decided.
#[derive(Debug, Clone)]
pub struct Translated {
    /// For the agent. `container_id` is empty and `hook_state` too; all standard streams are attached.
    pub request: CreateContainerRequest,
    /// Memory of the microVM.
    pub memory_mib: u64,
    /// vCPUs of the microVM.
    pub vcpus: u8,
    /// Words for the guest kernel's command line.
    pub kernel_params: Vec<String>,
    /// Directories and files of the host, by the number that `request` has them under. The last one is the root, so that
    /// a caller who has it in another form can leave it out.
    pub shares: Vec<ShareSpec>,
    /// Where its network comes from.
    pub network: Network,
    /// The host's control group for the microVM.
    pub host_cgroup: Option<HostCgroup>,
    /// What is to be limited there. Its memory limit is the container's: the microVM needs `memory_mib`.
    pub host_resources: LinuxResources,
    /// Programs to run at points of its life; those of `start_container` are in `request`.
    pub hooks: Hooks,
    /// All annotations.
    pub annotations: BTreeMap<String, String>,
    /// Whether its process has a terminal.
    pub terminal: bool,
    /// The terminal's rows and columns.
    pub console_size: Option<(u16, u16)>,
    /// What an operator should be told.
    pub warnings: Vec<String>,
}

/// Decides what becomes of the configuration `spec` of the bundle in the directory `bundle`.
///
/// # Errors
///
/// Names the first field that is wrong, or that a container in a microVM can't have.
pub fn translate(spec: &Spec, bundle: &Path, policy: &Policy) -> std::result::Result<Translated, SpecError> {
    translate_in_pod(spec, bundle, policy, None)
}

/// The same for a container of a pod that is one microVM.
///
/// # Errors
///
/// As [`translate`].
pub fn translate_in_pod(
    spec: &Spec,
    bundle: &Path,
    policy: &Policy,
    part: Option<&PodPart>,
) -> std::result::Result<Translated, SpecError> {
    let mut warnings = Warnings::default();
    refused::check(spec, &mut warnings)?;
    let linux = spec.linux().as_ref();
    let annotations = annotations::translate(spec)?;
    let Some(given) = spec.process() else {
        return invalid("process", "is missing: there is nothing to start");
    };
    let process = process::translate(given, spec, &mut warnings)?;
    if annotations.pod && part.is_none() {
        warnings.add(format!(
            "annotations.{}: has no effect: the container is not one of a pod",
            annotations::POD
        ));
    }
    let private = annotations.private_for_host;
    let namespaces = namespaces::translate(spec, private, (policy, part), &mut warnings)?;
    let mut mounts = mounts::translate(spec, bundle, &mut warnings)?;
    let root = mounts::root(spec, bundle)?;
    let host_resources = linux
        .and_then(|linux| linux.resources().clone())
        .unwrap_or_default();
    let of_pod = part.map(|_| PodLimits::of(&annotations));
    let size = vm::translate(
        Some(&host_resources),
        &annotations,
        (policy, of_pod),
        &mut warnings,
    )?;
    let hooks = hooks::translate(spec.hooks().as_ref())?;
    let devices = devices::translate(spec, &mut warnings)?;
    let mut nodes = devices.nodes;
    nodes.append(&mut mounts.devices);
    let mut limits = resources::translate(&host_resources, &mut warnings)?;
    if let Some(part) = part {
        pod::count_memory(&mut limits);
        pod::share_memory(part, &namespaces.joined, &mut mounts.mounts);
    }
    let may_mount = process.capabilities.bounding & SYS_ADMIN != 0;
    let device_filter = !devices.all && (may_mount || devices::rules_matter(&limits.device_rules, &nodes));
    if !device_filter {
        limits.device_rules.clear();
    }
    let rootfs = Rootfs {
        share: u32::try_from(mounts.shares.len()).ok(),
        read_only: spec
            .root()
            .as_ref()
            .and_then(|root| root.readonly())
            .unwrap_or(false),
        ..Rootfs::default()
    };
    mounts.shares.push(root);
    let paths = |list: Option<&Option<Vec<String>>>| list.cloned().flatten().unwrap_or_default();
    let terminal = process.terminal;
    let console_size = process.window_size.as_ref().map(|size| {
        let clamp = |value: u32| u16::try_from(value).unwrap_or(u16::MAX);
        (clamp(size.rows), clamp(size.columns))
    });
    let request = CreateContainerRequest {
        rootfs: Some(rootfs).into(),
        mounts: mounts.mounts,
        process: Some(process).into(),
        hostname: namespaces.hostname,
        domainname: namespaces.domainname,
        masked_paths: paths(linux.map(|linux| linux.masked_paths())),
        readonly_paths: paths(linux.map(|linux| linux.readonly_paths())),
        devices: nodes,
        resources: Some(limits).into(),
        sysctls: sysctl::translate(spec)?,
        all_devices: devices.all,
        device_filter,
        user_namespace: namespaces.user.into(),
        time_namespace: namespaces.time.into(),
        joined: part.map(|_| namespaces.joined).into(),
        rootfs_propagation: propagation(linux.and_then(|linux| linux.rootfs_propagation().as_deref()))?,
        start_hooks: hooks.start_container.iter().map(Hook::for_agent).collect(),
        ..CreateContainerRequest::default()
    };
    check_bounds(&request)?;
    Ok(Translated {
        request,
        memory_mib: size.memory_mib,
        vcpus: size.vcpus,
        kernel_params: annotations.kernel_params,
        shares: mounts.shares,
        network: namespaces.network,
        host_cgroup: cgroup_path::translate(
            linux.and_then(|linux| linux.cgroups_path().as_deref()),
            policy.systemd_cgroup,
        )?,
        host_resources,
        hooks,
        annotations: annotations.all,
        terminal,
        console_size,
        warnings: warnings.into(),
    })
}

/// A process to be executed in the container whose configuration is `container`, as the agent is asked for it.
///
/// # Errors
///
/// Names the first field that is wrong, or that a process in a microVM can't have.
pub fn translate_process(
    process: &Process,
    container: &Spec,
) -> std::result::Result<agent_protocol::Process, SpecError> {
    let mut translated = process::translate(process, container, &mut Warnings::default())?;
    process::affinity(process, container, &mut translated)?;
    translated.check().map_err(beyond)?;
    Ok(translated)
}

/// Limits to be set on a container that is there, as the agent is asked for them.
///
/// # Errors
///
/// Names the first field that is wrong, or that a container in a microVM can't have.
pub fn translate_resources(resources: &LinuxResources) -> std::result::Result<Resources, SpecError> {
    resources::translate(resources, &mut Warnings::default())
}

fn propagation(given: Option<&str>) -> Result<String> {
    let given = given.unwrap_or_default();
    if given.is_empty() || PROPAGATIONS.contains(&given) {
        return Ok(given.to_owned());
    }
    invalid(
        "linux.rootfsPropagation",
        format!("{given:?} is not one of {}", PROPAGATIONS.join(", ")),
    )
}

/// What the kernel can't take any way, found before there is a microVM.
fn check_bounds(request: &CreateContainerRequest) -> Result<()> {
    let named = CreateContainerRequest {
        container_id: "bundle".into(),
        ..request.clone()
    };
    named.check().map_err(beyond)
}

fn beyond(broken: agent_protocol::InvalidMessage) -> SpecError {
    SpecError::Invalid {
        field: broken.field.to_owned(),
        problem: broken.rule.to_owned(),
    }
}
