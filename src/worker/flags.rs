//! The atomics that a worker's thread shares with other threads.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use crate::runner::PrefixCacheStats;

/// Requests to a worker, and the state of its device.
#[derive(Debug, Default)]
pub(super) struct Flags {
    /// Set by [`WorkerWaker::wake`](super::waker::WorkerWaker::wake). Cleared when the worker has checked its token
    /// channels.
    pub(super) attention: AtomicBool,
    pub(super) draining: AtomicBool,
    pub(super) stopping: AtomicBool,
    /// Start of the current device call, in nanoseconds of CLOCK_MONOTONIC; 0 if none is running.
    pub(super) step_started_ns: AtomicU64,
    /// [`PrefixCacheStats::bytes`] of the device.
    pub(super) prefix_cache_bytes: AtomicU64,
    /// [`PrefixCacheStats::evictions`] of the device.
    pub(super) prefix_cache_evictions: AtomicU64,
}

impl Flags {
    /// Returns the state of the device's prefix cache.
    pub(super) fn prefix_cache(&self) -> PrefixCacheStats {
        PrefixCacheStats {
            bytes: self.prefix_cache_bytes.load(Ordering::Relaxed),
            evictions: self.prefix_cache_evictions.load(Ordering::Relaxed),
        }
    }

    /// Sets the state of the device's prefix cache.
    pub(super) fn set_prefix_cache(&self, stats: PrefixCacheStats) {
        self.prefix_cache_bytes
            .store(stats.bytes, Ordering::Relaxed);
        self.prefix_cache_evictions
            .store(stats.evictions, Ordering::Relaxed);
    }
}
