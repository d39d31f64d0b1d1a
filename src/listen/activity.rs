//! What a connection is doing: answering, waiting for the rest of a request's headers, or idle.

use std::pin::{Pin, pin};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};

use http::Version;
use http_body::{Frame, SizeHint};
use tokio::sync::Notify;
use tokio::time::Instant;

use super::Limits;
use super::stalled::set_waiting_for_peer;

/// What a connection is doing. Its socket says what it reads and writes, its service what it answers.
pub(super) struct Activity {
    requests: AtomicUsize,
    /// Told of each request.
    began: Notify,
    had_a_request: AtomicBool,
    is_http2: AtomicBool,
    /// The first bytes of a request's headers have come, and not yet the last.
    is_reading_headers: AtomicBool,
    /// The socket has taken only a part of what was written to it.
    is_behind: AtomicBool,
    idle_since: Mutex<Instant>,
}

impl Activity {
    pub(super) fn new() -> Self {
        Self {
            requests: AtomicUsize::new(0),
            began: Notify::new(),
            had_a_request: AtomicBool::new(false),
            is_http2: AtomicBool::new(false),
            is_reading_headers: AtomicBool::new(false),
            is_behind: AtomicBool::new(false),
            idle_since: Mutex::new(Instant::now()),
        }
    }

    /// The connection begins: after the TLS handshake, where there is one.
    pub(super) fn begin(&self) {
        self.idle_again();
    }

    /// A request begins; its answer ends when the guard is dropped.
    pub(super) fn busy(self: &Arc<Self>, version: Version) -> ActiveRequest {
        self.requests.fetch_add(1, Ordering::SeqCst);
        self.had_a_request.store(true, Ordering::SeqCst);
        if version == Version::HTTP_2 {
            self.set_http2();
        }
        self.is_reading_headers.store(false, Ordering::SeqCst);
        self.began.notify_waiters();
        ActiveRequest(Arc::clone(self))
    }

    /// The peer has begun HTTP/2.
    pub(super) fn set_http2(&self) {
        self.is_http2.store(true, Ordering::SeqCst);
    }

    /// Notes bytes that were read. On HTTP/2 they may be frames that belong to no request.
    pub(super) fn read(&self, bytes: &[u8]) {
        if !self.is_http2() && !self.is_unused() && !self.is_busy() {
            // A client may send an empty line behind a request (RFC 9112, 2.2).
            let is_empty_line = bytes.iter().all(|byte| matches!(byte, b'\r' | b'\n'));
            if !is_empty_line {
                self.is_reading_headers.store(true, Ordering::SeqCst);
            }
        }
    }

    /// Whether a later request of an HTTP/1.1 connection has begun, and its headers are not whole.
    pub(super) fn is_reading_headers(&self) -> bool {
        self.is_reading_headers.load(Ordering::Relaxed)
    }

    /// The socket takes no more for now.
    pub(super) fn fell_behind(&self) {
        self.is_behind.store(true, Ordering::SeqCst);
    }

    /// The socket has taken all that was written.
    pub(super) fn caught_up(&self) {
        self.idle_again();
        self.is_behind.store(false, Ordering::SeqCst);
    }

    /// Waits until a request is being answered.
    pub(super) async fn wait_until_busy(&self) {
        loop {
            let mut began = pin!(self.began.notified());
            began.as_mut().enable();
            if self.is_busy() {
                return;
            }
            began.await;
        }
    }

    /// Whether a request is being answered.
    pub(super) fn is_busy(&self) -> bool {
        self.requests.load(Ordering::SeqCst) > 0
    }

    /// Whether the connection has never had a request.
    pub(super) fn is_unused(&self) -> bool {
        !self.had_a_request.load(Ordering::SeqCst)
    }

    pub(super) fn is_http2(&self) -> bool {
        self.is_http2.load(Ordering::SeqCst)
    }

    /// The time at which the connection is to be looked at again.
    pub(super) fn next_idle_check(&self, limits: &Limits) -> Instant {
        let look_again = Instant::now() + limits.keep_alive_timeout;
        if self.has_something_to_do() {
            look_again
        } else {
            self.closes_at(limits).min(look_again)
        }
    }

    /// Whether the connection has been idle for too long.
    pub(super) fn is_idle(&self, limits: &Limits) -> bool {
        !self.has_something_to_do() && self.closes_at(limits) <= Instant::now()
    }

    fn has_something_to_do(&self) -> bool {
        self.is_busy() || self.is_reading_headers() || self.is_behind.load(Ordering::SeqCst)
    }

    /// The end of an idle connection: whoever connects must send something soon.
    fn closes_at(&self, limits: &Limits) -> Instant {
        let limit = if self.is_unused() && !self.is_http2() {
            limits.header_timeout
        } else {
            limits.keep_alive_timeout
        };
        let since = self.idle_since.lock();
        *since.unwrap_or_else(PoisonError::into_inner) + limit
    }

    fn idle_again(&self) {
        let since = self.idle_since.lock();
        *since.unwrap_or_else(PoisonError::into_inner) = Instant::now();
    }
}

/// Keeps its connection busy.
pub(super) struct ActiveRequest(Arc<Activity>);

impl Drop for ActiveRequest {
    fn drop(&mut self) {
        self.0.idle_again();
        self.0.requests.fetch_sub(1, Ordering::SeqCst);
    }
}

pin_project_lite::pin_project! {
    /// A response's body: it keeps its connection busy until it has ended, and says whether it waits
    /// to be read.
    pub(super) struct TrackedBody<B> {
        #[pin]
        body: B,
        busy: ActiveRequest,
    }
}

impl<B> TrackedBody<B> {
    pub(super) fn new(body: B, busy: ActiveRequest) -> Self {
        set_waiting_for_peer(true);
        Self { body, busy }
    }
}

impl<B: http_body::Body> http_body::Body for TrackedBody<B> {
    type Data = B::Data;
    type Error = B::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<B::Data>, B::Error>>> {
        let frame = self.project().body.poll_frame(cx);
        set_waiting_for_peer(frame.is_ready());
        frame
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
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
        assert!(!activity.is_idle(&limits()), "too soon");
        advance(Duration::from_millis(1)).await;
        assert!(activity.is_idle(&limits()), "too late");
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
            let busy = activity.busy(version);
            advance(1_000 * SECOND).await;
            assert!(!activity.is_idle(&limits()));
            drop(busy);
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
        let busy = activity.busy(Version::HTTP_11);
        activity.fell_behind();
        drop(busy);
        advance(1_000 * SECOND).await;
        assert!(!activity.is_idle(&limits()));
        activity.caught_up();
        idle_after(&activity, 75).await;
    }

    #[tokio::test(start_paused = true)]
    async fn partial_headers_are_not_idle_and_an_empty_line_is_ignored() {
        let activity = Arc::new(Activity::new());
        drop(activity.busy(Version::HTTP_11));
        activity.read(b"\r\n");
        assert!(!activity.is_reading_headers());
        advance(74 * SECOND).await;
        activity.read(b"\r\nP");
        assert!(activity.is_reading_headers());
        advance(9 * SECOND).await;
        assert!(!activity.is_idle(&limits()));
        drop(activity.busy(Version::HTTP_11));
        assert!(!activity.is_reading_headers());
        idle_after(&activity, 75).await;
    }
}
