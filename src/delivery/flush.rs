//! When what a response has said has left for its connection's socket.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::timeout;

use crate::runner::monotonic_ns;
use crate::telemetry::StageTimes;

/// Counts how often everything written so far has left for the socket.
#[derive(Default)]
pub struct FlushTracker {
    count: AtomicU64,
    changed: Notify,
    /// Tokens whose time in the socket's stage ends with the next flush.
    leaving: Mutex<Vec<PendingWrite>>,
    has_pending_writes: AtomicBool,
}

/// Tokens that were written, and wait for the flush.
struct PendingWrite {
    times: Arc<StageTimes>,
    tokens: u64,
    since_ns: u64,
}

/// How many writes are timed one by one until a flush. A connection whose peer does not read may have
/// more: the tokens of those are not timed.
const MAX_PENDING_WRITES: usize = 256;

impl FlushTracker {
    /// Everything that was written has left.
    pub fn flushed(&self) {
        self.count.fetch_add(1, Ordering::SeqCst);
        self.changed.notify_waiters();
        if self.has_pending_writes.swap(false, Ordering::SeqCst) {
            let now_ns = monotonic_ns();
            for left in self.leaving().drain(..) {
                left.times
                    .record(left.tokens, now_ns.saturating_sub(left.since_ns));
            }
        }
    }

    /// Held for a push or for a drain, and by one task at a time but on HTTP/2.
    fn leaving(&self) -> MutexGuard<'_, Vec<PendingWrite>> {
        self.leaving.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Lets a response wait until what it has said has left for the socket.
///
/// hyper flushes a connection only after it has written all that it holds. So whatever a body gave it
/// is on its way once a flush has *begun* after that: on HTTP/1.1, where body and socket are driven
/// by one task, that is the next flush. On HTTP/2 a flush may be under way at that moment, on another
/// thread, so it is the one after the next; and only what the peer's window has room for is flushed.
#[derive(Clone)]
pub struct FlushHandle {
    flushes: Arc<FlushTracker>,
    version: http::Version,
}

impl FlushHandle {
    /// Of a response in this version of HTTP, on the connection with these flushes.
    #[must_use]
    pub fn new(flushes: Arc<FlushTracker>, version: http::Version) -> Self {
        Self { flushes, version }
    }

    /// Whether the response ends by a frame of its own rather than with its connection.
    #[must_use]
    pub fn is_http2(&self) -> bool {
        self.version == http::Version::HTTP_2
    }

    /// Counts so many tokens as long in the socket's stage as they take from `since_ns` to the next
    /// flush.
    pub(super) fn time(&self, times: &Arc<StageTimes>, tokens: u64, since_ns: u64) {
        let mut leaving = self.flushes.leaving();
        if leaving.len() < MAX_PENDING_WRITES {
            leaving.push(PendingWrite {
                times: Arc::clone(times),
                tokens,
                since_ns,
            });
        }
        drop(leaving);
        self.flushes
            .has_pending_writes
            .store(true, Ordering::SeqCst);
    }

    /// Waits until all that was given to the connection before this call has left, at most so long:
    /// a peer that does not read could keep it for ever.
    pub async fn next(&self, at_most: Duration) {
        let flushes = if self.is_http2() { 2 } else { 1 };
        let enough = self.flushes.count.load(Ordering::SeqCst) + flushes;
        let left = async {
            loop {
                let changed = self.flushes.changed.notified();
                if self.flushes.count.load(Ordering::SeqCst) >= enough {
                    return;
                }
                changed.await;
            }
        };
        // Too late is as good as left: the caller goes on either way.
        let _ = timeout(at_most, left).await;
    }
}
