//! The settings of a listener, and the interface of the service that handles its requests.

use std::convert::Infallible;
use std::time::Duration;

use http::{Request, Response};
use tokio_util::sync::CancellationToken;
use tower::Service;

use super::connection_limits::ConnectionLimits;
use super::request_body::RequestBody;
use super::tls::ServerTls;
use crate::telemetry::{ListenerKind, Telemetry};

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

/// Limits and timeouts of connections.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Maximum number of open connections to both APIs together. Default 10,000.
    pub max_connections: u32,
    /// Maximum number of open connections of one IPv4 address or one IPv6 /64 network. Loopback addresses have no such
    /// limit. Default 2,000.
    pub max_connections_per_address: u32,
    /// Maximum time for receiving the headers of a request, counted from their first byte. On a new connection the
    /// time starts with the connection, or after its TLS handshake, which has the same timeout. Default 10 s.
    pub header_timeout: Duration,
    /// Maximum time of a wait for the next frame of a request body, and of all waits for the body together. The total
    /// grows by a second for each 500 bytes received. Default 30 s.
    pub body_timeout: Duration,
    /// Maximum idle time: between two requests on HTTP/1.1, and without a request on HTTP/2. Default 75 s, which is
    /// longer than the 60 s of nginx and of AWS's load balancer; `docs/deployment.md` lists others.
    ///
    /// The headers of a pipelined HTTP/1.1 request also have this timeout, if their first bytes share a packet with
    /// the previous request.
    pub keep_alive_timeout: Duration,
    /// Interval between HTTP/2 pings, and the timeout for the reply to each ping. Default 20 s.
    pub ping_interval: Duration,
    /// Maximum time for which a socket accepts no data, or an HTTP/2 stream cannot send its next 16 KiB. All waits of
    /// an HTTP/2 stream for its peer take at most this time together, and a second more for each 100 bytes. Default
    /// 30 s.
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
            max_connections: 10_000,
            max_connections_per_address: 2_000,
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
pub(crate) trait ListenerService<B>:
    Service<Request<RequestBody>, Response = Response<B>, Error = Infallible> + Clone + Send + 'static
{
}

impl<S, B> ListenerService<B> for S where
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
pub(crate) struct ListenerSettings {
    /// Value of the label `listener` in the connection metrics.
    pub frontend: ListenerKind,
    /// Protocols to serve.
    pub protocol: Protocol,
    /// Limits of each connection.
    pub limits: Limits,
    /// Metrics that count the open connections.
    pub telemetry: Telemetry,
    /// Limits on the number of connections; `None` for no limit.
    pub connections: Option<ConnectionLimits>,
    /// TLS; `None` for unencrypted connections.
    pub tls: Option<ServerTls>,
}
