//! The sockets of both doors: accepting, limits, time-outs and the orderly end of connections.
//!
//! One loop serves HTTP/1.1 and HTTP/2, so both doors have the same limits and the same end. It must
//! not know what the requests are about.

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

/// Which protocols a door speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    /// HTTP/2 only.
    Grpc,
    /// HTTP/2 only, with room for the tokens of many streams in one.
    Worker,
    /// HTTP/1.1, and HTTP/2 with prior knowledge.
    Http,
}

/// What a door puts up with from a connection.
#[derive(Clone, Debug)]
pub struct Limits {
    /// How long the headers of a request may take from their first byte, and the first bytes of a new
    /// connection. Default 10 s.
    pub header_timeout: Duration,
    /// How long a request's body may make no progress. Default 30 s.
    pub body_timeout: Duration,
    /// How long a connection may be idle: HTTP/1.1 between two requests, HTTP/2 without any. An HTTP/1.1
    /// client that pipelines the beginning of a request into the packet of the one before has as long for
    /// the rest of it. Default 75 s, longer than the 60 s of nginx and of AWS's load balancer;
    /// `docs/deployment.md` has the others.
    pub keep_alive_timeout: Duration,
    /// How often an HTTP/2 peer is pinged, and how long it may take to answer. Default 20 s.
    pub ping_interval: Duration,
    /// How long a peer may take nothing: a socket accept nothing of what is written to it, or an
    /// HTTP/2 stream have no room for more. Default 30 s: well over the time after which a sequence
    /// that is not read is given up, so that its last record can be read by a client that comes back.
    pub write_timeout: Duration,
    /// The most bytes of a request's headers. Default 64 KiB.
    pub max_header_bytes: u32,
    /// The most headers of an HTTP/1.1 request. Default 100.
    pub max_headers: usize,
    /// The most requests at once on one HTTP/2 connection. Default 10,000.
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

/// What answers a door's requests.
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

/// How a door is told to end.
#[derive(Clone, Debug, Default)]
pub struct Shutdown {
    /// Close the listener, let running requests end, take no further ones.
    pub stop: CancellationToken,
    /// Drop every connection that is left.
    pub abort: CancellationToken,
}

/// How a door is served.
#[derive(Clone)]
pub struct FrontendSettings {
    /// Which door this is, for the metrics.
    pub door: Frontend,
    /// What it speaks.
    pub protocol: Protocol,
    /// What it puts up with.
    pub limits: Limits,
    /// Where it counts its connections.
    pub telemetry: Telemetry,
    /// What peers have to show, and are shown; `None` where nothing is encrypted.
    pub tls: Option<MutualTls>,
}

/// Serves a door until it is told to stop, and every connection has closed.
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
                let counted = settings.telemetry.track_connection(settings.door);
                let connection = Connection {
                    stream: Arc::new(stream),
                    door: settings.clone(),
                    shutdown: shutdown.clone(),
                    streams: tasks.clone(),
                };
                let connection = connection.run(service.clone());
                tasks.spawn(async move {
                    connection.await;
                    drop(counted);
                });
            }
            Err(error) => {
                // Out of descriptors, or the client has gone again: neither ends the door. Without a
                // pause the first would spin.
                tracing::warn!(%error, "a connection could not be accepted");
                sleep(Duration::from_millis(50)).await;
            }
        }
    }
    drop(listener);
    tasks.close();
    tasks.wait().await;
}
