//! The limits of a key, and how much of them its requests have used. This module must not know how a rejection is sent.
//!
//! A rate limit is a bucket that fills with each request or token, and drains at the rate of the limit. A new limit
//! applies to the present level of the bucket, so a reload of the keys resets nothing. (Crate `governor` was not used:
//! it cannot give back tokens that a request reserved but did not use.)

use std::num::NonZeroU32;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

use super::key::Key;
use crate::error::{Error, ErrorKind};

/// Limits of a key. `None` means that there is no limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct KeyLimits {
    /// Maximum number of requests per minute, also of those that fail.
    pub requests_per_minute: Option<NonZeroU32>,
    /// Maximum number of requests that run or wait at the same time.
    pub concurrent_requests: Option<NonZeroU32>,
    /// Maximum number of tokens per minute, of prompts and completions together.
    pub tokens_per_minute: Option<NonZeroU32>,
}

/// What the requests of a key have used of its limits.
#[derive(Debug, Default)]
pub(crate) struct KeyUsage(Mutex<Counters>);

#[derive(Debug, Default)]
struct Counters {
    running: u32,
    requests: Bucket,
    tokens: Bucket,
}

/// State of a rate limit, for the headers of a response.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct RateStatus {
    /// The limit per minute.
    pub(crate) limit: u32,
    /// Amount that can be used now.
    pub(crate) remaining: u32,
    /// Time until nothing is used.
    pub(crate) reset: Duration,
}

/// A request that counts toward the limits of its key.
#[derive(Debug)]
pub(crate) struct LimitedRequest {
    key: Arc<Key>,
    /// Number of tokens that were reserved for the request.
    reserved: AtomicU64,
    has_ended: AtomicBool,
}

impl LimitedRequest {
    /// Counts a new request.
    ///
    /// # Errors
    /// The key has reached its limit of requests.
    pub(crate) fn start(key: &Arc<Key>, now: Instant) -> Result<Self, Error> {
        let limits = key.limits;
        let mut counters = key.usage.lock();
        if let Some(limit) = limits.concurrent_requests
            && counters.running >= limit.get()
        {
            let message = format!("The API key's limit of {limit} concurrent requests is reached.");
            return Err(Error::new(ErrorKind::RateLimited, message));
        }
        if let Some(limit) = limits.requests_per_minute {
            let taken = counters.requests.take(1, limit, now);
            taken.map_err(|wait| rate_limited(limit, "requests", wait))?;
        }
        counters.running += 1;
        Ok(Self {
            key: Arc::clone(key),
            reserved: AtomicU64::new(0),
            has_ended: AtomicBool::new(false),
        })
    }

    /// Reserves the tokens that the request needs at most. [`LimitedRequest::end`] gives back those that were not used.
    ///
    /// # Errors
    /// The key's limit of tokens per minute does not allow so many tokens now, or never does.
    pub(crate) fn reserve_tokens(&self, tokens: u64, now: Instant) -> Result<(), Error> {
        let Some(limit) = self.key.limits.tokens_per_minute else {
            return Ok(());
        };
        if tokens > limit.get().into() {
            let message = format!(
                "The request needs up to {tokens} tokens (its prompt, and `max_tokens` for each choice), and the \
                 API key's limit is {limit} tokens per minute. Lower `max_tokens`."
            );
            return Err(Error::invalid_value("max_tokens", message));
        }
        let taken = self.key.usage.lock().tokens.take(tokens, limit, now);
        taken.map_err(|wait| rate_limited(limit, "tokens", wait))?;
        self.reserved.fetch_add(tokens, Ordering::Relaxed);
        Ok(())
    }

    /// Ends the request, which used this number of tokens. Later calls have no effect.
    pub(crate) fn end(&self, tokens: u64, now: Instant) {
        if self.has_ended.swap(true, Ordering::Relaxed) {
            return;
        }
        let reserved = self.reserved.load(Ordering::Relaxed);
        let mut counters = self.key.usage.lock();
        counters.running = counters.running.saturating_sub(1);
        if let Some(limit) = self.key.limits.tokens_per_minute {
            counters.tokens.settle(reserved, tokens, limit, now);
        }
    }
}

impl Drop for LimitedRequest {
    fn drop(&mut self) {
        self.end(0, Instant::now());
    }
}

impl KeyUsage {
    /// Returns the state of the limit of requests per minute, and of that of tokens per minute.
    pub(crate) fn status(&self, limits: &KeyLimits, now: Instant) -> [Option<RateStatus>; 2] {
        let mut counters = self.lock();
        let Counters {
            requests, tokens, ..
        } = &mut *counters;
        [
            limits
                .requests_per_minute
                .map(|it| requests.status(it, now)),
            limits.tokens_per_minute.map(|it| tokens.status(it, now)),
        ]
    }

    fn lock(&self) -> MutexGuard<'_, Counters> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn rate_limited(limit: NonZeroU32, unit: &str, wait: Duration) -> Error {
    let seconds = wait.as_secs_f64();
    let message = format!(
        "The API key's limit of {limit} {unit} per minute is reached. Retry in {seconds:.1} s."
    );
    Error {
        retry_after: Some(wait),
        ..Error::new(ErrorKind::RateLimited, message)
    }
}

/// The amount that was used, as far as it has not drained since.
#[derive(Debug, Default)]
struct Bucket {
    /// Amount in millionths, because a limit drains parts of a token within a millisecond.
    level: u64,
    updated: Option<Instant>,
}

/// Number of parts of the level for one request or token.
const PARTS: u64 = 1_000_000;

impl Bucket {
    /// Uses an amount, which must not be larger than the limit. If the limit does not allow it now, returns the time
    /// after which it will.
    fn take(&mut self, amount: u64, limit: NonZeroU32, now: Instant) -> Result<(), Duration> {
        self.drain(limit, now);
        let level = self.level + amount * PARTS;
        let capacity = u64::from(limit.get()) * PARTS;
        if level > capacity {
            return Err(drain_time(level - capacity, limit));
        }
        self.level = level;
        Ok(())
    }

    /// Replaces a reserved amount by the amount that was used, which may be larger.
    fn settle(&mut self, reserved: u64, used: u64, limit: NonZeroU32, now: Instant) {
        self.drain(limit, now);
        let level = self.level.saturating_add(used.saturating_mul(PARTS));
        self.level = level.saturating_sub(reserved.saturating_mul(PARTS));
    }

    fn status(&mut self, limit: NonZeroU32, now: Instant) -> RateStatus {
        self.drain(limit, now);
        let used = u32::try_from(self.level.div_ceil(PARTS)).unwrap_or(u32::MAX);
        RateStatus {
            limit: limit.get(),
            remaining: limit.get().saturating_sub(used),
            reset: drain_time(self.level, limit),
        }
    }

    fn drain(&mut self, limit: NonZeroU32, now: Instant) {
        let Some(updated) = self.updated.replace(now) else {
            return;
        };
        let elapsed = now.saturating_duration_since(updated).as_micros();
        // `PARTS` parts of each token, and a limit per 60 million microseconds.
        let drained = elapsed * u128::from(limit.get()) / 60;
        self.level = self
            .level
            .saturating_sub(u64::try_from(drained).unwrap_or(u64::MAX));
    }
}

/// Returns the time in which a number of parts drains.
fn drain_time(parts: u64, limit: NonZeroU32) -> Duration {
    let micros = (u128::from(parts) * 60).div_ceil(limit.get().into());
    Duration::from_micros(u64::try_from(micros).unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use tokio::time::advance;

    use super::*;

    fn key(limits: KeyLimits) -> Arc<Key> {
        Arc::new(Key {
            name: "a".parse().unwrap(),
            scopes: BTreeSet::new(),
            models: None,
            limits,
            usage: Arc::default(),
        })
    }

    fn at_most(limit: u32) -> Option<NonZeroU32> {
        NonZeroU32::new(limit)
    }

    fn start(key: &Arc<Key>) -> Result<LimitedRequest, Error> {
        LimitedRequest::start(key, Instant::now())
    }

    fn wait<T>(result: Result<T, Error>) -> Option<Duration> {
        let Err(error) = result else {
            panic!("the request is within the limit")
        };
        assert_eq!(error.kind, ErrorKind::RateLimited);
        error.retry_after
    }

    #[tokio::test(start_paused = true)]
    async fn requests_beyond_the_rate_are_rejected_with_the_time_to_wait() {
        let key = key(KeyLimits {
            requests_per_minute: at_most(30),
            ..KeyLimits::default()
        });
        for _ in 0..30 {
            start(&key).unwrap();
        }
        let seconds = |seconds| Some(Duration::from_secs(seconds));
        assert_eq!(wait(start(&key)), seconds(2));
        advance(Duration::from_secs(1)).await;
        assert_eq!(
            wait(start(&key)),
            seconds(1),
            "a rejected request counts nothing"
        );
        advance(Duration::from_secs(1)).await;
        start(&key).unwrap();
        assert_eq!(wait(start(&key)), seconds(2));
        let [requests, tokens] = key.usage.status(&key.limits, Instant::now());
        assert_eq!(tokens, None);
        let expected = RateStatus {
            limit: 30,
            remaining: 0,
            reset: Duration::from_secs(60),
        };
        assert_eq!(requests, Some(expected));
    }

    #[tokio::test(start_paused = true)]
    async fn a_request_is_concurrent_until_it_ends_or_is_dropped() {
        let key = key(KeyLimits {
            concurrent_requests: at_most(2),
            ..KeyLimits::default()
        });
        let (first, second) = (start(&key).unwrap(), start(&key).unwrap());
        wait(start(&key)).unwrap();
        first.end(0, Instant::now());
        drop(first);
        let third = start(&key).unwrap();
        wait(start(&key)).unwrap();
        drop(second);
        start(&key).unwrap();
        drop(third);
    }

    #[tokio::test(start_paused = true)]
    async fn reserved_tokens_that_were_not_used_are_given_back() {
        let key = key(KeyLimits {
            tokens_per_minute: at_most(600),
            ..KeyLimits::default()
        });
        let request = start(&key).unwrap();
        request.reserve_tokens(500, Instant::now()).unwrap();
        let other = start(&key).unwrap();
        let rejected = other.reserve_tokens(150, Instant::now());
        assert_eq!(wait(rejected), Some(Duration::from_secs(5)));
        request.end(100, Instant::now());
        other.reserve_tokens(500, Instant::now()).unwrap();
        let [_, tokens] = key.usage.status(&key.limits, Instant::now());
        assert_eq!(tokens.unwrap().remaining, 0);

        let too_large = other.reserve_tokens(601, Instant::now()).unwrap_err();
        assert_eq!(too_large.kind, ErrorKind::InvalidValue);
        assert_eq!(too_large.param.as_deref(), Some("max_tokens"));
    }

    #[tokio::test(start_paused = true)]
    async fn tokens_that_were_not_reserved_count_when_the_request_ends() {
        let key = key(KeyLimits {
            tokens_per_minute: at_most(60),
            ..KeyLimits::default()
        });
        start(&key).unwrap().end(90, Instant::now());
        let rejected = start(&key).unwrap().reserve_tokens(1, Instant::now());
        assert_eq!(wait(rejected), Some(Duration::from_secs(31)));
    }
}
