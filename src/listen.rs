//! Listening sockets: accepts connections, enforces their limits and timeouts, and shuts them down.
//!
//! One accept loop serves HTTP/1.1 and HTTP/2, so the HTTP API and the gRPC API have the same limits and the same
//! shutdown. This module must not know any route or RPC.

use std::error::Error;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::time::sleep;
use tokio_util::task::TaskTracker;

use self::connection::Connection;

mod activity;
mod address;
mod connection;
mod connection_limits;
mod frames;
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) mod fuzzing;
mod keep_alive_header;
mod peer;
mod plaintext;
mod request_body;
mod request_head;
mod resets;
mod response_body;
mod settings;
mod stalled;
mod tls;
mod transport;
mod wait_budget;
mod watched_stream;

pub use address::{Address, InvalidAddress, Listener};
pub(crate) use connection_limits::ConnectionLimits;
pub use peer::PeerAddress;
pub(crate) use peer::network;
pub use request_body::RequestBody;
pub use request_head::MalformedHead;
pub use settings::{Limits, Protocol, Shutdown};
pub(crate) use settings::{ListenerService, ListenerSettings};
pub use tls::{ServerTls, ServerTlsFiles};

/// Serves a listener until `shutdown` stops it and every connection has closed.
pub(crate) async fn serve<S, B>(
    listener: Listener,
    service: S,
    settings: ListenerSettings,
    shutdown: Shutdown,
) where
    S: ListenerService<B>,
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
            Ok(socket) => {
                let opened = settings.connections.as_ref();
                let opened = opened.map(|limits| limits.open(socket.peer_address()));
                let counted = match opened.transpose() {
                    Ok(counted) => counted,
                    Err(limit) => {
                        let telemetry = &settings.telemetry;
                        telemetry.count_refused_connection(settings.frontend, limit);
                        continue;
                    }
                };
                let open_connection = settings.telemetry.track_connection(settings.frontend);
                let connection = Connection {
                    socket: Arc::new(socket),
                    settings: settings.clone(),
                    shutdown: shutdown.clone(),
                    streams: tasks.clone(),
                };
                let connection = connection.run(service.clone());
                tasks.spawn(async move {
                    connection.await;
                    drop((open_connection, counted));
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
