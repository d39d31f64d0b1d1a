//! One connection, HTTP/1.1 or HTTP/2, from accept to close, within the limits of its listener.

use std::convert::Infallible;
use std::error::Error;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use bytes::Bytes;
use http::{Request, Response, Version};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::conn::auto::Builder;
use tokio::time::{Instant, sleep_until, timeout};
use tokio_util::task::TaskTracker;
use tower::ServiceExt;

use super::activity::Activity;
use super::keep_alive_header::{KEEP_ALIVE, allows_keep_alive, keep_alive_header};
use super::peer::PeerAddress;
use super::plaintext::FirstBytes;
use super::request_body::{MIN_BODY_BYTES_PER_SECOND, RequestBody, UnreadBody};
use super::resets;
use super::response_body::TrackedBody;
use super::settings::{ListenerService, ListenerSettings, Protocol, Shutdown};
use super::stalled::StreamExecutor;
use super::tls::ServerTls;
use super::transport::{AcceptedSocket, LINGER_TIMEOUT, SocketStream, Transport};
use super::wait_budget::WaitLimits;
use super::watched_stream::WatchedStream;
use crate::delivery::{FlushHandle, FlushTracker};
use crate::poll_on_wake::PollOnWake;

/// Maximum number of bytes buffered for one HTTP/1.1 connection or one HTTP/2 stream whose peer does not read.
const MAX_WRITE_BUFFER_BYTES: usize = 64 * 1024;

/// HTTP/2 receive window of a stream, in bytes. Small, because a client sends one prompt and not a stream of tokens.
const STREAM_WINDOW_BYTES: u32 = 64 * 1024;

/// HTTP/2 receive window of a connection, and of each stream of a worker, in bytes.
const CONNECTION_WINDOW_BYTES: u32 = 4 * 1024 * 1024;

/// Maximum HTTP/2 frame size that clients may use, in bytes: the protocol's default.
const MAX_FRAME_BYTES: u32 = 16 * 1024;

/// Maximum HTTP/2 frame size that workers may use, in bytes: enough for one step of all sequences of a worker.
const MAX_WORKER_FRAME_BYTES: u32 = 256 * 1024;

/// An accepted connection.
pub(super) struct Connection {
    pub(super) socket: Arc<AcceptedSocket>,
    pub(super) settings: ListenerSettings,
    pub(super) shutdown: Shutdown,
    /// Tracks the tasks that run the connection's HTTP/2 streams.
    pub(super) streams: TaskTracker,
}

/// State that the connection's requests and its socket share.
struct ConnectionTracking {
    flushes: Arc<FlushTracker>,
    activity: Arc<Activity>,
}

impl Connection {
    /// Serves the connection until it closes or is shut down. Then keeps the socket open for a moment ("lingers"), so
    /// that the peer can read the last response.
    pub(super) async fn run<S, B>(self, service: S)
    where
        S: ListenerService<B>,
        S::Future: Send + 'static,
        B: http_body::Body<Data = Bytes> + Send + 'static,
        B::Error: Into<Box<dyn Error + Send + Sync>>,
    {
        if self.serve(service).await == CloseMode::Reset {
            self.socket.close_with_reset();
            return;
        }
        // The socket closes when this function returns, whether or not lingering was aborted.
        let abort = &self.shutdown.abort;
        let _ = abort.run_until_cancelled(self.socket.linger()).await;
    }

    /// Serves the connection until it closes or is shut down.
    async fn serve<S, B>(&self, service: S) -> CloseMode
    where
        S: ListenerService<B>,
        S::Future: Send + 'static,
        B: http_body::Body<Data = Bytes> + Send + 'static,
        B::Error: Into<Box<dyn Error + Send + Sync>>,
    {
        let transport = match &self.settings.tls {
            None => Some(Transport::Plain(Arc::clone(&self.socket))),
            // The future is boxed, so that connections without TLS do not reserve space for it.
            Some(tls) => Box::pin(self.accept_tls(tls)).await,
        };
        match transport {
            Some(transport) => self.serve_http(transport, service).await,
            None => CloseMode::Graceful,
        }
    }

    /// Performs the TLS handshake. Answers a client that does not use TLS. Returns `None` if the connection must close:
    /// no request has started, so it also closes when the listener stops.
    async fn accept_tls(&self, tls: &ServerTls) -> Option<Transport> {
        let handshake = timeout(self.settings.limits.header_timeout, self.handshake(tls));
        let stop = &self.shutdown.stop;
        match stop.run_until_cancelled(handshake).await? {
            Ok(Ok(transport)) => transport,
            Ok(Err(error)) => {
                let peer = self.socket.peer_address();
                tracing::debug!(?peer, %error, "a TLS handshake failed");
                None
            }
            Err(_) => {
                let peer = self.socket.peer_address();
                tracing::debug!(?peer, "a TLS handshake timed out");
                None
            }
        }
    }

    async fn handshake(&self, tls: &ServerTls) -> io::Result<Option<Transport>> {
        match FirstBytes::peek(&self.socket).await? {
            FirstBytes::Tls => {
                let socket = SocketStream::new(Arc::clone(&self.socket));
                let stream = tls.accept(socket, self.settings.protocol).await?;
                Ok(Some(Transport::Tls(Box::new(stream))))
            }
            FirstBytes::None => Ok(None),
            plaintext @ (FirstBytes::Http1 | FirstBytes::Http2 | FirstBytes::Unknown) => {
                let peer = self.socket.peer_address();
                tracing::debug!(?peer, "a client without TLS connected to a port with TLS");
                self.socket.try_write(&plaintext.refusal())?;
                Ok(None)
            }
        }
    }

    /// Serves HTTP on the socket or on the TLS session.
    async fn serve_http<S, B>(&self, transport: Transport, service: S) -> CloseMode
    where
        S: ListenerService<B>,
        S::Future: Send + 'static,
        B: http_body::Body<Data = Bytes> + Send + 'static,
        B::Error: Into<Box<dyn Error + Send + Sync>>,
    {
        let limits = &self.settings.limits;
        let activity = Arc::new(Activity::new());
        let (watched, flushes) = WatchedStream::new(transport, limits, &activity);
        let io = TokioIo::new(watched);
        let is_http_10 = Arc::new(AtomicBool::new(false));
        let tracking = ConnectionTracking {
            flushes,
            activity: Arc::clone(&activity),
        };
        let service = self.tracked_service(service, tracking, Arc::clone(&is_http_10));
        let builder = self.http_builder();
        let mut connection = boxed_out_of_line(|| builder.serve_connection(io, service));
        // HTTP/1.0 has no chunked encoding. After a graceful close, a truncated body would look complete, so the
        // connection is reset instead.
        let close_mode =
            || CloseMode::after(is_http_10.load(Ordering::Relaxed) && activity.is_busy());
        let mut fired = FiredEvents::default();
        loop {
            let mut next_event = PollOnWake::new(self.next_event(&activity, fired));
            let event = tokio::select! {
                // Poll the connection first: writing pending data comes before handling any event.
                biased;
                ended = connection.as_mut() => {
                    let Err(error) = ended else {
                        return CloseMode::Graceful;
                    };
                    tracing::debug!(%error, "a connection failed");
                    return CloseMode::after(is_http_10.load(Ordering::Relaxed));
                }
                event = next_event.ready() => event,
            };
            match event {
                ConnectionEvent::Stop if activity.is_unused() => return CloseMode::Graceful,
                ConnectionEvent::Stop => {
                    fired.stop = true;
                    connection.as_mut().graceful_shutdown();
                }
                ConnectionEvent::Abort => return close_mode(),
                ConnectionEvent::PeerClosed if activity.is_busy() => return close_mode(),
                // The last response may still be on its way to the peer, so the connection stays open. If a request
                // that was sent before the peer closed starts now, the connection closes: nobody will read its
                // response.
                ConnectionEvent::PeerClosed => fired.peer_closed = true,
                ConnectionEvent::IdleCheck if !activity.is_idle_too_long(limits) => {}
                // HTTP/2 gets a GOAWAY frame before the connection closes, so that a request that is already on its
                // way is still served.
                ConnectionEvent::IdleCheck if activity.is_http2() && fired.closes_at.is_none() => {
                    fired.closes_at = Some(Instant::now() + LINGER_TIMEOUT);
                    connection.as_mut().graceful_shutdown();
                }
                ConnectionEvent::IdleCheck => return CloseMode::Graceful,
            }
        }
    }

    /// Wraps the service that handles the connection's requests. Tracks each request, and sets `is_http_10` to true for
    /// a request of HTTP/1.0.
    fn tracked_service<S, B>(
        &self,
        service: S,
        ConnectionTracking { flushes, activity }: ConnectionTracking,
        is_http_10: Arc<AtomicBool>,
    ) -> impl hyper::service::Service<
        Request<Incoming>,
        Response = Response<TrackedBody<B>>,
        Error = Infallible,
        Future = impl Future<Output = Result<Response<TrackedBody<B>>, Infallible>>
                 + Send
                 + 'static
                 + use<S, B>,
    > + use<S, B>
    where
        S: ListenerService<B>,
        S::Future: Send + 'static,
        B: http_body::Body<Data = Bytes> + Send + 'static,
        B::Error: Into<Box<dyn Error + Send + Sync>>,
    {
        let limits = &self.settings.limits;
        let body_limits = self.body_limits();
        let keep_alive = keep_alive_header(limits.keep_alive_timeout);
        let streams = self.streams.clone();
        let peer = PeerAddress::new(self.socket.peer_address());
        service_fn(move |mut request: Request<Incoming>| {
            is_http_10.store(request.version() == Version::HTTP_10, Ordering::Relaxed);
            let version = request.version();
            let active = activity.start_request(version);
            let keep_alive = keep_alive.clone().filter(|_| allows_keep_alive(&request));
            let flush = FlushHandle::new(Arc::clone(&flushes), request.version());
            request.extensions_mut().insert(flush);
            request.extensions_mut().insert(peer);
            if let Some(fault) = activity.take_malformed_head() {
                request.extensions_mut().insert(fault);
            }
            let unread = match version {
                Version::HTTP_2 => UnreadBody::Discard(streams.clone()),
                _ => UnreadBody::Report(Arc::clone(&activity)),
            };
            let request = request.map(|body| RequestBody::new(body, body_limits, unread));
            // The response future is boxed, so that its memory is freed once the response headers are ready. Inline,
            // it would enlarge the HTTP/2 stream's task until the stream ends.
            let response = Box::pin(service.clone().oneshot(request));
            async move {
                let mut response = response.await?;
                if let Some(keep_alive) = keep_alive {
                    response.headers_mut().insert(KEEP_ALIVE, keep_alive);
                }
                Ok::<_, Infallible>(response.map(|body| TrackedBody::new(body, active, version)))
            }
        })
    }

    /// Returns the time limits for receiving a request's body.
    fn body_limits(&self) -> WaitLimits {
        WaitLimits {
            timeout: self.settings.limits.body_timeout,
            bytes_per_second: match self.settings.protocol {
                Protocol::Grpc | Protocol::Http => Some(MIN_BODY_BYTES_PER_SECOND),
                // A worker's request has one body, which lasts as long as the connection.
                Protocol::Worker => None,
            },
        }
    }

    /// Waits for the next event that may close the connection. Ignores events that are already recorded in `fired`.
    async fn next_event(&self, activity: &Activity, fired: FiredEvents) -> ConnectionEvent {
        let shutdown = &self.shutdown;
        let idle_check = activity.next_idle_check(&self.settings.limits);
        let idle_check = fired.closes_at.map_or(idle_check, |at| at.max(idle_check));
        tokio::select! {
            () = shutdown.stop.cancelled(), if !fired.stop => ConnectionEvent::Stop,
            () = shutdown.abort.cancelled() => ConnectionEvent::Abort,
            () = self.socket.peer_closed(), if !fired.peer_closed => ConnectionEvent::PeerClosed,
            () = activity.wait_until_busy(), if fired.peer_closed => ConnectionEvent::PeerClosed,
            () = sleep_until(idle_check) => ConnectionEvent::IdleCheck,
        }
    }

    fn http_builder(&self) -> Builder<StreamExecutor> {
        let limits = &self.settings.limits;
        let mut builder = Builder::new(StreamExecutor {
            tasks: self.streams.clone(),
            write_timeout: limits.write_timeout,
        });
        builder
            .http1()
            // hyper's header timeout would also run while an idle connection waits for its next request.
            // `WatchedStream` has a header timeout that does not.
            .header_read_timeout(None)
            .max_headers(limits.max_headers)
            .max_buf_size(
                MAX_WRITE_BUFFER_BYTES.max(usize::try_from(limits.max_header_bytes).unwrap_or(0)),
            );
        builder
            .http2()
            .timer(TokioTimer::new())
            .initial_stream_window_size(match self.settings.protocol {
                Protocol::Grpc | Protocol::Http => STREAM_WINDOW_BYTES,
                Protocol::Worker => CONNECTION_WINDOW_BYTES,
            })
            .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
            .max_frame_size(match self.settings.protocol {
                Protocol::Grpc | Protocol::Http => MAX_FRAME_BYTES,
                Protocol::Worker => MAX_WORKER_FRAME_BYTES,
            })
            .max_concurrent_streams(limits.max_concurrent_streams)
            // A client may cancel many requests in the same packet that starts them.
            .max_pending_accept_reset_streams(usize::try_from(resets::RESET_BURST).ok())
            .max_header_list_size(limits.max_header_bytes)
            .max_send_buf_size(MAX_WRITE_BUFFER_BYTES)
            .keep_alive_interval(limits.ping_interval)
            .keep_alive_timeout(limits.ping_interval);
        match self.settings.protocol {
            Protocol::Grpc | Protocol::Worker => builder.http2_only(),
            Protocol::Http => builder,
        }
    }
}

/// Constructs a boxed future in a separate stack frame. If the function that polls a large future also constructs it,
/// each poll's stack frame includes the space for the construction: here two memory pages, touched for every token.
#[inline(never)]
fn boxed_out_of_line<F>(make: impl FnOnce() -> F) -> Pin<Box<F>> {
    Box::pin(make())
}

/// An event outside HTTP that may close a connection.
#[derive(Debug)]
enum ConnectionEvent {
    /// Shutdown has started: take no further requests.
    Stop,
    /// Shutdown is forced: close at once.
    Abort,
    /// The peer has closed its sending side.
    PeerClosed,
    /// It is time to check whether the connection has been idle for too long.
    IdleCheck,
}

/// Events that have already fired, so that `next_event` does not report them again.
#[derive(Clone, Copy, Debug, Default)]
struct FiredEvents {
    stop: bool,
    peer_closed: bool,
    /// Time at which an idle HTTP/2 connection closes, after its GOAWAY was sent.
    closes_at: Option<Instant>,
}

/// The way to close a connection's socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum CloseMode {
    /// Close with FIN, which marks the end of the data.
    Graceful,
    /// Close with a reset, which tells the peer that data is missing.
    Reset,
}

impl CloseMode {
    /// Returns the way to close after a body whose truncation the peer could not detect, or after any other body.
    fn after(could_look_complete: bool) -> Self {
        match could_look_complete {
            true => Self::Reset,
            false => Self::Graceful,
        }
    }
}
