//! The gRPC connections to a remote engine, and their options.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use http::header::AUTHORIZATION;
use http::{Request as HttpRequest, Response as HttpResponse};
use tonic::Status;
use tonic::body::Body;
use tonic::transport::Endpoint;
use tower::ServiceExt;
use tower::util::BoxCloneSyncService;

use crate::cluster::spec::ApiKey;

/// Number of connections to each engine. With only one, all streams would wait for the same socket.
const CONNECTIONS_PER_ENGINE: usize = 2;

/// HTTP/2 flow-control window of a connection, in bytes.
///
/// h2 charges small unread frames, such as tokens, to the connection. When they use up half of the window, h2 closes
/// the connection. This window is larger than the unread data of all streams can become.
const CONNECTION_WINDOW: u32 = 1 << 30;
/// Flow-control window of a stream, in bytes. It is small to limit the unread data.
const STREAM_WINDOW: u32 = 64 * 1024;

/// Number of reset streams that a connection remembers. h2 ignores late frames of a remembered stream.
const REMEMBERED_RESET_STREAMS: usize = 10_000;

/// Interval between pings, and also the timeout for the reply. Their sum, one second, is the time after which a hung
/// engine is detected.
const KEEP_ALIVE_INTERVAL: Duration = Duration::from_millis(500);

const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);

/// A connection to a remote engine.
pub(in crate::cluster) type EngineChannel =
    BoxCloneSyncService<HttpRequest<Body>, HttpResponse<Body>, Status>;

/// The connections of one engine for completions. Calls take them in turn.
pub(in crate::cluster) struct Connections {
    channels: Vec<EngineChannel>,
    next: AtomicUsize,
}

impl Connections {
    /// Creates the connections. Each is opened by its first call. The key, if there is one, is sent with every call.
    pub(in crate::cluster) fn new(endpoint: &Endpoint, api_key: Option<&ApiKey>) -> Self {
        let channel = |_| connect(endpoint, api_key);
        Self {
            channels: (0..CONNECTIONS_PER_ENGINE).map(channel).collect(),
            next: AtomicUsize::new(0),
        }
    }

    /// Creates the connections of an engine for tests.
    #[cfg(test)]
    pub(in crate::cluster) fn scripted(channel: EngineChannel) -> Self {
        Self {
            channels: vec![channel],
            next: AtomicUsize::new(0),
        }
    }

    /// Returns the connection for the next call.
    pub(in crate::cluster) fn next(&self) -> EngineChannel {
        let index = self.next.fetch_add(1, Ordering::Relaxed) % self.channels.len();
        self.channels[index].clone()
    }
}

/// Creates a connection, which its first call opens. The key, if there is one, is sent with every call.
pub(in crate::cluster) fn connect(endpoint: &Endpoint, api_key: Option<&ApiKey>) -> EngineChannel {
    let channel = endpoint
        .connect_lazy()
        .map_err(|error| Status::from_error(error.into()));
    let Some(api_key) = api_key else {
        return EngineChannel::new(channel);
    };
    let authorization = api_key.authorization();
    EngineChannel::new(channel.map_request(move |mut request: HttpRequest<Body>| {
        let headers = request.headers_mut();
        headers.insert(AUTHORIZATION, authorization.clone());
        request
    }))
}

/// Sets the options of the connections to an engine.
pub(in crate::cluster) fn with_options(endpoint: Endpoint) -> Endpoint {
    endpoint
        .connect_timeout(CONNECT_TIMEOUT)
        .tcp_nodelay(true)
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        // When a client disconnects, the gateway resets its stream, and the engine may still send frames on it. h2
        // ignores them as long as it remembers the stream.
        .http2_max_concurrent_reset_streams(REMEMBERED_RESET_STREAMS)
        // A frame on a forgotten stream is a local error, and too many of them would close the connection with the
        // streams of all other clients. The number is not limited, because engines are trusted.
        .http2_max_local_error_reset_streams(None)
        .http2_keep_alive_interval(KEEP_ALIVE_INTERVAL)
        .keep_alive_timeout(KEEP_ALIVE_INTERVAL)
        .keep_alive_while_idle(true)
}
