//! The listeners of a server. They are bound before anything else starts, so that an address in use is reported at
//! once.

use bytes::Bytes;
use tempfile::TempDir;
use tokio_util::task::TaskTracker;

use super::engine::{Isolation, ModelParts};
use super::parts::Source;
use super::start_error::StartError;
use crate::critical::CriticalTasks;
use crate::listen::{
    self, Address, Listener, ListenerService, ListenerSettings, ServerTls, Shutdown,
};

/// A group of listeners that are closed together.
#[derive(Default)]
pub(super) struct Listeners {
    tasks: TaskTracker,
    pub(super) shutdown: Shutdown,
}

impl Listeners {
    /// Starts the accept loop of a listener.
    pub(super) fn spawn_accept_loop(
        &self,
        critical: &CriticalTasks,
        name: &'static str,
        serving: impl Future<Output = ()> + Send + 'static,
    ) {
        critical
            .with_tracker(self.tasks.clone())
            .spawn(name, serving);
    }

    /// Returns a future that accepts and serves connections until the listener closes.
    pub(super) fn serve<S, B>(
        &self,
        listener: Listener,
        settings: ListenerSettings,
        service: S,
    ) -> impl Future<Output = ()> + Send + use<S, B>
    where
        S: ListenerService<B>,
        S::Future: Send + 'static,
        B: http_body::Body<Data = Bytes> + Send + 'static,
        B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        listen::serve(listener, service, settings, self.shutdown.clone())
    }

    /// Stops accepting connections and requests. Running requests continue.
    pub(super) fn close(&self) {
        self.shutdown.stop.cancel();
        self.tasks.close();
    }

    /// Closes all connections at once. Does not wait for their tasks to end.
    pub(super) fn abort_connections(&self) {
        self.shutdown.stop.cancel();
        self.shutdown.abort.cancel();
    }

    /// Waits until the last connection has ended.
    pub(super) async fn wait(&self) {
        self.tasks.wait().await;
    }

    /// Closes all connections at once, and waits until their tasks have ended.
    pub(super) async fn abort(&self) {
        self.shutdown.abort.cancel();
        self.tasks.wait().await;
    }
}

pub(super) fn addresses(listener: Option<&Listener>) -> Vec<Address> {
    listener.map_or_else(Vec::new, |listener| listener.addresses().to_vec())
}

pub(super) async fn bind(
    setting: &'static str,
    address: Option<&Address>,
) -> Result<Option<Listener>, StartError> {
    let Some(address) = address else {
        return Ok(None);
    };
    let listener = Listener::bind(address).await;
    listener.map(Some).map_err(|source| StartError::Listen {
        setting,
        address: address.clone(),
        source,
    })
}

/// The worker socket of an engine.
#[derive(Default)]
pub(super) struct WorkerSocket {
    /// Address of the worker socket; `None` if the engine needs none.
    pub(super) address: Option<Address>,
    /// Temporary folder that contains the socket, if no setting chooses the socket's path.
    pub(super) folder: Option<TempDir>,
}

/// Returns the address of the worker socket, if the server needs one. It is the configured address; or, if the engine
/// starts worker processes, a socket in a new temporary folder that only the current user may enter.
pub(super) fn worker_socket(source: &Source) -> Result<WorkerSocket, StartError> {
    let Source::Engine(engine) = source else {
        return Ok(WorkerSocket::default());
    };
    if let Some(address) = &engine.workers.listen {
        return Ok(WorkerSocket {
            address: Some(address.clone()),
            folder: None,
        });
    }
    let is_process = |model: &ModelParts| model.isolation != Isolation::Thread;
    if !engine.models.iter().any(is_process) {
        return Ok(WorkerSocket::default());
    }
    let folder = tempfile::Builder::new().prefix("tokenway-").tempdir();
    let folder = folder.map_err(StartError::WorkerSocket)?;
    let address = Address::Unix(folder.path().join("workers.sock"));
    Ok(WorkerSocket {
        address: Some(address),
        folder: Some(folder),
    })
}

/// Returns the TLS of the worker socket.
pub(super) fn worker_tls(source: &Source) -> Option<ServerTls> {
    match source {
        Source::Engine(engine) => engine.workers.tls.clone(),
        Source::Remote(_) => None,
    }
}
