//! The address of an engine's worker socket, and the worker's connection to it.

use std::fmt::{Display, Formatter};
use std::path::PathBuf;
use std::sync::Arc;

use hyper_util::rt::TokioIo;
use tonic::transport::{Channel, Endpoint, Error};
use tower::service_fn;

use super::socket::Socket;
use super::tasks::Tasks;

/// HTTP/2 flow-control window of the stream and of the connection, in bytes. It is large because the connection has
/// only one stream, and the worker always reads it.
const FLOW_CONTROL_WINDOW: u32 = 4 * 1024 * 1024;

/// The address of an engine's worker socket.
#[derive(Clone, Debug)]
pub enum WorkerSocketAddress {
    /// Path of a Unix socket on this machine.
    Unix(PathBuf),
    /// TCP endpoint with mutual TLS.
    Tls(Box<Endpoint>),
}

impl Display for WorkerSocketAddress {
    fn fmt(&self, f: &mut Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
            Self::Tls(engine) => write!(f, "{}", engine.uri()),
        }
    }
}

impl WorkerSocketAddress {
    /// Connects to the engine. The connection runs on `tasks`.
    pub(super) async fn connect(&self, tasks: &Tasks) -> Result<Channel, Error> {
        match self {
            Self::Unix(path) => {
                let path: Arc<_> = path.as_path().into();
                let socket = service_fn(move |_| {
                    let path = Arc::clone(&path);
                    async move { Socket::connect(&path).await.map(TokioIo::new) }
                });
                // HTTP/2 requires a host name, which a Unix socket does not have.
                let engine = Endpoint::from_static("http://localhost");
                let engine = with_flow_control(engine).executor(tasks.clone());
                engine.connect_with_connector(socket).await
            }
            Self::Tls(engine) => {
                let engine = with_flow_control(Endpoint::clone(engine)).executor(tasks.clone());
                engine.connect().await
            }
        }
    }
}

fn with_flow_control(engine: Endpoint) -> Endpoint {
    engine
        .initial_stream_window_size(FLOW_CONTROL_WINDOW)
        .initial_connection_window_size(FLOW_CONTROL_WINDOW)
}
