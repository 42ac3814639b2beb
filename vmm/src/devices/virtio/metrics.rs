//! Counters of devices: cheap to bump on the hot path, read by whoever answers a metrics request.

use std::sync::atomic::{AtomicU64, Ordering};

/// A number that only its device changes and anyone may read.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Adds to a counter.
    pub fn add(&self, count: u64) {
        self.0.fetch_add(count, Ordering::Relaxed);
    }

    /// Adds one.
    pub fn inc(&self) {
        self.add(1);
    }

    /// Replaces the value of a gauge.
    pub fn set(&self, value: u64) {
        self.0.store(value, Ordering::Relaxed);
    }

    /// The current value.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// A device's counters by name.
pub trait DeviceMetrics: Send + Sync {
    /// Calls `visit` for each counter.
    fn visit(&self, visit: &mut dyn FnMut(&'static str, u64));
}

/// Declares a struct of [`Counter`]s; the fields' names, which carry their unit, are the metrics' names.
macro_rules! device_metrics {
    ($(#[$attr:meta])* $name:ident { $($(#[$doc:meta])* $field:ident,)+ }) => {
        $(#[$attr])*
        #[derive(Debug, Default)]
        pub struct $name {
            $($(#[$doc])* pub $field: $crate::devices::virtio::metrics::Counter,)+
        }

        impl $crate::devices::virtio::metrics::DeviceMetrics for $name {
            fn visit(&self, visit: &mut dyn FnMut(&'static str, u64)) {
                $(visit(stringify!($field), self.$field.get());)+
            }
        }
    };
}
pub(crate) use device_metrics;
