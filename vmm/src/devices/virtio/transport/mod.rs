//! How a driver reaches a device's registers.

pub mod interrupt;
pub mod mmio;
pub mod page;
mod registers;
#[cfg(test)]
mod tests;
