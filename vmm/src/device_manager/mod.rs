//! Places devices on the buses and connects them: interrupts by irqfd, queue notifications by ioeventfd, events to the loop.
//!
//! Owner: filled by [`crate::builder`], then split: the buses go to the vCPU threads, the rest stays with the driver.

use crate::{
    arch::x86_64::layout,
    devices::{
        bus::{Bus, BusDevice, BusError},
        virtio::{
            self, VirtioDevice,
            transport::mmio::{ACK_OFFSET, ACK_USED, MMIO_SIZE, MmioTransport, NOTIFY_OFFSET},
        },
    },
    vstate::vm::{Vm, VmError},
};
use event_manager::MutEventSubscriber;
use std::{
    collections::BTreeMap,
    fmt, io,
    sync::{Arc, Mutex, PoisonError},
};
use vmm_sys_util::eventfd::EventFd;

/// A device as the event loop sees it.
pub type Subscriber = Arc<Mutex<dyn MutEventSubscriber + Send>>;

/// Why a device can't be attached.
#[derive(Debug, thiserror::Error)]
pub enum DeviceManagerError {
    /// No interrupt line left.
    #[error(
        "device {id:?}: no interrupt line is left; a microVM takes {} devices",
        capacity()
    )]
    TooMany {
        /// The device.
        id: String,
    },
    /// The addresses clash.
    #[error(transparent)]
    Bus(#[from] BusError),
    /// KVM refuses a connection.
    #[error("device {id:?}")]
    Connect {
        /// The device.
        id: String,
        /// What KVM said.
        #[source]
        source: VmError,
    },
    /// No descriptor left.
    #[error("device {id:?}: can't make its interrupt event")]
    Event {
        /// The device.
        id: String,
        /// What the system said.
        #[source]
        source: io::Error,
    },
}

/// Virtio devices a microVM can have.
fn capacity() -> u32 {
    layout::GSI_LAST - layout::VIRTIO_GSI_FIRST + 1
}

/// The devices of one microVM.
#[derive(Default)]
pub struct DeviceManager {
    pio: Bus,
    mmio: Bus,
    cmdline: Vec<String>,
    attached: u32,
    /// Where acknowledgements of interrupts go that need no answer.
    acknowledged: Option<EventFd>,
    subscribers: Vec<Subscriber>,
    metrics: Vec<(String, Arc<dyn virtio::DeviceMetrics>)>,
}

impl fmt::Debug for DeviceManager {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DeviceManager")
            .field("pio", &self.pio)
            .field("mmio", &self.mmio)
            .field("attached", &self.attached)
            .finish_non_exhaustive()
    }
}

impl DeviceManager {
    /// Without devices.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Places a port device.
    ///
    /// # Errors
    /// [`DeviceManagerError::Bus`].
    pub fn attach_port(
        &mut self,
        port: u16,
        ports: u64,
        device: Arc<dyn BusDevice>,
    ) -> Result<(), DeviceManagerError> {
        Ok(self.pio.insert(u64::from(port), ports, device)?)
    }

    /// Adds a word to the kernel's command line.
    pub fn announce(&mut self, word: String) {
        self.cmdline.push(word);
    }

    /// Puts a virtio device behind the next free register page and interrupt line, and announces it to the kernel.
    ///
    /// # Errors
    /// [`DeviceManagerError`].
    pub fn attach_virtio<D>(
        &mut self,
        vm: &Vm,
        id: &str,
        device: Arc<Mutex<D>>,
        metrics: Arc<dyn virtio::DeviceMetrics>,
    ) -> Result<(), DeviceManagerError>
    where
        D: VirtioDevice + MutEventSubscriber + 'static,
    {
        let gsi = layout::VIRTIO_GSI_FIRST + self.attached;
        if gsi > layout::GSI_LAST {
            return Err(DeviceManagerError::TooMany { id: id.to_owned() });
        }
        let base = layout::VIRTIO_MMIO_START + u64::from(self.attached) * MMIO_SIZE;
        let connect = |source| DeviceManagerError::Connect {
            id: id.to_owned(),
            source,
        };
        {
            let device = device.lock().unwrap_or_else(PoisonError::into_inner);
            for (queue, event) in (0u32..).zip(device.queue_events()) {
                vm.register_ioevent(event, base + NOTIFY_OFFSET, queue)
                    .map_err(connect)?;
            }
        }
        let page = vm.register_pages().and_then(|pages| pages.page(self.attached));
        if page.is_some() {
            // Nobody listens: the acknowledgement is all there is to it.
            vm.register_ioevent(self.acknowledged(id)?, base + ACK_OFFSET, ACK_USED)
                .map_err(connect)?;
        }
        let transport = MmioTransport::new(
            Arc::clone(vm.ram()),
            Arc::clone(&device) as Arc<Mutex<dyn VirtioDevice>>,
            Box::new(vm.interrupt_line(gsi)),
            page,
        );
        self.mmio.insert(base, MMIO_SIZE, Arc::new(transport))?;
        self.cmdline
            .push(format!("virtio_mmio.device=4K@{base:#x}:{gsi}"));
        self.subscribers.push(device);
        self.metrics.push((id.to_owned(), metrics));
        self.attached += 1;
        Ok(())
    }

    fn acknowledged(&mut self, id: &str) -> Result<&EventFd, DeviceManagerError> {
        let event = match self.acknowledged.take() {
            Some(event) => event,
            None => EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).map_err(|source| {
                DeviceManagerError::Event {
                    id: id.to_owned(),
                    source,
                }
            })?,
        };
        Ok(self.acknowledged.insert(event))
    }

    /// The words the kernel must find on its command line.
    #[must_use]
    pub fn cmdline(&self) -> &[String] {
        &self.cmdline
    }

    /// The buses, for the vCPU threads. Nothing can be attached afterwards.
    pub fn take_buses(&mut self) -> (Arc<Bus>, Arc<Bus>) {
        (
            Arc::new(std::mem::take(&mut self.pio)),
            Arc::new(std::mem::take(&mut self.mmio)),
        )
    }

    /// The event sources, for the event loop.
    pub fn take_subscribers(&mut self) -> Vec<Subscriber> {
        std::mem::take(&mut self.subscribers)
    }

    /// Every device's counters.
    #[must_use]
    pub fn metrics(&self) -> BTreeMap<String, vmm_api::DeviceMetrics> {
        let read = |metrics: &Arc<dyn virtio::DeviceMetrics>| {
            let mut values = vmm_api::DeviceMetrics::new();
            metrics.visit(&mut |name, value| {
                values.insert(name.to_owned(), value);
            });
            values
        };
        self.metrics
            .iter()
            .map(|(id, metrics)| (id.clone(), read(metrics)))
            .collect()
    }
}
