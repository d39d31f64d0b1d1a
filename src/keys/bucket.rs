//! The bucket of a rate limit: the amount that was used within about the last minute, and the amount that running
//! requests hold. This module must not know keys or requests.

use std::num::NonZeroU32;
use std::time::Duration;

use tokio::time::Instant;

/// State of a rate limit, for the headers of a response.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct RateStatus {
    /// The limit per minute.
    pub(crate) limit: u32,
    /// Amount that can be used now.
    pub(crate) remaining: u32,
    /// Time until the whole limit is available again.
    pub(crate) reset: Duration,
}

/// Leaky bucket: the used amount, which drains at the rate of the limit. Held amounts count, but do not drain.
#[derive(Debug, Default)]
pub(super) struct Bucket {
    /// The used amount, in [`PARTS`].
    level: u64,
    /// The amount that is held for running requests, in [`PARTS`].
    held: u64,
    updated: Option<Instant>,
}

/// Wait before the next try if only the end of a running request can help.
pub(super) const RETRY_AFTER_HELD: Duration = Duration::from_secs(1);

/// Number of parts of one request or token. It is the number of microseconds of a minute, so that a limit per minute
/// drains its own number of parts in each microsecond.
const PARTS: u64 = 60_000_000;

impl Bucket {
    /// Uses an amount, which must not be larger than the limit. If the limit does not allow it now, returns the time
    /// after which it may.
    pub(super) fn take(
        &mut self,
        amount: u64,
        limit: NonZeroU32,
        now: Instant,
    ) -> Result<(), Duration> {
        self.check(amount, limit, now)?;
        self.level += amount * PARTS;
        Ok(())
    }

    /// Reduces the used amount.
    pub(super) fn give_back(&mut self, amount: u64, limit: NonZeroU32, now: Instant) {
        self.drain(limit, now);
        self.level = self.level.saturating_sub(amount.saturating_mul(PARTS));
    }

    /// Like [`Bucket::take`], but the amount does not drain before [`Bucket::settle`].
    pub(super) fn hold(
        &mut self,
        amount: u64,
        limit: NonZeroU32,
        now: Instant,
    ) -> Result<(), Duration> {
        self.check(amount, limit, now)?;
        self.held += amount * PARTS;
        Ok(())
    }

    /// Replaces a held amount by the amount that was used, which may be larger.
    pub(super) fn settle(&mut self, held: u64, used: u64, limit: NonZeroU32, now: Instant) {
        self.drain(limit, now);
        self.held = self.held.saturating_sub(held.saturating_mul(PARTS));
        self.level = self.level.saturating_add(used.saturating_mul(PARTS));
    }

    fn check(&mut self, amount: u64, limit: NonZeroU32, now: Instant) -> Result<(), Duration> {
        self.drain(limit, now);
        let total = self.counted().saturating_add(amount.saturating_mul(PARTS));
        let excess = total.saturating_sub(u64::from(limit.get()) * PARTS);
        match excess {
            0 => Ok(()),
            _ if excess <= self.level => Err(drain_time(excess, limit)),
            _ => Err(drain_time(self.level, limit).max(RETRY_AFTER_HELD)),
        }
    }

    fn counted(&self) -> u64 {
        self.level.saturating_add(self.held)
    }

    pub(super) fn status(&mut self, limit: NonZeroU32, now: Instant) -> RateStatus {
        self.drain(limit, now);
        let used = u32::try_from(self.counted().div_ceil(PARTS)).unwrap_or(u32::MAX);
        RateStatus {
            limit: limit.get(),
            remaining: limit.get().saturating_sub(used),
            reset: drain_time(self.counted(), limit),
        }
    }

    fn drain(&mut self, limit: NonZeroU32, now: Instant) {
        let updated = *self.updated.get_or_insert(now);
        let elapsed = now.saturating_duration_since(updated).as_micros();
        let elapsed = u64::try_from(elapsed).unwrap_or(u64::MAX);
        // The rest of the last microsecond counts next time.
        self.updated = Some(updated + Duration::from_micros(elapsed));
        let drained = elapsed.saturating_mul(limit.get().into()).min(self.level);
        self.level -= drained;
    }
}

/// Returns the time in which a number of parts drains.
fn drain_time(parts: u64, limit: NonZeroU32) -> Duration {
    Duration::from_micros(parts.div_ceil(limit.get().into()))
}
