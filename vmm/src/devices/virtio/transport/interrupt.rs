//! The registers that a device and its transport share, and the device's interrupt.
//!
//! Owner: the transport; devices hold it as [`Interrupt`]. Called on any thread, never takes a lock.
//!
//! A driver reads why it was interrupted and acknowledges it. As exits, both come to the transport. With the registers
//! mapped as a [`RegisterPage`] neither does: the page always shows "used buffers", and KVM drops the acknowledgement of
//! that alone.

use std::fmt;
use std::sync::atomic::{AtomicU32, Ordering, fence};

use tracing::warn;
use virtio_bindings::virtio_config::{VIRTIO_CONFIG_S_DRIVER_OK, VIRTIO_CONFIG_S_NEEDS_RESET};
use virtio_bindings::virtio_mmio::{
    VIRTIO_MMIO_CONFIG, VIRTIO_MMIO_CONFIG_GENERATION, VIRTIO_MMIO_INT_CONFIG, VIRTIO_MMIO_INT_VRING,
    VIRTIO_MMIO_INTERRUPT_STATUS, VIRTIO_MMIO_STATUS,
};

use super::page::RegisterPage;
use crate::devices::virtio::{Interrupt, InterruptLine};

/// The interrupt line of one device and the registers it shares with the transport.
pub struct MmioInterrupt {
    /// Device status register. Driver bits are written under the transport's lock; VIRTIO_CONFIG_S_NEEDS_RESET by the device.
    device_status: AtomicU32,
    /// Interrupt status register.
    pending: AtomicU32,
    config_generation: AtomicU32,
    line: Box<dyn InterruptLine>,
    /// The guest reads the registers there, and acknowledges used buffers unseen.
    page: Option<RegisterPage>,
}

impl MmioInterrupt {
    /// A device that has just been reset, with its interrupt `line`.
    pub fn new(line: Box<dyn InterruptLine>, page: Option<RegisterPage>) -> Self {
        let interrupt = Self {
            device_status: AtomicU32::new(0),
            pending: AtomicU32::new(0),
            config_generation: AtomicU32::new(0),
            line,
            page,
        };
        interrupt.show_pending();
        interrupt
    }

    /// The device status register.
    pub fn status(&self) -> u32 {
        self.device_status.load(Ordering::SeqCst)
    }

    /// Sets bits of the device status register.
    pub fn add_status(&self, bits: u32) {
        self.device_status.fetch_or(bits, Ordering::SeqCst);
        self.show_latest(VIRTIO_MMIO_STATUS, || self.status());
    }

    /// The interrupt status register.
    pub fn pending(&self) -> u32 {
        self.pending.load(Ordering::SeqCst)
    }

    /// The configuration generation register.
    pub fn generation(&self) -> u32 {
        self.config_generation.load(Ordering::SeqCst)
    }

    /// Back to the beginning, except for the generation.
    pub fn reset(&self) {
        self.device_status.store(0, Ordering::SeqCst);
        self.pending.store(0, Ordering::SeqCst);
        self.show_latest(VIRTIO_MMIO_STATUS, || self.status());
        self.show_pending();
    }

    fn raise(&self, cause: u32) {
        let before = self.pending.fetch_or(cause, Ordering::SeqCst);
        if self.page.is_some() {
            self.show_pending();
        } else if before & cause != 0 {
            // A bit that is still set means an interrupt the driver has not acknowledged. It looks at the rings only
            // after the acknowledgement, hence after what was published before this call: once is enough.
            return;
        }
        if let Err(error) = self.line.pulse() {
            warn!(%error, "cannot raise a device interrupt");
        }
    }

    /// The driver has seen these causes.
    pub fn acknowledge(&self, causes: u32) {
        self.pending.fetch_and(!causes, Ordering::SeqCst);
        self.show_pending();
    }

    /// In the page, used buffers are always pending: acknowledging them doesn't come here, and looking at a ring in vain
    /// costs the driver nothing. Only a change of the configuration has to be told apart.
    fn show_pending(&self) {
        self.show_latest(VIRTIO_MMIO_INTERRUPT_STATUS, || {
            self.pending() | VIRTIO_MMIO_INT_VRING
        });
    }

    /// Shows a register that several threads change: whoever shows last shows what is true.
    fn show_latest(&self, register: u32, value: impl Fn() -> u32) {
        loop {
            let shown = value();
            self.show(register, shown);
            // Else the store might only be seen after another thread's, and the load be done before that thread's change.
            fence(Ordering::SeqCst);
            if value() == shown {
                return;
            }
        }
    }

    /// Shows a register.
    pub fn show(&self, register: u32, value: u32) {
        if let Some(page) = &self.page {
            page.store(register, value);
        }
    }

    /// Shows the configuration.
    pub fn show_config(&self, config: &[u8]) {
        if let Some(page) = &self.page {
            page.store_bytes(VIRTIO_MMIO_CONFIG, config);
        }
    }

    fn advance_generation(&self) {
        let generation = self
            .config_generation
            .fetch_add(1, Ordering::SeqCst)
            .wrapping_add(1);
        self.show(VIRTIO_MMIO_CONFIG_GENERATION, generation);
    }

    fn is_driver_ok(&self) -> bool {
        self.device_status.load(Ordering::Acquire) & VIRTIO_CONFIG_S_DRIVER_OK != 0
    }
}

impl Interrupt for MmioInterrupt {
    fn signal_used_queue(&self, _index: u16) {
        self.raise(VIRTIO_MMIO_INT_VRING);
    }

    fn signal_config_change(&self, config: &[u8]) {
        // Before and after: a reader in between finds two generations and reads again.
        self.advance_generation();
        self.show_config(config);
        self.advance_generation();
        if self.is_driver_ok() {
            self.raise(VIRTIO_MMIO_INT_CONFIG);
        }
    }

    fn signal_needs_reset(&self) {
        let status = self
            .device_status
            .fetch_or(VIRTIO_CONFIG_S_NEEDS_RESET, Ordering::SeqCst);
        self.show_latest(VIRTIO_MMIO_STATUS, || self.status());
        if status & (VIRTIO_CONFIG_S_DRIVER_OK | VIRTIO_CONFIG_S_NEEDS_RESET) == VIRTIO_CONFIG_S_DRIVER_OK {
            self.raise(VIRTIO_MMIO_INT_CONFIG);
        }
    }
}

impl fmt::Debug for MmioInterrupt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MmioInterrupt")
            .field("device_status", &self.device_status)
            .field("pending", &self.pending)
            .field("config_generation", &self.config_generation)
            .finish_non_exhaustive()
    }
}
