//! The debugging UART (COM1). It exists only when configured: every byte costs an exit.
//!
//! Invariant: a reader that does not read costs output, never a stuck vCPU: bytes that can't be written at once to a
//! non-blocking output are dropped and counted, and a blocking write is given up when the vCPU is interrupted.

use crate::devices::bus::BusDevice;
use std::{
    fs::File,
    io::{self, Write},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};
use vm_superio::{Serial as Uart, Trigger};
use vmm_sys_util::eventfd::EventFd;

/// Why there is no UART.
#[derive(Debug, thiserror::Error)]
#[error("can't make the event of the serial port")]
pub struct SerialError(#[source] io::Error);

struct Line(EventFd);

impl Trigger for Line {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

/// Drops what can't be written now.
struct Output {
    file: File,
    dropped_bytes: Arc<AtomicU64>,
}

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        // Not `write_all`, which tries again when interrupted.
        let written = self.file.write(bytes).unwrap_or(0);
        self.dropped_bytes
            .fetch_add((bytes.len() - written) as u64, Ordering::Relaxed);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A 16550A with output only.
pub struct Serial {
    uart: Mutex<Uart<Line, vm_superio::serial::NoEvents, Output>>,
    interrupt: EventFd,
    dropped_bytes: Arc<AtomicU64>,
}

impl std::fmt::Debug for Serial {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Serial")
            .field("dropped_bytes", &self.dropped_bytes)
            .finish_non_exhaustive()
    }
}

impl Serial {
    /// Writes to `output`.
    ///
    /// # Errors
    /// [`SerialError`].
    pub fn new(output: File) -> Result<Self, SerialError> {
        let interrupt = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).map_err(SerialError)?;
        let line = Line(interrupt.try_clone().map_err(SerialError)?);
        let dropped_bytes = Arc::new(AtomicU64::new(0));
        let output = Output {
            file: output,
            dropped_bytes: Arc::clone(&dropped_bytes),
        };
        Ok(Self {
            uart: Mutex::new(Uart::new(line, output)),
            interrupt,
            dropped_bytes,
        })
    }

    /// To be connected to the UART's interrupt line.
    #[must_use]
    pub fn interrupt(&self) -> &EventFd {
        &self.interrupt
    }

    /// Bytes the output did not take.
    #[must_use]
    pub fn dropped_bytes(&self) -> u64 {
        self.dropped_bytes.load(Ordering::Relaxed)
    }
}

impl BusDevice for Serial {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let (Ok(offset), [byte]) = (u8::try_from(offset), &mut *data) else {
            data.fill(0xff);
            return;
        };
        *byte = self
            .uart
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .read(offset);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let (Ok(offset), [byte]) = (u8::try_from(offset), data) else {
            return;
        };
        if let Err(error) = self
            .uart
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .write(offset, *byte)
        {
            tracing::debug!(?error, "serial port");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Seek};

    #[test]
    fn bytes_reach_the_output_and_odd_accesses_do_nothing() {
        let mut file = tempfile::tempfile().unwrap();
        let serial = Serial::new(file.try_clone().unwrap()).unwrap();
        b"hi".iter().for_each(|byte| serial.write(0, &[*byte]));
        serial.write(0, &[1, 2]);
        serial.write(400, &[1]);
        let mut odd = [0; 2];
        serial.read(0, &mut odd);
        assert_eq!(odd, [0xff; 2]);
        file.rewind().unwrap();
        let mut text = String::new();
        file.read_to_string(&mut text).unwrap();
        assert_eq!((text.as_str(), serial.dropped_bytes()), ("hi", 0));
    }

    #[test]
    fn full_pipe_drops_bytes() {
        let (_read, write) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::NONBLOCK).unwrap();
        let serial = Serial::new(File::from(write)).unwrap();
        for _ in 0..70_000 {
            serial.write(0, b"x");
        }
        assert_eq!(serial.dropped_bytes(), 70_000 - 65_536);
    }
}
