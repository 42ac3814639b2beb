//! The monitor of a bundle's container, from its start until the container is created.
//!
//! What fails here ends the microVM, which is this process's. The rest is the client's to remove, or that of whoever finds
//! a record that says `creating` in a home without an owner: the control groups are only empty when this process is gone.

use std::{
    fs::File,
    os::{
        fd::{AsFd as _, OwnedFd},
        unix::net::UnixStream,
    },
};

use agent_protocol::{CreateContainer, CreateContainerRequest, RPC_PORT};
use nix::sched::{CloneFlags, setns, unshare};

use super::{
    cgroup::{HostCgroups, HostLimits, host_path},
    error::{BundleError, Refusal, Result},
    home::Home,
    hooks::state_json,
    machine::{Machine, OwnMachine},
    member,
    mount_view::MountView,
    pod::Pod,
    pod_shares::PodShares,
    protocol::{self, LaunchRequest, Reply},
    record::{BundleRecord, BundleState, BundleStatus, PodRole},
    relay::{AllSignals, BundleStdio, Ends},
    server::Server,
};
use crate::{
    Components, SandboxError,
    agent_client::{AgentClient, CALL_TIMEOUT},
    container_record::RunInfo,
    layers::LayeredRootfs,
    lifecycle::{Shape, boot, wait_ready},
    monitor::{Connection, Incoming},
    network::{NetworkMode, Wiring, interfaces_here},
    oci_spec::{Network, PodPart, Policy, Translated, translate_in_pod},
    rootfs::{RootfsSpec, Writable},
    shares::{self, ShareSpec},
    stdio::connect_ports,
    vmm_client::{Vmm, check_kvm},
};

/// A microVM in which the container waits to be started.
#[derive(Debug)]
pub(super) struct Created {
    // The order of fields is the order of destruction.
    pub(super) agent: AgentClient,
    pub(super) machine: Machine,
    /// What the host sees of its mounts.
    pub(super) view: Option<MountView>,
    pub(super) ends: Ends,
    /// Whether the process has an input.
    pub(super) input: bool,
    pub(super) signals: AllSignals,
}

/// Serves one launch; the whole process is its own.
pub(crate) fn serve(
    mut connection: Connection,
    request: LaunchRequest,
    mut fds: impl Iterator<Item = OwnedFd>,
) {
    let Some(dir) = fds.next() else { return };
    let home = Home::inherited(request.home, dir);
    let stdio = BundleStdio::planned(request.stdio, fds);
    let Ok(Some(mut record)) = home.read() else { return };
    let (hooks, systemd_cgroup) = (request.hooks, request.systemd_cgroup);
    let created = match record.pod.clone() {
        PodRole::Member { sandbox } => {
            let options = (sandbox.as_str(), hooks, systemd_cgroup);
            member::launch(&home, &mut record, stdio, &mut connection, options)
        }
        _ => launch(
            &home,
            &mut record,
            &request.components,
            stdio,
            &mut connection,
            (hooks, systemd_cgroup, request.layers),
        ),
    };
    match created.and_then(|created| Server::new(home, record, created)) {
        Ok(server) => server.run(connection),
        // What this process was part of can only be removed when it is gone: by the client, or who finds it.
        Err(error) => drop(connection.send(&Reply::Failed(Refusal::from(&error)), &[])),
    }
}

fn launch(
    home: &Home,
    record: &mut BundleRecord,
    components: &Components,
    stdio: BundleStdio,
    client: &mut Connection,
    (hooks, systemd_cgroup, layers): (bool, bool, Option<LayeredRootfs>),
) -> Result<Created> {
    check_kvm()?;
    let spec = home.spec()?;
    let policy = Policy {
        systemd_cgroup,
        ..Policy::of_host()
    };
    let is_pods = record.pod == PodRole::Sandbox;
    let part = is_pods.then_some(PodPart::Sandbox);
    let translated = translate_in_pod(&spec, &record.bundle, &policy, part.as_ref());
    let mut translated = translated.map_err(SandboxError::from)?;
    record.memory_mib = translated.memory_mib;
    enter_network(&translated.network)?;
    if let Network::Join(path) = &translated.network {
        let (path, devices) = (path.clone(), 0);
        record.network = NetworkMode::Namespace { path, devices };
    }
    let mut cgroups = HostCgroups::planned(&host_path(translated.host_cgroup.as_ref(), &record.id));
    // Known before they are there, so that who finds this process killed can remove them.
    record.cgroups = cgroups.directories();
    record.run = Some(RunInfo::of_this_process()?);
    home.write(record)?;
    record.cgroups = cgroups.make()?;
    let mut limits = HostLimits {
        memory_bytes: Some(memory_of(translated.memory_mib)),
        ..HostLimits::of_cpu(&translated.host_resources)
    };
    if is_pods {
        // As little as a sandbox container needs, which is all the pod here.
        limits.cpu_shares = None;
    }
    cgroups.limit(&limits)?;
    cgroups.join()?;
    if hooks {
        wait_for_hooks(client)?;
    }
    let input = stdio.has_input();
    let ends = Ends::new(stdio, record.terminal, translated.console_size)?;
    let (rootfs, view) = plan_root(&mut translated, layers)?;
    let request = request_of(record, &mut translated, input);
    let disks = rootfs.open_disks(&components.agent_image)?;
    let shares = shares::open_all(&translated.shares)?;
    let shared = !shares.is_empty();
    let (pod, share_orders) = if is_pods {
        let (shares, orders) = PodShares::new(shares.len())?;
        (Some(Pod::new(shares)), Some(orders))
    } else {
        (None, None)
    };
    let mut vmm = Vmm::spawn(&components.vmm, &record.sandbox_id, record.jail_uid, shared)?;
    record.run = Some(RunInfo {
        vmm: Some(vmm.identity),
        ..RunInfo::of_this_process()?
    });
    home.write(record)?;
    let shape = Shape {
        vcpus: translated.vcpus,
        memory_mib: translated.memory_mib,
        disks,
        shares,
        share_orders,
        // Who fills the namespace later, as Docker does, finds one to fill.
        net: interfaces_here().map_err(SandboxError::from)?.max(1),
        kernel_params: std::mem::take(&mut translated.kernel_params),
    };
    let devices = shape.net;
    // Not before: a child inherits what is blocked. Until now a signal ends this process, and the creation with it.
    let signals = AllSignals::take()?;
    let ready = boot(home.listen_vsock()?, &mut vmm, components, shape)?;
    wait_ready(&mut vmm, &ready, client.as_fd())?;
    let agent = create_in_guest(home, &request, Moment::First)?;
    if let Some(view) = &view {
        view.show_root()?;
    }
    record.status = BundleStatus::Created;
    home.write(record)?;
    let own = OwnMachine {
        vmm,
        devices,
        wiring: Wiring::default(),
        pod,
    };
    Ok(Created {
        agent,
        machine: Machine::Own(Box::new(own)),
        view,
        ends,
        input,
        signals,
    })
}

/// What its root filesystem is, for the microVM and for who looks at it on the host. The root's share is the last one.
fn plan_root(
    translated: &mut Translated,
    layers: Option<LayeredRootfs>,
) -> Result<(RootfsSpec, Option<MountView>)> {
    let Some(LayeredRootfs { layers, snapshot }) = layers else {
        return Ok((RootfsSpec::default(), MountView::planned(translated)?));
    };
    if let Some(shown) = translated.shares.last_mut() {
        shown.read_only = true;
    }
    let view = MountView::planned(translated)?;
    translated.shares.pop();
    let share = u32::try_from(translated.shares.len()).unwrap_or(u32::MAX);
    translated.shares.push(ShareSpec {
        source: snapshot,
        exclusive: true,
        snapshot: true,
        ..ShareSpec::default()
    });
    let spec = RootfsSpec {
        layers,
        ..RootfsSpec::default()
    };
    let read_only = translated.request.rootfs.read_only;
    translated.request.rootfs = Some(spec.for_agent(read_only, Writable::Snapshot { share })).into();
    Ok((spec, view))
}

/// What a microVM of this size may use on the host: its memory, and what the VMM needs for itself and to keep files of
/// the guest at hand.
fn memory_of(memory_mib: u64) -> u64 {
    const OVERHEAD_MIB: u64 = 64;
    (memory_mib + memory_mib / 64 + OVERHEAD_MIB) << 20
}

/// Goes where the container's network is on the host; what its microVM is connected to is looked for from here.
pub(super) fn enter_network(network: &Network) -> Result<()> {
    match network {
        Network::Private => unshare(CloneFlags::CLONE_NEWNET)
            .map_err(SandboxError::system("making a network namespace"))
            .map_err(Into::into),
        Network::Join(path) => {
            let file = File::open(path).map_err(SandboxError::io("opening the network namespace", path))?;
            setns(file, CloneFlags::CLONE_NEWNET)
                .map_err(|errno| SandboxError::io("joining the network namespace", path)(errno.into()))
                .map_err(Into::into)
        }
    }
}

/// Lets the client run its hooks, which may change the root filesystem and the network.
pub(super) fn wait_for_hooks(client: &mut Connection) -> Result<()> {
    client
        .send(&Reply::Prepared, &[])
        .map_err(SandboxError::system("talking to the client"))?;
    loop {
        match client.wait::<protocol::Request>(None)? {
            Some((protocol::Request::Go, _)) => return Ok(()),
            Some(_) => {}
            None => match client.receive::<protocol::Request>() {
                Incoming::Nothing => {}
                _ => return Err(SandboxError::Cancelled.into()),
            },
        }
    }
}

/// What the agent is asked for.
pub(super) fn request_of(
    record: &BundleRecord,
    translated: &mut Translated,
    input: bool,
) -> CreateContainerRequest {
    let mut request = std::mem::take(&mut translated.request);
    record.sandbox_id.as_str().clone_into(&mut request.container_id);
    if let Some(process) = request.process.as_mut() {
        process.attach_stdin = input;
        process.attach_stdout = true;
        process.attach_stderr = !process.terminal;
    }
    if !request.start_hooks.is_empty() {
        let state = BundleState {
            status: BundleStatus::Created,
            ..BundleState::from(record.clone())
        };
        request.hook_state = state_json(&state).to_string().into_bytes();
    }
    request
}

/// Whether a microVM is new, which then gets its clock and its entropy with the container.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Moment {
    First,
    Further,
}

pub(super) fn create_in_guest(
    home: &Home,
    request: &CreateContainerRequest,
    which: Moment,
) -> Result<AgentClient> {
    let rpc: Option<UnixStream> = connect_ports(|| home.connect_vsock(), &[RPC_PORT])
        .map_err(|source| SandboxError::AgentConnection { source })?
        .pop();
    let rpc = rpc.ok_or(SandboxError::MonitorGone)?;
    let mut agent = AgentClient::new(rpc);
    let connect = agent.send_connect(which == Moment::First)?;
    let create = agent.send::<CreateContainer>(request)?;
    agent.finish_connect(&connect)?;
    agent
        .wait(&create, Some(CALL_TIMEOUT))
        .map_err(BundleError::from_agent)?;
    Ok(agent)
}
