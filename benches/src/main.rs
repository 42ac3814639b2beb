//! `hull-bench`: the benchmark harness.
mod harness;
mod report;
mod stats;
fn main() {}
