//! Builds a server from its parts, serves, and shuts down.
//!
//! A server is either an engine or a gateway in front of remote engines, with the HTTP API, the gRPC API or both. This
//! module must not read settings: `config` passes it [`ServerParts`].

use std::sync::Arc;
use std::time::Duration;

use tempfile::TempDir;
use tokio::sync::watch;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;
use tonic::service::Routes;

use crate::critical::{CriticalTasks, TaskPanicked};
use crate::frontend::{self, Authenticator, LayerSettings};
use crate::keys::Keys;
use crate::listen::{
    Address, ConnectionLimits, Limits, Listener, ListenerSettings, Protocol, ServerTls,
};
use crate::models::Readiness;
use crate::request_memory::RequestMemory;
use crate::telemetry::{ListenerKind, Telemetry};
use crate::worker::attached::MAX_HEARTBEAT_TIMEOUT;

mod backend;
mod engine;
mod free_memory;
mod health;
mod http;
mod listeners;
mod parts;
mod reload;
mod remote_engines;
pub mod run;
mod start_error;
mod usage;

use backend::{Backend, Lifecycle, Service};
use engine::Engine;
pub use engine::{EngineParts, Isolation, ModelParts, WorkerParts};
use health::ServerHealth;
use listeners::{Listeners, addresses, bind, worker_socket, worker_tls};
pub use parts::{AdminFrontend, DrainDurations, HttpFrontend, ServerParts, Source};
pub use remote_engines::SetClusterError;
use remote_engines::{RemoteEngines, check_engines};
pub use start_error::StartError;

/// Maximum time for sending the final records of running streams at the end of a shutdown.
const FINAL_WRITE_TIMEOUT: Duration = Duration::from_secs(1);

/// Maximum time to wait for each device to finish its current step at shutdown.
const DEVICE_STOP_TIMEOUT: Duration = Duration::from_secs(2);

/// A running server. [`Server::drain`] shuts it down in order. Dropping it stops it at once: it closes the connections,
/// stops the worker processes, and joins the device threads, for at most a few seconds.
pub struct Server {
    http_addresses: Vec<Address>,
    grpc_addresses: Vec<Address>,
    admin_addresses: Vec<Address>,
    worker_addresses: Vec<Address>,
    /// Temporary folder of the worker socket, if no setting chooses the socket's path. The folder is deleted with the
    /// server.
    _socket_folder: Option<TempDir>,
    telemetry: Telemetry,
    /// `None` if requests need no key.
    keys: Option<Keys>,
    authenticator: Option<Arc<Authenticator>>,
    request_memory: RequestMemory,
    /// The limits on the number of connections to both APIs together.
    connections: ConnectionLimits,
    /// TLS of the listeners that use it. It is reloaded when files change, and on SIGHUP.
    tls: Vec<ServerTls>,
    engine: Option<Engine>,
    /// `None` if the server has an engine of its own.
    remote_engines: Option<RemoteEngines>,
    health: ServerHealth,
    public_listeners: Listeners,
    /// The admin listener. It stays open until the running streams have ended.
    admin_listeners: Listeners,
    /// Listeners for remote workers. They stay open until the last worker has ended.
    worker_listeners: Listeners,
    /// Cancelled when the drain has timed out. Requests that still run then end with an error.
    stopping: CancellationToken,
    critical: CriticalTasks,
    drain: DrainDurations,
}

impl Server {
    /// Binds the listeners and starts the workers. Models load in the background. Requests for a model that is not
    /// loaded yet are rejected as not ready.
    ///
    /// # Errors
    /// Returns an error if the server cannot start. Everything that was already started is stopped again.
    pub async fn start(parts: ServerParts) -> Result<Self, StartError> {
        let keys = parts.keys.clone().map(Keys::read).transpose()?;
        let http_listen = parts.http.as_ref().map(|frontend| &frontend.listen);
        let http = bind("http-listen", http_listen).await?;
        let grpc = bind("grpc-listen", parts.grpc.as_ref()).await?;
        let admin_listen = parts.admin.as_ref().map(|frontend| &frontend.listen);
        let admin = bind("admin-listen", admin_listen).await?;
        let worker_socket = worker_socket(&parts.source)?;
        let workers = bind("worker-listen", worker_socket.address.as_ref()).await?;
        let worker_addresses = addresses(workers.as_ref());
        check_engines(
            &parts.source,
            [
                ("http-listen", &http),
                ("grpc-listen", &grpc),
                ("admin-listen", &admin),
            ],
        )?;
        let (telemetry, critical) = (Telemetry::new(), CriticalTasks::default());
        let stopping = CancellationToken::new();
        let backend = Backend::start(
            &parts,
            worker_addresses.first(),
            &telemetry,
            &Lifecycle {
                critical: &critical,
                stopping: &stopping,
            },
        )?;
        let mut server = Self {
            http_addresses: Vec::new(),
            grpc_addresses: Vec::new(),
            admin_addresses: Vec::new(),
            worker_addresses,
            _socket_folder: worker_socket.folder,
            telemetry,
            authenticator: keys.clone().map(|keys| Arc::new(Authenticator::new(keys))),
            keys,
            request_memory: RequestMemory::new(parts.body_memory_bytes),
            connections: ConnectionLimits::new(&parts.limits),
            tls: parts
                .tls
                .iter()
                .cloned()
                .chain(worker_tls(&parts.source))
                .collect(),
            engine: backend.engine,
            remote_engines: backend.remote_engines,
            health: backend.health,
            public_listeners: Listeners::default(),
            admin_listeners: Listeners::default(),
            worker_listeners: Listeners::default(),
            stopping,
            critical,
            drain: parts.drain,
        };
        if let Some(keys) = &server.keys {
            let reloading = reload::reload_keys_on_change(keys.clone(), server.stopping.clone());
            server.critical.spawn("keys file", reloading);
            let storing = usage::store_usage_regularly(keys.clone(), server.stopping.clone());
            server.critical.spawn("usage file", storing);
        }
        let returning = free_memory::return_free_memory_regularly(server.stopping.clone());
        server.critical.spawn("free memory", returning);
        for tls in &server.tls {
            let stopping = server.stopping.clone();
            let reloading = reload::reload_certificates_on_change(tls.clone(), stopping);
            server.critical.spawn("certificates", reloading);
        }
        if let Some(listener) = workers {
            server.serve_workers(listener, &parts);
        }
        if let Some(listener) = grpc {
            server.serve_grpc(listener, backend.service, &parts).await;
        }
        if let (Some(listener), Some(frontend)) = (http, &parts.http) {
            server.serve_http(listener, frontend, backend.cluster, &parts);
        }
        if let (Some(listener), Some(frontend)) = (admin, &parts.admin) {
            server.serve_admin(listener, frontend, &parts);
        }
        Ok(server)
    }

    /// Starts to accept remote workers on the worker socket. Only an engine has a worker socket.
    fn serve_workers(&self, listener: Listener, parts: &ServerParts) {
        let Some(engine) = &self.engine else {
            return;
        };
        let routes = Routes::new(engine.attach_service.clone().into_server()).prepare();
        let limits = Limits {
            // The worker protocol has its own heartbeat timeout, so the body timeout must not end a worker's
            // connection earlier.
            body_timeout: MAX_HEARTBEAT_TIMEOUT,
            write_timeout: MAX_HEARTBEAT_TIMEOUT,
            ..parts.limits.clone()
        };
        let settings = ListenerSettings {
            tls: worker_tls(&parts.source),
            ..self.listener_settings(ListenerKind::Worker, Protocol::Worker, &limits)
        };
        let listeners = &self.worker_listeners;
        let serving = listeners.serve(listener, settings, routes);
        listeners.spawn_accept_loop(&self.critical, "worker listener", serving);
    }

    async fn serve_grpc(&mut self, listener: Listener, service: Service, parts: &ServerParts) {
        self.grpc_addresses = addresses(Some(&listener));
        let listeners = &self.public_listeners;
        let (ready, closing) = (self.health.clone(), listeners.shutdown.stop.clone());
        let routes = match service {
            Service::Engine(service) => {
                health::grpc_services(service.into_server(), ready, &self.critical, closing).await
            }
            Service::Proxy(proxy) => {
                health::grpc_services(proxy.into_server(), ready, &self.critical, closing).await
            }
        };
        let routes = frontend::grpc_router(routes, self.layer_settings(parts));
        let settings = ListenerSettings {
            tls: parts.tls_at(&listener.addresses()[0]),
            connections: Some(self.connections.clone()),
            ..self.listener_settings(ListenerKind::Grpc, Protocol::Grpc, &parts.limits)
        };
        let serving = listeners.serve(listener, settings, routes);
        listeners.spawn_accept_loop(&self.critical, "gRPC listener", serving);
    }

    fn layer_settings(&self, parts: &ServerParts) -> LayerSettings {
        LayerSettings {
            telemetry: self.telemetry.clone(),
            request_timeout: parts.request_timeout,
            access_log: parts.access_log,
            authenticator: self.authenticator.clone(),
            request_memory: self.request_memory.clone(),
            prefix_sharing: parts.prefix_sharing,
        }
    }

    /// Returns the first address on which the HTTP API listens.
    #[must_use]
    pub fn http_address(&self) -> Option<&Address> {
        self.http_addresses.first()
    }

    /// Returns the first address on which the gRPC API listens.
    #[must_use]
    pub fn grpc_address(&self) -> Option<&Address> {
        self.grpc_addresses.first()
    }

    /// Returns all addresses on which the HTTP API listens. A host name may resolve to several.
    #[must_use]
    pub(crate) fn http_addresses(&self) -> &[Address] {
        &self.http_addresses
    }

    /// Returns all addresses on which the gRPC API listens.
    #[must_use]
    pub(crate) fn grpc_addresses(&self) -> &[Address] {
        &self.grpc_addresses
    }

    /// Returns all addresses of the admin listener.
    #[must_use]
    pub(crate) fn admin_addresses(&self) -> &[Address] {
        &self.admin_addresses
    }

    /// Returns all addresses on which the server accepts remote workers.
    #[must_use]
    pub(crate) fn worker_addresses(&self) -> &[Address] {
        &self.worker_addresses
    }

    /// Returns the keys that the server accepts. `None` if requests need no key.
    pub(crate) fn keys(&self) -> Option<&Keys> {
        self.keys.as_ref()
    }

    /// Returns the TLS of the listeners that use it.
    pub(crate) fn tls(&self) -> &[ServerTls] {
        &self.tls
    }

    /// Returns the metrics of the server.
    #[must_use]
    pub fn telemetry(&self) -> &Telemetry {
        &self.telemetry
    }

    /// Watches the readiness of the engine. Returns `None` for a gateway.
    #[must_use]
    pub fn readiness(&self) -> Option<watch::Receiver<Readiness>> {
        self.engine
            .as_ref()
            .map(|engine| engine.scheduler.readiness())
    }

    /// Waits until every model is loaded, and calls `progress` with the loaded fraction, from 0 to 1. A gateway waits
    /// until one of its engines accepts requests.
    ///
    /// # Errors
    /// Returns an error if a model cannot be loaded.
    pub async fn ready(&self, progress: impl FnMut(f32)) -> Result<(), StartError> {
        let Some(engine) = &self.engine else {
            self.health.wait_until_up().await;
            return Ok(());
        };
        health::wait_for_models(engine.scheduler.readiness(), progress).await
    }

    /// Waits until a critical task has panicked. The caller should then drain the server and start another one.
    pub async fn panicked(&self) -> TaskPanicked {
        self.critical.panicked().await
    }

    /// Waits until `POST /admin/drain` is received. From then on, new requests are rejected, and the caller should
    /// drain the server.
    pub async fn drain_requested(&self) {
        self.health.drain_requested().await;
    }

    /// Shuts the server down. During the grace time it rejects new requests. It then closes the listeners, waits for
    /// running streams until the drain timeout, and ends the remaining streams with an error.
    pub async fn drain(mut self) {
        self.shut_down().await;
    }

    async fn shut_down(&mut self) {
        self.health.set_draining();
        if let Some(engine) = &self.engine {
            engine.scheduler.drain();
        }
        sleep(self.drain.grace).await;
        self.public_listeners.close();
        if timeout(self.drain.timeout, self.public_listeners.wait())
            .await
            .is_err()
        {
            tracing::warn!("the drain timed out; the remaining streams end with an error");
        }
        self.stopping.cancel();
        if let Some(engine) = &self.engine {
            engine.scheduler.stop();
        }
        // Give the final error records time to reach the clients.
        let _ = timeout(FINAL_WRITE_TIMEOUT, self.public_listeners.wait()).await;
        self.public_listeners.abort().await;
        self.health.set_stopped();
        if let Some(engine) = self.engine.take() {
            engine.join(DEVICE_STOP_TIMEOUT).await;
        }
        self.worker_listeners.close();
        self.worker_listeners.abort().await;
        self.admin_listeners.close();
        let _ = timeout(FINAL_WRITE_TIMEOUT, self.admin_listeners.wait()).await;
        self.admin_listeners.abort().await;
        let tasks = self.critical.tracker();
        tasks.close();
        let _ = timeout(DEVICE_STOP_TIMEOUT, tasks.wait()).await;
        if let Some(keys) = &self.keys {
            usage::store_final_usage(keys).await;
        }
    }

    /// Drops the server without waiting for its devices, which may still be computing. The process must then exit
    /// through [`crate::exit`].
    fn abandon(mut self) {
        if let Some(engine) = self.engine.take() {
            engine.abandon();
        }
    }

    fn first_panic(&self) -> Option<TaskPanicked> {
        self.critical.first_panic()
    }

    fn listener_settings(
        &self,
        frontend: ListenerKind,
        protocol: Protocol,
        limits: &Limits,
    ) -> ListenerSettings {
        ListenerSettings {
            frontend,
            protocol,
            limits: limits.clone(),
            telemetry: self.telemetry.clone(),
            connections: None,
            tls: None,
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.health.set_draining();
        self.stopping.cancel();
        self.public_listeners.abort_connections();
        self.worker_listeners.abort_connections();
        self.admin_listeners.abort_connections();
        self.health.set_stopped();
    }
}
