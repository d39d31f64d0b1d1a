//! Tracks when the output of a response has been flushed to its connection's socket.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::timeout;

use crate::runner::monotonic_ns;
use crate::telemetry::StageTimes;

/// Counts the flushes of one connection. A flush means that everything written before has been sent to the socket.
#[derive(Default)]
pub struct FlushTracker {
    count: AtomicU64,
    changed: Notify,
    /// Writes that wait for the next flush, which ends their socket stage.
    pending: Mutex<Vec<PendingWrite>>,
    has_pending_writes: AtomicBool,
}

/// Tokens that were written together and are not flushed yet.
struct PendingWrite {
    times: Arc<StageTimes>,
    tokens: u64,
    written_ns: u64,
}

/// Maximum number of unflushed writes whose time is measured. If a peer does not read, more writes may wait; their
/// tokens are not measured.
const MAX_PENDING_WRITES: usize = 256;

impl FlushTracker {
    /// Records that everything written so far has been flushed to the socket.
    pub fn record_flush(&self) {
        self.count.fetch_add(1, Ordering::SeqCst);
        self.changed.notify_waiters();
        if self.has_pending_writes.swap(false, Ordering::SeqCst) {
            let now_ns = monotonic_ns();
            for write in self.pending().drain(..) {
                write
                    .times
                    .record(write.tokens, now_ns.saturating_sub(write.written_ns));
            }
        }
    }

    /// Locks the pending writes. The lock is held only for a push or a drain. On HTTP/1 one task uses it, so there is
    /// no contention.
    fn pending(&self) -> MutexGuard<'_, Vec<PendingWrite>> {
        self.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Lets a response wait until its output has been flushed to the socket.
///
/// hyper flushes a connection only after it has written all data that it holds. Data from a body has therefore been
/// written when a flush that *started* later completes. On HTTP/1.1 one task drives the body and the socket, so this is
/// the next flush. On HTTP/2 another thread may be flushing already, so this is the second flush from now, and it
/// covers only the data for which the peer's flow-control window has room.
#[derive(Clone)]
pub struct FlushHandle {
    flushes: Arc<FlushTracker>,
    version: http::Version,
}

impl FlushHandle {
    /// Creates the handle of a response. `version` is the HTTP version of the connection that `flushes` tracks.
    #[must_use]
    pub fn new(flushes: Arc<FlushTracker>, version: http::Version) -> Self {
        Self { flushes, version }
    }

    /// Returns true on HTTP/2, where a response ends with a frame of its own instead of with its connection.
    #[must_use]
    pub(crate) fn is_http2(&self) -> bool {
        self.version == http::Version::HTTP_2
    }

    /// Records in `times` the time from `written_ns` until the next flush, for `tokens` tokens.
    pub(super) fn record_socket_time(&self, times: &Arc<StageTimes>, tokens: u64, written_ns: u64) {
        let mut pending = self.flushes.pending();
        if pending.len() < MAX_PENDING_WRITES {
            pending.push(PendingWrite {
                times: Arc::clone(times),
                tokens,
                written_ns,
            });
        }
        drop(pending);
        self.flushes
            .has_pending_writes
            .store(true, Ordering::SeqCst);
    }

    /// Waits until everything given to the connection so far has been flushed, for at most `max_wait`. Without the
    /// limit, a peer that does not read could delay the caller forever.
    pub async fn wait_until_flushed(&self, max_wait: Duration) {
        let flushes = if self.is_http2() { 2 } else { 1 };
        let target = self.flushes.count.load(Ordering::SeqCst) + flushes;
        let flushed = async {
            loop {
                let changed = self.flushes.changed.notified();
                if self.flushes.count.load(Ordering::SeqCst) >= target {
                    return;
                }
                changed.await;
            }
        };
        // The caller continues in both cases, so a timeout is not an error.
        let _ = timeout(max_wait, flushed).await;
    }
}
