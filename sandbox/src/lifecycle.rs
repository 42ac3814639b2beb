//! One sandbox from nothing to nothing.
//!
//! ```text
//!  reserve ─► spawn VMM ─► configure, start ─► agent ready ─► container created ─► started ─► exited
//!     │            │               │                 │                │               │          │
//!     └────────────┴───────────────┴─── any failure, any signal ──────┴───────────────┴──────────┴─► removed
//! ```
//!
//! Owner: the process that created it, which holds its directory's lock. Thread: the caller's.
//!
//! Invariant: a [`Sandbox`] owns everything of its own. Dropping it, at whatever point, ends the VMM and removes
//! the directory; nothing has to be undone by hand.

use std::{
    fs::File,
    os::{fd::AsFd as _, unix::net::UnixStream},
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use agent_protocol::{
    ConnectResponse, ContainerRef, CreateContainer, GetStats, READY_PORT, RPC_PORT, StatsResponse,
};

use crate::{
    Components, ContainerSpec, Result, Runtime, SandboxError, SandboxRecord, Signals, Status, Timing,
    agent_client::{AgentClient, CALL_TIMEOUT},
    attach::{AttachOptions, Attached, ExitStatus, process_ref, send_signal},
    process_handle::ProcessIdentity,
    recovery::Reservation,
    spec::ProcessSpec,
    state_store::{OwnedDir, RECORD_VERSION, boot_id},
    stdio::{ProcessStreams, connect_ports},
    timing::{Stopwatch, microseconds},
    vmm_client::{Disk, VmParts, Vmm, Watched, check_kvm},
};

/// How long a microVM may take until its agent is ready. A guest that is stuck is the only reason to give up;
/// a host that runs more than it can is none.
const READY_TIMEOUT: Duration = Duration::from_secs(120);

/// The guest kernel's command line; the VMM adds what describes its devices. There is no PCI bus to look for,
/// rewriting locks for one CPU costs more than it saves, and a grace period that is waited for (joining a control
/// group, leaving a namespace) must not take ticks of a timer when the microVM does nothing else.
const CMDLINE: &str = "root=/dev/vda ro rootfstype=erofs init=/hull-agent reboot=t panic=-1 pci=off \
                       noreplace-smp rcupdate.rcu_expedited=1";
/// Added without a console: nothing waits for a port that isn't there.
const CMDLINE_SILENT: &str = "quiet loglevel=1 8250.nr_uarts=0";
/// Added with one.
const CMDLINE_CONSOLE: &str = "console=ttyS0 loglevel=7";

/// How to start a sandbox.
#[derive(Debug, Clone, Copy, Default)]
pub struct StartOptions<'a> {
    /// Gives up when one of these asks for it.
    pub signals: Option<&'a Signals>,
    /// How long the front-end has been busy before, for [`Timing`].
    pub client_time: Duration,
}

/// A container in its microVM, owned by this process.
#[derive(Debug)]
pub struct Sandbox {
    // The order of fields is the order of destruction: the VMM ends before its directory goes.
    agent: AgentClient,
    vmm: Vmm,
    dir: OwnedDir,
    record: SandboxRecord,
    process: ProcessSpec,
    /// Until the process is started.
    streams: Option<ProcessStreams>,
    timing: Timing,
    stopwatch: Stopwatch,
}

fn now_ms() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(now.as_millis()).unwrap_or(0)
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

fn new_record(reservation: &Reservation, spec: &ContainerSpec) -> Result<SandboxRecord> {
    let pid = i32::try_from(std::process::id()).unwrap_or(0);
    let owner = ProcessIdentity::of(pid).ok_or_else(|| {
        SandboxError::system("reading /proc/self/stat")(std::io::Error::from(std::io::ErrorKind::NotFound))
    })?;
    Ok(SandboxRecord {
        version: RECORD_VERSION,
        id: reservation.id.clone(),
        name: reservation.name.clone(),
        image: spec.image.clone(),
        image_id: spec.image_id.clone(),
        command: spec.process.args.clone(),
        created_ms: now_ms(),
        started_ms: None,
        status: Status::Creating,
        vcpus: spec.vcpus,
        memory_mib: spec.memory_mib,
        boot_id: boot_id(),
        owner,
        vmm: None,
        jail_uid: reservation.jail_uid,
    })
}

/// A microVM that runs, and the stream on which its agent will say that it is ready.
fn boot(
    dir: &OwnedDir,
    vmm: &mut Vmm,
    components: &Components,
    spec: &ContainerSpec,
    disks: Vec<Disk>,
) -> Result<UnixStream> {
    let (ready, guest_end) = UnixStream::pair().map_err(SandboxError::system("creating a socket pair"))?;
    let console = open_console()?;
    let verbosity = if console.is_some() {
        CMDLINE_CONSOLE
    } else {
        CMDLINE_SILENT
    };
    let kernel = File::open(&components.kernel).map_err(SandboxError::io("opening", &components.kernel))?;
    let parts = VmParts {
        vcpus: spec.vcpus,
        memory_mib: spec.memory_mib,
        kernel,
        cmdline: format!("{CMDLINE} {verbosity}"),
        disks,
        vsock: dir.listen_vsock()?,
        guest_port: (READY_PORT, guest_end),
        console,
    };
    vmm.start(&parts)?;
    Ok(ready)
}

impl Sandbox {
    /// Makes a microVM and a container in it, which waits to be started.
    ///
    /// # Errors
    ///
    /// Whatever stands in the way; nothing is left behind.
    pub fn create(
        runtime: &Runtime,
        components: &Components,
        spec: &ContainerSpec,
        options: StartOptions<'_>,
    ) -> Result<Self> {
        let mut stopwatch = Stopwatch::start();
        let mut timing = Timing {
            client_us: microseconds(options.client_time),
            ..Timing::default()
        };
        spec.check()?;
        check_kvm()?;
        let disks = spec.rootfs.open_disks(&components.agent_image)?;
        let reservation = runtime.reserve(spec.name.as_deref())?;
        let mut record = new_record(&reservation, spec)?;
        let dir = reservation.dir;
        dir.write(&record)?;
        let mut vmm = Vmm::spawn(&components.vmm, &record.id, record.jail_uid)?;
        record.vmm = Some(vmm.identity);
        dir.write(&record)?;
        let ready = boot(&dir, &mut vmm, components, spec, disks)?;
        timing.vm_setup_us = microseconds(stopwatch.lap());

        let deadline = Instant::now() + READY_TIMEOUT;
        if vmm.watch(ready.as_fd(), options.signals, deadline)? == Watched::TimedOut {
            let diagnosis = vmm.diagnosis();
            return Err(SandboxError::AgentTimeout {
                timeout: READY_TIMEOUT,
                diagnosis,
            });
        }
        let boot_us = microseconds(stopwatch.lap());
        let (rpc, streams) = ProcessStreams::open_with(
            || dir.connect_vsock(),
            RPC_PORT,
            (record.id.as_str(), ""),
            &spec.process,
        )?;
        let mut agent = AgentClient::new(rpc);
        // Both under way at once: one round trip. A version that doesn't fit fails the first.
        let connect = agent.send_connect(true)?;
        let create = agent.send::<CreateContainer>(&spec.for_agent(&record.id))?;
        let hello = agent.finish_connect(&connect)?;
        split_boot(&mut timing, boot_us, &hello);
        agent.wait(&create, Some(CALL_TIMEOUT))?;
        record.status = Status::Created;
        dir.write(&record)?;
        tracing::debug!(id = %record.id, kernel = hello.kernel_release, agent = hello.agent_version, "created");
        Ok(Self {
            agent,
            vmm,
            dir,
            record,
            process: spec.process.clone(),
            streams: Some(streams),
            timing,
            stopwatch,
        })
    }

    /// What is known of it.
    #[must_use]
    pub fn record(&self) -> &SandboxRecord {
        &self.record
    }

    /// Starts the container's first process, attached, and waits until it has exited.
    ///
    /// # Errors
    ///
    /// The process can't be started, the microVM stopped, or a signal asked three times to give up.
    pub fn run(&mut self, options: AttachOptions<'_>) -> Result<ExitStatus> {
        let id = self.record.id.as_str();
        let streams = self
            .streams
            .take()
            .ok_or_else(|| SandboxError::NotRunning { name: id.to_owned() })?;
        let attached = Attached::start(&mut self.agent, process_ref(id, ""), streams, &self.process)?;
        self.timing.container_us = microseconds(self.stopwatch.lap());
        self.record.status = Status::Running;
        self.record.started_ms = Some(now_ms());
        self.dir.write(&self.record)?;
        let exit = attached.drive(&mut self.agent, Some(&mut self.vmm), options)?;
        self.timing.run_us = microseconds(self.stopwatch.lap());
        Ok(exit)
    }

    /// The VMM's counters.
    ///
    /// # Errors
    ///
    /// The VMM doesn't answer.
    pub fn vmm_metrics(&mut self) -> Result<Box<vmm_api::MetricsReport>> {
        self.vmm.metrics()
    }

    /// Ends the microVM, removes what belonged to it, and says how long everything took.
    #[must_use]
    pub fn remove(self) -> Timing {
        let Self {
            agent,
            mut vmm,
            dir,
            mut timing,
            mut stopwatch,
            ..
        } = self;
        drop(agent);
        vmm.end();
        drop(vmm);
        drop(dir);
        timing.teardown_us = microseconds(stopwatch.lap());
        timing
    }
}

/// Splits the time from the vCPUs' start until the agent was ready between the kernel and the agent.
fn split_boot(timing: &mut Timing, boot_us: u64, hello: &ConnectResponse) {
    let agent_us = hello.boot_to_ready_ns.saturating_sub(hello.boot_to_agent_ns) / 1000;
    // What a guest says about time is not trusted beyond what the host saw.
    timing.agent_us = agent_us.min(boot_us);
    timing.kernel_us = boot_us - timing.agent_us;
}

impl Runtime {
    /// Connects to the agent of a running sandbox.
    pub(crate) fn connect_agent(&self, record: &SandboxRecord) -> Result<AgentClient> {
        let not_running = || SandboxError::NotRunning {
            name: record.name.clone(),
        };
        if record.status != Status::Running {
            return Err(not_running());
        }
        let connected = connect_ports(|| self.run.connect_vsock(&record.id), &[RPC_PORT]);
        let rpc = connected
            .map(|mut streams| streams.pop())
            .unwrap_or_else(|error| {
                tracing::debug!(%error, "connecting to the agent");
                None
            });
        let mut agent = AgentClient::new(rpc.ok_or_else(not_running)?);
        let connect = agent.send_connect(false)?;
        agent.finish_connect(&connect)?;
        Ok(agent)
    }

    /// Sends a signal to a container's first process, or to all of them.
    ///
    /// # Errors
    ///
    /// The container isn't running.
    pub fn signal(&self, record: &SandboxRecord, signal: i32, all: bool) -> Result<()> {
        let mut agent = self.connect_agent(record)?;
        send_signal(&mut agent, &process_ref(record.id.as_str(), ""), signal, all)
    }

    /// A container's statistics, as its guest counts them.
    ///
    /// # Errors
    ///
    /// The container isn't running.
    pub fn stats(&self, record: &SandboxRecord) -> Result<StatsResponse> {
        let container_id = record.id.as_str().to_owned();
        self.connect_agent(record)?.call::<GetStats>(&ContainerRef {
            container_id,
            ..ContainerRef::default()
        })
    }

    /// Waits until a sandbox has been removed by its owner; false if it hasn't in time.
    #[must_use]
    pub fn wait_removed(&self, record: &SandboxRecord, timeout: Duration) -> bool {
        let deadline = Instant::now() + timeout;
        // The VMM ends before the directory goes; the rest is a matter of milliseconds.
        if let Some(vmm) = record.vmm.and_then(ProcessIdentity::open)
            && !vmm.wait_exited(timeout)
        {
            return false;
        }
        while self.run.read(&record.id).is_ok_and(|found| found.is_some()) {
            if Instant::now() >= deadline {
                return false;
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        true
    }
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
