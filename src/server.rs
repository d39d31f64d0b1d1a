//! Builds the parts, serves, and drains.
//!
//! A server is an engine behind one or two doors, or the HTTP door alone in front of engines
//! elsewhere. It must not read settings: `config` gives it [`ServerParts`].

use std::io;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tempfile::TempDir;
use tokio::sync::watch;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tonic::service::Routes;

use crate::cluster::Cluster;
use crate::critical::{Critical, TaskPanicked};
use crate::gateway::{self, Gateway, OriginPolicy, StreamFormat, UnknownFields};
use crate::grpc;
use crate::listen::{
    self, Address, DoorService, DoorSettings, Limits, Listener, MutualTls, Protocol, Shutdown,
};
use crate::scheduler::Readiness;
use crate::telemetry::{Door, Telemetry};
use crate::worker::attached::LONGEST_SILENCE;

mod engine;
mod health;
pub mod run;

use engine::Engine;
pub use engine::{EngineParts, Isolation, ModelParts, WorkerParts};
use health::Ready;

/// How long the last answers may take to reach their clients once everything has ended.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// How long a streamed request waits in the queue, by default, before its headers are sent: less than the 60 s after
/// which load balancers give up a silent answer.
const HEADERS_AFTER: Duration = Duration::from_secs(30);

/// How long a device may take to return from its last step.
const LAST_STEP: Duration = Duration::from_secs(2);

/// What a server is made of.
#[derive(Clone)]
pub struct ServerParts {
    /// Where tokens come from.
    pub source: Source,
    /// The HTTP door, if there is one.
    pub http: Option<HttpDoor>,
    /// Where the gRPC door listens, if there is one. It needs an engine of this process.
    pub grpc: Option<Address>,
    /// What both doors put up with.
    pub limits: Limits,
    /// How long a request may take where its client does not say.
    pub request_timeout: Duration,
    /// How the server ends.
    pub drain: Drain,
}

/// Where a server's tokens come from.
#[derive(Clone)]
pub enum Source {
    /// An engine in this process.
    Engine(EngineParts),
    /// Engines elsewhere, by their addresses.
    Remote(Vec<String>),
}

/// The HTTP door.
#[derive(Clone)]
pub struct HttpDoor {
    /// Where it listens.
    pub listen: Address,
    /// The form of a stream whose client has no preference.
    pub stream_format: StreamFormat,
    /// What happens to fields of a request that are unknown.
    pub unknown_fields: UnknownFields,
    /// How long a streamed request waits in the queue before its headers are sent; `None` is without end.
    pub headers_after: Option<Duration>,
    /// Under which host names, and for pages of which origins, requests are taken.
    pub origins: OriginPolicy,
}

impl HttpDoor {
    /// The HTTP API at this address, with the defaults of the command line: NDJSON, unknown fields are refused, headers
    /// after 30 s in the queue, and no host names or origins besides the server's own.
    #[must_use]
    pub fn at(listen: Address) -> Self {
        Self {
            listen,
            stream_format: StreamFormat::Ndjson,
            unknown_fields: UnknownFields::Refuse,
            headers_after: Some(HEADERS_AFTER),
            origins: OriginPolicy::default(),
        }
    }

    /// Whether other machines reach the HTTP API, but no host name that they may use is allowed.
    fn refuses_names(&self) -> bool {
        !self.listen.is_loopback() && self.origins.allowed_hosts.is_empty()
    }

    /// The policy at the address where it listens. Browsers do not reach a Unix socket, so its host names are not checked.
    fn origins(&self) -> OriginPolicy {
        match self.listen {
            Address::Tcp(_) => self.origins.clone(),
            Address::Unix(_) => self.origins.clone().without_host_check(),
        }
    }
}

/// How a server ends.
#[derive(Clone, Copy, Debug)]
pub struct Drain {
    /// How long it goes on answering 'not ready' before it closes its listeners, so that load
    /// balancers notice.
    pub grace: Duration,
    /// How long running streams may take to end.
    pub timeout: Duration,
}

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
    doors: Doors,
    /// Where workers dial in: it is open until the last of them has ended.
    worker_door: Doors,
    /// What still runs then is ended with an error.
    stopping: CancellationToken,
    tasks: TaskTracker,
    critical: Critical,
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
        let (telemetry, tasks, critical) =
            (Telemetry::new(), TaskTracker::new(), Critical::default());
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
            doors: Doors::default(),
            worker_door: Doors::default(),
            stopping: CancellationToken::new(),
            tasks,
            critical,
            drain: parts.drain,
        };
        if let (Some(listener), Some(engine)) = (workers, &server.engine) {
            let routes = Routes::new(engine.door.clone().into_server()).prepare();
            let limits = Limits {
                // Each worker's session has limits of its own for a worker that sends or reads nothing.
                body_timeout: LONGEST_SILENCE,
                write_timeout: LONGEST_SILENCE,
                ..parts.limits.clone()
            };
            let settings = DoorSettings {
                tls: worker_tls(&parts.source),
                ..server.settings(Door::Worker, Protocol::Worker, &limits)
            };
            let serving = server.worker_door.serve(listener, settings, routes);
            server
                .worker_door
                .open(&server.critical, "worker listener", serving);
        }
        if let (Some(listener), Some(service)) = (grpc, backend.service) {
            server.grpc_addresses = addresses(Some(&listener));
            let (ready, closing) = (server.readiness.clone(), server.doors.shutdown.stop.clone());
            let tasks = (&server.tasks, &server.critical);
            let routes = health::routes(service, ready, tasks, closing).await;
            let settings = server.settings(Door::Grpc, Protocol::Grpc, &parts.limits);
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
                ready: Arc::new(move || ready.check()),
                workers: Arc::new(move || workers.workers()),
                open: Arc::new(move || open.check_open()),
                stopping: server.stopping.clone(),
                stream_format: door.stream_format,
                unknown_fields: door.unknown_fields,
                headers_after: door.headers_after,
                origins: door.origins(),
                request_timeout: parts.request_timeout,
            });
            let settings = server.settings(Door::Http, Protocol::Http, &parts.limits);
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
        let _ = timeout(LAST_WORDS, self.doors.wait()).await;
        self.doors.abort().await;
        self.readiness.set_stopped();
        if let Some(engine) = self.engine.take() {
            engine.join(LAST_STEP).await;
        }
        self.worker_door.close();
        self.worker_door.abort().await;
        self.tasks.close();
        let _ = timeout(LAST_STEP, self.tasks.wait()).await;
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

    fn settings(&self, door: Door, protocol: Protocol, limits: &Limits) -> DoorSettings {
        DoorSettings {
            door,
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
        for doors in [&self.doors, &self.worker_door] {
            doors.shutdown.stop.cancel();
            doors.shutdown.abort.cancel();
        }
        self.readiness.set_stopped();
    }
}

fn worker_tls(source: &Source) -> Option<MutualTls> {
    match source {
        Source::Engine(engine) => engine.workers.tls.clone(),
        Source::Remote(_) => None,
    }
}

/// Doors that are opened and closed together.
#[derive(Default)]
struct Doors {
    tasks: TaskTracker,
    shutdown: Shutdown,
}

impl Doors {
    fn open(
        &self,
        critical: &Critical,
        name: &'static str,
        serving: impl Future<Output = ()> + Send + 'static,
    ) {
        critical.spawn(&self.tasks, name, serving);
    }

    fn serve<S, B>(
        &self,
        listener: Listener,
        settings: DoorSettings,
        service: S,
    ) -> impl Future<Output = ()> + Send + use<S, B>
    where
        S: DoorService<B>,
        S::Future: Send + 'static,
        B: http_body::Body<Data = Bytes> + Send + 'static,
        B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        listen::serve(listener, service, settings, self.shutdown.clone())
    }

    /// Takes no further requests.
    fn close(&self) {
        self.shutdown.stop.cancel();
        self.tasks.close();
    }

    /// Waits until the last request has ended.
    async fn wait(&self) {
        self.tasks.wait().await;
    }

    /// Waits for nothing that is left.
    async fn abort(&self) {
        self.shutdown.abort.cancel();
        self.tasks.wait().await;
    }
}

/// What the system says, and of which folder where there is none for a socket.
fn why(address: &Address, source: &io::Error) -> String {
    let folder = match address {
        Address::Unix(path) => path.parent().filter(|folder| !folder.exists()),
        Address::Tcp(_) => None,
    };
    match folder {
        Some(folder) => format!("there is no folder {}", folder.display()),
        None => source.to_string(),
    }
}

fn addresses(listener: Option<&Listener>) -> Vec<Address> {
    listener.map_or_else(Vec::new, |listener| listener.addresses().to_vec())
}

async fn bind(
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

/// Where the engine's workers are to dial in: where its settings say, or, where it starts processes of its own,
/// in a folder that is made for it and that only its user may enter.
fn worker_socket(source: &Source) -> Result<(Option<Address>, Option<TempDir>), StartError> {
    let Source::Engine(engine) = source else {
        return Ok((None, None));
    };
    if let Some(address) = &engine.workers.listen {
        return Ok((Some(address.clone()), None));
    }
    let is_process = |model: &ModelParts| model.isolation != Isolation::Thread;
    if !engine.models.iter().any(is_process) {
        return Ok((None, None));
    }
    let folder = tempfile::Builder::new().prefix("tokenway-").tempdir();
    let folder = folder.map_err(StartError::WorkerSocket)?;
    let address = Address::Unix(folder.path().join("workers.sock"));
    Ok((Some(address), Some(folder)))
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
        tasks: (&TaskTracker, &Critical),
    ) -> Result<Self, StartError> {
        match &parts.source {
            Source::Engine(engine) => {
                let engine = Engine::start(engine, worker_socket, telemetry, tasks);
                let engine = engine.map_err(StartError::Thread)?;
                let scheduler = engine.scheduler.clone();
                let readiness = Ready::of_engine(&scheduler);
                let service =
                    grpc::Service::door(scheduler, telemetry.clone(), parts.request_timeout);
                let cluster = Cluster::local(service.behind_another_door());
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
