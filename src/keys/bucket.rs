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

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;
    use proptest::sample::Index;

    use super::*;

    const MINUTE: Duration = Duration::from_secs(60);

    /// A limit, and attempts to use some of it: the time since the previous attempt, and the amount.
    fn attempts() -> impl Strategy<Value = (NonZeroU32, Vec<(Duration, u64)>)> {
        (1..2_000_u32).prop_flat_map(|limit| {
            let pause = prop_oneof![Just(0), 0..1_000_000_u64, 0..90_000_000_u64];
            let attempt = (pause.prop_map(Duration::from_micros), 1..=u64::from(limit));
            let limit = NonZeroU32::new(limit).expect("the range starts at 1");
            (Just(limit), vec(attempt, 1..40))
        })
    }

    proptest! {
        #[test]
        fn no_interval_has_more_than_the_limit_and_what_drains_in_it((limit, attempts) in attempts()) {
            let (mut bucket, start, mut now) = (Bucket::default(), Instant::now(), Duration::ZERO);
            let mut allowed: Vec<(Duration, u64)> = Vec::new();
            for (pause, amount) in attempts {
                now += pause;
                if bucket.take(amount, limit, start + now).is_ok() {
                    allowed.push((now, amount));
                }
            }
            for (at, (from, _)) in allowed.iter().enumerate() {
                let mut total = 0;
                for (to, amount) in &allowed[at..] {
                    total += amount;
                    let drained = (*to - *from).as_micros() * u128::from(limit.get());
                    let most = u128::from(limit.get()) * u128::from(PARTS) + drained;
                    prop_assert!(u128::from(total * PARTS) <= most, "{} from {:?} to {:?}", total, from, to);
                }
            }
        }

        #[test]
        fn a_rejected_amount_is_allowed_after_the_wait_and_not_before((limit, attempts) in attempts()) {
            let (mut bucket, mut now) = (Bucket::default(), Instant::now());
            for (pause, amount) in attempts {
                now += pause;
                let Err(wait) = bucket.take(amount, limit, now) else {
                    continue;
                };
                let microsecond = Duration::from_micros(1);
                now += wait - microsecond;
                prop_assert_eq!(bucket.take(amount, limit, now), Err(microsecond));
                now += microsecond;
                prop_assert_eq!(bucket.take(amount, limit, now), Ok(()));
            }
        }

        #[test]
        fn held_amounts_count_until_they_return(
            (limit, attempts) in attempts(),
            ended in vec((any::<Index>(), 0..100_u64), 1..40),
        ) {
            let (mut bucket, mut now) = (Bucket::default(), Instant::now());
            let (mut held, mut used) = (Vec::new(), 0);
            for ((pause, amount), (end, percent)) in attempts.into_iter().zip(ended) {
                now += pause;
                if bucket.hold(amount, limit, now).is_ok() {
                    held.push(amount);
                }
                let held_total: u64 = held.iter().sum();
                prop_assert!(held_total <= limit.get().into());
                let remaining = u64::from(bucket.status(limit, now).remaining);
                prop_assert!(remaining <= u64::from(limit.get()) - held_total);
                if !held.is_empty() && percent % 2 == 0 {
                    let amount = held.swap_remove(end.index(held.len()));
                    let part = amount * percent / 100;
                    bucket.settle(amount, part, limit, now);
                    used += part;
                }
            }
            for amount in held {
                bucket.settle(amount, 0, limit, now);
            }
            let status = bucket.status(limit, now);
            let all = u64::from(limit.get());
            prop_assert!(u64::from(status.remaining) >= all.saturating_sub(used), "only used amounts are missing");
            let later = bucket.status(limit, now + status.reset);
            prop_assert_eq!((later.remaining, later.reset), (limit.get(), Duration::ZERO));
            prop_assert!(status.reset <= MINUTE);
        }
    }
}
