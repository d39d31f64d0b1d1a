//! Activity of one connection, from which its idle timeout is computed: requests in progress, incomplete headers,
//! unsent data, or none of these.

use std::pin::pin;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use http::Version;
use tokio::sync::Notify;
use tokio::time::Instant;

use super::Limits;
use super::request_head::MalformedHead;

/// Activity of a connection. The socket reports reads and writes; the HTTP service reports requests.
pub(super) struct Activity {
    active_requests: AtomicUsize,
    /// Notified when a request starts.
    new_request: Notify,
    had_a_request: AtomicBool,
    is_http2: AtomicBool,
    /// True while the headers of an HTTP/1.1 request are incomplete.
    is_reading_headers: AtomicBool,
    /// True while written data waits because the socket accepts no more.
    has_unsent_data: AtomicBool,
    /// True if an HTTP/1.1 request was answered before its body was read. The rest of that body then cannot be
    /// distinguished from the head of the next request.
    has_unread_body: AtomicBool,
    /// The fault of the HTTP/1.1 head that was read last.
    malformed_head: Mutex<Option<MalformedHead>>,
    idle_since: Mutex<Instant>,
}

impl Activity {
    pub(super) fn new() -> Self {
        Self {
            active_requests: AtomicUsize::new(0),
            new_request: Notify::new(),
            had_a_request: AtomicBool::new(false),
            is_http2: AtomicBool::new(false),
            is_reading_headers: AtomicBool::new(false),
            has_unsent_data: AtomicBool::new(false),
            has_unread_body: AtomicBool::new(false),
            malformed_head: Mutex::new(None),
            idle_since: Mutex::new(Instant::now()),
        }
    }

    /// Records the start of a request. The request ends when the returned guard is dropped.
    pub(super) fn start_request(self: &Arc<Self>, version: Version) -> ActiveRequest {
        self.active_requests.fetch_add(1, Ordering::SeqCst);
        self.had_a_request.store(true, Ordering::SeqCst);
        if version == Version::HTTP_2 {
            self.set_http2();
        }
        self.is_reading_headers.store(false, Ordering::SeqCst);
        self.new_request.notify_waiters();
        ActiveRequest(Arc::clone(self))
    }

    /// Records that the connection is HTTP/2.
    pub(super) fn set_http2(&self) {
        self.is_http2.store(true, Ordering::SeqCst);
    }

    /// Records bytes that were read from the socket. On HTTP/1.1, bytes between two requests start the headers of the
    /// next request. On HTTP/2 they may be frames that belong to no request.
    pub(super) fn record_read(&self, bytes: &[u8]) {
        if !self.is_http2() && !self.is_unused() && !self.is_busy() {
            // A client may send an empty line after a request (RFC 9112, section 2.2).
            let is_empty_line = bytes.iter().all(|byte| matches!(byte, b'\r' | b'\n'));
            if !is_empty_line {
                self.is_reading_headers.store(true, Ordering::SeqCst);
            }
        }
    }

    /// Returns true while the headers of a second or later HTTP/1.1 request are incomplete.
    pub(super) fn is_reading_headers(&self) -> bool {
        self.is_reading_headers.load(Ordering::Relaxed)
    }

    /// Returns true if the next byte that is read on an HTTP/1.1 connection belongs to the head of a request.
    pub(super) fn expects_head(&self) -> bool {
        !self.is_busy() && !self.has_unread_body.load(Ordering::Relaxed)
    }

    /// Records that the body of an HTTP/1.1 request was not read to its end.
    pub(super) fn set_unread_body(&self) {
        self.has_unread_body.store(true, Ordering::Relaxed);
    }

    /// Records the fault of an HTTP/1.1 head. Its request starts next.
    pub(super) fn set_malformed_head(&self, fault: MalformedHead) {
        *self.malformed_head() = Some(fault);
    }

    /// Returns the fault in the head of the HTTP/1.1 request that starts.
    pub(super) fn take_malformed_head(&self) -> Option<MalformedHead> {
        self.malformed_head().take()
    }

    fn malformed_head(&self) -> MutexGuard<'_, Option<MalformedHead>> {
        let fault = self.malformed_head.lock();
        fault.unwrap_or_else(PoisonError::into_inner)
    }

    /// Records that the socket accepts no more data for now.
    pub(super) fn set_output_blocked(&self) {
        self.has_unsent_data.store(true, Ordering::SeqCst);
    }

    /// Records that the socket has accepted all data.
    pub(super) fn clear_output_blocked(&self) {
        self.restart_idle_time();
        self.has_unsent_data.store(false, Ordering::SeqCst);
    }

    /// Waits until a request is in progress.
    pub(super) async fn wait_until_busy(&self) {
        loop {
            let mut new_request = pin!(self.new_request.notified());
            // Register for notifications before the check, so that a request that starts in between is not missed.
            new_request.as_mut().enable();
            if self.is_busy() {
                return;
            }
            new_request.await;
        }
    }

    /// Returns true while a request is in progress.
    pub(super) fn is_busy(&self) -> bool {
        self.active_requests.load(Ordering::SeqCst) > 0
    }

    /// Returns true if the connection has never had a request.
    pub(super) fn is_unused(&self) -> bool {
        !self.had_a_request.load(Ordering::SeqCst)
    }

    pub(super) fn is_http2(&self) -> bool {
        self.is_http2.load(Ordering::SeqCst)
    }

    /// Returns the time at which to check again whether the connection is idle.
    pub(super) fn next_idle_check(&self, limits: &Limits) -> Instant {
        let latest = Instant::now() + limits.keep_alive_timeout;
        if self.is_active() {
            latest
        } else {
            self.closes_at(limits).min(latest)
        }
    }

    /// Returns true if the connection has exceeded its idle timeout.
    pub(super) fn is_idle_too_long(&self, limits: &Limits) -> bool {
        !self.is_active() && self.closes_at(limits) <= Instant::now()
    }

    fn is_active(&self) -> bool {
        self.is_busy() || self.is_reading_headers() || self.has_unsent_data.load(Ordering::SeqCst)
    }

    /// Returns the time at which the connection closes if it stays idle. Before the first HTTP/1.1 request or the
    /// HTTP/2 preface, only the header timeout applies.
    fn closes_at(&self, limits: &Limits) -> Instant {
        let timeout = if self.is_unused() && !self.is_http2() {
            limits.header_timeout
        } else {
            limits.keep_alive_timeout
        };
        let since = self.idle_since.lock();
        *since.unwrap_or_else(PoisonError::into_inner) + timeout
    }

    fn restart_idle_time(&self) {
        let since = self.idle_since.lock();
        *since.unwrap_or_else(PoisonError::into_inner) = Instant::now();
    }
}

/// Marks a request as in progress until this guard is dropped.
pub(super) struct ActiveRequest(Arc<Activity>);

impl Drop for ActiveRequest {
    fn drop(&mut self) {
        self.0.restart_idle_time();
        self.0.active_requests.fetch_sub(1, Ordering::SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::time::advance;

    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn limits() -> Limits {
        Limits {
            header_timeout: 10 * SECOND,
            keep_alive_timeout: 75 * SECOND,
            ..Limits::default()
        }
    }

    async fn idle_after(activity: &Activity, seconds: u32) {
        advance(SECOND * seconds - Duration::from_millis(1)).await;
        assert!(!activity.is_idle_too_long(&limits()), "too soon");
        advance(Duration::from_millis(1)).await;
        assert!(activity.is_idle_too_long(&limits()), "too late");
        assert!(activity.next_idle_check(&limits()) <= Instant::now());
    }

    #[tokio::test(start_paused = true)]
    async fn a_new_connection_without_data_is_idle_after_the_header_timeout() {
        idle_after(&Activity::new(), 10).await;
    }

    #[tokio::test(start_paused = true)]
    async fn a_connection_is_idle_after_the_keep_alive_timeout() {
        for version in [Version::HTTP_11, Version::HTTP_2] {
            let activity = Arc::new(Activity::new());
            let request = activity.start_request(version);
            advance(1_000 * SECOND).await;
            assert!(!activity.is_idle_too_long(&limits()));
            drop(request);
            idle_after(&activity, 75).await;
        }
    }

    #[tokio::test(start_paused = true)]
    async fn an_http2_connection_without_requests_gets_the_keep_alive_timeout() {
        let activity = Activity::new();
        activity.set_http2();
        idle_after(&activity, 75).await;
    }

    #[tokio::test(start_paused = true)]
    async fn a_connection_with_unsent_data_is_not_idle() {
        let activity = Arc::new(Activity::new());
        let request = activity.start_request(Version::HTTP_11);
        activity.set_output_blocked();
        drop(request);
        advance(1_000 * SECOND).await;
        assert!(!activity.is_idle_too_long(&limits()));
        activity.clear_output_blocked();
        idle_after(&activity, 75).await;
    }

    #[tokio::test(start_paused = true)]
    async fn partial_headers_are_not_idle_and_an_empty_line_is_ignored() {
        let activity = Arc::new(Activity::new());
        drop(activity.start_request(Version::HTTP_11));
        activity.record_read(b"\r\n");
        assert!(!activity.is_reading_headers());
        advance(74 * SECOND).await;
        activity.record_read(b"\r\nP");
        assert!(activity.is_reading_headers());
        advance(9 * SECOND).await;
        assert!(!activity.is_idle_too_long(&limits()));
        drop(activity.start_request(Version::HTTP_11));
        assert!(!activity.is_reading_headers());
        idle_after(&activity, 75).await;
    }
}
