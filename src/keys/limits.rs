//! The limits of a key, and how much of them its requests have used. This module must not know how a rejection is sent.
//!
//! A rate limit is a bucket that fills with each request or token, and drains at the rate of the limit. A request holds
//! the tokens that it may need until it ends; only then the tokens that it has used go into the bucket. A new limit
//! applies to the present level of the bucket, so a reload of the keys resets nothing. (Crate `governor` was not used:
//! it cannot hold tokens back.)

use std::num::NonZeroU32;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

use super::bucket::{Bucket, RateStatus};
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

/// Usage counters of a key: running requests, and recent requests and tokens.
#[derive(Debug, Default)]
pub(crate) struct KeyUsage(Mutex<Counters>);

#[derive(Debug, Default)]
struct Counters {
    running: u32,
    requests: Bucket,
    tokens: Bucket,
}

/// Limits, and the usage counted against them.
#[derive(Clone, Debug, Default)]
pub(crate) struct Quota {
    pub(crate) limits: KeyLimits,
    pub(crate) usage: Arc<KeyUsage>,
}

/// The quotas of a request: that of its key, and that of all keys together.
#[derive(Clone, Debug, Default)]
pub(crate) struct Quotas {
    pub(crate) of_key: Quota,
    pub(crate) of_all: Quota,
}

/// A request that counts toward the limits of its key, and of all keys.
#[derive(Debug)]
pub(crate) struct LimitedRequest {
    quotas: Quotas,
    /// Number of tokens that are held for the request. `None` after the request has ended.
    held: Mutex<Option<u64>>,
}

impl LimitedRequest {
    /// Counts a new request.
    ///
    /// # Errors
    /// A limit of requests is reached.
    pub(crate) fn start(quotas: &Quotas, now: Instant) -> Result<Self, Error> {
        let Quotas { of_key, of_all } = quotas;
        of_key
            .start_request(now)
            .map_err(|limit| limit.error(KEY))?;
        if let Err(limit) = of_all.start_request(now) {
            of_key.cancel_request(now);
            return Err(limit.error(ALL));
        }
        Ok(Self {
            quotas: quotas.clone(),
            held: Mutex::new(Some(0)),
        })
    }

    /// Holds tokens for one of the prompts of the request until the request ends.
    ///
    /// # Errors
    /// A limit of tokens per minute does not allow so many tokens now, or never allows the tokens of all prompts
    /// together.
    pub(crate) fn hold_tokens(&self, tokens: u64, now: Instant) -> Result<(), Error> {
        let mut held = self.lock_held();
        let Some(held) = &mut *held else {
            return Ok(());
        };
        let Quotas { of_key, of_all } = &self.quotas;
        let total = held.saturating_add(tokens);
        of_key.check_total(total).map_err(|it| it.error(KEY))?;
        of_all.check_total(total).map_err(|it| it.error(ALL))?;
        let of_key_held = of_key.hold_tokens(tokens, now);
        of_key_held.map_err(|limit| limit.error(KEY))?;
        if let Err(limit) = of_all.hold_tokens(tokens, now) {
            of_key.settle_tokens(tokens, 0, now);
            return Err(limit.error(ALL));
        }
        *held = total;
        Ok(())
    }

    /// Ends the request, which used this number of tokens. Later calls have no effect.
    pub(crate) fn end(&self, tokens: u64, now: Instant) {
        let Some(held) = self.lock_held().take() else {
            return;
        };
        for quota in [&self.quotas.of_key, &self.quotas.of_all] {
            quota.end_request();
            quota.settle_tokens(held, tokens, now);
        }
    }

    fn lock_held(&self) -> MutexGuard<'_, Option<u64>> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for LimitedRequest {
    fn drop(&mut self) {
        self.end(0, Instant::now());
    }
}

impl Quotas {
    /// Returns the state of the limit of requests per minute, and of that of tokens per minute. Of the key's limit and
    /// that of all keys, it is the one with less left.
    pub(crate) fn status(&self, now: Instant) -> [Option<RateStatus>; 2] {
        let (of_key, of_all) = (self.of_key.status(now), self.of_all.status(now));
        [0, 1].map(|unit| {
            let states = [of_key[unit], of_all[unit]].into_iter().flatten();
            states.min_by_key(|status| status.remaining)
        })
    }
}

impl Quota {
    fn start_request(&self, now: Instant) -> Result<(), ReachedLimit> {
        let mut counters = self.usage.lock();
        if let Some(limit) = self.limits.concurrent_requests
            && counters.running >= limit.get()
        {
            return Err(ReachedLimit::Concurrent(limit));
        }
        if let Some(limit) = self.limits.requests_per_minute {
            let taken = counters.requests.take(1, limit, now);
            taken.map_err(|wait| ReachedLimit::Rate(limit, "requests", wait))?;
        }
        counters.running += 1;
        Ok(())
    }

    fn end_request(&self) {
        let mut counters = self.usage.lock();
        counters.running = counters.running.saturating_sub(1);
    }

    /// Undoes [`Quota::start_request`].
    fn cancel_request(&self, now: Instant) {
        self.end_request();
        if let Some(limit) = self.limits.requests_per_minute {
            self.usage.lock().requests.give_back(1, limit, now);
        }
    }

    /// Checks that the limit of tokens per minute is not smaller than the number of tokens that a request needs.
    fn check_total(&self, tokens: u64) -> Result<(), ReachedLimit> {
        match self.limits.tokens_per_minute {
            Some(limit) if tokens > limit.get().into() => {
                Err(ReachedLimit::TooManyTokens(limit, tokens))
            }
            Some(_) | None => Ok(()),
        }
    }

    fn hold_tokens(&self, tokens: u64, now: Instant) -> Result<(), ReachedLimit> {
        let Some(limit) = self.limits.tokens_per_minute else {
            return Ok(());
        };
        let held = self.usage.lock().tokens.hold(tokens, limit, now);
        held.map_err(|wait| ReachedLimit::Rate(limit, "tokens", wait))
    }

    /// Replaces held tokens by the tokens that were used.
    fn settle_tokens(&self, held: u64, used: u64, now: Instant) {
        if let Some(limit) = self.limits.tokens_per_minute {
            self.usage.lock().tokens.settle(held, used, limit, now);
        }
    }

    fn status(&self, now: Instant) -> [Option<RateStatus>; 2] {
        let mut counters = self.usage.lock();
        let Counters {
            requests, tokens, ..
        } = &mut *counters;
        [
            self.limits
                .requests_per_minute
                .map(|limit| requests.status(limit, now)),
            self.limits
                .tokens_per_minute
                .map(|limit| tokens.status(limit, now)),
        ]
    }
}

impl KeyUsage {
    fn lock(&self) -> MutexGuard<'_, Counters> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Owners of limits, for error messages.
const KEY: &str = "API key's";
const ALL: &str = "server's";

/// A limit that does not allow a request.
enum ReachedLimit {
    Concurrent(NonZeroU32),
    /// The limit per minute, its unit, and the time to wait.
    Rate(NonZeroU32, &'static str, Duration),
    /// The limit of tokens per minute, and the number of tokens that the request needs, which is larger.
    TooManyTokens(NonZeroU32, u64),
}

impl ReachedLimit {
    /// Returns the error for the client. `owner` has the limit.
    fn error(self, owner: &str) -> Error {
        match self {
            Self::Concurrent(limit) => {
                let message =
                    format!("The {owner} limit of {limit} concurrent requests is reached.");
                Error::new(ErrorKind::RateLimited, message)
            }
            Self::Rate(limit, unit, wait) => {
                let (seconds, tenth) = {
                    let tenths = wait.as_nanos().div_ceil(100_000_000);
                    (tenths / 10, tenths % 10)
                };
                let message = format!(
                    "The {owner} limit of {limit} {unit} per minute is reached. Retry in {seconds}.{tenth} s."
                );
                Error {
                    retry_after: Some(wait),
                    ..Error::new(ErrorKind::RateLimited, message)
                }
            }
            Self::TooManyTokens(limit, tokens) => {
                let message = format!(
                    "The request needs up to {tokens} tokens (its prompt, and `max_tokens` for each choice), and the \
                     {owner} limit is {limit} tokens per minute. Lower `max_tokens`, or shorten the prompt."
                );
                Error::invalid_value("max_tokens", message)
            }
        }
    }
}

#[cfg(test)]
mod tests;
