//! Assembles a microVM; nothing else does.
//!
//! Order, which matters: memory; VM with its chips and slots, devices (they add to the command line), vCPUs, and beside all
//! these, the images into memory; boot data (which needs the complete command line) and entry state; vCPU threads.
//!
//! Thread: the event loop's, with two helpers that end before [`build`] does. Everything made here is taken down by dropping [`MicroVm`].

mod devices;

use crate::{
    arch::x86_64::{
        backend::{self, Backend},
        boot::{self, BootData, BootError, Images},
        cpuid::{CpuidError, CpuidTable},
        msr::{self, MsrError},
        regs::{self, RegsError},
    },
    boot_timer::BootTimer,
    config::VmSpec,
    device_manager::{DeviceManager, DeviceManagerError, Subscriber},
    devices::{
        legacy::SerialError,
        virtio::{
            self, GuestRam,
            balloon::{Balloon, BalloonError},
            fs::ShareThread,
            net::{Net, NetError, Tap},
            vsock::Vsock,
        },
    },
    jail::seccomp::{Filters, Role},
    stop::StopSignal,
    vstate::{
        kvm::KvmHost,
        memory::{self, MemoryError},
        vcpu::{
            self, Vcpu, VcpuContext, VcpuHandle,
            control::{Order, VcpuControl},
        },
        vm::{Vm, VmError},
    },
};
use devices::Attached;
use kvm_ioctls::VcpuFd;
use std::{
    fs::File,
    io,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    thread::{self, Scope, ScopedJoinHandle},
    time::{Duration, Instant},
};
use vmm_api::{StartMetrics, VcpuMetrics};

/// What copying a kernel takes, several times over.
const HELPER_STACK_BYTES: usize = 128 << 10;
/// How long a vCPU may take to leave the guest. It needs microseconds; a host under heavy load may need much more.
const HOLD_TIMEOUT: Duration = Duration::from_secs(10);

/// Why a microVM can't be built.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// Guest memory.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// The VM.
    #[error(transparent)]
    Vm(#[from] VmError),
    /// The devices.
    #[error(transparent)]
    Devices(#[from] DeviceManagerError),
    /// The UART.
    #[error(transparent)]
    Serial(#[from] SerialError),
    /// A disk.
    #[error(transparent)]
    Blk(#[from] virtio::blk::BlkError),
    /// A network device.
    #[error(transparent)]
    Net(#[from] virtio::net::NetError),
    /// The socket device.
    #[error(transparent)]
    Vsock(#[from] virtio::vsock::VsockError),
    /// The shares.
    #[error(transparent)]
    Fs(#[from] virtio::fs::FsError),
    /// The entropy device.
    #[error(transparent)]
    Rng(#[from] virtio::rng::RngError),
    /// The balloon.
    #[error(transparent)]
    Balloon(#[from] BalloonError),
    /// Kernel and boot data.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// Processor features.
    #[error(transparent)]
    Cpuid(#[from] CpuidError),
    /// Processor state.
    #[error(transparent)]
    Regs(#[from] RegsError),
    /// Processor state.
    #[error(transparent)]
    Msr(#[from] MsrError),
    /// A thread.
    #[error("can't start the thread of vCPU {index}")]
    Thread {
        /// The vCPU.
        index: u8,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// A thread that fills memory.
    #[error("can't start the thread \"{name}\"")]
    Helper {
        /// Its name.
        name: &'static str,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The thread that fills memory is broken.
    #[error("the thread that loads the kernel panicked")]
    LoaderPanicked,
    /// The kick signal.
    #[error("can't prepare the process for vCPU threads")]
    Process(#[source] io::Error),
}

/// A vCPU did not leave the guest in time.
#[derive(Debug, thiserror::Error)]
#[error("vCPU {index} did not pause within {} s", HOLD_TIMEOUT.as_secs())]
pub struct HoldError {
    index: usize,
}

/// What confines the threads of a microVM, and the one that was confined otherwise before.
#[derive(Debug, Clone, Copy)]
pub struct Confinement<'a> {
    /// System calls of each kind of thread.
    pub filters: &'a Filters,
    /// Serves shares; there is none unless the command line asked for it.
    pub share_thread: Option<&'a ShareThread>,
}

/// A microVM that can run.
#[derive(Debug)]
pub struct MicroVm {
    /// Dropped first: the threads must be gone before the VM is.
    vcpus: Vec<VcpuHandle>,
    devices: DeviceManager,
    balloon: Option<Arc<Mutex<Balloon>>>,
    vsock: Option<Arc<Mutex<Vsock>>>,
    net: Vec<Arc<Mutex<Net>>>,
    boot_timer: Arc<BootTimer>,
    unclaimed: Arc<AtomicU64>,
    start: StartMetrics,
    _vm: Vm,
}

/// Measures one step after another.
struct Stopwatch(Instant);

impl Stopwatch {
    fn lap_us(&mut self) -> u64 {
        let now = Instant::now();
        let lap = now - std::mem::replace(&mut self.0, now);
        u64::try_from(lap.as_micros()).unwrap_or(u64::MAX)
    }
}

/// A VM that has everything but contents in its memory.
struct Assembled {
    vm: Vm,
    attached: Attached,
    vcpus: Vec<VcpuFd>,
    backend: &'static dyn Backend,
}

/// Builds what `spec` describes; its vCPUs hold until [`MicroVm::resume`].
///
/// # Errors
/// [`BuildError`]; nothing is left behind.
pub fn build(
    host: &KvmHost,
    spec: VmSpec,
    stop: &Arc<StopSignal>,
    confinement: Confinement<'_>,
) -> Result<MicroVm, BuildError> {
    let mut start = StartMetrics::default();
    let boot_timer = Arc::new(BootTimer::default());
    let ram = Arc::new(memory::create(spec.memory_mib, spec.huge_pages)?);
    let files = (spec.kernel, spec.initrd);
    let (assembled, images) = fill_and_assemble(&ram, files, spec.huge_pages, &mut start, |start| {
        assemble(host, &ram, spec.vcpu_count, start, |vm| {
            devices::attach(vm, spec.devices, stop, confinement, &boot_timer)
        })
    })?;
    let Assembled {
        vm,
        attached,
        vcpus,
        backend,
    } = assembled;
    let Attached {
        mut devices,
        balloon,
        vsock,
        net,
    } = attached;

    let mut watch = Stopwatch(Instant::now());
    let cmdline = full_cmdline(&spec.cmdline, backend.kernel_parameters(), devices.cmdline());
    let data = BootData {
        cmdline: &cmdline,
        protocol: spec.protocol,
        vcpu_count: spec.vcpu_count,
    };
    let entry = boot::write_data(vm.ram(), &images, &data)?;
    if let Some(first) = vcpus.first() {
        regs::set_boot_state(first, vm.ram(), spec.protocol, entry)?;
    }
    start.load_kernel_us += watch.lap_us();

    let (pio, mmio) = devices.take_buses();
    let controls: Arc<[_]> = vcpus.iter().map(|_| Arc::new(VcpuControl::default())).collect();
    let unclaimed = Arc::new(AtomicU64::new(0));
    let context = VcpuContext {
        pio,
        mmio,
        ram: Arc::clone(vm.ram()),
        vcpus: Arc::clone(&controls),
        stop: Arc::clone(stop),
        boot_timer: Arc::clone(&boot_timer),
        unclaimed: Arc::clone(&unclaimed),
    };
    let vcpus = spawn_vcpus(vcpus, &context, confinement.filters)?;
    start.vcpus_us += watch.lap_us();
    Ok(MicroVm {
        vcpus,
        devices,
        balloon,
        vsock,
        net,
        boot_timer,
        unclaimed,
        start,
        _vm: vm,
    })
}

/// Loads the images into `ram` beside `assemble`: filling memory takes longer than all the rest, and neither needs the other.
fn fill_and_assemble(
    ram: &GuestRam,
    (mut kernel, mut initrd): (File, Option<File>),
    huge_pages: bool,
    start: &mut StartMetrics,
    assemble: impl FnOnce(&mut StartMetrics) -> Result<Assembled, BuildError>,
) -> Result<(Assembled, Images), BuildError> {
    thread::scope(|scope| {
        let loader = spawn_beside(scope, "loader", || {
            let mut watch = Stopwatch(Instant::now());
            let images = boot::load_images(ram, &mut kernel, initrd.as_mut());
            (images, watch.lap_us())
        })?;
        if huge_pages {
            spawn_beside(scope, "populate", || memory::populate_for_boot(ram))?;
        }
        let assembled = assemble(start);
        let (images, load_us) = loader.join().map_err(|_| BuildError::LoaderPanicked)?;
        start.load_kernel_us = load_us;
        Ok((assembled?, images?))
    })
}

/// Starts a thread that ends before `scope` does. It is confined as the calling thread is.
fn spawn_beside<'scope, T: Send + 'scope>(
    scope: &'scope Scope<'scope, '_>,
    name: &'static str,
    work: impl FnOnce() -> T + Send + 'scope,
) -> Result<ScopedJoinHandle<'scope, T>, BuildError> {
    thread::Builder::new()
        .name(name.to_owned())
        .stack_size(HELPER_STACK_BYTES)
        .spawn_scoped(scope, work)
        .map_err(|source| BuildError::Helper { name, source })
}

/// Makes the VM, its devices and its vCPUs.
fn assemble(
    host: &KvmHost,
    ram: &Arc<GuestRam>,
    vcpu_count: u8,
    start: &mut StartMetrics,
    attach: impl FnOnce(&Vm) -> Result<Attached, BuildError>,
) -> Result<Assembled, BuildError> {
    let mut watch = Stopwatch(Instant::now());
    let vm = Vm::new(host, Arc::clone(ram))?;
    start.create_vm_us = watch.lap_us();
    let attached = attach(&vm)?;
    start.devices_us = watch.lap_us();
    let (vcpus, backend) = create_vcpus(host, &vm, vcpu_count)?;
    start.vcpus_us = watch.lap_us();
    Ok(Assembled {
        vm,
        attached,
        vcpus,
        backend,
    })
}

/// The configured command line, what the backend advises (unless configured otherwise) and what describes the devices. What
/// follows `--` is for init, so all that goes before it.
fn full_cmdline(configured: &str, advised: &[(&str, &str)], devices: &[String]) -> String {
    let (kernel, init) = match configured.split_once(" -- ") {
        Some((kernel, init)) => (kernel, Some(init)),
        None => (configured, None),
    };
    let is_configured = |name: &str| {
        kernel
            .split_whitespace()
            .any(|word| word.split('=').next() == Some(name))
    };
    let mut words = vec![kernel.trim().to_owned()];
    words.extend(
        advised
            .iter()
            .filter(|(name, _)| !is_configured(name))
            .map(|(name, value)| format!("{name}={value}")),
    );
    words.extend_from_slice(devices);
    if let Some(init) = init {
        words.push(format!("-- {init}"));
    }
    words.retain(|word| !word.is_empty());
    words.join(" ")
}

/// Creates the vCPUs, all but the first one's entry state, and says what runs them.
fn create_vcpus(
    host: &KvmHost,
    vm: &Vm,
    count: u8,
) -> Result<(Vec<VcpuFd>, &'static dyn Backend), BuildError> {
    let fds = (0..count)
        .map(|index| vm.create_vcpu(index))
        .collect::<Result<Vec<_>, _>>()?;
    let backend = backend::detect(fds.first());
    let tsc_khz = fds.first().and_then(|first| first.get_tsc_khz().ok());
    let table = CpuidTable::new(host.kvm(), backend, count, tsc_khz)?;
    for (index, fd) in (0..count).zip(&fds) {
        table.apply(fd, index)?;
        msr::set_boot(fd)?;
        regs::set_fpu(fd)?;
        regs::set_lapic(fd)?;
    }
    Ok((fds, backend))
}

fn spawn_vcpus(
    fds: Vec<VcpuFd>,
    context: &VcpuContext,
    filters: &Filters,
) -> Result<Vec<VcpuHandle>, BuildError> {
    vcpu::prepare_process().map_err(BuildError::Process)?;
    let mut handles = Vec::with_capacity(fds.len());
    for (index, fd) in (0u8..).zip(fds) {
        let filter = filters.of(Role::Vcpu);
        let thread = Vcpu::new(index, fd, context.clone())
            .spawn(move || filter.apply().map_err(|error| error.to_string()))
            .map_err(|source| BuildError::Thread { index, source })?;
        handles.push(VcpuHandle::new(
            Arc::clone(&context.vcpus[usize::from(index)]),
            thread,
        ));
    }
    Ok(handles)
}

impl MicroVm {
    /// Runs the vCPUs, for the first time or again.
    pub fn resume(&self) {
        for vcpu in &self.vcpus {
            vcpu.control.order(Order::Run);
        }
    }

    /// Brings all vCPUs out of the guest.
    ///
    /// # Errors
    /// [`HoldError`] if one does not come; all are then ordered to hold nevertheless.
    pub fn pause(&self) -> Result<(), HoldError> {
        for vcpu in &self.vcpus {
            vcpu.control.order(Order::Hold);
        }
        match self
            .vcpus
            .iter()
            .position(|vcpu| !vcpu.control.wait_held(HOLD_TIMEOUT))
        {
            None => Ok(()),
            Some(index) => Err(HoldError { index }),
        }
    }

    /// Ends the socket device's streams. To be called when no vCPU runs any more.
    ///
    /// The guest can't know that what it has sent is still on its way; [`MicroVm::undelivered_bytes`] tells.
    pub fn finish_streams(&self) {
        if let Some(vsock) = &self.vsock {
            virtio::lock(vsock).finish();
        }
    }

    /// Bytes that readers on the host have yet to take, after having been given what they have room for.
    #[must_use]
    pub fn undelivered_bytes(&self) -> usize {
        self.vsock.as_ref().map_or(0, |vsock| {
            let mut vsock = virtio::lock(vsock);
            vsock.flush_undelivered();
            vsock.undelivered_bytes()
        })
    }

    /// The event sources, once.
    pub fn take_subscribers(&mut self) -> Vec<Subscriber> {
        self.devices.take_subscribers()
    }

    /// Sets the balloon's target; false if there is no balloon.
    ///
    /// # Errors
    /// If the target is beyond the guest's memory.
    pub fn set_balloon(&self, target_mib: u64) -> Result<bool, BalloonError> {
        let Some(balloon) = &self.balloon else {
            return Ok(false);
        };
        balloon
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .set_target_mib(target_mib)?;
        Ok(true)
    }

    /// Gives the network device `id` its taps; false if there is no such device.
    ///
    /// # Errors
    /// If the device has a tap, or takes another number of them.
    pub fn attach_net(&self, id: &str, taps: Vec<Tap>) -> Result<bool, NetError> {
        for net in &self.net {
            let mut net = virtio::lock(net);
            if net.id() == id {
                net.attach(taps)?;
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// How long each step took.
    #[must_use]
    pub fn start_metrics(&self) -> StartMetrics {
        self.start
    }

    /// When the guest reached which phase.
    #[must_use]
    pub fn boot_timer(&self) -> &BootTimer {
        &self.boot_timer
    }

    /// The vCPUs' counters.
    #[must_use]
    pub fn vcpu_metrics(&self) -> Vec<VcpuMetrics> {
        self.vcpus
            .iter()
            .map(|vcpu| VcpuMetrics {
                exits: vcpu.control.exits.snapshot(),
            })
            .collect()
    }

    /// The devices.
    #[must_use]
    pub fn devices(&self) -> &DeviceManager {
        &self.devices
    }

    /// Accesses nobody claimed.
    #[must_use]
    pub fn unclaimed_accesses(&self) -> u64 {
        self.unclaimed.load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn device_words_come_before_the_arguments_of_init() {
        let devices = ["virtio_mmio.device=4K@0xd0000000:5".to_owned()];
        assert_eq!(
            full_cmdline("quiet -- -x", &[], &devices),
            "quiet virtio_mmio.device=4K@0xd0000000:5 -- -x"
        );
        assert_eq!(full_cmdline("", &[], &devices), devices[0]);
        assert_eq!(full_cmdline(" a  b ", &[], &[]), "a  b");
    }

    #[test]
    fn configured_parameters_win_over_advised_ones() {
        assert_eq!(full_cmdline("a=1", &[("a", "2"), ("b", "3")], &[]), "a=1 b=3");
    }
}
