//! Wakes a worker and tells it to stop, without sending a message.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::Thread;

use tokio::sync::Notify;

use crate::runner::PrefixCacheStats;

/// Makes a worker check its token channels, because a reader was dropped or a full channel has room again.
///
/// Waking sets a flag and unparks the thread. No message is sent, so a wake-up cannot be lost, block or overflow a
/// queue.
#[derive(Clone, Debug)]
pub(crate) struct WorkerWaker {
    pub(super) flags: Arc<Flags>,
    pub(super) target: WakeTarget,
}

/// The thread or task that runs the worker.
#[derive(Clone, Debug)]
pub(super) enum WakeTarget {
    Thread(Thread),
    Task(Arc<Notify>),
}

/// Requests to a worker, and the state of its device.
#[derive(Debug, Default)]
pub(super) struct Flags {
    /// Set by [`WorkerWaker::wake`]. Cleared when the worker has checked its token channels.
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

impl WorkerWaker {
    /// Wakes the worker. A worker that is already awake checks its token channels once more before it sleeps.
    pub(crate) fn wake(&self) {
        self.flags.attention.store(true, Ordering::SeqCst);
        match &self.target {
            WakeTarget::Thread(thread) => thread.unpark(),
            WakeTarget::Task(notify) => notify.notify_one(),
        }
    }

    /// Tells the worker to stop now.
    pub(super) fn stop(&self) {
        self.flags.stopping.store(true, Ordering::SeqCst);
        self.wake();
    }
}
