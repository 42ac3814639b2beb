//! Address-to-device dispatch for port I/O and MMIO exits.
//!
//! Owner: built once by the device manager, then shared read-only (`Arc<Bus>`) by every vCPU thread, so that the
//! lookup of an exit takes no lock. Devices do their own locking behind [`BusDevice`].
//!
//! Invariants: ranges never overlap and never wrap; an access that would leave its range is not dispatched.

use std::fmt;
use std::sync::Arc;

use thiserror::Error;

/// A device reachable through a [`Bus`].
///
/// Called on vCPU threads with guest-chosen offsets, widths and data: implementations must accept every combination.
pub trait BusDevice: Send + Sync {
    /// Fills `data` with the device's bytes at `offset` from the start of its range.
    fn read(&self, offset: u64, data: &mut [u8]);

    /// Takes the guest's `data` for `offset` from the start of the range.
    fn write(&self, offset: u64, data: &[u8]);
}

/// Why a range could not be placed on a bus.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum BusError {
    /// The range is empty or wraps around the address space.
    #[error("bus range at {base:#x} of {size:#x} bytes is empty or wraps")]
    InvalidRange {
        /// First address of the range.
        base: u64,
        /// Its length in bytes.
        size: u64,
    },
    /// Another device answers at one of the addresses.
    #[error("bus range at {base:#x} of {size:#x} bytes overlaps the range at {other:#x}")]
    Overlap {
        /// First address of the range.
        base: u64,
        /// Its length in bytes.
        size: u64,
        /// First address of the range already present.
        other: u64,
    },
}

struct Entry {
    base: u64,
    size: u64,
    device: Arc<dyn BusDevice>,
}

/// An address space (ports or guest-physical) with devices in it.
#[derive(Default)]
pub struct Bus {
    /// Sorted by `base`.
    entries: Vec<Entry>,
}

impl Bus {
    /// An empty bus.
    pub fn new() -> Self {
        Self::default()
    }

    /// Places `device` at `base .. base + size`.
    pub fn insert(&mut self, base: u64, size: u64, device: Arc<dyn BusDevice>) -> Result<(), BusError> {
        let last = size
            .checked_sub(1)
            .and_then(|len| base.checked_add(len))
            .ok_or(BusError::InvalidRange { base, size })?;
        let position = self.entries.partition_point(|entry| entry.base <= base);
        let before = position.checked_sub(1).map(|index| &self.entries[index]);
        let clash = before
            .filter(|entry| base - entry.base < entry.size)
            .or_else(|| self.entries.get(position).filter(|entry| entry.base <= last));
        if let Some(entry) = clash {
            return Err(BusError::Overlap {
                base,
                size,
                other: entry.base,
            });
        }
        self.entries.insert(position, Entry { base, size, device });
        Ok(())
    }

    /// Dispatches a read. Returns false, with `data` untouched, if no device owns all of the addressed bytes.
    pub fn read(&self, address: u64, data: &mut [u8]) -> bool {
        match self.find(address, data.len()) {
            Some((device, offset)) => {
                device.read(offset, data);
                true
            }
            None => false,
        }
    }

    /// Dispatches a write. Returns false if no device owns all of the addressed bytes.
    pub fn write(&self, address: u64, data: &[u8]) -> bool {
        match self.find(address, data.len()) {
            Some((device, offset)) => {
                device.write(offset, data);
                true
            }
            None => false,
        }
    }

    fn find(&self, address: u64, len: usize) -> Option<(&dyn BusDevice, u64)> {
        let index = self
            .entries
            .partition_point(|entry| entry.base <= address)
            .checked_sub(1)?;
        let entry = &self.entries[index];
        let offset = address - entry.base;
        let end = offset.checked_add(u64::try_from(len).ok()?)?;
        (end <= entry.size).then(|| (entry.device.as_ref(), offset))
    }
}

impl fmt::Debug for Bus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list()
            .entries(
                self.entries
                    .iter()
                    .map(|entry| format!("{:#x}+{:#x}", entry.base, entry.size)),
            )
            .finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;

    #[derive(Default)]
    struct Recorder(Mutex<Vec<(u64, Vec<u8>)>>);

    impl BusDevice for Recorder {
        fn read(&self, offset: u64, data: &mut [u8]) {
            data.fill(offset.to_le_bytes()[0]);
        }
        fn write(&self, offset: u64, data: &[u8]) {
            self.0.lock().unwrap().push((offset, data.to_vec()));
        }
    }

    #[test]
    fn overlapping_and_wrapping_ranges_are_refused() {
        let mut bus = Bus::new();
        let dev = Arc::new(Recorder::default());
        bus.insert(0x1000, 0x1000, dev.clone()).unwrap();
        for (base, size) in [
            (0x1000, 1),
            (0x1fff, 1),
            (0xfff, 2),
            (0x0, 0x1001),
            (0x0, 0x4000),
            (0x1800, 0x10),
        ] {
            assert_eq!(
                bus.insert(base, size, dev.clone()),
                Err(BusError::Overlap {
                    base,
                    size,
                    other: 0x1000
                })
            );
        }
        for (base, size) in [(0, 0), (u64::MAX, 2), (2, u64::MAX)] {
            assert_eq!(
                bus.insert(base, size, dev.clone()),
                Err(BusError::InvalidRange { base, size })
            );
        }
        bus.insert(0x2000, 0x10, dev.clone()).unwrap();
        bus.insert(0xff0, 0x10, dev.clone()).unwrap();
        bus.insert(u64::MAX, 1, dev).unwrap();
    }

    #[test]
    fn accesses_reach_their_device_with_its_offset() {
        let mut bus = Bus::new();
        let low = Arc::new(Recorder::default());
        let high = Arc::new(Recorder::default());
        bus.insert(0x1000, 0x100, low.clone()).unwrap();
        bus.insert(0x2000, 0x100, high.clone()).unwrap();
        assert!(bus.write(0x1004, &[1, 2]));
        assert!(bus.write(0x20ff, &[3]));
        assert_eq!(*low.0.lock().unwrap(), vec![(4, vec![1, 2])]);
        assert_eq!(*high.0.lock().unwrap(), vec![(0xff, vec![3])]);
        let mut data = [0; 2];
        assert!(bus.read(0x1010, &mut data));
        assert_eq!(data, [0x10; 2]);
    }

    #[test]
    fn accesses_outside_or_across_a_range_are_not_dispatched() {
        let mut bus = Bus::new();
        bus.insert(0x1000, 0x100, Arc::new(Recorder::default())).unwrap();
        let mut data = [0xaa; 4];
        for address in [0, 0xfff, 0x10fd, 0x1100, u64::MAX] {
            assert!(!bus.read(address, &mut data));
            assert!(!bus.write(address, &data));
        }
        assert_eq!(data, [0xaa; 4]);
        assert!(bus.read(0x10fc, &mut data));
    }
}
