//! Device registers as memory that the guest reads without an exit.
//!
//! The pages of all devices lie side by side and are mapped into the guest read-only, in one piece: its reads are plain
//! loads, its writes still come to the transport. A transport keeps its page up to date: a register changes only through
//! a write of the guest, which waits for the transport, or through the device, which updates the page before it
//! interrupts the guest. Pages without a device read as zero, which is no device.
//!
//! Invariant: nothing is in a page but what its registers show, and nothing is ever read from it.

use std::fmt;
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use vm_memory::{Bytes, MmapRegion, VolatileMemory};

/// Size of a device's register page.
pub const PAGE_BYTES: u64 = 0x1000;

/// Memory for the register pages of a microVM.
pub struct RegisterPages {
    memory: MmapRegion<()>,
}

impl RegisterPages {
    /// Pages of zeroes for `count` devices.
    pub fn new(count: u32) -> io::Result<Arc<Self>> {
        let len = usize::try_from(u64::from(count) * PAGE_BYTES).map_err(|_| io::ErrorKind::OutOfMemory)?;
        let memory = MmapRegion::new(len).map_err(|_| io::ErrorKind::OutOfMemory)?;
        Ok(Arc::new(Self { memory }))
    }

    /// Where the pages are in this process, for KVM to map.
    pub fn host_address(&self) -> u64 {
        self.memory.as_ptr() as u64
    }

    /// Their size.
    pub fn len_bytes(&self) -> u64 {
        self.memory.size() as u64
    }

    /// The page of device `index`, if there is one.
    pub fn page(self: &Arc<Self>, index: u32) -> Option<RegisterPage> {
        let offset = u64::from(index) * PAGE_BYTES;
        (offset < self.len_bytes()).then(|| RegisterPage {
            pages: Arc::clone(self),
            offset: usize::try_from(offset).unwrap_or(usize::MAX),
        })
    }
}

impl fmt::Debug for RegisterPages {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RegisterPages")
            .field("len_bytes", &self.len_bytes())
            .finish()
    }
}

/// The page of one device.
#[derive(Clone, Debug)]
pub struct RegisterPage {
    pages: Arc<RegisterPages>,
    offset: usize,
}

impl RegisterPage {
    /// Sets a register.
    pub fn store(&self, register: u32, value: u32) {
        let at = self.offset + register as usize;
        // Registers are aligned words within the page, so this can't fail.
        let stored = self
            .pages
            .memory
            .as_volatile_slice()
            .store(value.to_le(), at, Ordering::SeqCst);
        debug_assert!(stored.is_ok(), "register {register:#x}");
    }

    /// Sets bytes of the device's configuration.
    pub fn store_bytes(&self, register: u32, bytes: &[u8]) {
        let at = self.offset + register as usize;
        let stored = self.pages.memory.as_volatile_slice().write_slice(bytes, at);
        debug_assert!(stored.is_ok(), "configuration at {register:#x}");
    }

    /// Reads a register back.
    #[cfg(test)]
    pub fn load(&self, register: u32) -> u32 {
        let at = self.offset + register as usize;
        self.pages
            .memory
            .as_volatile_slice()
            .load(at, Ordering::SeqCst)
            .map_or(0, u32::from_le)
    }
}
