//! A pod that is one microVM: what its containers share inside of it, and how large it is.
//!
//! The pod's sandbox container makes the microVM; the others become containers in it. An engine says what they share by paths of
//! namespaces: those of the processes that stand for the pod's containers on the host.

use std::{collections::BTreeMap, path::Path};

use ::oci_spec::runtime::Spec;
use agent_protocol::{CgroupFile, JoinedNamespaces, Mount, Resources};

use super::{
    annotations::{self, Annotations},
    error::{Result, SpecError, unsupported},
};

/// What containerd's CRI says of all containers of a pod together, on its sandbox container.
const SANDBOX_MEMORY: &str = "io.kubernetes.cri.sandbox-memory";
const SANDBOX_CPU_QUOTA: &str = "io.kubernetes.cri.sandbox-cpu-quota";
const SANDBOX_CPU_PERIOD: &str = "io.kubernetes.cri.sandbox-cpu-period";
/// Memory of a pod's microVM where nothing says it.
pub(super) const DEFAULT_MIB: u64 = 512;
/// What the agent calls a pod's shared memory.
const SHM: &str = "shm";

/// What a container is to a pod that is one microVM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PodPart {
    /// The one that makes the microVM.
    Sandbox,
    /// One of those that become containers in it.
    Member {
        /// What the agent calls the sandbox container.
        sandbox: String,
        /// What the agent calls the pod's containers, by the process that stands for each on the host.
        processes: BTreeMap<i32, String>,
    },
}

/// Whether a pod's sandbox container asks for one microVM for all of the pod.
///
/// # Errors
///
/// The annotation has a value that it can't have.
pub fn is_pod_microvm(spec: &Spec) -> std::result::Result<bool, SpecError> {
    let value = spec
        .annotations()
        .as_ref()
        .and_then(|all| all.get(annotations::POD));
    value.map_or(Ok(false), |value| annotations::pod(value))
}

/// The limits of a pod's containers together, as far as they are said.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct PodLimits {
    pub(super) memory_bytes: Option<u64>,
    pub(super) cpus: Option<u64>,
}

impl PodLimits {
    pub(super) fn of(annotations: &Annotations) -> Self {
        // An engine's own words, with zero or less for no limit.
        let number = |name: &str| -> Option<u64> {
            let value = annotations.all.get(name)?.parse().ok()?;
            Some(value).filter(|value| *value != 0)
        };
        let cpus = match (number(SANDBOX_CPU_QUOTA), number(SANDBOX_CPU_PERIOD)) {
            (Some(quota), Some(period)) => Some(quota.div_ceil(period)),
            _ => None,
        };
        Self {
            memory_bytes: number(SANDBOX_MEMORY),
            cpus,
        }
    }
}

/// The process whose namespace a path names, as in `/proc/7/ns/pid`.
fn process_of(path: &Path) -> Option<i32> {
    let rest = path.strip_prefix("/proc").ok()?;
    rest.components().next()?.as_os_str().to_str()?.parse().ok()
}

/// Which containers' namespaces a container of the pod has.
pub(super) fn joined(
    part: &PodPart,
    path_of: impl Fn(&str) -> Option<std::path::PathBuf>,
) -> Result<JoinedNamespaces> {
    let PodPart::Member { sandbox, processes } = part else {
        return Ok(JoinedNamespaces::default());
    };
    let known = |path: &Path| process_of(path).and_then(|pid| processes.get(&pid)).cloned();
    // Engines may name these by files of their own, which are the sandbox's.
    let shared = |kind: &str| {
        path_of(kind).map_or_else(String::new, |path| {
            known(&path).unwrap_or_else(|| sandbox.clone())
        })
    };
    let pid = match path_of("pid") {
        None => String::new(),
        Some(path) => match known(&path) {
            Some(container) => container,
            None => {
                return unsupported(
                    "linux.namespaces: pid",
                    format!(
                        "the container can't join {}: that is no process of a container of its pod",
                        path.display()
                    ),
                );
            }
        },
    };
    Ok(JoinedNamespaces {
        ipc: shared("ipc"),
        uts: shared("uts"),
        pid,
        ..JoinedNamespaces::default()
    })
}

/// Makes shared memory that of the pod, where the container has the pod's IPC namespace.
pub(super) fn share_memory(part: &PodPart, joined: &JoinedNamespaces, mounts: &mut [Mount]) {
    if matches!(part, PodPart::Member { .. }) && joined.ipc.is_empty() {
        return;
    }
    let is_shm = |mount: &&mut Mount| mount.destination == "/dev/shm" && mount.type_ == "tmpfs";
    for mount in mounts.iter_mut().filter(is_shm) {
        SHM.clone_into(&mut mount.common_tmpfs);
    }
}

/// Has each container's memory counted: the microVM's is that of several.
pub(super) fn count_memory(limits: &mut Resources) {
    if !limits.files.iter().any(|file| file.name == "memory.max") {
        limits.files.push(CgroupFile {
            name: "memory.max".into(),
            value: "max".into(),
            ..CgroupFile::default()
        });
    }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use serde_json::json;

    use super::*;

    fn member() -> PodPart {
        PodPart::Member {
            sandbox: "pause".into(),
            processes: BTreeMap::from([(7, "pause".to_owned()), (8, "web".to_owned())]),
        }
    }

    #[test]
    fn namespaces_are_those_of_the_container_behind_the_process() {
        let paths = |kind: &str| match kind {
            "ipc" => Some(PathBuf::from("/proc/7/ns/ipc")),
            "uts" => Some(PathBuf::from("/run/names/uts")),
            "pid" => Some(PathBuf::from("/proc/8/ns/pid")),
            _ => None,
        };
        let joined = joined(&member(), paths).unwrap();
        assert_eq!(
            (joined.ipc.as_str(), joined.uts.as_str(), joined.pid.as_str()),
            ("pause", "pause", "web")
        );
    }

    #[test]
    fn processes_of_others_are_not_joined() {
        for path in ["/proc/9/ns/pid", "/proc/self/ns/pid", "/run/names/pid"] {
            let paths = |kind: &str| (kind == "pid").then(|| PathBuf::from(path));
            let error = joined(&member(), paths).unwrap_err().to_string();
            assert!(error.contains(path), "{error}");
        }
    }

    #[test]
    fn limits_of_a_pod_are_read_where_there_are_any() {
        let limits = |memory: &str, quota: &str| {
            let spec = json!({"ociVersion": "1.2.0", "annotations": {
                SANDBOX_MEMORY: memory, SANDBOX_CPU_QUOTA: quota, SANDBOX_CPU_PERIOD: "100000"}});
            let annotations = annotations::translate(&serde_json::from_value(spec).unwrap()).unwrap();
            PodLimits::of(&annotations)
        };
        let some = limits("268435456", "150000");
        assert_eq!((some.memory_bytes, some.cpus), (Some(256 << 20), Some(2)));
        assert_eq!(limits("0", "0"), PodLimits::default());
        assert_eq!(limits("", "-1"), PodLimits::default());
    }
}
