//! Token buckets: how much a device may do, on average and at once. Pure; the caller brings the time.
//!
//! A request is let through while the bucket isn't in debt and is then paid for in full. So a request larger than the
//! bucket passes too, and the debt it leaves keeps the average.

use std::time::{Duration, Instant};

const NANOS_PER_SECOND: u128 = 1_000_000_000;
/// The longest a debtor waits before it is looked at again.
const MAX_WAIT: Duration = Duration::from_millis(900);
/// The shortest, so that a timer isn't set for every packet.
const MIN_WAIT: Duration = Duration::from_micros(500);

/// A rate with a burst. Both are at least 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rate {
    /// Units a second.
    pub per_second: u64,
    /// Units that may be spent at once after a pause.
    pub burst: u64,
}

/// One bucket.
#[derive(Clone, Copy, Debug)]
struct Bucket {
    rate: Rate,
    /// What may be spent; negative is debt.
    balance: i128,
    filled_at: Instant,
}

impl Bucket {
    fn new(rate: Rate, now: Instant) -> Self {
        Self {
            rate,
            balance: rate.burst.into(),
            filled_at: now,
        }
    }

    /// Zero if something may be spent now, else how long to wait.
    fn wait(&mut self, now: Instant) -> Duration {
        let elapsed = now.saturating_duration_since(self.filled_at).as_nanos();
        let rate = u128::from(self.rate.per_second.max(1));
        let gain = elapsed.saturating_mul(rate) / NANOS_PER_SECOND;
        if gain > 0 {
            let gain = i128::try_from(gain).unwrap_or(i128::MAX);
            self.balance = self.balance.saturating_add(gain).min(self.rate.burst.into());
            self.filled_at = now;
        }
        if self.balance > 0 {
            return Duration::ZERO;
        }
        let debt = self.balance.unsigned_abs() + 1;
        let wait_ns = debt.saturating_mul(NANOS_PER_SECOND) / rate;
        let wait = u64::try_from(wait_ns).map_or(MAX_WAIT, Duration::from_nanos);
        wait.clamp(MIN_WAIT, MAX_WAIT)
    }
}

/// Bounds bytes and operations, either or both.
#[derive(Clone, Copy, Debug, Default)]
pub struct RateLimiter {
    bytes: Option<Bucket>,
    operations: Option<Bucket>,
}

impl RateLimiter {
    /// A limiter whose buckets are full.
    pub fn new(bytes: Option<Rate>, operations: Option<Rate>, now: Instant) -> Self {
        Self {
            bytes: bytes.map(|rate| Bucket::new(rate, now)),
            operations: operations.map(|rate| Bucket::new(rate, now)),
        }
    }

    /// Whether there is anything to limit.
    pub fn is_active(&self) -> bool {
        self.bytes.is_some() || self.operations.is_some()
    }

    /// Whether another operation may begin; else how long to wait. Reads the clock only if there is a limit.
    pub fn admit(&mut self, now: impl FnOnce() -> Instant) -> Result<(), Duration> {
        if !self.is_active() {
            return Ok(());
        }
        let now = now();
        let buckets = [&mut self.bytes, &mut self.operations];
        let waits = buckets.into_iter().flatten().map(|bucket| bucket.wait(now));
        match waits.max() {
            Some(wait) if wait > Duration::ZERO => Err(wait),
            _ => Ok(()),
        }
    }

    /// Pays for an operation.
    pub fn spend(&mut self, bytes: u64) {
        if let Some(bucket) = &mut self.bytes {
            bucket.balance -= i128::from(bytes);
        }
        if let Some(bucket) = &mut self.operations {
            bucket.balance -= 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RATE: Rate = Rate {
        per_second: 1000,
        burst: 100,
    };

    /// What gets through in `seconds` when operations of `bytes` are tried whenever the limiter says so.
    fn passed_bytes(limiter: &mut RateLimiter, start: Instant, seconds: u64, bytes: u64) -> u64 {
        let mut now = start;
        let mut passed = 0;
        while now < start + Duration::from_secs(seconds) {
            match limiter.admit(|| now) {
                Ok(()) => {
                    limiter.spend(bytes);
                    passed += bytes;
                }
                Err(wait) => now += wait,
            }
        }
        passed
    }

    #[test]
    fn average_holds_for_small_and_for_oversized_operations() {
        let start = Instant::now();
        for bytes in [1, 7, 99, 100, 350] {
            let mut limiter = RateLimiter::new(Some(RATE), None, start);
            let passed = passed_bytes(&mut limiter, start, 10, bytes);
            let expected = 10_000 + 100;
            assert!(
                passed <= expected + bytes && passed + bytes + 100 >= expected,
                "{bytes}: {passed}"
            );
        }
    }

    #[test]
    fn burst_is_bounded_however_long_the_pause() {
        let start = Instant::now();
        let mut limiter = RateLimiter::new(None, Some(RATE), start);
        let later = start + Duration::from_secs(1 << 30);
        for _ in 0..100 {
            limiter.admit(|| later).unwrap();
            limiter.spend(1 << 40);
        }
        assert!(limiter.admit(|| later).unwrap_err() > Duration::ZERO);
    }

    #[test]
    fn extremes_neither_overflow_nor_stall() {
        let start = Instant::now();
        let rate = |per_second, burst| Some(Rate { per_second, burst });
        let mut limiter = RateLimiter::new(rate(1, 1), rate(u64::MAX, u64::MAX), start);
        limiter.spend(u64::MAX);
        limiter.spend(u64::MAX);
        assert_eq!(limiter.admit(|| start), Err(MAX_WAIT));
        let mut limiter = RateLimiter::new(rate(u64::MAX, u64::MAX), rate(0, 0), start);
        assert!(
            limiter
                .admit(|| start + Duration::from_secs(u64::from(u32::MAX)))
                .is_err()
        );
        let mut unlimited = RateLimiter::default();
        assert_eq!(unlimited.admit(|| unreachable!()), Ok(()));
    }
}
