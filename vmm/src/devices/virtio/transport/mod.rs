//! How a driver reaches a device's registers.

pub mod mmio;
#[cfg(test)]
mod tests;
