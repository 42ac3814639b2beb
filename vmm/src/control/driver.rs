//! The state machine, on the event-loop thread.

use super::queue::{DriverEnd, Order};
use crate::{
    arch::x86_64::{backend, boot::BootError},
    builder::{self, BuildError, Confinement, MicroVm},
    config::{ConfigError, Resources, VmSpec, open_taps},
    device_manager::Subscriber,
    devices::virtio::{
        blk::BlkError,
        fs::{FsError, ShareThread},
        net::NetError,
    },
    jail::{
        limits,
        seccomp::{Filters, Role, SeccompError},
    },
    stop::StopSignal,
    vstate::kvm::KvmHost,
};
use event_manager::{EventManager, EventOps, EventSet, Events, MutEventSubscriber, SubscriberOps};
use std::{
    error::Error,
    os::fd::{AsRawFd, OwnedFd, RawFd},
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};
use vmm_api::{
    ApiError, ControlMetrics, ErrorCode, HelloInfo, MetricsReport, PROTOCOL_VERSION, RequestBody,
    ResourceRef, ResponseBody, StateReport, StopReason, VmConfig, VmState,
};

/// How long readers on the host may take for what the guest sent before it stopped.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(30);
/// How long they may pause.
const DRAIN_PATIENCE: Duration = Duration::from_secs(3);
/// How often that is looked at.
const DRAIN_INTERVAL_MS: i32 = 20;

/// Why the event loop can't go on.
#[derive(Debug, thiserror::Error)]
pub enum DriverError {
    /// epoll or an event descriptor.
    #[error("event loop")]
    Events(#[from] event_manager::Error),
    /// An event descriptor.
    #[error("event descriptor")]
    Event(#[from] std::io::Error),
    /// The second filter.
    #[error(transparent)]
    Seccomp(#[from] SeccompError),
}

/// The state with what belongs to it.
#[derive(Debug)]
enum State {
    Unconfigured,
    Configured(Box<MicroVm>),
    Running(Box<MicroVm>),
    Paused(Box<MicroVm>),
    /// What is left of a microVM that has stopped, for its counters.
    Stopped(Option<Box<MicroVm>>),
}

/// Wakes the loop; the loop itself looks at what there is to do.
struct Wakeup(Vec<(RawFd, vmm_sys_util::eventfd::EventFd)>);

impl MutEventSubscriber for Wakeup {
    fn process(&mut self, events: Events, _: &mut EventOps) {
        if let Some((_, event)) = self.0.iter().find(|(fd, _)| *fd == events.fd()) {
            // Empty already: nothing lost.
            let _ = event.read();
        }
    }

    fn init(&mut self, ops: &mut EventOps) {
        for (_, event) in &self.0 {
            if let Err(error) = ops.add(Events::new(event, EventSet::IN)) {
                tracing::error!(%error, "event loop wake-up");
            }
        }
    }
}

/// Runs one microVM from configuration to its end.
pub struct Driver {
    host: KvmHost,
    filters: Filters,
    /// Serves shares, if the microVM may have any.
    share_thread: Option<ShareThread>,
    stop: Arc<StopSignal>,
    state: State,
    queue: Option<DriverEnd>,
    manager: EventManager<Subscriber>,
    process_start: Instant,
    jail_us: u64,
    /// Bound on file sizes, set when the guest starts.
    largest_disk_bytes: u64,
    /// The event loop has given up what only building needed.
    narrowed: bool,
}

impl std::fmt::Debug for Driver {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Driver")
            .field("state", &self.state)
            .finish_non_exhaustive()
    }
}

impl Driver {
    /// A driver without a microVM; `queue` is missing when there is no control socket.
    ///
    /// # Errors
    /// [`DriverError`].
    pub fn new(
        host: KvmHost,
        filters: Filters,
        share_thread: Option<ShareThread>,
        queue: Option<DriverEnd>,
        process_start: Instant,
    ) -> Result<Self, DriverError> {
        let stop = Arc::new(StopSignal::new()?);
        let mut manager: EventManager<Subscriber> = EventManager::new()?;
        let mut events = vec![stop.event().try_clone()?];
        if let Some(queue) = &queue {
            events.push(queue.event().try_clone()?);
        }
        let wakeup = Wakeup(
            events
                .into_iter()
                .map(|event| (event.as_raw_fd(), event))
                .collect(),
        );
        manager.add_subscriber(Arc::new(Mutex::new(wakeup)));
        let jail_us = u64::try_from(process_start.elapsed().as_micros()).unwrap_or(u64::MAX);
        Ok(Self {
            host,
            filters,
            share_thread,
            stop,
            state: State::Unconfigured,
            queue,
            manager,
            process_start,
            jail_us,
            largest_disk_bytes: 0,
            narrowed: false,
        })
    }

    /// Builds the microVM.
    ///
    /// # Errors
    /// With the field or thing that is wrong; nothing is left of the attempt.
    pub fn configure(&mut self, spec: VmSpec) -> Result<(), BuildError> {
        self.largest_disk_bytes = spec.largest_disk_bytes();
        let confinement = Confinement {
            filters: &self.filters,
            share_thread: self.share_thread.as_ref(),
        };
        let mut microvm = Box::new(builder::build(&self.host, spec, &self.stop, confinement)?);
        for subscriber in microvm.take_subscribers() {
            self.manager.add_subscriber(subscriber);
        }
        self.state = State::Configured(microvm);
        Ok(())
    }

    /// Serves until the microVM has stopped, and says why it did.
    ///
    /// # Errors
    /// [`DriverError`].
    pub fn run(&mut self) -> Result<StopReason, DriverError> {
        loop {
            self.serve_queue();
            if let Some(reason) = self.stop.reason().cloned() {
                self.finish(&reason);
                return Ok(reason);
            }
            match self.manager.run() {
                Ok(_) => {}
                Err(event_manager::Error::Epoll(error)) if error.errno() == libc::EINTR => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Serves what waits in the queue.
    fn serve_queue(&mut self) {
        while !self.stop.is_reported() {
            let Some(order) = self.queue.as_ref().and_then(|queue| queue.next().ok().flatten()) else {
                break;
            };
            match order {
                Order::Request { body, fds, reply } => {
                    let shutdown = matches!(body, RequestBody::Shutdown);
                    let result = self.serve(body, fds);
                    // The client may have gone; that is its business.
                    let _ = reply.try_send(result);
                    if shutdown {
                        self.stop.report(StopReason::Requested);
                    }
                }
                Order::Abandoned => {
                    tracing::info!("nobody can control the microVM any more");
                    self.stop.report(StopReason::Requested);
                }
            }
        }
    }

    /// Gives up, before the guest runs, what only building it needed.
    fn narrow(&mut self) -> Result<(), DriverError> {
        if self.narrowed || !self.filters.is_confined() {
            return Ok(());
        }
        limits::bound_file_size(self.largest_disk_bytes)?;
        self.filters.of(Role::EventLoop).apply()?;
        self.narrowed = true;
        Ok(())
    }

    fn finish(&mut self, reason: &StopReason) {
        let microvm = match std::mem::replace(&mut self.state, State::Stopped(None)) {
            State::Unconfigured | State::Stopped(None) => None,
            State::Configured(vm) | State::Running(vm) | State::Paused(vm) | State::Stopped(Some(vm)) => {
                Some(vm)
            }
        };
        if let Some(microvm) = &microvm
            && let Err(error) = microvm.pause()
        {
            tracing::warn!(%error, "stopping");
        }
        // First of all: a client may begin to read its streams only when it hears that nothing will follow.
        if let Some(queue) = &self.queue {
            queue.announce_stop(reason.clone());
        }
        if let Some(microvm) = &microvm {
            microvm.finish_streams();
            self.wait_for_readers(microvm);
        }
        self.state = State::Stopped(microvm);
    }

    /// Gives readers on the host time to take what the guest sent before it stopped, as long as they do take it.
    fn wait_for_readers(&mut self, microvm: &MicroVm) {
        let begin = Instant::now();
        let mut progress = begin;
        let mut undelivered = microvm.undelivered_bytes();
        while undelivered > 0 {
            if begin.elapsed() > DRAIN_TIMEOUT || progress.elapsed() > DRAIN_PATIENCE {
                tracing::warn!(undelivered, "nobody reads the rest of what the guest sent");
                return;
            }
            if let Err(error) = self.manager.run_with_timeout(DRAIN_INTERVAL_MS) {
                tracing::debug!(?error, "stopping");
            }
            let left = microvm.undelivered_bytes();
            if left < undelivered {
                progress = Instant::now();
            }
            undelivered = left;
        }
    }

    fn serve(&mut self, body: RequestBody, fds: Vec<OwnedFd>) -> Result<ResponseBody, ApiError> {
        match body {
            RequestBody::Hello => Ok(ResponseBody::Hello(self.hello())),
            RequestBody::Configure(config) => self.serve_configure(*config, fds),
            RequestBody::Start => self.start(),
            RequestBody::Pause => self.pause(),
            RequestBody::Resume => self.resume(),
            RequestBody::Balloon { target_mib } => self.set_balloon(target_mib),
            RequestBody::AttachNet { id, taps } => self.attach_net(&id, &taps, fds),
            RequestBody::Metrics => Ok(ResponseBody::Metrics(Box::new(self.metrics()))),
            RequestBody::State => Ok(ResponseBody::State(self.report_state())),
            RequestBody::Shutdown => Ok(ResponseBody::Done),
        }
    }

    fn hello(&self) -> HelloInfo {
        HelloInfo {
            vmm_version: env!("CARGO_PKG_VERSION").to_owned(),
            protocol_version: PROTOCOL_VERSION,
            backend: backend::guess(),
        }
    }

    fn serve_configure(&mut self, config: VmConfig, fds: Vec<OwnedFd>) -> Result<ResponseBody, ApiError> {
        if !matches!(self.state, State::Unconfigured) {
            return Err(self.wrong_state("configure"));
        }
        let spec =
            VmSpec::open(config, &mut Resources::from_fds(fds)).map_err(|error| describe_config(&error))?;
        self.configure(spec).map_err(|error| describe_build(&error))?;
        Ok(ResponseBody::Done)
    }

    /// Runs the configured microVM.
    ///
    /// # Errors
    /// In any other state, or if the event loop can't be confined for it.
    pub fn start(&mut self) -> Result<ResponseBody, ApiError> {
        if !matches!(self.state, State::Configured(_)) {
            return Err(self.wrong_state("start"));
        }
        self.narrow().map_err(|error| ApiError {
            code: ErrorCode::Host,
            message: chain(&error),
        })?;
        self.state = match std::mem::replace(&mut self.state, State::Unconfigured) {
            State::Configured(microvm) => {
                microvm.resume();
                State::Running(microvm)
            }
            other => other,
        };
        Ok(ResponseBody::Done)
    }

    fn pause(&mut self) -> Result<ResponseBody, ApiError> {
        match std::mem::replace(&mut self.state, State::Unconfigured) {
            State::Running(microvm) => match microvm.pause() {
                Ok(()) => {
                    self.state = State::Paused(microvm);
                    Ok(ResponseBody::Done)
                }
                Err(error) => {
                    microvm.resume();
                    self.state = State::Running(microvm);
                    Err(ApiError {
                        code: ErrorCode::Host,
                        message: chain(&error),
                    })
                }
            },
            other => {
                self.state = other;
                Err(self.wrong_state("pause"))
            }
        }
    }

    fn resume(&mut self) -> Result<ResponseBody, ApiError> {
        match std::mem::replace(&mut self.state, State::Unconfigured) {
            State::Paused(microvm) => {
                microvm.resume();
                self.state = State::Running(microvm);
                Ok(ResponseBody::Done)
            }
            other => {
                self.state = other;
                Err(self.wrong_state("resume"))
            }
        }
    }

    fn set_balloon(&mut self, target_mib: u64) -> Result<ResponseBody, ApiError> {
        let Some(microvm) = self.microvm() else {
            return Err(self.wrong_state("balloon"));
        };
        match microvm.set_balloon(target_mib) {
            Ok(true) => Ok(ResponseBody::Done),
            Ok(false) => {
                let message = "the microVM was configured without a balloon".to_owned();
                Err(ApiError {
                    code: ErrorCode::NoSuchDevice,
                    message,
                })
            }
            Err(error) => Err(ApiError {
                code: ErrorCode::InvalidConfig,
                message: chain(&error),
            }),
        }
    }

    fn attach_net(
        &mut self,
        id: &str,
        taps: &[ResourceRef],
        fds: Vec<OwnedFd>,
    ) -> Result<ResponseBody, ApiError> {
        let microvm = match &self.state {
            State::Configured(vm) | State::Running(vm) | State::Paused(vm) => vm,
            State::Unconfigured | State::Stopped(_) => return Err(self.wrong_state("attach a tap to")),
        };
        let taps = open_taps(id, taps, &mut Resources::from_fds(fds));
        match microvm.attach_net(id, taps.map_err(|error| describe_config(&error))?) {
            Ok(true) => Ok(ResponseBody::Done),
            Ok(false) => Err(ApiError {
                code: ErrorCode::NoSuchDevice,
                message: format!("the microVM was configured without a network device {id:?}"),
            }),
            Err(error) => Err(ApiError {
                code: ErrorCode::InvalidConfig,
                message: chain(&error),
            }),
        }
    }

    fn microvm(&self) -> Option<&MicroVm> {
        match &self.state {
            State::Unconfigured => None,
            State::Configured(vm) | State::Running(vm) | State::Paused(vm) => Some(vm),
            State::Stopped(vm) => vm.as_deref(),
        }
    }

    fn report_state(&self) -> StateReport {
        let state = match &self.state {
            State::Unconfigured => VmState::Unconfigured,
            State::Configured(_) => VmState::Configured,
            State::Running(_) => VmState::Running,
            State::Paused(_) => VmState::Paused,
            State::Stopped(_) => VmState::Stopped,
        };
        StateReport {
            state,
            stopped: self.stop.reason().cloned(),
        }
    }

    /// All counters.
    #[must_use]
    pub fn metrics(&self) -> MetricsReport {
        let mut report = MetricsReport {
            uptime_us: u64::try_from(self.process_start.elapsed().as_micros()).unwrap_or(u64::MAX),
            control: self
                .queue
                .as_ref()
                .map_or(ControlMetrics::default(), |queue| queue.counters().snapshot()),
            ..MetricsReport::default()
        };
        if let Some(microvm) = self.microvm() {
            report.start = microvm.start_metrics();
            report.boot_phases = microvm.boot_timer().marks();
            report.vcpus = microvm.vcpu_metrics();
            report.devices = microvm.devices().metrics();
            report.unclaimed_accesses = microvm.unclaimed_accesses();
            report.start.main_to_first_run_us = microvm.boot_timer().first_run().and_then(|first_run| {
                u64::try_from(first_run.duration_since(self.process_start).as_micros()).ok()
            });
        }
        report.start.jail_us = self.jail_us;
        report
    }

    fn wrong_state(&self, action: &str) -> ApiError {
        let state = match &self.state {
            State::Unconfigured => "unconfigured",
            State::Configured(_) => "configured",
            State::Running(_) => "running",
            State::Paused(_) => "paused",
            State::Stopped(_) => "stopped",
        };
        ApiError {
            code: ErrorCode::WrongState,
            message: format!("can't {action} a microVM that is {state}"),
        }
    }
}

fn describe_config(error: &ConfigError) -> ApiError {
    let code = match error {
        ConfigError::Resource(_) | ConfigError::Tap { .. } => ErrorCode::Resource,
        _ => ErrorCode::InvalidConfig,
    };
    ApiError {
        code,
        message: chain(error),
    }
}

fn describe_build(error: &BuildError) -> ApiError {
    let code = match error {
        BuildError::Boot(BootError::Cmdline { .. } | BootError::TooSmall { .. }) => ErrorCode::InvalidConfig,
        BuildError::Blk(BlkError::Queues { .. } | BlkError::Serial { .. }) => ErrorCode::InvalidConfig,
        BuildError::Net(NetError::TapCount { .. }) => ErrorCode::InvalidConfig,
        BuildError::Fs(FsError::Tag { .. } | FsError::NoShares | FsError::NoThread) => {
            ErrorCode::InvalidConfig
        }
        BuildError::Fs(_) | BuildError::Boot(_) | BuildError::Blk(_) | BuildError::Vsock(_) => {
            ErrorCode::Resource
        }
        _ => ErrorCode::Host,
    };
    ApiError {
        code,
        message: chain(error),
    }
}

/// An error with all its causes in one line.
#[must_use]
pub fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}
