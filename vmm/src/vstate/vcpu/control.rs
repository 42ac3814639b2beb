//! Orders to a vCPU thread from other threads, and how the thread is brought out of `KVM_RUN`.
//!
//! Owner: shared by the vCPU thread, the event loop and, for vCPU starts, the other vCPU threads.
//!
//! ```text
//!            order(Run)              order(Hold)
//!   held ───────────────► running ───────────────► held        order(Stop) ends the thread from either
//! ```
//!
//! Invariants:
//! - An order is written and `immediate_exit` set under the same lock under which the thread takes orders and clears
//!   `immediate_exit`: no order is lost between a look at the orders and `KVM_RUN`.
//! - The pointer to `immediate_exit` is only used while the thread has it registered, which it ends before unmapping.

use kvm_bindings::{kvm_regs, kvm_sregs};
use std::{
    sync::{
        Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};
use vmm_api::ExitCounts;

/// While somebody waits for a thread, it is interrupted again at this interval: a signal that arrives just before a blocking
/// system call does not interrupt it.
const KICK_INTERVAL: Duration = Duration::from_millis(10);

/// What a vCPU shall do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Order {
    /// Stay out of the guest.
    #[default]
    Hold,
    /// Run the guest.
    Run,
    /// End the thread.
    Stop,
}

/// The state in which a doorbell starts a vCPU.
#[derive(Debug, Clone)]
pub struct ApState {
    /// System registers.
    pub sregs: kvm_sregs,
    /// General registers.
    pub regs: kvm_regs,
}

/// How a start went.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StartOutcome {
    /// The vCPU is runnable now.
    Started,
    /// It was before.
    AlreadyRunning,
    /// KVM refused, or the thread did not answer.
    Failed,
}

/// What the thread finds when it looks.
#[derive(Debug)]
pub enum Work {
    /// Enter the guest.
    Run,
    /// Apply this, report with [`VcpuControl::finish_start`], look again.
    Start(Box<ApState>),
    /// End.
    Stop,
}

#[derive(Debug, Default)]
struct Orders {
    order: Order,
    /// The thread waits, out of the guest.
    held: bool,
    /// The thread has ended (or never begun).
    ended: bool,
    start: Option<Box<ApState>>,
    outcome: Option<StartOutcome>,
    /// A start is under way; a second must not take its outcome.
    starting: bool,
    kick: Option<kick::Target>,
}

/// The shared half of a vCPU.
#[derive(Debug, Default)]
pub struct VcpuControl {
    orders: Mutex<Orders>,
    changed: Condvar,
    /// Exits by kind.
    pub exits: ExitCounters,
}

impl VcpuControl {
    fn lock(&self) -> MutexGuard<'_, Orders> {
        // A panic elsewhere leaves plain values behind.
        self.orders.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gives an order without waiting for it. `Stop` is final.
    pub fn order(&self, order: Order) {
        let mut orders = self.lock();
        if orders.order != Order::Stop {
            orders.order = order;
        }
        if let Some(kick) = &orders.kick {
            kick.interrupt();
        }
        drop(orders);
        self.changed.notify_all();
    }

    /// Waits until the thread is out of the guest; false if it isn't in time.
    pub fn wait_held(&self, timeout: Duration) -> bool {
        self.wait_until(timeout, |orders| orders.held || orders.ended)
    }

    /// Waits until the thread has ended; false if it has not in time.
    pub fn wait_ended(&self, timeout: Duration) -> bool {
        self.wait_until(timeout, |orders| orders.ended)
    }

    fn wait_until(&self, timeout: Duration, done: impl Fn(&Orders) -> bool) -> bool {
        let deadline = Instant::now() + timeout;
        let mut orders = self.lock();
        loop {
            if done(&orders) {
                return true;
            }
            if Instant::now() >= deadline {
                return false;
            }
            if let Some(kick) = &orders.kick {
                kick.interrupt();
            }
            orders = self
                .changed
                .wait_timeout(orders, KICK_INTERVAL)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }

    /// Asks the vCPU to start in `state` and waits for the outcome.
    pub fn start_ap(&self, state: ApState, timeout: Duration) -> StartOutcome {
        {
            let mut orders = self.lock();
            if orders.starting {
                return StartOutcome::AlreadyRunning;
            }
            orders.starting = true;
            orders.outcome = None;
            orders.start = Some(Box::new(state));
        }
        self.changed.notify_all();
        self.wait_until(timeout, |orders| orders.outcome.is_some() || orders.ended);
        let mut orders = self.lock();
        orders.starting = false;
        orders.start = None;
        orders.outcome.take().unwrap_or(StartOutcome::Failed)
    }

    /// The thread's report on a [`Work::Start`].
    pub fn finish_start(&self, outcome: StartOutcome) {
        self.lock().outcome = Some(outcome);
        self.changed.notify_all();
    }

    /// Called by the thread when it begins; `immediate_exit` must stay valid until [`VcpuControl::end`].
    pub(super) fn begin(&self, target: kick::Target) {
        self.lock().kick = Some(target);
    }

    /// Called by the thread before its `kvm_run` goes away.
    pub(super) fn end(&self) {
        let mut orders = self.lock();
        orders.kick = None;
        orders.ended = true;
        drop(orders);
        self.changed.notify_all();
    }

    /// Called by the thread whenever `KVM_RUN` was interrupted: waits while the order is to hold.
    pub(super) fn take_work(&self) -> Work {
        let mut orders = self.lock();
        loop {
            if let Some(start) = orders.start.take() {
                return Work::Start(start);
            }
            match orders.order {
                Order::Stop => return Work::Stop,
                Order::Run => {
                    orders.held = false;
                    if let Some(kick) = &orders.kick {
                        kick.clear();
                    }
                    return Work::Run;
                }
                Order::Hold => {
                    if !orders.held {
                        orders.held = true;
                        self.changed.notify_all();
                    }
                    orders = self.changed.wait(orders).unwrap_or_else(PoisonError::into_inner);
                }
            }
        }
    }
}

/// Exits by kind; each is written by its own vCPU thread only.
#[derive(Debug, Default)]
pub struct ExitCounters {
    pub(super) pio_in: AtomicU64,
    pub(super) pio_out: AtomicU64,
    pub(super) mmio_read: AtomicU64,
    pub(super) mmio_write: AtomicU64,
    pub(super) hlt: AtomicU64,
    pub(super) interrupted: AtomicU64,
    pub(super) shutdown: AtomicU64,
    pub(super) failed: AtomicU64,
    pub(super) other: AtomicU64,
}

impl ExitCounters {
    /// The counts at this moment.
    #[must_use]
    pub fn snapshot(&self) -> ExitCounts {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        ExitCounts {
            pio_in: get(&self.pio_in),
            pio_out: get(&self.pio_out),
            mmio_read: get(&self.mmio_read),
            mmio_write: get(&self.mmio_write),
            hlt: get(&self.hlt),
            interrupted: get(&self.interrupted),
            shutdown: get(&self.shutdown),
            failed: get(&self.failed),
            other: get(&self.other),
        }
    }
}

/// Adds one to a counter that only the calling thread writes.
pub(super) fn count(counter: &AtomicU64) {
    counter.store(counter.load(Ordering::Relaxed).wrapping_add(1), Ordering::Relaxed);
}

#[expect(
    unsafe_code,
    reason = "another thread's kvm_run page is written, and that thread signalled"
)]
pub(super) mod kick {
    use kvm_ioctls::VcpuFd;
    use std::{
        ptr::NonNull,
        sync::atomic::{AtomicU8, Ordering},
    };
    use vmm_sys_util::signal::{SIGRTMIN, register_signal_handler};

    /// What it takes to bring a thread out of `KVM_RUN`.
    #[derive(Debug)]
    pub(in super::super) struct Target {
        immediate_exit: NonNull<AtomicU8>,
        thread: libc::pthread_t,
    }

    // SAFETY: the pointer is only used for atomic accesses; see `Target::of_this_thread` for its validity.
    unsafe impl Send for Target {}

    impl Target {
        /// The calling thread with the vCPU it runs.
        ///
        /// # Safety
        /// The target must be dropped before `vcpu` is, and before the calling thread ends.
        pub(in super::super) unsafe fn of_this_thread(vcpu: &mut VcpuFd) -> Option<Self> {
            let immediate_exit: *mut u8 = &raw mut vcpu.get_kvm_run().immediate_exit;
            // SAFETY: no preconditions.
            let thread = unsafe { libc::pthread_self() };
            Some(Self {
                immediate_exit: NonNull::new(immediate_exit.cast())?,
                thread,
            })
        }

        /// Makes the present or next `KVM_RUN` return.
        pub(super) fn interrupt(&self) {
            // SAFETY: valid while the target is registered (`of_this_thread`), and a byte of memory shared with the kernel.
            unsafe { self.immediate_exit.as_ref() }.store(1, Ordering::Release);
            // SAFETY: the thread has not ended while the target is registered. The signal has a handler.
            let _ = unsafe { libc::pthread_kill(self.thread, SIGRTMIN()) };
        }

        /// Lets the next `KVM_RUN` enter the guest.
        pub(super) fn clear(&self) {
            // SAFETY: as in `interrupt`.
            unsafe { self.immediate_exit.as_ref() }.store(0, Ordering::Release);
        }
    }

    extern "C" fn interrupted(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}

    /// Gives the signal a handler that does nothing: what matters is that the system call returns.
    pub(in super::super) fn install_handler() -> std::io::Result<()> {
        register_signal_handler(SIGRTMIN(), interrupted)
            .map_err(|error| std::io::Error::from_raw_os_error(error.errno()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{sync::Arc, thread};

    #[test]
    fn thread_holds_until_ordered_to_run() {
        let control = Arc::new(VcpuControl::default());
        let thread = thread::spawn({
            let control = Arc::clone(&control);
            move || {
                let work = control.take_work();
                control.end();
                matches!(work, Work::Run)
            }
        });
        assert!(control.wait_held(Duration::from_secs(60)));
        control.order(Order::Run);
        assert!(thread.join().unwrap());
        assert!(control.wait_ended(Duration::from_secs(60)));
    }

    #[test]
    fn stop_is_final() {
        let control = VcpuControl::default();
        control.order(Order::Stop);
        control.order(Order::Run);
        assert!(matches!(control.take_work(), Work::Stop));
    }

    #[test]
    fn start_is_answered_even_while_held() {
        let control = Arc::new(VcpuControl::default());
        let thread = thread::spawn({
            let control = Arc::clone(&control);
            move || {
                loop {
                    match control.take_work() {
                        Work::Start(state) => {
                            assert_eq!(state.regs.rip, 7);
                            control.finish_start(StartOutcome::Started);
                        }
                        Work::Stop => break,
                        Work::Run => unreachable!(),
                    }
                }
                control.end();
            }
        });
        let state = ApState {
            sregs: kvm_sregs::default(),
            regs: kvm_regs {
                rip: 7,
                ..Default::default()
            },
        };
        assert_eq!(
            control.start_ap(state.clone(), Duration::from_secs(60)),
            StartOutcome::Started
        );
        control.order(Order::Stop);
        thread.join().unwrap();
        assert_eq!(
            control.start_ap(state, Duration::from_secs(60)),
            StartOutcome::Failed
        );
    }

    #[test]
    fn waiting_for_a_deaf_thread_ends() {
        let control = VcpuControl::default();
        assert!(!control.wait_held(Duration::from_millis(20)));
        let state = ApState {
            sregs: kvm_sregs::default(),
            regs: kvm_regs::default(),
        };
        assert_eq!(
            control.start_ap(state, Duration::from_millis(20)),
            StartOutcome::Failed
        );
    }
}
