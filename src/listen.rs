//! Listening sockets: accepts connections, enforces their limits and timeouts, and shuts them down.
//!
//! One accept loop serves HTTP/1.1 and HTTP/2, so the HTTP API and the gRPC API have the same limits and the same
//! shutdown. This module must not know any route or RPC.

use std::convert::Infallible;
use std::error::Error;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::{Request, Response};
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tower::Service;

use self::connection::Connection;
use crate::telemetry::{Frontend, Telemetry};

mod activity;
mod address;
mod connection;
mod io;
mod request_body;
mod resets;
mod stalled;
mod tls;

pub use address::{Address, InvalidAddress, Listener};
pub use request_body::RequestBody;
pub use tls::{MutualTls, TlsError, TlsFiles};

/// Protocols of a listener.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    /// HTTP/2 only.
    Grpc,
    /// HTTP/2 only, with larger windows and frames. A worker sends the tokens of all its sequences on one HTTP/2
    /// stream.
    Worker,
    /// HTTP/1.1, and HTTP/2 with prior knowledge.
    Http,
}

/// Limits and timeouts of each connection.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Maximum time for receiving the headers of a request, counted from their first byte. On a new connection the
    /// time starts with the connection, or after its TLS handshake, which has the same timeout. Default 10 s.
    pub header_timeout: Duration,
    /// Maximum time between two frames of a request body. Default 30 s.
    pub body_timeout: Duration,
    /// Maximum idle time: between two requests on HTTP/1.1, and without a request on HTTP/2. Default 75 s, which is
    /// longer than the 60 s of nginx and of AWS's load balancer; `docs/deployment.md` lists others.
    ///
    /// The headers of a pipelined HTTP/1.1 request also have this timeout, if their first bytes share a packet with
    /// the previous request.
    pub keep_alive_timeout: Duration,
    /// Interval between HTTP/2 pings, and the timeout for the reply to each ping. Default 20 s.
    pub ping_interval: Duration,
    /// Maximum time for which a socket accepts no data, or an HTTP/2 stream has no flow-control window. Default 30 s.
    ///
    /// The default is well above the slow-reader timeout, so that a slow client that resumes reading still receives
    /// the error record.
    pub write_timeout: Duration,
    /// Maximum size of a request's headers, in bytes. Default 64 KiB.
    pub max_header_bytes: u32,
    /// Maximum number of headers in an HTTP/1.1 request. Default 100.
    pub max_headers: usize,
    /// Maximum number of concurrent requests on one HTTP/2 connection. Default 10,000.
    pub max_concurrent_streams: u32,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            header_timeout: Duration::from_secs(10),
            body_timeout: Duration::from_secs(30),
            keep_alive_timeout: Duration::from_secs(75),
            ping_interval: Duration::from_secs(20),
            write_timeout: Duration::from_secs(30),
            max_header_bytes: 64 * 1024,
            max_headers: 100,
            max_concurrent_streams: 10_000,
        }
    }
}

/// The service that handles the requests of a listener's connections.
pub trait FrontendService<B>:
    Service<Request<RequestBody>, Response = Response<B>, Error = Infallible> + Clone + Send + 'static
{
}

impl<S, B> FrontendService<B> for S where
    S: Service<Request<RequestBody>, Response = Response<B>, Error = Infallible>
        + Clone
        + Send
        + 'static
{
}

/// Shutdown signals of a listener.
#[derive(Clone, Debug, Default)]
pub struct Shutdown {
    /// Closes the listener and lets the requests in progress finish.
    pub stop: CancellationToken,
    /// Drops all remaining connections.
    pub abort: CancellationToken,
}

/// Settings of a listener.
#[derive(Clone)]
pub struct FrontendSettings {
    /// Value of the label `listener` in the connection metrics.
    pub frontend: Frontend,
    /// Protocols to serve.
    pub protocol: Protocol,
    /// Limits of each connection.
    pub limits: Limits,
    /// Metrics that count the open connections.
    pub telemetry: Telemetry,
    /// Mutual TLS; `None` for unencrypted connections.
    pub tls: Option<MutualTls>,
}

/// Serves a listener until `shutdown` stops it and every connection has closed.
pub async fn serve<S, B>(
    listener: Listener,
    service: S,
    settings: FrontendSettings,
    shutdown: Shutdown,
) where
    S: FrontendService<B>,
    S::Future: Send + 'static,
    B: http_body::Body<Data = Bytes> + Send + 'static,
    B::Error: Into<Box<dyn Error + Send + Sync>>,
{
    let tasks = TaskTracker::new();
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = shutdown.stop.cancelled() => break,
        };
        match accepted {
            Ok(stream) => {
                let open_connection = settings.telemetry.track_connection(settings.frontend);
                let connection = Connection {
                    stream: Arc::new(stream),
                    settings: settings.clone(),
                    shutdown: shutdown.clone(),
                    streams: tasks.clone(),
                };
                let connection = connection.run(service.clone());
                tasks.spawn(async move {
                    connection.await;
                    drop(open_connection);
                });
            }
            Err(error) => {
                // Either the client has already disconnected, or the process has no file descriptors left. In the
                // second case, the pause prevents a busy loop.
                tracing::warn!(%error, "cannot accept a connection");
                sleep(Duration::from_millis(50)).await;
            }
        }
    }
    drop(listener);
    tasks.close();
    tasks.wait().await;
}
