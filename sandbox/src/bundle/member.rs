//! The monitor of a container in the microVM of its pod, from its start until the container is created.
//!
//! What the microVM's own monitor does for a container alone is done here for one of several, but for what it has of the host:
//! that goes to the pod's monitor, which shares it. What fails here is undone by the end of this process's connection there.

use std::{
    collections::BTreeMap,
    os::fd::{AsFd as _, BorrowedFd},
    path::Path,
    time::Duration,
};

use agent_protocol::CreateContainerRequest;

use super::{
    cgroup::{HostCgroups, host_path},
    control::Bundles,
    error::{BundleError, Result},
    home::{Home, sandbox_id},
    launch::{Created, Moment, create_in_guest, enter_network, request_of, wait_for_hooks},
    machine::{Machine, PodLink},
    mount_view::MountView,
    pod::joined,
    pod_shares::WantedShare,
    protocol,
    record::{BundleRecord, BundleStatus, PodRole},
    relay::{AllSignals, BundleStdio, Ends},
};
use crate::{
    SandboxError,
    container_record::RunInfo,
    monitor::Connection,
    oci_spec::{PodPart, Policy, translate_in_pod},
    shares::{self, ShareSpec},
};

/// How long the pod's monitor may take to share what a container needs.
const JOIN_PATIENCE: Duration = Duration::from_secs(60);

/// Makes the container in the microVM of the container `sandbox`, which is beneath the same root.
pub(super) fn launch(
    home: &Home,
    record: &mut BundleRecord,
    stdio: BundleStdio,
    client: &mut Connection,
    (sandbox, hooks, systemd_cgroup): (&str, bool, bool),
) -> Result<Created> {
    let bundles = Bundles::open(home.path().parent().unwrap_or(Path::new("/")))?;
    let spec = home.spec()?;
    let policy = Policy {
        systemd_cgroup,
        ..Policy::of_host()
    };
    let part = PodPart::Member {
        sandbox: sandbox_id(sandbox).as_str().to_owned(),
        processes: processes_of(&bundles, sandbox)?,
    };
    let translated = translate_in_pod(&spec, &record.bundle, &policy, Some(&part));
    let mut translated = translated.map_err(SandboxError::from)?;
    // For who looks it up by this process. The interface is the microVM's already.
    enter_network(&translated.network)?;
    let mut cgroups = HostCgroups::planned(&host_path(translated.host_cgroup.as_ref(), &record.id));
    record.cgroups = cgroups.directories();
    record.run = Some(RunInfo::of_this_process()?);
    home.write(record)?;
    record.cgroups = cgroups.make()?;
    cgroups.join()?;
    if hooks {
        wait_for_hooks(client)?;
    }
    let input = stdio.has_input();
    let ends = Ends::new(stdio, record.terminal, translated.console_size)?;
    let view = MountView::planned(&translated)?;
    let mut request = request_of(record, &mut translated, input);
    let signals = AllSignals::take()?;
    let mut link = bundles.connect(sandbox)?.ok_or_else(|| no_pod(sandbox))?;
    let (indices, memory_mib) = join(&mut link, record, &translated.shares)?;
    record.memory_mib = memory_mib;
    place(&mut request, &indices)?;
    home.borrow_vsock(sandbox)?;
    let agent = create_in_guest(home, &request, Moment::Further)?;
    if let Some(view) = &view {
        view.show_root()?;
    }
    record.status = BundleStatus::Created;
    home.write(record)?;
    Ok(Created {
        agent,
        machine: Machine::Pods(PodLink::new(link)),
        view,
        ends,
        input,
        signals,
    })
}

fn no_pod(sandbox: &str) -> BundleError {
    BundleError::Monitor {
        message: format!("the microVM of the pod, container {sandbox}, has ended"),
    }
}

/// What the agent calls the containers of a pod that live, by their processes on the host.
fn processes_of(bundles: &Bundles, sandbox: &str) -> Result<BTreeMap<i32, String>> {
    let mut processes = BTreeMap::new();
    for state in bundles.list()? {
        let is_of_pod = match &state.pod {
            PodRole::Sandbox => state.id == sandbox,
            PodRole::Member { sandbox: other } => other == sandbox,
            PodRole::Alone => false,
        };
        if is_of_pod && state.pid != 0 {
            processes.insert(state.pid, state.sandbox_id.as_str().to_owned());
        }
    }
    Ok(processes)
}

/// Has the pod's monitor share what the container needs: by which indices, and how much memory the microVM has.
fn join(link: &mut Connection, record: &BundleRecord, wanted: &[ShareSpec]) -> Result<(Vec<u32>, u64)> {
    let open = shares::open_all(wanted)?;
    let fds: Vec<BorrowedFd<'_>> = open.iter().map(|share| share.root.as_fd()).collect();
    let request = protocol::Request::Join {
        container: record.sandbox_id.clone(),
        shares: wanted.iter().map(WantedShare::from).collect(),
    };
    link.send(&request, &fds).map_err(|_| SandboxError::MonitorGone)?;
    loop {
        if let Some(answer) = joined(link.wait(Some(JOIN_PATIENCE))?)? {
            return Ok(answer);
        }
    }
}

/// Replaces the container's own numbers of its shares by those of the microVM.
fn place(request: &mut CreateContainerRequest, indices: &[u32]) -> Result<()> {
    let index_of = |share: &mut Option<u32>| -> Result<()> {
        let Some(own) = *share else { return Ok(()) };
        let index = usize::try_from(own).ok().and_then(|own| indices.get(own));
        *share = Some(*index.ok_or(SandboxError::MonitorGone)?);
        Ok(())
    };
    for mount in &mut request.mounts {
        index_of(&mut mount.share)?;
    }
    match request.rootfs.as_mut() {
        Some(rootfs) => index_of(&mut rootfs.share),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use agent_protocol::{Mount, Rootfs};

    use super::*;

    #[test]
    fn shares_are_found_by_the_numbers_of_the_microvm() {
        let mut request = CreateContainerRequest {
            rootfs: Some(Rootfs {
                share: Some(1),
                ..Rootfs::default()
            })
            .into(),
            mounts: vec![
                Mount {
                    share: Some(0),
                    ..Mount::default()
                },
                Mount::default(),
            ],
            ..CreateContainerRequest::default()
        };
        place(&mut request, &[40, 41]).unwrap();
        assert_eq!(request.mounts[0].share, Some(40));
        assert_eq!(request.mounts[1].share, None);
        assert_eq!(request.rootfs.share, Some(41));
        assert!(place(&mut request, &[40, 41]).is_err());
    }
}
