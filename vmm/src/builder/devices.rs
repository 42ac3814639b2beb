//! Creates the configured devices and attaches them, in the order in which the guest shall number them.

use super::{BuildError, Confinement};
use crate::{
    arch::x86_64::layout,
    boot_timer::BootTimer,
    config::{BalloonResource, BlkResource, DeviceResources, FsResource, NetResource, VsockResource},
    device_manager::DeviceManager,
    devices::{
        legacy::{BootTimerDevice, I8042, Serial},
        virtio::{
            balloon::{Balloon, BalloonSpec},
            blk::{Blk, BlkSpec, EngineChoice},
            fs::{Confine, Fs, FsError, FsSpec},
            net::Net,
            rng::Rng,
            vsock::{Vsock, VsockSpec},
        },
    },
    jail::{
        fds,
        seccomp::{Filters, Role},
    },
    stop::StopSignal,
    vstate::{memory, vm::Vm},
};
use std::{
    os::fd::RawFd,
    sync::{Arc, Mutex},
};
use vmm_api::IoEngine;

/// What was attached.
pub(super) struct Attached {
    /// All devices.
    pub(super) devices: DeviceManager,
    /// The balloon once more, for whoever sets its target.
    pub(super) balloon: Option<Arc<Mutex<Balloon>>>,
    /// The socket device once more, for whoever ends the microVM.
    pub(super) vsock: Option<Arc<Mutex<Vsock>>>,
    /// The network devices once more, for whoever gives them their taps.
    pub(super) net: Vec<Arc<Mutex<Net>>>,
}

/// All devices of `resources`.
pub(super) fn attach(
    vm: &Vm,
    resources: DeviceResources,
    stop: &Arc<StopSignal>,
    confinement: Confinement<'_>,
    boot_timer: &Arc<BootTimer>,
) -> Result<Attached, BuildError> {
    let mut devices = DeviceManager::new();
    devices.attach_port(
        layout::I8042_PORT,
        layout::I8042_PORTS,
        Arc::new(I8042::new(Arc::clone(stop))),
    )?;
    if let Some(output) = resources.serial {
        let serial = Serial::new(output)?;
        vm.register_irqfd(serial.interrupt(), layout::SERIAL_GSI)?;
        devices.attach_port(layout::SERIAL_PORT, layout::SERIAL_PORTS, Arc::new(serial))?;
    }
    if resources.boot_timer {
        devices.attach_port(
            layout::BOOT_TIMER_PORT,
            1,
            Arc::new(BootTimerDevice::new(Arc::clone(boot_timer))),
        )?;
        devices.announce(format!("hull_boottimer={:#x}", layout::BOOT_TIMER_PORT));
    }
    devices.announce(format!("hull_apstart={:#x}", layout::APSTART_PORT));
    for disk in resources.blk {
        attach_disk(&mut devices, vm, disk, confinement.filters)?;
    }
    if let Some(fs) = resources.fs {
        attach_fs(&mut devices, vm, fs, confinement)?;
    }
    let net = resources
        .net
        .into_iter()
        .map(|net| attach_net(&mut devices, vm, net))
        .collect::<Result<_, _>>()?;
    let vsock = resources
        .vsock
        .map(|vsock| attach_vsock(&mut devices, vm, vsock))
        .transpose()?;
    if resources.rng {
        let rng = Rng::new()?;
        let metrics = rng.metrics();
        devices.attach_virtio(vm, "rng", Arc::new(Mutex::new(rng)), metrics)?;
    }
    let balloon = resources
        .balloon
        .map(|balloon| attach_balloon(&mut devices, vm, balloon))
        .transpose()?;
    Ok(Attached {
        devices,
        balloon,
        vsock,
        net,
    })
}

fn attach_disk(
    devices: &mut DeviceManager,
    vm: &Vm,
    disk: BlkResource,
    filters: &Filters,
) -> Result<(), BuildError> {
    let engine = match disk.io_engine {
        IoEngine::Auto => EngineChoice::Auto,
        IoEngine::IoUring => EngineChoice::IoUring,
        IoEngine::Sync => EngineChoice::Sync,
    };
    let spec = BlkSpec::new(disk.id.clone(), disk.image, disk.read_only);
    let filter = filters.of(Role::Disk);
    let mut spec = spec
        .with_queues(disk.queues)?
        .with_engine(engine)
        .with_confinement(Box::new(move || {
            filter.apply().map_err(|error| error.to_string())
        }));
    if let Some(serial) = &disk.serial {
        spec = spec.with_serial(serial)?;
    }
    let blk = Blk::new(spec)?;
    let metrics = blk.metrics();
    Ok(devices.attach_virtio(vm, &disk.id, Arc::new(Mutex::new(blk)), metrics)?)
}

fn attach_fs(
    devices: &mut DeviceManager,
    vm: &Vm,
    fs: FsResource,
    confinement: Confinement<'_>,
) -> Result<(), BuildError> {
    let thread = confinement.share_thread.ok_or(FsError::NoThread)?;
    let spec = FsSpec::new(&fs.tag, fs.shares, memory::size_bytes(vm.ram()) >> 20)?.with_orders(fs.orders);
    let fs = Fs::new(spec, thread, confine_shares(confinement.filters, vm.raw_fd()))?;
    let metrics = fs.metrics();
    Ok(devices.attach_virtio(vm, "fs", Arc::new(Mutex::new(fs)), metrics)?)
}

/// What the thread that serves shares does before it reads what a guest wrote. It raises interrupts through the VM.
fn confine_shares(filters: &Filters, vm: RawFd) -> Confine {
    let (filter, is_confined) = (filters.of(Role::Shares), filters.is_confined());
    Box::new(move |descriptors, orders| {
        if !is_confined {
            return Ok(false);
        }
        let keep: Vec<RawFd> = descriptors.iter().copied().chain([vm]).collect();
        // The filter knows the socket of orders by the number of standard input.
        fds::own_table(&keep, orders).map_err(|error| format!("a descriptor table of its own: {error}"))?;
        filter.apply().map_err(|error| error.to_string())?;
        Ok(true)
    })
}

fn attach_net(
    devices: &mut DeviceManager,
    vm: &Vm,
    resource: NetResource,
) -> Result<Arc<Mutex<Net>>, BuildError> {
    let NetResource { spec, taps, id } = resource;
    let mut net = Net::new(&spec)?;
    if !taps.is_empty() {
        net.attach(taps)?;
    }
    let metrics = net.metrics();
    let net = Arc::new(Mutex::new(net));
    devices.attach_virtio(vm, &id, Arc::clone(&net), metrics)?;
    Ok(net)
}

fn attach_vsock(
    devices: &mut DeviceManager,
    vm: &Vm,
    vsock: VsockResource,
) -> Result<Arc<Mutex<Vsock>>, BuildError> {
    let vsock = Vsock::new(VsockSpec::new(
        u64::from(vsock.cid),
        vsock.listener,
        vsock.guest_ports,
    )?)?;
    let metrics = vsock.metrics();
    let vsock = Arc::new(Mutex::new(vsock));
    devices.attach_virtio(vm, "vsock", Arc::clone(&vsock), metrics)?;
    Ok(vsock)
}

fn attach_balloon(
    devices: &mut DeviceManager,
    vm: &Vm,
    balloon: BalloonResource,
) -> Result<Arc<Mutex<Balloon>>, BuildError> {
    let balloon = Balloon::new(BalloonSpec {
        memory_mib: memory::size_bytes(vm.ram()) >> 20,
        free_page_reporting: balloon.free_page_reporting,
        deflate_on_oom: balloon.deflate_on_oom,
        stats_interval: balloon.stats_interval,
    })?;
    let metrics = balloon.metrics();
    let balloon = Arc::new(Mutex::new(balloon));
    devices.attach_virtio(vm, "balloon", Arc::clone(&balloon), metrics)?;
    Ok(balloon)
}
