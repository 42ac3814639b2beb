//! One write-only port: each byte written marks a phase of the guest's boot.

use crate::{boot_timer::BootTimer, devices::bus::BusDevice};
use std::sync::Arc;

/// The port device.
#[derive(Debug)]
pub struct BootTimerDevice(Arc<BootTimer>);

impl BootTimerDevice {
    /// Marks go to `timer`.
    #[must_use]
    pub fn new(timer: Arc<BootTimer>) -> Self {
        Self(timer)
    }
}

impl BusDevice for BootTimerDevice {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0xff);
    }

    fn write(&self, _offset: u64, data: &[u8]) {
        if let [phase] = data {
            self.0.mark(*phase);
        }
    }
}
