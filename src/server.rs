//! Builds the parts, serves, and drains.
//!
//! A server is an engine behind one or two doors, or the HTTP door alone in front of engines
//! elsewhere. It must not read settings: `config` gives it [`ServerParts`].

use std::io;
use std::sync::Arc;
use std::time::Duration;

use tempfile::TempDir;
use tokio::sync::watch;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tonic::service::Routes;

use crate::cluster::Cluster;
use crate::critical::{CriticalTasks, TaskPanicked};
use crate::gateway::{self, Gateway};
use crate::grpc;
use crate::listen::{Address, FrontendSettings, Limits, Protocol};
use crate::scheduler::Readiness;
use crate::telemetry::{Frontend, Telemetry};
use crate::worker::attached::MAX_HEARTBEAT_TIMEOUT;

mod engine;
mod health;
mod listeners;
mod parts;
pub mod run;

use engine::Engine;
pub use engine::{EngineParts, Isolation, ModelParts, WorkerParts};
use health::Ready;
use listeners::{Listeners, addresses, bind, why, worker_socket, worker_tls};
pub use parts::{Drain, HttpFrontend, ServerParts, Source};

/// How long the last answers may take to reach their clients once everything has ended.
const FINAL_WRITE_TIMEOUT: Duration = Duration::from_secs(1);

/// How long a device may take to return from its last step.
const DEVICE_STOP_TIMEOUT: Duration = Duration::from_secs(2);

/// Why a server did not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// An address cannot be listened on.
    #[error(
        "cannot listen on {address}: {}; --{setting} chooses another address",
        why(address, source)
    )]
    Listen {
        /// What chooses it.
        setting: &'static str,
        /// The address.
        address: Address,
        /// What the system says.
        source: io::Error,
    },
    /// A worker's thread cannot be started.
    #[error("cannot start a worker's thread: {0}")]
    Thread(io::Error),
    /// A folder for the worker socket cannot be made.
    #[error("cannot make a folder for the worker socket: {0}; --worker-listen chooses a place")]
    WorkerSocket(io::Error),
    /// An engine's address is none.
    #[error("{0}")]
    Engine(String),
    /// A model cannot be loaded.
    #[error("cannot load the model '{model}': {reason}")]
    Model {
        /// Which.
        model: String,
        /// What its runner says.
        reason: String,
    },
    /// It ended before its models were loaded.
    #[error("the server ended before its models were loaded")]
    Ended,
}

/// A server that runs. It ends in order by [`Server::drain`]. Dropping it cuts off whatever still runs: its connections
/// close, its worker processes are told to end, and its devices' threads are joined, at most for some seconds.
pub struct Server {
    http_addresses: Vec<Address>,
    grpc_addresses: Vec<Address>,
    worker_addresses: Vec<Address>,
    /// Where the worker socket is that nobody has chosen a place for. It goes with the server.
    _private: Option<TempDir>,
    telemetry: Telemetry,
    engine: Option<Engine>,
    readiness: Ready,
    doors: Listeners,
    /// Where workers dial in: it is open until the last of them has ended.
    worker_listeners: Listeners,
    /// What still runs then is ended with an error.
    stopping: CancellationToken,
    tasks: TaskTracker,
    critical: CriticalTasks,
    drain: Drain,
}

impl Server {
    /// Binds the doors and starts the workers. Models load in the background: until one has, the doors
    /// answer its requests with 'not ready'.
    ///
    /// # Errors
    /// What keeps the server from starting. Nothing is left running then.
    pub async fn start(parts: ServerParts) -> Result<Self, StartError> {
        let http_listen = parts.http.as_ref().map(|door| &door.listen);
        let http = bind("http-listen", http_listen).await?;
        let grpc = bind("grpc-listen", parts.grpc.as_ref()).await?;
        let (worker_socket, private) = worker_socket(&parts.source)?;
        let workers = bind("worker-listen", worker_socket.as_ref()).await?;
        let worker_addresses = addresses(workers.as_ref());
        let (telemetry, tasks, critical) = (
            Telemetry::new(),
            TaskTracker::new(),
            CriticalTasks::default(),
        );
        let backend = Backend::start(
            &parts,
            worker_addresses.first(),
            &telemetry,
            (&tasks, &critical),
        )?;
        let mut server = Self {
            http_addresses: Vec::new(),
            grpc_addresses: Vec::new(),
            worker_addresses,
            _private: private,
            telemetry,
            engine: backend.engine,
            readiness: backend.readiness,
            doors: Listeners::default(),
            worker_listeners: Listeners::default(),
            stopping: CancellationToken::new(),
            tasks,
            critical,
            drain: parts.drain,
        };
        if let (Some(listener), Some(engine)) = (workers, &server.engine) {
            let routes = Routes::new(engine.door.clone().into_server()).prepare();
            let limits = Limits {
                // Each worker's session has limits of its own for a worker that sends or reads nothing.
                body_timeout: MAX_HEARTBEAT_TIMEOUT,
                write_timeout: MAX_HEARTBEAT_TIMEOUT,
                ..parts.limits.clone()
            };
            let settings = FrontendSettings {
                tls: worker_tls(&parts.source),
                ..server.settings(Frontend::Worker, Protocol::Worker, &limits)
            };
            let serving = server.worker_listeners.serve(listener, settings, routes);
            server
                .worker_listeners
                .open(&server.critical, "worker listener", serving);
        }
        if let (Some(listener), Some(service)) = (grpc, backend.service) {
            server.grpc_addresses = addresses(Some(&listener));
            let (ready, closing) = (server.readiness.clone(), server.doors.shutdown.stop.clone());
            let tasks = (&server.tasks, &server.critical);
            let routes = health::routes(service, ready, tasks, closing).await;
            let settings = server.settings(Frontend::Grpc, Protocol::Grpc, &parts.limits);
            let serving = server.doors.serve(listener, settings, routes);
            server
                .doors
                .open(&server.critical, "gRPC listener", serving);
        }
        if let (Some(listener), Some(door)) = (http, parts.http) {
            server.http_addresses = addresses(Some(&listener));
            let (ready, open) = (server.readiness.clone(), server.readiness.clone());
            let workers = server.readiness.clone();
            let router = gateway::router(Gateway {
                cluster: backend.cluster,
                telemetry: server.telemetry.clone(),
                check_ready: Arc::new(move || ready.check()),
                worker_counts: Arc::new(move || workers.workers()),
                check_accepting: Arc::new(move || open.check_open()),
                stopping: server.stopping.clone(),
                stream_format: door.stream_format,
                unknown_fields: door.unknown_fields,
                headers_after: door.headers_after,
                origins: door.origins(),
                request_timeout: parts.request_timeout,
            });
            let settings = server.settings(Frontend::Http, Protocol::Http, &parts.limits);
            let serving = server.doors.serve(listener, settings, router);
            server
                .doors
                .open(&server.critical, "HTTP listener", serving);
        }
        Ok(server)
    }

    /// The first address of the HTTP API.
    #[must_use]
    pub fn http_address(&self) -> Option<&Address> {
        self.http_addresses.first()
    }

    /// The first address of the gRPC API.
    #[must_use]
    pub fn grpc_address(&self) -> Option<&Address> {
        self.grpc_addresses.first()
    }

    /// Every address of the HTTP API: a host name may stand for several.
    #[must_use]
    pub fn http_addresses(&self) -> &[Address] {
        &self.http_addresses
    }

    /// Every address of the gRPC API.
    #[must_use]
    pub fn grpc_addresses(&self) -> &[Address] {
        &self.grpc_addresses
    }

    /// Every address at which workers dial in.
    #[must_use]
    pub fn worker_addresses(&self) -> &[Address] {
        &self.worker_addresses
    }

    /// What the server counts.
    #[must_use]
    pub fn telemetry(&self) -> &Telemetry {
        &self.telemetry
    }

    /// How able the engine's workers are, as it changes; `None` without an engine.
    #[must_use]
    pub fn readiness(&self) -> Option<watch::Receiver<Readiness>> {
        self.engine
            .as_ref()
            .map(|engine| engine.scheduler.readiness())
    }

    /// Waits until every model is loaded, telling `progress` how far that is, from 0 to 1. Without an
    /// engine of its own it waits until one of those elsewhere takes requests.
    ///
    /// # Errors
    /// When a model cannot be loaded.
    pub async fn ready(&self, progress: impl FnMut(f32)) -> Result<(), StartError> {
        let Some(engine) = &self.engine else {
            self.readiness.up().await;
            return Ok(());
        };
        health::wait_for_models(engine.scheduler.readiness(), progress).await
    }

    /// Waits until a task that the server cannot work without has panicked. It is then to be drained, and another one
    /// started.
    pub async fn panicked(&self) -> TaskPanicked {
        self.critical.panicked().await
    }

    /// Ends the server: new work is refused for the grace time, then the listeners close, running
    /// streams may end until the time-out, and what is left then is ended with an error.
    pub async fn drain(mut self) {
        self.end().await;
    }

    async fn end(&mut self) {
        self.readiness.set_draining();
        if let Some(engine) = &self.engine {
            engine.scheduler.drain();
        }
        sleep(self.drain.grace).await;
        self.doors.close();
        if timeout(self.drain.timeout, self.doors.wait())
            .await
            .is_err()
        {
            tracing::warn!("streams were still running at the end of the drain; they are ended");
        }
        self.stopping.cancel();
        if let Some(engine) = &self.engine {
            engine.scheduler.stop();
        }
        // What has been told of the end is still on its way to the clients.
        let _ = timeout(FINAL_WRITE_TIMEOUT, self.doors.wait()).await;
        self.doors.abort().await;
        self.readiness.set_stopped();
        if let Some(engine) = self.engine.take() {
            engine.join(DEVICE_STOP_TIMEOUT).await;
        }
        self.worker_listeners.close();
        self.worker_listeners.abort().await;
        self.tasks.close();
        let _ = timeout(DEVICE_STOP_TIMEOUT, self.tasks.wait()).await;
    }

    /// Drops the server without waiting for its devices. The process must then leave by [`crate::exit`].
    fn abandon(mut self) {
        if let Some(engine) = self.engine.take() {
            engine.abandon();
        }
    }

    fn first_panic(&self) -> Option<TaskPanicked> {
        self.critical.first_panic()
    }

    fn settings(&self, frontend: Frontend, protocol: Protocol, limits: &Limits) -> FrontendSettings {
        FrontendSettings {
            frontend,
            protocol,
            limits: limits.clone(),
            telemetry: self.telemetry.clone(),
            tls: None,
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.readiness.set_draining();
        self.stopping.cancel();
        self.doors.cut_off();
        self.worker_listeners.cut_off();
        self.readiness.set_stopped();
    }
}

/// Where the doors' requests go.
struct Backend {
    engine: Option<Engine>,
    /// The engine's own door.
    service: Option<grpc::Service>,
    cluster: Cluster,
    readiness: Ready,
}

impl Backend {
    fn start(
        parts: &ServerParts,
        worker_socket: Option<&Address>,
        telemetry: &Telemetry,
        tasks: (&TaskTracker, &CriticalTasks),
    ) -> Result<Self, StartError> {
        match &parts.source {
            Source::Engine(engine) => {
                let engine = Engine::start(engine, worker_socket, telemetry, tasks);
                let engine = engine.map_err(StartError::Thread)?;
                let scheduler = engine.scheduler.clone();
                let readiness = Ready::of_engine(&scheduler);
                let service =
                    grpc::Service::new(scheduler, telemetry.clone(), parts.request_timeout);
                let cluster = Cluster::local(service.uncounted());
                Ok(Self {
                    engine: Some(engine),
                    service: Some(service),
                    cluster,
                    readiness,
                })
            }
            Source::Remote(addresses) => {
                let stop = CancellationToken::new();
                let cluster =
                    Cluster::remote(addresses, tasks, &stop).map_err(StartError::Engine)?;
                let readiness = Ready::of_cluster(cluster.clone(), stop);
                Ok(Self {
                    engine: None,
                    service: None,
                    cluster,
                    readiness,
                })
            }
        }
    }
}
