//! What a Kubernetes pod's containers get, and what they can't have, when each is a microVM.
//!
//! A pod's containers expect to share namespaces. A microVM has namespaces of its own, so (what isn't here is
//! `sandbox::oci_spec`'s to decide):
//!
//! | shared in a pod | here |
//! |---|---|
//! | network | the pod's interface belongs to one container at a time, the first that lives; others have a loopback only |
//! | host name | each container is given the pod's, which is that of the pod's process |
//! | IPC, `/dev/shm` | each container has its own |
//! | processes (`shareProcessNamespace`) | refused |
//!
//! A pod that asks for it is one microVM: then its containers share all of that, as `sandbox::bundle` has it.
//!
//! containerd tells by annotations which container is which.

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
};

use oci_spec::runtime::{LinuxNamespace, LinuxNamespaceType, Spec};
use sandbox::{
    SandboxError,
    bundle::{BundleError, PodRole},
    oci_spec::is_pod_microvm,
};

use crate::error::{Result, ShimError};

/// Annotations that tell a pod's sandbox container from its others.
const KINDS: [&str; 2] = [
    "io.kubernetes.cri.container-type",
    "io.kubernetes.cri-o.ContainerType",
];

/// Annotations that name a container's pod by its sandbox.
const SANDBOXES: [&str; 2] = ["io.kubernetes.cri.sandbox-id", "io.kubernetes.cri-o.SandboxID"];
const POD: &str = "annotations.io.hull.pod";

/// What a container is to its pod.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// It is no part of one.
    None,
    /// It stands for the pod, and runs no program of the user's.
    Sandbox,
    /// It is one of those that do.
    Member,
}

impl Role {
    /// As the annotations say.
    pub fn of(spec: &Spec) -> Self {
        let annotations = spec.annotations().as_ref();
        let kind = KINDS
            .iter()
            .find_map(|name| annotations.and_then(|annotations| annotations.get(*name)));
        match kind.map(String::as_str) {
            Some("sandbox") => Self::Sandbox,
            Some("container") => Self::Member,
            _ => Self::None,
        }
    }
}

/// What a container is to the microVM of its pod, where the pod is one; `is_pods` says so of a sandbox.
pub fn role_in_microvm(spec: &Spec, role: Role, is_pods: impl Fn(&str) -> bool) -> Result<PodRole> {
    let wanted = is_pod_microvm(spec).map_err(|error| BundleError::from(SandboxError::from(error)))?;
    match role {
        Role::None => Ok(PodRole::Alone),
        Role::Sandbox if wanted => Ok(PodRole::Sandbox),
        Role::Sandbox => Ok(PodRole::Alone),
        Role::Member => {
            let sandbox = SANDBOXES
                .iter()
                .find_map(|name| spec.annotations().as_ref()?.get(*name))
                .filter(|sandbox| is_pods(sandbox));
            match sandbox {
                Some(sandbox) => Ok(PodRole::Member {
                    sandbox: sandbox.clone(),
                }),
                None if wanted => Err(ShimError::Refused {
                    field: POD.into(),
                    problem: "the pod wasn't made as one microVM, or that has ended; the annotation has to be on the pod, and \
                              in the runtime's pod_annotations"
                        .into(),
                }),
                None => Ok(PodRole::Alone),
            }
        }
    }
}

/// The path of the network namespace a configuration joins.
pub fn network_namespace(spec: &Spec) -> Option<PathBuf> {
    namespaces(spec)
        .iter()
        .find(|namespace| namespace.typ() == LinuxNamespaceType::Network)
        .and_then(|namespace| namespace.path().clone())
}

fn namespaces(spec: &Spec) -> &[LinuxNamespace] {
    let linux = spec.linux().as_ref();
    linux
        .and_then(|linux| linux.namespaces().as_deref())
        .unwrap_or_default()
}

/// Which container of the shim has a network namespace's interface.
#[derive(Debug, Default)]
pub struct Interfaces(Mutex<HashMap<PathBuf, String>>);

impl Interfaces {
    /// True if the interface is this container's now.
    fn claim(&self, namespace: &Path, id: &str) -> bool {
        let mut owners = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        owners
            .entry(namespace.to_owned())
            .or_insert_with(|| id.to_owned())
            == id
    }

    /// Somebody else may have it.
    pub fn release(&self, id: &str) {
        let mut owners = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        owners.retain(|_, owner| owner != id);
    }
}

/// Makes a member's configuration one for a microVM of its own: only one of them has the pod's interface.
pub fn separate(spec: &mut Spec, id: &str, interfaces: &Interfaces) {
    let Some(path) = network_namespace(spec) else {
        return;
    };
    if interfaces.claim(&path, id) {
        return;
    }
    tracing::warn!(
        id,
        "the pod's network interface is another container's; this one has a loopback only"
    );
    let namespaces = spec
        .linux_mut()
        .as_mut()
        .and_then(|linux| linux.namespaces_mut().as_mut());
    for namespace in namespaces.into_iter().flatten() {
        if namespace.typ() == LinuxNamespaceType::Network {
            namespace.set_path(None);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(text: &str) -> Spec {
        serde_json::from_str(text).unwrap()
    }

    const MEMBER: &str = r#"{"ociVersion":"1.1.0",
        "annotations":{"io.kubernetes.cri.container-type":"container"},
        "linux":{"namespaces":[{"type":"pid"},{"type":"ipc","path":"/proc/7/ns/ipc"},
            {"type":"network","path":"/proc/7/ns/net"},{"type":"mount"}]}}"#;

    #[test]
    fn annotations_tell_the_roles() {
        assert_eq!(Role::of(&spec(MEMBER)), Role::Member);
        let sandbox =
            r#"{"ociVersion":"1.1.0","annotations":{"io.kubernetes.cri.container-type":"sandbox"}}"#;
        assert_eq!(Role::of(&spec(sandbox)), Role::Sandbox);
        assert_eq!(Role::of(&spec(r#"{"ociVersion":"1.1.0"}"#)), Role::None);
    }

    #[test]
    fn pod_is_one_microvm_where_its_sandbox_says_so() {
        let with = |kind: &str, pod: &str| {
            let text = format!(
                r#"{{"ociVersion":"1.1.0","annotations":{{"io.kubernetes.cri.container-type":"{kind}",
                "io.kubernetes.cri.sandbox-id":"pod1"{pod}}}}}"#
            );
            spec(&text)
        };
        let (asked, not) = (r#","io.hull.pod":"microvm""#, "");
        let role = |spec: &Spec, is_pods: bool| {
            role_in_microvm(spec, Role::of(spec), |id| {
                assert_eq!(id, "pod1");
                is_pods
            })
        };
        assert_eq!(role(&with("sandbox", asked), false).unwrap(), PodRole::Sandbox);
        assert_eq!(role(&with("sandbox", not), false).unwrap(), PodRole::Alone);
        let member = PodRole::Member {
            sandbox: "pod1".into(),
        };
        assert_eq!(role(&with("container", asked), true).unwrap(), member);
        assert_eq!(role(&with("container", not), true).unwrap(), member);
        assert_eq!(role(&with("container", not), false).unwrap(), PodRole::Alone);
        let error = role(&with("container", asked), false).unwrap_err().to_string();
        assert!(error.contains("io.hull.pod"), "{error}");
        let wrong = r#","io.hull.pod":"yes""#;
        let error = role(&with("sandbox", wrong), false).unwrap_err();
        assert!(error.chain().contains("neither microvm"), "{}", error.chain());
    }

    #[test]
    fn first_member_keeps_the_interface_until_it_ends() {
        let interfaces = Interfaces::default();
        let (mut first, mut second, mut third) = (spec(MEMBER), spec(MEMBER), spec(MEMBER));
        separate(&mut first, "a", &interfaces);
        separate(&mut second, "b", &interfaces);
        assert!(network_namespace(&first).is_some() && network_namespace(&second).is_none());
        interfaces.release("a");
        separate(&mut third, "c", &interfaces);
        assert!(network_namespace(&third).is_some());
    }
}
