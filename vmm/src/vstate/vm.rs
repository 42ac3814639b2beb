//! One KVM virtual machine: its memory slots and its in-kernel interrupt controllers and timer.

use crate::{
    arch::x86_64::layout,
    devices::virtio::{GuestRam, InterruptLine, transport::page::RegisterPages},
    vstate::kvm::KvmHost,
};
use kvm_bindings::{KVM_MEM_READONLY, KVM_PIT_SPEAKER_DUMMY, kvm_pit_config, kvm_userspace_memory_region};
use kvm_ioctls::{Cap, IoEventAddress, VcpuFd, VmFd};
use std::{
    io,
    os::fd::{AsRawFd, RawFd},
    sync::Arc,
};
use vm_memory::{Address, GuestMemory, GuestMemoryRegion};
use vmm_sys_util::{errno, eventfd::EventFd};

/// Three pages Intel processors without "unrestricted guest" need; they lie in the hole, above the devices.
const TSS_ADDRESS: usize = 0xfffb_d000;
/// One more such page.
const IDENTITY_MAP_ADDRESS: u64 = 0xfffb_c000;

/// Why a VM can't be made.
#[derive(Debug, thiserror::Error)]
pub enum VmError {
    /// A KVM call failed.
    #[error("KVM refuses to {action}")]
    Kvm {
        /// What was tried.
        action: &'static str,
        /// What it said.
        #[source]
        source: io::Error,
    },
    /// KVM has too few memory slots.
    #[error("KVM offers {available} memory slots, {needed} are needed")]
    Slots {
        /// As reported.
        available: usize,
        /// Regions of guest memory.
        needed: usize,
    },
}

/// Names what failed.
pub(crate) fn kvm_error(action: &'static str) -> impl Fn(errno::Error) -> VmError {
    move |source| VmError::Kvm {
        action,
        source: source.into(),
    }
}

/// A VM with its memory.
#[derive(Debug)]
pub struct Vm {
    fd: Arc<VmFd>,
    /// Kept for as long as KVM may access it.
    ram: Arc<GuestRam>,
    /// The same for the device registers that the guest reads as memory.
    register_pages: Option<Arc<RegisterPages>>,
}

/// An interrupt line of a VM, raised by a call instead of an event: events for the chips' pins go through a worker
/// thread of the kernel's, which is one more thread to wait for.
#[derive(Debug)]
pub struct VmInterruptLine {
    fd: Arc<VmFd>,
    gsi: u32,
}

impl InterruptLine for VmInterruptLine {
    fn pulse(&self) -> io::Result<()> {
        self.fd.set_irq_line(self.gsi, true)?;
        self.fd.set_irq_line(self.gsi, false)?;
        Ok(())
    }
}

impl Vm {
    /// Creates the VM, its chips, and registers `ram` with it.
    ///
    /// # Errors
    /// [`VmError`].
    pub fn new(host: &KvmHost, ram: Arc<GuestRam>) -> Result<Self, VmError> {
        let mut vm = Self {
            fd: Arc::new(create(host)?),
            ram,
            register_pages: None,
        };
        // Memory first: once the interrupt controllers exist, every change of the slots waits for a grace period of several
        // milliseconds.
        vm.register_memory(host)?;
        vm.register_register_pages(host)?;
        // Only processors that can't run real mode natively need these; a backend may refuse them.
        if let Err(error) = vm.fd.set_identity_map_address(IDENTITY_MAP_ADDRESS) {
            tracing::debug!(%error, "no identity map page");
        }
        if let Err(error) = vm.fd.set_tss_address(TSS_ADDRESS) {
            tracing::debug!(%error, "no TSS pages");
        }
        vm.fd
            .create_irq_chip()
            .map_err(kvm_error("create the interrupt controllers"))?;
        let pit = kvm_pit_config {
            flags: KVM_PIT_SPEAKER_DUMMY,
            ..Default::default()
        };
        vm.fd.create_pit2(pit).map_err(kvm_error("create the timer"))?;
        Ok(vm)
    }

    fn register_memory(&self, host: &KvmHost) -> Result<(), VmError> {
        let available = host.kvm().get_nr_memslots();
        let needed = self.ram.num_regions();
        if needed > available {
            return Err(VmError::Slots { available, needed });
        }
        for (slot, region) in (0u32..).zip(self.ram.iter()) {
            let slot = kvm_userspace_memory_region {
                slot,
                flags: 0,
                guest_phys_addr: region.start_addr().raw_value(),
                memory_size: region.len(),
                userspace_addr: region.as_ptr() as u64,
            };
            memory_slot::register(&self.fd, slot)?;
        }
        Ok(())
    }

    /// Lets the guest read device registers as memory, while its writes to them exit. Left out where KVM can't.
    fn register_register_pages(&mut self, host: &KvmHost) -> Result<(), VmError> {
        let slot = self.ram.num_regions();
        let (true, Ok(slot_number)) = (slot < host.kvm().get_nr_memslots(), u32::try_from(slot)) else {
            return Ok(());
        };
        if !self.fd.check_extension(Cap::ReadonlyMem) {
            return Ok(());
        }
        let devices = layout::GSI_LAST - layout::VIRTIO_GSI_FIRST + 1;
        let pages = RegisterPages::new(devices).map_err(|source| VmError::Kvm {
            action: "map the registers of devices",
            source,
        })?;
        let slot = kvm_userspace_memory_region {
            slot: slot_number,
            flags: KVM_MEM_READONLY,
            guest_phys_addr: layout::VIRTIO_MMIO_START,
            memory_size: pages.len_bytes(),
            userspace_addr: pages.host_address(),
        };
        match memory_slot::register(&self.fd, slot) {
            Ok(()) => self.register_pages = Some(pages),
            Err(error) => tracing::debug!(%error, "device registers can't be read as memory"),
        }
        Ok(())
    }

    /// Creates vCPU `index`.
    ///
    /// # Errors
    /// [`VmError::Kvm`].
    pub fn create_vcpu(&self, index: u8) -> Result<VcpuFd, VmError> {
        self.fd
            .create_vcpu(u64::from(index))
            .map_err(kvm_error("create a vCPU"))
    }

    /// Makes writes to `event` raise `gsi`, edge-triggered, without an exit.
    ///
    /// # Errors
    /// [`VmError::Kvm`].
    pub fn register_irqfd(&self, event: &EventFd, gsi: u32) -> Result<(), VmError> {
        self.fd
            .register_irqfd(event, gsi)
            .map_err(kvm_error("register an irqfd"))
    }

    /// The VM's descriptor, for a thread whose descriptor table is to have it.
    #[must_use]
    pub fn raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }

    /// The interrupt line `gsi`, edge-triggered.
    #[must_use]
    pub fn interrupt_line(&self, gsi: u32) -> VmInterruptLine {
        VmInterruptLine {
            fd: Arc::clone(&self.fd),
            gsi,
        }
    }

    /// The registers that the guest reads as memory, from the first device's address on; none if it can't.
    #[must_use]
    pub fn register_pages(&self) -> Option<&Arc<RegisterPages>> {
        self.register_pages.as_ref()
    }

    /// Makes the guest's 4-byte write of `value` to `address` signal `event` without an exit.
    ///
    /// # Errors
    /// [`VmError::Kvm`].
    pub fn register_ioevent(&self, event: &EventFd, address: u64, value: u32) -> Result<(), VmError> {
        self.fd
            .register_ioevent(event, &IoEventAddress::Mmio(address), value)
            .map_err(kvm_error("register an ioeventfd"))
    }

    /// The guest's memory.
    #[must_use]
    pub fn ram(&self) -> &Arc<GuestRam> {
        &self.ram
    }
}

/// `KVM_CREATE_VM` is interrupted by signals while KVM starts its worker threads; that is worth another try.
fn create(host: &KvmHost) -> Result<VmFd, VmError> {
    let mut attempts = 0;
    loop {
        match host.kvm().create_vm() {
            Err(error) if error.errno() == libc::EINTR && attempts < 10 => attempts += 1,
            result => return result.map_err(kvm_error("create a VM")),
        }
    }
}

#[expect(unsafe_code, reason = "KVM takes the memory by address")]
mod memory_slot {
    use super::{VmError, kvm_error};
    use kvm_bindings::kvm_userspace_memory_region;
    use kvm_ioctls::VmFd;

    pub(super) fn register(fd: &VmFd, slot: kvm_userspace_memory_region) -> Result<(), VmError> {
        // SAFETY: address and size are those of a mapped region of the `GuestRam`, or of the register pages, that `Vm`
        // keeps alive, so the mapping outlives the VM; both are only ever accessed as volatile bytes on this side.
        unsafe { fd.set_user_memory_region(slot) }.map_err(kvm_error("register guest memory"))
    }
}
