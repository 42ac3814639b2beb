//! Emulated devices and the buses that reach them.
//!
//! Owner: the device manager, which builds every device, places it on a [`bus::Bus`] and hands its event sources to
//! the event loop. Invariant: a device knows neither its transport, nor the builder, nor another device.

pub mod bus;
pub mod legacy;
pub mod virtio;
