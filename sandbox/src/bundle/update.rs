//! Other limits for a container that is there: on the host for the microVM, in the guest for its processes.

use agent_protocol::{UpdateContainer, UpdateContainerRequest};
use oci_spec::runtime::LinuxResources;

use super::{
    cgroup::{HostCgroups, HostLimits},
    control::Bundles,
    error::{BundleError, Result},
    record::{BundleStatus, PodRole},
};
use crate::{SandboxError, oci_spec::translate_resources};

impl HostLimits {
    /// What is given of CPU time and processors. Memory is the microVM's size, which can't change.
    pub(super) fn of_cpu(resources: &LinuxResources) -> Self {
        let cpu = resources.cpu().clone().unwrap_or_default();
        let given = |text: &Option<String>| text.clone().filter(|text| !text.is_empty());
        Self {
            memory_bytes: None,
            cpu_shares: cpu.shares().filter(|shares| *shares != 0),
            cpu_quota_us: cpu.quota().filter(|quota| *quota != 0),
            cpu_period_us: cpu.period().filter(|period| *period != 0),
            cpus: given(cpu.cpus()),
            memory_nodes: given(cpu.mems()),
        }
    }
}

impl Bundles {
    /// Changes limits; what isn't given stays as it is.
    ///
    /// # Errors
    ///
    /// The container has stopped, or a limit is impossible.
    pub fn update(&self, id: &str, resources: &LinuxResources) -> Result<()> {
        let record = self.require(id)?;
        if matches!(record.status, BundleStatus::Stopped | BundleStatus::Creating) {
            return Err(BundleError::NotRunning);
        }
        let limit = resources.memory().and_then(|memory| memory.limit()).unwrap_or(0);
        let size_mib = record.memory_mib;
        if u64::try_from(limit).is_ok_and(|bytes| bytes > size_mib << 20) {
            return Err(SandboxError::InvalidOption {
                option: "memory.limit",
                problem: format!(
                    "{limit} bytes are more than the {size_mib} MiB of the microVM, whose size doesn't change"
                ),
            }
            .into());
        }
        let request = UpdateContainerRequest {
            container_id: record.sandbox_id.as_str().to_owned(),
            resources: Some(translate_resources(resources).map_err(SandboxError::from)?).into(),
            ..UpdateContainerRequest::default()
        };
        let (record, mut agent) = self.agent(id)?;
        agent
            .call::<UpdateContainer>(&request)
            .map_err(BundleError::from_agent)?;
        if matches!(record.pod, PodRole::Member { .. }) {
            // On the host there is nothing of it to be limited.
            return Ok(());
        }
        HostCgroups::existing(&record.cgroups).limit(&HostLimits::of_cpu(resources))
    }
}
