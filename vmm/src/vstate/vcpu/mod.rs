//! One vCPU: a thread that runs the guest and serves its exits.
//!
//! Thread: its own. It takes orders through [`control::VcpuControl`] and touches devices only through the buses, so that the
//! event loop never waits for a guest.
//!
//! Invariant: whatever the guest does ends in a served exit, a counted and ignored access, or a reported stop; never in a panic
//! and never in a loop outside `KVM_RUN`.

pub mod control;
pub mod diagnostics;

use crate::{
    arch::x86_64::{apstart, layout},
    boot_timer::BootTimer,
    devices::{bus::Bus, virtio::GuestRam},
    stop::StopSignal,
};
use control::{Order, StartOutcome, VcpuControl, Work, count, kick};
use kvm_bindings::{
    KVM_MP_STATE_INIT_RECEIVED, KVM_MP_STATE_RUNNABLE, KVM_MP_STATE_UNINITIALIZED, kvm_mp_state,
};
use kvm_ioctls::{VcpuExit, VcpuFd};
use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    thread::{self, JoinHandle},
};
use vmm_api::StopReason;

/// Ample: a thread that has run a guest with every device has touched 8 KiB of it.
const STACK_BYTES: usize = 128 << 10;
/// Unclaimed accesses are logged this often, then at every power of two.
const LOGGED_UNCLAIMED: u64 = 8;

/// What a vCPU reaches.
#[derive(Debug, Clone)]
pub struct VcpuContext {
    /// Port devices.
    pub pio: Arc<Bus>,
    /// Memory-mapped devices.
    pub mmio: Arc<Bus>,
    /// Guest memory.
    pub ram: Arc<GuestRam>,
    /// All vCPUs, by index.
    pub vcpus: Arc<[Arc<VcpuControl>]>,
    /// Where a stop is reported.
    pub stop: Arc<StopSignal>,
    /// Takes the time of the first `KVM_RUN`.
    pub boot_timer: Arc<BootTimer>,
    /// Accesses nobody claims.
    pub unclaimed: Arc<AtomicU64>,
}

/// Prepares the process for vCPU threads. Once, before the first.
///
/// # Errors
/// If the signal can't be handled.
pub fn prepare_process() -> io::Result<()> {
    kick::install_handler()
}

/// A vCPU that is ready to run.
#[derive(Debug)]
pub struct Vcpu {
    index: u8,
    fd: VcpuFd,
    context: VcpuContext,
}

/// Whether to go back into the guest.
enum Next {
    Continue,
    Stopped(StopReason),
    /// The doorbell was rung with this frame number.
    StartAp(u32),
}

impl Vcpu {
    /// Takes a prepared KVM vCPU.
    #[must_use]
    pub fn new(index: u8, fd: VcpuFd, context: VcpuContext) -> Self {
        Self { index, fd, context }
    }

    /// Starts the thread, which first confines itself with `confine`; it holds until it is ordered to run.
    ///
    /// # Errors
    /// If the thread can't be made.
    pub fn spawn(
        self,
        confine: impl FnOnce() -> Result<(), String> + Send + 'static,
    ) -> io::Result<JoinHandle<()>> {
        let name = format!("vcpu{}", self.index);
        thread::Builder::new()
            .name(name)
            .stack_size(STACK_BYTES)
            .spawn(move || {
                let mut vcpu = self;
                let presence = Presence::begin(&mut vcpu);
                let reason = match confine() {
                    Ok(()) => vcpu.serve(),
                    Err(message) => Some(StopReason::VmmFailed { message }),
                };
                if let Some(reason) = reason {
                    presence.stop.report(reason);
                }
            })
    }

    fn control(&self) -> &VcpuControl {
        &self.context.vcpus[usize::from(self.index)]
    }

    /// Runs until told to stop (`None`) or the microVM stops.
    fn serve(&mut self) -> Option<StopReason> {
        loop {
            match self.control().take_work() {
                Work::Stop => return None,
                Work::Start(state) => {
                    let outcome = self.start(&state);
                    self.control().finish_start(outcome);
                }
                Work::Run => {
                    self.context.boot_timer.note_first_run();
                    if let Some(reason) = self.run_until_interrupted() {
                        return Some(reason);
                    }
                }
            }
        }
    }

    /// Serves exits until an order waits.
    fn run_until_interrupted(&mut self) -> Option<StopReason> {
        loop {
            let context = &self.context;
            let exits = &context.vcpus[usize::from(self.index)].exits;
            let next = match self.fd.run() {
                Ok(VcpuExit::IoOut(layout::APSTART_PORT, data)) => {
                    count(&exits.pio_out);
                    <[u8; 4]>::try_from(data)
                        .map_or(Next::Continue, |frame| Next::StartAp(u32::from_le_bytes(frame)))
                }
                Ok(exit) => serve_exit(context, exits, exit),
                Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => {
                    count(&exits.interrupted);
                    return None;
                }
                Err(error) => {
                    count(&exits.failed);
                    let message = format!("KVM_RUN: {}", io::Error::from_raw_os_error(error.errno()));
                    Next::Stopped(StopReason::VcpuFailed { message })
                }
            };
            match next {
                Next::Continue => {}
                Next::StartAp(frame) => {
                    apstart::ring(
                        &self.context.ram,
                        frame,
                        self.index,
                        &self.fd,
                        &self.context.vcpus,
                    );
                }
                Next::Stopped(reason) => return Some(self.explain(reason)),
            }
        }
    }

    /// Adds what only the stopped vCPU can tell, and logs it in full.
    fn explain(&mut self, reason: StopReason) -> StopReason {
        let StopReason::VcpuFailed { mut message } = reason else {
            return reason;
        };
        let internal = diagnostics::internal_error(&mut self.fd);
        if internal.suberror != 0 {
            message = format!(
                "{message} suberror {} data {:x?}",
                internal.suberror, internal.data
            );
        }
        let registers = diagnostics::describe(&self.fd, &self.context.ram);
        tracing::error!(vcpu = self.index, "vCPU can't go on: {message}\n{registers}");
        let summary = registers.lines().next().unwrap_or_default();
        StopReason::VcpuFailed {
            message: format!("vCPU {}: {message}; {summary}", self.index),
        }
    }

    /// Becomes runnable in a state another vCPU has named.
    fn start(&self, state: &control::ApState) -> StartOutcome {
        let waiting = [KVM_MP_STATE_UNINITIALIZED, KVM_MP_STATE_INIT_RECEIVED];
        match self.fd.get_mp_state() {
            Ok(mp) if waiting.contains(&mp.mp_state) => {}
            Ok(_) => return StartOutcome::AlreadyRunning,
            Err(_) => return StartOutcome::Failed,
        }
        let result = self
            .fd
            .set_sregs(&state.sregs)
            .and_then(|()| self.fd.set_regs(&state.regs))
            .and_then(|()| {
                self.fd.set_mp_state(kvm_mp_state {
                    mp_state: KVM_MP_STATE_RUNNABLE,
                })
            });
        match result {
            Ok(()) => StartOutcome::Started,
            Err(error) => {
                tracing::warn!(vcpu = self.index, %error, "KVM refuses the state in which the guest starts a vCPU");
                StartOutcome::Failed
            }
        }
    }
}

/// Serves one exit that needs nothing but the buses.
fn serve_exit(context: &VcpuContext, exits: &control::ExitCounters, exit: VcpuExit<'_>) -> Next {
    let failed = |message: String| {
        count(&exits.failed);
        Next::Stopped(StopReason::VcpuFailed { message })
    };
    match exit {
        VcpuExit::IoOut(port, data) => {
            count(&exits.pio_out);
            if !context.pio.write(u64::from(port), data) {
                note_unclaimed(context, "port write", u64::from(port));
            }
            if context.stop.is_reported() {
                // A device (the reset line) has ended the microVM: not one more instruction.
                return Next::Stopped(StopReason::GuestShutdown);
            }
            Next::Continue
        }
        VcpuExit::IoIn(port, data) => {
            count(&exits.pio_in);
            if !context.pio.read(u64::from(port), data) {
                data.fill(0xff);
                note_unclaimed(context, "port read", u64::from(port));
            }
            Next::Continue
        }
        VcpuExit::MmioRead(address, data) => {
            count(&exits.mmio_read);
            if !context.mmio.read(address, data) {
                data.fill(0xff);
                note_unclaimed(context, "memory read", address);
            }
            Next::Continue
        }
        VcpuExit::MmioWrite(address, data) => {
            count(&exits.mmio_write);
            if !context.mmio.write(address, data) {
                note_unclaimed(context, "memory write", address);
            }
            Next::Continue
        }
        VcpuExit::Shutdown => {
            count(&exits.shutdown);
            Next::Stopped(StopReason::GuestShutdown)
        }
        VcpuExit::Hlt => {
            // Only without an in-kernel interrupt controller, or with one that lost the vCPU: nothing would ever wake it.
            count(&exits.hlt);
            failed("halted for good".to_owned())
        }
        VcpuExit::Intr | VcpuExit::IrqWindowOpen | VcpuExit::SetTpr | VcpuExit::IoapicEoi(_) => {
            count(&exits.other);
            Next::Continue
        }
        VcpuExit::InternalError => failed("KVM_EXIT_INTERNAL_ERROR".to_owned()),
        VcpuExit::FailEntry(reason, cpu) => failed(format!(
            "KVM_EXIT_FAIL_ENTRY reason {reason:#x} on host CPU {cpu}"
        )),
        VcpuExit::SystemEvent(kind, _) => {
            count(&exits.shutdown);
            tracing::debug!(kind, "system event");
            Next::Stopped(StopReason::GuestShutdown)
        }
        other => failed(format!("unexpected exit {other:?}")),
    }
}

/// Counts an access to nothing; logs it, but not at the guest's pace.
fn note_unclaimed(context: &VcpuContext, what: &'static str, address: u64) {
    let count = context.unclaimed.fetch_add(1, Ordering::Relaxed) + 1;
    if count <= LOGGED_UNCLAIMED || count.is_power_of_two() {
        tracing::debug!(
            what,
            address = format_args!("{address:#x}"),
            count,
            "nobody claims the access"
        );
    }
}

/// A vCPU's thread is there and can be interrupted. Dropped before the vCPU, however the thread ends.
struct Presence {
    control: Arc<VcpuControl>,
    stop: Arc<StopSignal>,
}

impl Drop for Presence {
    fn drop(&mut self) {
        self.control.end();
        if thread::panicking() {
            let message = "a vCPU thread panicked".to_owned();
            self.stop.report(StopReason::VmmFailed { message });
        }
    }
}

#[expect(
    unsafe_code,
    reason = "the thread vouches for the lifetime of its kvm_run page"
)]
mod begin {
    use super::{Arc, Presence, Vcpu, control::kick};

    impl Presence {
        /// Lets others interrupt the calling thread, which runs `vcpu` and must drop the result before it.
        pub(super) fn begin(vcpu: &mut Vcpu) -> Self {
            let control = Arc::clone(&vcpu.context.vcpus[usize::from(vcpu.index)]);
            // SAFETY: `VcpuControl::end` drops the target. The one caller, `Vcpu::spawn`, declares the vCPU before the
            // presence, so that the presence is dropped first, on a panic too.
            if let Some(target) = unsafe { kick::Target::of_this_thread(&mut vcpu.fd) } {
                control.begin(target);
            }
            Self {
                control,
                stop: Arc::clone(&vcpu.context.stop),
            }
        }
    }
}

/// A running vCPU thread.
#[derive(Debug)]
pub struct VcpuHandle {
    /// Its shared half.
    pub control: Arc<VcpuControl>,
    thread: Option<JoinHandle<()>>,
}

impl VcpuHandle {
    /// Joins what [`Vcpu::spawn`] made.
    #[must_use]
    pub fn new(control: Arc<VcpuControl>, thread: JoinHandle<()>) -> Self {
        Self {
            control,
            thread: Some(thread),
        }
    }
}

impl Drop for VcpuHandle {
    fn drop(&mut self) {
        self.control.order(Order::Stop);
        // A thread that doesn't end in time ends with the process.
        if self.control.wait_ended(std::time::Duration::from_secs(2))
            && let Some(thread) = self.thread.take()
        {
            let _ = thread.join();
        }
    }
}
