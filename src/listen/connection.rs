//! One connection from its first byte to its end: HTTP/1.1 or HTTP/2, within the door's limits.

use std::convert::Infallible;
use std::error::Error;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http::{Request, Version};
use http_body::{Frame, SizeHint};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::conn::auto::Builder;
use tokio::sync::Notify;
use tokio::time::{Instant, sleep_until, timeout};
use tokio_util::task::TaskTracker;
use tower::ServiceExt;
use tower_http::timeout::TimeoutBody;

use super::io::{Stream, WatchedStream};
use super::resets;
use super::stalled::{StreamExecutor, waits_for_its_peer};
use super::upload::RequestBody;
use super::{DoorService, DoorSettings, Limits, MutualTls, Protocol, Shutdown};
use crate::delivery::{Flush, Flushes};
use crate::seldom::Seldom;

/// The most bytes that are held for one HTTP/1.1 connection or one HTTP/2 stream whose peer does not
/// read.
const WRITE_BUFFER: usize = 64 * 1024;

/// HTTP/2's windows for what clients send: one prompt, not a stream of tokens.
const STREAM_WINDOW: u32 = 64 * 1024;
const CONNECTION_WINDOW: u32 = 4 * 1024 * 1024;

/// HTTP/2's largest frames, in bytes: its own limit, and that for what a worker's device made of all its sequences at
/// once.
const FRAME: u32 = 16 * 1024;
const WORKER_FRAME: u32 = 256 * 1024;

/// A connection that was accepted.
pub(super) struct Connection {
    pub(super) stream: Arc<Stream>,
    pub(super) door: DoorSettings,
    pub(super) shutdown: Shutdown,
    /// Where the tasks of its HTTP/2 streams are.
    pub(super) streams: TaskTracker,
}

impl Connection {
    /// Serves it until it closes, or is told to, and lets its peer read the last answer.
    pub(super) async fn run<S, B>(self, service: S)
    where
        S: DoorService<B>,
        S::Future: Send + 'static,
        B: http_body::Body<Data = Bytes> + Send + 'static,
        B::Error: Into<Box<dyn Error + Send + Sync>>,
    {
        if self.serve(service).await == End::Abortive {
            self.stream.close_with_reset();
            return;
        }
        // Lingered to the end or not, the socket closes now.
        let abort = &self.shutdown.abort;
        let _ = abort.run_until_cancelled(self.stream.linger()).await;
    }

    /// Serves it until it closes, or is told to.
    async fn serve<S, B>(&self, service: S) -> End
    where
        S: DoorService<B>,
        S::Future: Send + 'static,
        B: http_body::Body<Data = Bytes> + Send + 'static,
        B::Error: Into<Box<dyn Error + Send + Sync>>,
    {
        let limits = &self.door.limits;
        let (watched, flushes) = WatchedStream::new(Arc::clone(&self.stream), limits.write_timeout);
        match &self.door.tls {
            None => self.drive(TokioIo::new(watched), flushes, service).await,
            // Boxed: a connection without it, and there may be thousands, need have no room for it.
            Some(tls) => Box::pin(self.serve_tls(tls, (watched, flushes), service)).await,
        }
    }

    /// Serves it through TLS.
    async fn serve_tls<S, B>(
        &self,
        tls: &MutualTls,
        (watched, flushes): (WatchedStream, Arc<Flushes>),
        service: S,
    ) -> End
    where
        S: DoorService<B>,
        S::Future: Send + 'static,
        B: http_body::Body<Data = Bytes> + Send + 'static,
        B::Error: Into<Box<dyn Error + Send + Sync>>,
    {
        let handshake = timeout(self.door.limits.header_timeout, tls.accept(watched));
        let abort = &self.shutdown.abort;
        match abort.run_until_cancelled(handshake).await {
            Some(Ok(Ok(stream))) => self.drive(TokioIo::new(stream), flushes, service).await,
            Some(Ok(Err(error))) => {
                tracing::info!(%error, "a TLS handshake failed");
                End::Orderly
            }
            Some(Err(_)) | None => End::Orderly,
        }
    }

    /// Serves what comes through the socket, or through TLS on it.
    async fn drive<S, B, I>(&self, io: I, flushes: Arc<Flushes>, service: S) -> End
    where
        S: DoorService<B>,
        S::Future: Send + 'static,
        B: http_body::Body<Data = Bytes> + Send + 'static,
        B::Error: Into<Box<dyn Error + Send + Sync>>,
        I: hyper::rt::Read + hyper::rt::Write + Unpin + Send + 'static,
    {
        let limits = &self.door.limits;
        let activity = Arc::new(Activity::new());
        let body_timeout = limits.body_timeout;
        let is_http_10 = Arc::new(AtomicBool::new(false));
        let service = {
            let streams = self.streams.clone();
            let (activity, is_http_10) = (Arc::clone(&activity), Arc::clone(&is_http_10));
            service_fn(move |mut request: Request<Incoming>| {
                is_http_10.store(request.version() == Version::HTTP_10, Ordering::Relaxed);
                let busy = activity.busy();
                let flush = Flush::new(Arc::clone(&flushes), request.version());
                request.extensions_mut().insert(flush);
                let rest = (request.version() == Version::HTTP_2).then(|| streams.clone());
                let request = request
                    .map(|body| RequestBody::new(TimeoutBody::new(body_timeout, body), rest));
                // Boxed, so that its memory goes when the answer begins, and the stream's task, which stays
                // for as long as the stream does, is the smaller by it.
                let answer = Box::pin(service.clone().oneshot(request));
                async move {
                    let answer = answer.await?;
                    Ok::<_, Infallible>(answer.map(|body| BusyBody::new(body, busy)))
                }
            })
        };
        let builder = self.builder();
        let mut connection = made_apart(|| builder.serve_connection(io, service));
        // HTTP/1.0 has no chunks: closed in an orderly way, a body that is cut off would look whole.
        let cut_off = || {
            if is_http_10.load(Ordering::Relaxed) && activity.is_busy() {
                End::Abortive
            } else {
                End::Orderly
            }
        };
        let mut watch = Watch::default();
        loop {
            let mut seldom = Seldom::new(self.happens(&activity, watch));
            let happened = tokio::select! {
                // What there is to write is written before anything else is looked at.
                biased;
                ended = connection.as_mut() => {
                    let Err(error) = ended else {
                        return End::Orderly;
                    };
                    tracing::debug!(%error, "a connection broke");
                    return if is_http_10.load(Ordering::Relaxed) {
                        End::Abortive
                    } else {
                        End::Orderly
                    };
                }
                happened = seldom.ready() => happened,
            };
            match happened {
                Happened::Stop if activity.is_unused() => return End::Orderly,
                Happened::Stop => {
                    watch.is_stopping = true;
                    connection.as_mut().graceful_shutdown();
                }
                Happened::Abort => return cut_off(),
                Happened::PeerClosed if activity.is_busy() => return cut_off(),
                // What is not being answered may still be on its way to a peer that only reads now. But what
                // it had sent before is not to be begun.
                Happened::PeerClosed => watch.has_closed = true,
                Happened::LongSince if activity.is_idle(limits) => return End::Orderly,
                Happened::LongSince => {}
            }
        }
    }

    /// Waits for what else may end a connection.
    async fn happens(&self, activity: &Activity, watch: Watch) -> Happened {
        let shutdown = &self.shutdown;
        tokio::select! {
            () = shutdown.stop.cancelled(), if !watch.is_stopping => Happened::Stop,
            () = shutdown.abort.cancelled() => Happened::Abort,
            () = self.stream.closed(), if !watch.has_closed => Happened::PeerClosed,
            () = activity.is_busy_again(), if watch.has_closed => Happened::PeerClosed,
            () = sleep_until(activity.idle_until(&self.door.limits)) => Happened::LongSince,
        }
    }

    fn builder(&self) -> Builder<StreamExecutor> {
        let limits = &self.door.limits;
        let mut builder = Builder::new(StreamExecutor {
            tasks: self.streams.clone(),
            write_timeout: limits.write_timeout,
        });
        builder
            .http1()
            .timer(TokioTimer::new())
            .header_read_timeout(limits.header_timeout)
            .max_headers(limits.max_headers)
            .max_buf_size(WRITE_BUFFER.max(usize::try_from(limits.max_header_bytes).unwrap_or(0)));
        builder
            .http2()
            .timer(TokioTimer::new())
            .initial_stream_window_size(match self.door.protocol {
                Protocol::Grpc | Protocol::Http => STREAM_WINDOW,
                Protocol::Worker => CONNECTION_WINDOW,
            })
            .initial_connection_window_size(CONNECTION_WINDOW)
            .max_frame_size(match self.door.protocol {
                Protocol::Grpc | Protocol::Http => FRAME,
                Protocol::Worker => WORKER_FRAME,
            })
            .max_concurrent_streams(limits.max_concurrent_streams)
            // A client may cancel many requests in the packet that brings them.
            .max_pending_accept_reset_streams(usize::try_from(resets::BURST).ok())
            .max_header_list_size(limits.max_header_bytes)
            .max_send_buf_size(WRITE_BUFFER)
            .keep_alive_interval(limits.keep_alive)
            .keep_alive_timeout(limits.keep_alive);
        match self.door.protocol {
            Protocol::Grpc | Protocol::Worker => builder.http2_only(),
            Protocol::Http => builder,
        }
    }
}

/// Makes a future on a stack of its own. Where it is large and made by the function that polls it, every
/// poll reserves the room that only its making needs: two pages of stack, touched at every token.
#[inline(never)]
fn made_apart<F>(make: impl FnOnce() -> F) -> Pin<Box<F>> {
    Box::pin(make())
}

/// What may end a connection besides its protocol.
#[derive(Debug)]
enum Happened {
    /// The door is to take no further requests.
    Stop,
    /// The door is not to wait for what is left.
    Abort,
    /// The peer has ended what it sends.
    PeerClosed,
    /// It is time to look whether the connection is idle.
    LongSince,
}

/// What need not be waited for any more.
#[derive(Clone, Copy, Debug, Default)]
struct Watch {
    is_stopping: bool,
    has_closed: bool,
}

/// How a connection's socket is to be closed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    /// With an end of what is written.
    Orderly,
    /// With a reset, which nobody takes for an end.
    Abortive,
}

/// Whether a connection has something to do.
struct Activity {
    requests: AtomicUsize,
    /// Told of each request.
    began: Notify,
    had_a_request: AtomicBool,
    idle_since: Mutex<Instant>,
}

impl Activity {
    fn new() -> Self {
        Self {
            requests: AtomicUsize::new(0),
            began: Notify::new(),
            had_a_request: AtomicBool::new(false),
            idle_since: Mutex::new(Instant::now()),
        }
    }

    fn busy(self: &Arc<Self>) -> Busy {
        self.requests.fetch_add(1, Ordering::SeqCst);
        self.had_a_request.store(true, Ordering::SeqCst);
        self.began.notify_waiters();
        Busy(Arc::clone(self))
    }

    /// Waits until a request is being answered.
    async fn is_busy_again(&self) {
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
    fn is_busy(&self) -> bool {
        self.requests.load(Ordering::SeqCst) > 0
    }

    /// Whether the connection has never had a request.
    fn is_unused(&self) -> bool {
        !self.had_a_request.load(Ordering::SeqCst)
    }

    /// How long the connection may be idle as things stand: its first request must come soon.
    fn limit(&self, limits: &Limits) -> Duration {
        if self.is_unused() {
            limits.header_timeout
        } else {
            limits.idle_timeout
        }
    }

    /// When the connection is to be looked at again: a busy one later, an idle one when it has been
    /// idle for too long.
    fn idle_until(&self, limits: &Limits) -> Instant {
        let since = if self.is_busy() {
            Instant::now()
        } else {
            self.idle_since()
        };
        since + self.limit(limits)
    }

    fn is_idle(&self, limits: &Limits) -> bool {
        !self.is_busy() && self.idle_since() + self.limit(limits) <= Instant::now()
    }

    fn idle_since(&self) -> Instant {
        *self
            .idle_since
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

/// Keeps its connection busy.
struct Busy(Arc<Activity>);

impl Drop for Busy {
    fn drop(&mut self) {
        *self
            .0
            .idle_since
            .lock()
            .unwrap_or_else(PoisonError::into_inner) = Instant::now();
        self.0.requests.fetch_sub(1, Ordering::SeqCst);
    }
}

pin_project_lite::pin_project! {
    /// A response's body: it keeps its connection busy until it has ended, and says whether it waits
    /// to be read.
    struct BusyBody<B> {
        #[pin]
        body: B,
        busy: Busy,
    }
}

impl<B> BusyBody<B> {
    fn new(body: B, busy: Busy) -> Self {
        waits_for_its_peer(true);
        Self { body, busy }
    }
}

impl<B: http_body::Body> http_body::Body for BusyBody<B> {
    type Data = B::Data;
    type Error = B::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<B::Data>, B::Error>>> {
        let frame = self.project().body.poll_frame(cx);
        waits_for_its_peer(frame.is_ready());
        frame
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
