//! A container's microVM from nothing to nothing.
//!
//! ```text
//!  spawn VMM ─► configure, start ─► agent ready ─► container created, its process started ─► exited
//!      │               │                │                        │                            │
//!      └───────────────┴─── any failure, a client that gives up ─┴────────────────────────────┴─► ended
//! ```
//!
//! Owner: the monitor, which holds the container's home. Thread: its only one.
//!
//! Invariant: a [`MicroVm`] owns everything of its own. Dropping it, at whatever point, ends the VMM and removes
//! the folder of its sockets; nothing has to be undone by hand.

use std::{
    fs::File,
    os::{
        fd::{AsFd as _, BorrowedFd, OwnedFd},
        unix::net::{UnixListener, UnixStream},
    },
    time::{Duration, Instant},
};

use agent_protocol::{
    ConfigureNetwork, ConnectResponse, CreateContainer, READY_PORT, RPC_PORT, Shutdown, StartProcess,
    WaitProcess,
};

use crate::{
    Components, ContainerRecord, Result, SandboxError, Status, Timing,
    agent_client::{AgentClient, CALL_TIMEOUT, Pending},
    attach::process_ref,
    container_record::{RunInfo, now_ms},
    container_store::Home,
    network::{Identity, Wiring},
    rootfs,
    run_dir::{RunDir, SocketDir},
    shares::{self, OpenShare},
    stdio::ProcessStreams,
    timing::{Stopwatch, microseconds},
    vmm_client::{Disk, VmParts, Vmm, Watched, check_kvm},
};

/// How long a microVM may take until its agent is ready. A guest that is stuck is the only reason to give up;
/// a host that runs more than it can is none.
const READY_TIMEOUT: Duration = Duration::from_secs(120);

/// The guest kernel's command line; the VMM adds what describes its devices. There is no PCI bus to look for,
/// rewriting locks for one CPU costs more than it saves, and a grace period that is waited for (joining a control
/// group, leaving a namespace) must not take ticks of a timer when the microVM does nothing else. Of interfaces there are
/// those the container is given, and none that a driver makes to begin with.
const CMDLINE: &str = "root=/dev/vda ro rootfstype=erofs init=/hull-agent reboot=t panic=-1 pci=off \
                       noreplace-smp rcupdate.rcu_expedited=1 dummy.numdummies=0 ifb.numifbs=0";
/// Added without a console: nothing waits for a port that isn't there.
const CMDLINE_SILENT: &str = "quiet loglevel=1 8250.nr_uarts=0";
/// Added with one.
const CMDLINE_CONSOLE: &str = "console=ttyS0 loglevel=7";

/// How long a guest may take to write its files to the disk and switch itself off.
const POWER_OFF_PATIENCE: Duration = Duration::from_secs(10);

/// A microVM with its container's process running in it.
#[derive(Debug)]
pub(crate) struct MicroVm {
    // The order of fields is the order of destruction: the VMM ends before the folder of its sockets goes.
    pub(crate) agent: AgentClient,
    pub(crate) vmm: Vmm,
    /// Taken back when the VMM has gone.
    _wiring: Wiring,
    pub(crate) sockets: SocketDir,
    /// Until the monitor takes them.
    pub(crate) streams: Option<ProcessStreams>,
    /// Answered when the container's process has exited.
    pub(crate) exit: Pending<WaitProcess>,
    pub(crate) timing: Timing,
    pub(crate) stopwatch: Stopwatch,
    keeps_files: bool,
}

/// What a launch is given.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Launch<'a> {
    pub(crate) home: &'a Home,
    pub(crate) run: &'a RunDir,
    pub(crate) components: &'a Components,
    /// Readable when the client has given up.
    pub(crate) cancel: BorrowedFd<'a>,
    /// How long the client has been busy before, for [`Timing`].
    pub(crate) client_us: u64,
}

/// Where the guest's console goes, if somebody asked for it.
fn open_console() -> Result<Option<File>> {
    let Some(path) = std::env::var_os("HULL_CONSOLE").filter(|path| !path.is_empty()) else {
        return Ok(None);
    };
    File::create(&path)
        .map(Some)
        .map_err(SandboxError::io("creating", path))
}

/// What a microVM is made of, beside the kernel.
#[derive(Debug)]
pub(crate) struct Shape {
    pub(crate) vcpus: u8,
    pub(crate) memory_mib: u64,
    pub(crate) disks: Vec<Disk>,
    pub(crate) shares: Vec<OpenShare>,
    /// Where further ones will come from.
    pub(crate) share_orders: Option<OwnedFd>,
    /// Network devices, to be connected later.
    pub(crate) net: usize,
    /// Further words for its kernel.
    pub(crate) kernel_params: Vec<String>,
}

/// A microVM that runs, and the stream on which its agent will say that it is ready.
pub(crate) fn boot(
    vsock: UnixListener,
    vmm: &mut Vmm,
    components: &Components,
    shape: Shape,
) -> Result<UnixStream> {
    let (ready, guest_end) = UnixStream::pair().map_err(SandboxError::system("creating a socket pair"))?;
    let console = open_console()?;
    let verbosity = if console.is_some() {
        CMDLINE_CONSOLE
    } else {
        CMDLINE_SILENT
    };
    let kernel = File::open(&components.kernel).map_err(SandboxError::io("opening", &components.kernel))?;
    let words: Vec<&str> = shape.kernel_params.iter().map(String::as_str).collect();
    let parts = VmParts {
        vcpus: shape.vcpus,
        memory_mib: shape.memory_mib,
        kernel,
        cmdline: [&[CMDLINE, verbosity], words.as_slice()].concat().join(" "),
        disks: shape.disks,
        shares: shape.shares,
        share_orders: shape.share_orders,
        vsock,
        guest_port: (READY_PORT, guest_end),
        console,
        net: shape.net,
    };
    vmm.start(&parts)?;
    Ok(ready)
}

/// Waits until the agent says that it is ready.
pub(crate) fn wait_ready(vmm: &mut Vmm, ready: &UnixStream, cancel: BorrowedFd<'_>) -> Result<()> {
    let deadline = Instant::now() + READY_TIMEOUT;
    if vmm.watch(ready.as_fd(), Some(cancel), deadline)? == Watched::TimedOut {
        let diagnosis = vmm.diagnosis();
        return Err(SandboxError::AgentTimeout {
            timeout: READY_TIMEOUT,
            diagnosis,
        });
    }
    Ok(())
}

impl MicroVm {
    /// Makes a microVM and a container in it, and starts the container's process. The record tells the processes from
    /// the moment there are any, and that the container runs once it does.
    pub(crate) fn launch(record: &mut ContainerRecord, launch: Launch<'_>) -> Result<Self> {
        let mut stopwatch = Stopwatch::start();
        let mut timing = Timing {
            client_us: launch.client_us,
            ..Timing::default()
        };
        let (home, components) = (launch.home, launch.components);
        record.spec.check()?;
        check_kvm()?;
        let mut disks = record.spec.rootfs.open_disks(&components.agent_image)?;
        if record.spec.storage_bytes.is_some() {
            disks.push(rootfs::open_writable(&home.writable_path())?);
        }
        let shares = shares::open_all(&record.spec.shares)?;
        let sockets = launch.run.create(&record.id)?;
        let jail_uid = record.jail_uid();
        let mut vmm = Vmm::spawn(&components.vmm, &record.id, jail_uid, !shares.is_empty())?;
        let shape = Shape {
            vcpus: record.spec.vcpus,
            memory_mib: record.spec.memory_mib,
            disks,
            shares,
            share_orders: None,
            net: record.spec.network.devices(),
            kernel_params: Vec::new(),
        };
        let ready = boot(sockets.listen_vsock()?, &mut vmm, components, shape)?;
        timing.vm_setup_us = microseconds(stopwatch.lap());
        // While the guest boots.
        record.run = Some(RunInfo {
            vmm: Some(vmm.identity),
            ..RunInfo::of_this_process()?
        });
        home.write(record)?;
        let wiring = connect(record, &mut vmm)?;

        wait_ready(&mut vmm, &ready, launch.cancel)?;
        let boot_us = microseconds(stopwatch.lap());
        let process = process_ref(record.id.as_str(), "");
        let connect = || sockets.connect_vsock();
        let ids = (record.id.as_str(), "");
        let (rpc, mut streams) = ProcessStreams::open_with(connect, RPC_PORT, ids, &record.spec.process)?;
        let mut accepted = rpc
            .try_clone()
            .map_err(SandboxError::system("duplicating a descriptor"))?;
        let mut agent = AgentClient::new(rpc);
        // All under way at once, and handled in order: one round trip. Whichever fails first says why.
        let connect = agent.send_connect(true)?;
        let request = record.spec.for_agent(&record.id, wiring.endpoint.as_ref())?;
        let create = agent.send::<CreateContainer>(&request)?;
        let network = match wiring.request.interfaces.is_empty() {
            true => None,
            false => Some(agent.send::<ConfigureNetwork>(&wiring.request)?),
        };
        let start = agent.send::<StartProcess>(&process)?;
        let exit = agent.send::<WaitProcess>(&process)?;
        streams.confirm([&mut accepted])?;
        let hello = agent.finish_connect(&connect)?;
        split_boot(&mut timing, boot_us, &hello);
        agent.wait(&create, Some(CALL_TIMEOUT))?;
        if let Some(network) = network {
            agent.wait(&network, Some(CALL_TIMEOUT))?;
        }
        agent.wait(&start, Some(CALL_TIMEOUT))?;
        timing.container_us = microseconds(stopwatch.lap());
        record.status = Status::Running;
        record.started_ms = Some(now_ms());
        record.endpoint.clone_from(&wiring.endpoint);
        (
            record.finished_ms,
            record.exit_code,
            record.oom_killed,
            record.error,
        ) = (None, None, false, None);
        home.write(record)?;
        tracing::debug!(id = %record.id, kernel = hello.kernel_release, agent = hello.agent_version, "started");
        Ok(Self {
            agent,
            vmm,
            _wiring: wiring,
            sockets,
            streams: Some(streams),
            exit,
            timing,
            stopwatch,
            keeps_files: record.spec.storage_bytes.is_some(),
        })
    }

    /// The time since the last step.
    pub(crate) fn lap_us(&mut self) -> u64 {
        microseconds(self.stopwatch.lap())
    }

    /// Lets the microVM end; [`MicroVm::finish`] waits for it. A guest whose files are kept switches itself off, when
    /// they are on the disk.
    pub(crate) fn begin_end(&mut self) {
        if !self.keeps_files || !self.power_off() {
            self.vmm.kill();
        }
    }

    fn power_off(&mut self) -> bool {
        let asked = self.agent.send::<Shutdown>(&agent_protocol::Empty::default());
        asked.is_ok() && self.vmm.wait_exited(POWER_OFF_PATIENCE)
    }

    /// Waits for the end of the microVM, removes what belonged to it, and says how long everything took.
    pub(crate) fn finish(self) -> Timing {
        let Self {
            agent,
            mut vmm,
            sockets,
            mut timing,
            mut stopwatch,
            ..
        } = self;
        drop(agent);
        vmm.end();
        drop(vmm);
        drop(sockets);
        timing.teardown_us = microseconds(stopwatch.lap());
        timing
    }
}

/// Connects the microVM, while it boots, with what its container asked for.
fn connect(record: &ContainerRecord, vmm: &mut Vmm) -> Result<Wiring> {
    let spec = &record.spec;
    let hostname = spec.hostname(&record.id);
    let identity = Identity {
        id: &record.id,
        name: &record.name,
        hostname: &hostname,
    };
    let mut wiring = Wiring::connect(&spec.network, identity)?;
    vmm.attach_taps(&mut wiring)?;
    Ok(wiring)
}

/// Splits the time from the vCPUs' start until the agent was ready between the kernel and the agent.
fn split_boot(timing: &mut Timing, boot_us: u64, hello: &ConnectResponse) {
    let agent_us = hello.boot_to_ready_ns.saturating_sub(hello.boot_to_agent_ns) / 1000;
    // What a guest says about time is not trusted beyond what the host saw.
    timing.agent_us = agent_us.min(boot_us);
    timing.kernel_us = boot_us - timing.agent_us;
}

/// Checks that this host can run microVMs at all.
///
/// # Errors
///
/// Says what is missing and the way out.
pub fn check_host() -> Result<()> {
    check_kvm()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guest_cannot_claim_more_time_than_the_host_saw() {
        let mut timing = Timing::default();
        let hello = ConnectResponse {
            boot_to_ready_ns: u64::MAX,
            ..ConnectResponse::default()
        };
        split_boot(&mut timing, 1000, &hello);
        assert_eq!((timing.agent_us, timing.kernel_us), (1000, 0));
    }
}
