//! Where a worker's engine is, and how it is reached.

use std::fmt::{Display, Formatter};
use std::path::PathBuf;
use std::sync::Arc;

use hyper_util::rt::TokioIo;
use tonic::transport::{Channel, Endpoint, Error};
use tower::service_fn;

use super::socket::Socket;
use super::tasks::Tasks;

/// What the connection's windows hold. One stream carries everything, and is always read.
const WINDOW: u32 = 4 * 1024 * 1024;

/// An engine's worker socket.
#[derive(Clone, Debug)]
pub enum EngineAddress {
    /// On this machine, by the path of its socket.
    Unix(PathBuf),
    /// Anywhere, with certificates on both sides.
    Tls(Box<Endpoint>),
}

impl Display for EngineAddress {
    fn fmt(&self, f: &mut Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
            Self::Tls(engine) => write!(f, "{}", engine.uri()),
        }
    }
}

impl EngineAddress {
    /// Connects; the connection is run by these tasks.
    pub(super) async fn connect(&self, tasks: &Tasks) -> Result<Channel, Error> {
        match self {
            Self::Unix(path) => {
                let path: Arc<_> = path.as_path().into();
                let socket = service_fn(move |_| {
                    let path = Arc::clone(&path);
                    async move { Socket::connect(&path).await.map(TokioIo::new) }
                });
                // A Unix socket has no host; HTTP/2 wants one.
                let engine = Endpoint::from_static("http://localhost");
                let engine = windows(engine).executor(tasks.clone());
                engine.connect_with_connector(socket).await
            }
            Self::Tls(engine) => {
                let engine = windows(Endpoint::clone(engine)).executor(tasks.clone());
                engine.connect().await
            }
        }
    }
}

fn windows(engine: Endpoint) -> Endpoint {
    engine
        .initial_stream_window_size(WINDOW)
        .initial_connection_window_size(WINDOW)
}
