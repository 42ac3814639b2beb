//! Of the keyboard controller only the reset line and a status that says "ready, no keyboard".

use crate::{devices::bus::BusDevice, stop::StopSignal};
use std::sync::Arc;
use vmm_api::StopReason;

const COMMAND_OFFSET: u64 = 4;
const COMMAND_RESET: u8 = 0xfe;

/// The controller.
#[derive(Debug)]
pub struct I8042(Arc<StopSignal>);

impl I8042 {
    /// A reset is reported to `stop`.
    #[must_use]
    pub fn new(stop: Arc<StopSignal>) -> Self {
        Self(stop)
    }
}

impl BusDevice for I8042 {
    fn read(&self, offset: u64, data: &mut [u8]) {
        // An empty input buffer lets `reboot=k` write its command at once; all ones would look like an absent controller,
        // but make the reboot path wait for it.
        data.fill(if offset == COMMAND_OFFSET { 0 } else { 0xff });
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if offset == COMMAND_OFFSET && data == [COMMAND_RESET] {
            self.0.report(StopReason::GuestShutdown);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_reset_command_stops() {
        let stop = Arc::new(StopSignal::new().unwrap());
        let device = I8042::new(Arc::clone(&stop));
        device.write(COMMAND_OFFSET, &[0xd1]);
        device.write(0, &[COMMAND_RESET]);
        device.write(COMMAND_OFFSET, &[COMMAND_RESET, 0]);
        assert!(!stop.is_reported());
        device.write(COMMAND_OFFSET, &[COMMAND_RESET]);
        assert_eq!(stop.reason(), Some(&StopReason::GuestShutdown));
    }
}
