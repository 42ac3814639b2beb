//! `annotations` with the prefix `io.hull.`, which say what a microVM needs to know and the specification has no field for.
//! All others are handed on as they are. They may come from who runs the container, so each is bounded and checked.

use std::collections::BTreeMap;

use ::oci_spec::runtime::Spec;

use super::error::{Result, invalid};
use crate::spec::{MAX_VCPUS, MIN_MEMORY_MIB};

/// Everything with this prefix is ours; what of it isn't known is a mistake.
const PREFIX: &str = "io.hull.";
/// Memory of the microVM.
const MEMORY_MIB: &str = "io.hull.memory_mib";
/// vCPUs of the microVM.
const VCPUS: &str = "io.hull.vcpus";
/// Words for the guest kernel's command line.
const KERNEL_PARAMS: &str = "io.hull.kernel_params";
/// What becomes of a namespace that would be the host's.
pub(super) const HOST_NAMESPACES: &str = "io.hull.host_namespaces";
/// How a snapshotter's root filesystem gets into the microVM: see [`crate::layers`].
const ROOTFS: &str = "io.hull.rootfs";
const SHARED: &str = "shared";

/// Whether a container's root filesystem shall be shared as it is mounted on the host, whatever is known of its layers.
#[must_use]
pub fn wants_shared_rootfs(spec: &Spec) -> bool {
    let annotations = spec.annotations().as_ref();
    annotations
        .and_then(|all| all.get(ROOTFS))
        .is_some_and(|value| value == SHARED)
}

/// What a pod is made of.
pub(super) const POD: &str = "io.hull.pod";

/// All words together; the command line has 2048 bytes.
const MAX_KERNEL_PARAMS_BYTES: usize = 512;
/// Words of the guest kernel's command line that a container may have: none of them reaches beyond its own kernel, and
/// none takes the agent or the root filesystem from it. Those that end in a dot are a beginning.
const ALLOWED_PARAMS: [&str; 10] = [
    "default_hugepagesz",
    "hugepages",
    "hugepagesz",
    "log_buf_len",
    "mitigations",
    "preempt",
    "psi",
    "sysctl.",
    "transparent_hugepage",
    "zswap.",
];

/// What the annotations say.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Annotations {
    pub(super) memory_mib: Option<u64>,
    pub(super) vcpus: Option<u8>,
    pub(super) kernel_params: Vec<String>,
    pub(super) private_for_host: bool,
    pub(super) pod: bool,
    pub(super) all: BTreeMap<String, String>,
}

pub(super) fn translate(spec: &Spec) -> Result<Annotations> {
    let mut annotations = Annotations::default();
    for (key, value) in spec.annotations().iter().flatten() {
        if key.is_empty() {
            return invalid("annotations", "has an empty key");
        }
        annotations.all.insert(key.clone(), value.clone());
        if key.starts_with(PREFIX) {
            annotations.take(key, value)?;
        }
    }
    Ok(annotations)
}

impl Annotations {
    fn take(&mut self, key: &str, value: &str) -> Result<()> {
        let field = || format!("annotations.{key}");
        match key {
            MEMORY_MIB => {
                let memory = value.parse().ok().filter(|memory| *memory >= MIN_MEMORY_MIB);
                self.memory_mib = memory;
                if memory.is_none() {
                    return invalid(
                        field(),
                        format!("{value:?} is not a number of MiB, {MIN_MEMORY_MIB} at least"),
                    );
                }
            }
            VCPUS => {
                let vcpus = value.parse().ok().filter(|vcpus| (1..=MAX_VCPUS).contains(vcpus));
                self.vcpus = vcpus;
                if vcpus.is_none() {
                    return invalid(
                        field(),
                        format!("{value:?} is not a number from 1 to {MAX_VCPUS}"),
                    );
                }
            }
            KERNEL_PARAMS => self.kernel_params = kernel_params(value)?,
            HOST_NAMESPACES => match value {
                "private" => self.private_for_host = true,
                "refuse" => self.private_for_host = false,
                _ => return invalid(field(), format!("{value:?} is neither private nor refuse")),
            },
            POD => self.pod = pod(value)?,
            ROOTFS => {
                if !["layers", SHARED].contains(&value) {
                    return invalid(field(), format!("{value:?} is neither layers nor {SHARED}"));
                }
            }
            _ => {
                return invalid(
                    field(),
                    format!(
                        "is not known; there are {MEMORY_MIB}, {VCPUS}, {KERNEL_PARAMS}, {HOST_NAMESPACES}, {POD} and {ROOTFS}"
                    ),
                );
            }
        }
        Ok(())
    }
}

/// Whether a pod is one microVM.
pub(super) fn pod(value: &str) -> Result<bool> {
    match value {
        "microvm" => Ok(true),
        "separate" => Ok(false),
        _ => invalid(
            format!("annotations.{POD}"),
            format!(
                "{value:?} is neither microvm, for one microVM for all of the pod, nor separate, for one for each container"
            ),
        ),
    }
}

fn kernel_params(text: &str) -> Result<Vec<String>> {
    let wrong = |problem: String| invalid(format!("annotations.{KERNEL_PARAMS}"), problem);
    if text.len() > MAX_KERNEL_PARAMS_BYTES {
        return wrong(format!("is longer than {MAX_KERNEL_PARAMS_BYTES} bytes"));
    }
    let mut params = Vec::new();
    for word in text.split_ascii_whitespace() {
        let name = word.split_once('=').map_or(word, |(name, _)| name);
        let allowed = ALLOWED_PARAMS
            .iter()
            .any(|allowed| name == *allowed || allowed.ends_with('.') && name.starts_with(allowed));
        if !allowed {
            return wrong(format!(
                "{name:?} is not one of {}",
                ALLOWED_PARAMS
                    .map(|name| name.to_owned() + if name.ends_with('.') { "*" } else { "" })
                    .join(", ")
            ));
        }
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"._-/:,=".contains(&byte);
        if !word.bytes().all(plain) {
            return wrong(format!(
                "{word:?} has a character other than a-z A-Z 0-9 . _ - / : , ="
            ));
        }
        params.push(word.to_owned());
    }
    Ok(params)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn annotations(key: &str, value: &str) -> Result<Annotations> {
        let spec = json!({"ociVersion": "1.2.0", "annotations": {key: value, "other": "kept"}});
        translate(&serde_json::from_value(spec).unwrap())
    }

    #[test]
    fn microvm_is_sized_by_annotations() {
        assert_eq!(annotations(MEMORY_MIB, "512").unwrap().memory_mib, Some(512));
        assert_eq!(annotations(VCPUS, "4").unwrap().vcpus, Some(4));
        let params = annotations(KERNEL_PARAMS, "mitigations=off  sysctl.vm.max_map_count=262144").unwrap();
        assert_eq!(
            params.kernel_params,
            ["mitigations=off", "sysctl.vm.max_map_count=262144"]
        );
        assert!(annotations(HOST_NAMESPACES, "private").unwrap().private_for_host);
        assert!(annotations(POD, "microvm").unwrap().pod && !annotations(POD, "separate").unwrap().pod);
        assert_eq!(params.all["other"], "kept");
    }

    #[test]
    fn annotation_out_of_bounds_or_unknown_is_refused_by_name() {
        for (key, value) in [
            (MEMORY_MIB, "8"),
            (MEMORY_MIB, "much"),
            (VCPUS, "0"),
            (VCPUS, "4000"),
            (KERNEL_PARAMS, "init=/bin/sh"),
            (KERNEL_PARAMS, "sysctl.kernel.x=\"a"),
            (KERNEL_PARAMS, "root=/dev/vdb"),
            (HOST_NAMESPACES, "yes"),
            (POD, "true"),
            (ROOTFS, "mounted"),
            ("io.hull.memory", "512"),
        ] {
            let error = annotations(key, value).unwrap_err().to_string();
            assert!(error.starts_with(&format!("annotations.{key}: ")), "{error}");
        }
    }
}
