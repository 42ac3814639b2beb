//! The size of the microVM: what the limits and annotations come to.

use ::oci_spec::runtime::LinuxResources;

use super::{
    Policy,
    annotations::Annotations,
    error::Result,
    pod::{self, PodLimits},
    resources,
    warnings::Warnings,
};
use crate::spec::{MAX_VCPUS, MIN_MEMORY_MIB};

/// What the guest's kernel and the agent need beside the container's limit: themselves, and 1/32 for what the kernel
/// keeps about each page.
const GUEST_MIB: u64 = 48;
const PER_PAGE_SHARE: u64 = 32;

/// A microVM's size.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Size {
    pub(super) memory_mib: u64,
    pub(super) vcpus: u8,
}

/// Memory that lets a container use all of its limit.
fn for_limit(limit_bytes: u64) -> u64 {
    let limit_mib = limit_bytes.div_ceil(1 << 20);
    limit_mib
        .saturating_add(limit_mib / PER_PAGE_SHARE)
        .saturating_add(GUEST_MIB)
        .max(MIN_MEMORY_MIB)
}

pub(super) fn translate(
    resources: Option<&LinuxResources>,
    annotations: &Annotations,
    (policy, pod): (&Policy, Option<PodLimits>),
    warnings: &mut Warnings,
) -> Result<Size> {
    let most = policy.host_memory_mib.max(MIN_MEMORY_MIB);
    let default_mib = pod.map_or(policy.default_memory_mib, |_| pod::DEFAULT_MIB);
    let of_pod = pod.unwrap_or_default();
    let limit = resources.and_then(resources::memory_limit);
    let memory_mib = match (annotations.memory_mib, of_pod.memory_bytes.or(limit)) {
        (Some(given), _) => given,
        (None, Some(limit)) => for_limit(limit).min(most),
        (None, None) => default_mib.min(most),
    };
    let vcpus = match annotations.vcpus {
        Some(given) => given,
        None => {
            let limit = resources.map_or(Ok(None), resources::cpus)?;
            let wanted = of_pod.cpus.or(limit).unwrap_or(1);
            let most = u64::from(policy.host_cpus).clamp(1, MAX_VCPUS.into());
            if wanted > most {
                warnings.add(format!(
                    "linux.resources.cpu: the microVM has {most} of the {wanted} CPUs that the limit allows"
                ));
            }
            u8::try_from(wanted.clamp(1, most)).unwrap_or(MAX_VCPUS)
        }
    };
    Ok(Size { memory_mib, vcpus })
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn size(resources: Value, annotations: &Annotations) -> (u64, u8) {
        size_in(resources, annotations, None)
    }

    fn size_in(resources: Value, annotations: &Annotations, pod: Option<PodLimits>) -> (u64, u8) {
        let policy = Policy {
            host_cpus: 8,
            host_memory_mib: 4096,
            hostname: "host".into(),
            default_memory_mib: 256,
            systemd_cgroup: false,
        };
        let resources: LinuxResources = serde_json::from_value(resources).unwrap();
        let mut warnings = Warnings::default();
        let size = translate(Some(&resources), annotations, (&policy, pod), &mut warnings).unwrap();
        (size.memory_mib, size.vcpus)
    }

    #[test]
    fn microvm_has_room_for_the_limit_and_its_own_kernel() {
        let none = Annotations::default();
        assert_eq!(size(json!({}), &none), (256, 1));
        assert_eq!(size(json!({"memory": {"limit": 1}}), &none), (64, 1));
        assert_eq!(size(json!({"memory": {"limit": 67_108_864}}), &none), (114, 1));
        assert_eq!(size(json!({"memory": {"limit": i64::MAX}}), &none), (4096, 1));
        assert_eq!(
            size(json!({"cpu": {"quota": 250_000, "period": 100_000}}), &none),
            (256, 3)
        );
        assert_eq!(size(json!({"cpu": {"quota": 6_400_000}}), &none), (256, 8));
    }

    #[test]
    fn microvm_of_a_pod_has_room_for_the_limits_of_all_its_containers() {
        let none = Annotations::default();
        let nothing = PodLimits::default();
        assert_eq!(size_in(json!({}), &none, Some(nothing)), (512, 1));
        let limits = PodLimits {
            memory_bytes: Some(64 << 20),
            cpus: Some(3),
        };
        assert_eq!(size_in(json!({}), &none, Some(limits)), (114, 3));
        let given = Annotations {
            memory_mib: Some(200),
            ..Annotations::default()
        };
        assert_eq!(size_in(json!({}), &given, Some(limits)), (200, 3));
    }

    #[test]
    fn annotation_goes_over_what_the_limits_say() {
        let given = Annotations {
            memory_mib: Some(100),
            vcpus: Some(2),
            ..Annotations::default()
        };
        assert_eq!(
            size(
                json!({"memory": {"limit": 1 << 30}, "cpu": {"quota": 400_000}}),
                &given
            ),
            (100, 2)
        );
    }
}
