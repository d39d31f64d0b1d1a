//! One connection from its first byte to its end: HTTP/1.1 or HTTP/2, within the door's limits.

use std::convert::Infallible;
use std::error::Error;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bytes::Bytes;
use http::header::{CONNECTION, HeaderName};
use http::{HeaderMap, HeaderValue, Request, Version};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::conn::auto::Builder;
use tokio::time::{Instant, sleep_until, timeout};
use tokio_util::task::TaskTracker;
use tower::ServiceExt;
use tower_http::timeout::TimeoutBody;

use super::activity::{Activity, TrackedBody};
use super::io::{LINGER_TIMEOUT, Stream, WatchedStream};
use super::request_body::RequestBody;
use super::resets;
use super::stalled::StreamExecutor;
use super::{FrontendService, FrontendSettings, MutualTls, Protocol, Shutdown};
use crate::delivery::{FlushHandle, FlushTracker};
use crate::poll_on_wake::PollOnWake;

/// The most bytes that are held for one HTTP/1.1 connection or one HTTP/2 stream whose peer does not
/// read.
const MAX_WRITE_BUFFER_BYTES: usize = 64 * 1024;

/// HTTP/2's windows for what clients send: one prompt, not a stream of tokens.
const STREAM_WINDOW: u32 = 64 * 1024;
const CONNECTION_WINDOW: u32 = 4 * 1024 * 1024;

/// HTTP/2's largest frames, in bytes: its own limit, and that for what a worker's device made of all its sequences at
/// once.
const MAX_FRAME_BYTES: u32 = 16 * 1024;
const MAX_WORKER_FRAME_BYTES: u32 = 256 * 1024;

/// A connection that was accepted.
pub(super) struct Connection {
    pub(super) stream: Arc<Stream>,
    pub(super) door: FrontendSettings,
    pub(super) shutdown: Shutdown,
    /// Where the tasks of its HTTP/2 streams are.
    pub(super) streams: TaskTracker,
}

impl Connection {
    /// Serves it until it closes, or is told to, and lets its peer read the last answer.
    pub(super) async fn run<S, B>(self, service: S)
    where
        S: FrontendService<B>,
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
        S: FrontendService<B>,
        S::Future: Send + 'static,
        B: http_body::Body<Data = Bytes> + Send + 'static,
        B::Error: Into<Box<dyn Error + Send + Sync>>,
    {
        let activity = Arc::new(Activity::new());
        let (watched, flushes) =
            WatchedStream::new(Arc::clone(&self.stream), &self.door.limits, &activity);
        let watch = (flushes, activity);
        match &self.door.tls {
            None => self.drive(TokioIo::new(watched), watch, service).await,
            // Boxed: a connection without it, and there may be thousands, need have no room for it.
            Some(tls) => Box::pin(self.serve_tls((tls, watched), watch, service)).await,
        }
    }

    /// Serves it through TLS.
    async fn serve_tls<S, B>(
        &self,
        (tls, watched): (&MutualTls, WatchedStream),
        watch: (Arc<FlushTracker>, Arc<Activity>),
        service: S,
    ) -> End
    where
        S: FrontendService<B>,
        S::Future: Send + 'static,
        B: http_body::Body<Data = Bytes> + Send + 'static,
        B::Error: Into<Box<dyn Error + Send + Sync>>,
    {
        let handshake = timeout(self.door.limits.header_timeout, tls.accept(watched));
        let abort = &self.shutdown.abort;
        match abort.run_until_cancelled(handshake).await {
            Some(Ok(Ok(stream))) => self.drive(TokioIo::new(stream), watch, service).await,
            Some(Ok(Err(error))) => {
                tracing::info!(%error, "a TLS handshake failed");
                End::Orderly
            }
            Some(Err(_)) | None => End::Orderly,
        }
    }

    /// Serves what comes through the socket, or through TLS on it.
    async fn drive<S, B, I>(
        &self,
        io: I,
        (flushes, activity): (Arc<FlushTracker>, Arc<Activity>),
        service: S,
    ) -> End
    where
        S: FrontendService<B>,
        S::Future: Send + 'static,
        B: http_body::Body<Data = Bytes> + Send + 'static,
        B::Error: Into<Box<dyn Error + Send + Sync>>,
        I: hyper::rt::Read + hyper::rt::Write + Unpin + Send + 'static,
    {
        let limits = &self.door.limits;
        activity.begin();
        let body_timeout = limits.body_timeout;
        let is_http_10 = Arc::new(AtomicBool::new(false));
        let service = {
            let streams = self.streams.clone();
            let (activity, is_http_10) = (Arc::clone(&activity), Arc::clone(&is_http_10));
            let hint = keep_alive_hint(limits.keep_alive_timeout);
            service_fn(move |mut request: Request<Incoming>| {
                is_http_10.store(request.version() == Version::HTTP_10, Ordering::Relaxed);
                let busy = activity.busy(request.version());
                let hint = hint.clone().filter(|_| allows_keep_alive(&request));
                let flush = FlushHandle::new(Arc::clone(&flushes), request.version());
                request.extensions_mut().insert(flush);
                let rest = (request.version() == Version::HTTP_2).then(|| streams.clone());
                let request = request
                    .map(|body| RequestBody::new(TimeoutBody::new(body_timeout, body), rest));
                // Boxed, so that its memory goes when the answer begins, and the stream's task, which stays
                // for as long as the stream does, is the smaller by it.
                let answer = Box::pin(service.clone().oneshot(request));
                async move {
                    let mut answer = answer.await?;
                    if let Some(hint) = hint {
                        answer.headers_mut().insert(KEEP_ALIVE, hint);
                    }
                    Ok::<_, Infallible>(answer.map(|body| TrackedBody::new(body, busy)))
                }
            })
        };
        let builder = self.builder();
        let mut connection = boxed_out_of_line(|| builder.serve_connection(io, service));
        // HTTP/1.0 has no chunks: closed in an orderly way, a body that is cut off would look whole.
        let cut_off = || {
            if is_http_10.load(Ordering::Relaxed) && activity.is_busy() {
                End::Abortive
            } else {
                End::Orderly
            }
        };
        let mut watch = Seen::default();
        loop {
            let mut poll_on_wake = PollOnWake::new(self.next_event(&activity, watch));
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
                happened = poll_on_wake.ready() => happened,
            };
            match happened {
                ConnectionEvent::Stop if activity.is_unused() => return End::Orderly,
                ConnectionEvent::Stop => {
                    watch.is_stopping = true;
                    connection.as_mut().graceful_shutdown();
                }
                ConnectionEvent::Abort => return cut_off(),
                ConnectionEvent::PeerClosed if activity.is_busy() => return cut_off(),
                // What is not being answered may still be on its way to a peer that only reads now. But what
                // it had sent before is not to be begun.
                ConnectionEvent::PeerClosed => watch.has_closed = true,
                ConnectionEvent::IdleCheck if !activity.is_idle(limits) => {}
                // A request that is on its way is still answered: on HTTP/2 its client is warned first.
                ConnectionEvent::IdleCheck if activity.is_http2() && watch.closes_at.is_none() => {
                    watch.closes_at = Some(Instant::now() + LINGER_TIMEOUT);
                    connection.as_mut().graceful_shutdown();
                }
                ConnectionEvent::IdleCheck => return End::Orderly,
            }
        }
    }

    /// Waits for what else may end a connection.
    async fn next_event(&self, activity: &Activity, watch: Seen) -> ConnectionEvent {
        let shutdown = &self.shutdown;
        let next_idle_check = activity.next_idle_check(&self.door.limits);
        let look_again = watch
            .closes_at
            .map_or(next_idle_check, |at| at.max(next_idle_check));
        tokio::select! {
            () = shutdown.stop.cancelled(), if !watch.is_stopping => ConnectionEvent::Stop,
            () = shutdown.abort.cancelled() => ConnectionEvent::Abort,
            () = self.stream.closed(), if !watch.has_closed => ConnectionEvent::PeerClosed,
            () = activity.wait_until_busy(), if watch.has_closed => ConnectionEvent::PeerClosed,
            () = sleep_until(look_again) => ConnectionEvent::IdleCheck,
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
            // hyper's time-out for headers also runs while an idle connection waits for the first of them;
            // that of the socket does not.
            .header_read_timeout(None)
            .max_headers(limits.max_headers)
            .max_buf_size(
                MAX_WRITE_BUFFER_BYTES.max(usize::try_from(limits.max_header_bytes).unwrap_or(0)),
            );
        builder
            .http2()
            .timer(TokioTimer::new())
            .initial_stream_window_size(match self.door.protocol {
                Protocol::Grpc | Protocol::Http => STREAM_WINDOW,
                Protocol::Worker => CONNECTION_WINDOW,
            })
            .initial_connection_window_size(CONNECTION_WINDOW)
            .max_frame_size(match self.door.protocol {
                Protocol::Grpc | Protocol::Http => MAX_FRAME_BYTES,
                Protocol::Worker => MAX_WORKER_FRAME_BYTES,
            })
            .max_concurrent_streams(limits.max_concurrent_streams)
            // A client may cancel many requests in the packet that brings them.
            .max_pending_accept_reset_streams(usize::try_from(resets::RESET_BURST).ok())
            .max_header_list_size(limits.max_header_bytes)
            .max_send_buf_size(MAX_WRITE_BUFFER_BYTES)
            .keep_alive_interval(limits.ping_interval)
            .keep_alive_timeout(limits.ping_interval);
        match self.door.protocol {
            Protocol::Grpc | Protocol::Worker => builder.http2_only(),
            Protocol::Http => builder,
        }
    }
}

/// Makes a future on a stack of its own. Where it is large and made by the function that polls it, every
/// poll reserves the room that only its making needs: two pages of stack, touched at every token.
#[inline(never)]
fn boxed_out_of_line<F>(make: impl FnOnce() -> F) -> Pin<Box<F>> {
    Box::pin(make())
}

/// For HTTP/1.1: how long a connection may be idle, in seconds. Pools that read it, such as those of Node's
/// undici and Apache's `HttpClient`, then use no connection that is about to be closed.
const KEEP_ALIVE: HeaderName = HeaderName::from_static("keep-alive");

/// The hint is a second shorter than the truth, for the time that it travels; `None` where that leaves
/// nothing.
fn keep_alive_hint(timeout: Duration) -> Option<HeaderValue> {
    let seconds = timeout.as_secs().checked_sub(1).filter(|left| *left > 0)?;
    HeaderValue::try_from(format!("timeout={seconds}")).ok()
}

/// Whether the request's connection goes on after its answer, as far as its client is asked, and can be
/// told how long.
fn allows_keep_alive<B>(request: &Request<B>) -> bool {
    let closes = |headers: &HeaderMap| {
        let connection = headers.get(CONNECTION);
        connection.is_some_and(|value| value.as_bytes().eq_ignore_ascii_case(b"close"))
    };
    request.version() == Version::HTTP_11 && !closes(request.headers())
}

/// What may end a connection besides its protocol.
#[derive(Debug)]
enum ConnectionEvent {
    /// The door is to take no further requests.
    Stop,
    /// The door is not to wait for what is left.
    Abort,
    /// The peer has ended what it sends.
    PeerClosed,
    /// It is time to look whether the connection is idle.
    IdleCheck,
}

/// What need not be waited for any more.
#[derive(Clone, Copy, Debug, Default)]
struct Seen {
    is_stopping: bool,
    has_closed: bool,
    /// The end of an idle HTTP/2 connection whose peer was warned of it.
    closes_at: Option<Instant>,
}

/// How a connection's socket is to be closed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    /// With an end of what is written.
    Orderly,
    /// With a reset, which nobody takes for an end.
    Abortive,
}
