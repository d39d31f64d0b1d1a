//! The source of tokens behind a server's two APIs: an engine in this process, or a cluster of remote engines.

use std::sync::Arc;

use tokio_util::sync::CancellationToken;

use super::engine::Engine;
use super::health::ServerHealth;
use super::parts::{ServerParts, Source};
use super::remote_engines::RemoteEngines;
use super::start_error::StartError;
use crate::cluster::Cluster;
use crate::critical::CriticalTasks;
use crate::grpc;
use crate::listen::Address;
use crate::proxy::{Proxy, ProxyParts};
use crate::telemetry::Telemetry;

/// The services that both APIs call: those of an engine in this process, or those of a gateway to remote engines.
pub(super) struct Backend {
    pub(super) engine: Option<Engine>,
    pub(super) service: Service,
    pub(super) cluster: Cluster,
    /// Engines and routes that the cluster of a gateway follows.
    pub(super) remote_engines: Option<RemoteEngines>,
    pub(super) health: ServerHealth,
}

/// The gRPC service `tokenway.v1.Inference`, of an engine or of a gateway.
pub(super) enum Service {
    Engine(Box<grpc::InferenceService>),
    Proxy(Proxy),
}

/// The critical tasks of a server, and the token that ends its remaining requests.
pub(super) struct Lifecycle<'a> {
    pub(super) critical: &'a CriticalTasks,
    /// Cancelled when the drain has timed out and the server no longer waits for running requests.
    pub(super) stopping: &'a CancellationToken,
}

impl Backend {
    pub(super) fn start(
        parts: &ServerParts,
        worker_socket: Option<&Address>,
        telemetry: &Telemetry,
        lifecycle: &Lifecycle<'_>,
    ) -> Result<Self, StartError> {
        match &parts.source {
            Source::Engine(engine) => {
                let engine = Engine::start(engine, worker_socket, telemetry, lifecycle.critical);
                let engine = engine.map_err(StartError::Thread)?;
                let scheduler = Arc::clone(&engine.scheduler);
                let health = ServerHealth::for_engine(&scheduler);
                let service = grpc::InferenceService::new(
                    engine.models.clone(),
                    scheduler,
                    telemetry.clone(),
                );
                let cluster = Cluster::local(service.clone(), telemetry);
                Ok(Self {
                    engine: Some(engine),
                    service: Service::Engine(Box::new(service)),
                    cluster,
                    remote_engines: None,
                    health,
                })
            }
            Source::Remote(spec) => {
                let stop = CancellationToken::new();
                let (remote_engines, membership) = RemoteEngines::new(spec.clone());
                let cluster = Cluster::remote(membership, telemetry, lifecycle.critical, &stop);
                let health = ServerHealth::for_cluster(cluster.clone(), stop);
                let open = health.clone();
                let proxy = Proxy::new(ProxyParts {
                    cluster: cluster.clone(),
                    check_accepting: Box::new(move || open.check_accepting()),
                    stopping: lifecycle.stopping.clone(),
                });
                Ok(Self {
                    engine: None,
                    service: Service::Proxy(proxy),
                    cluster,
                    remote_engines: Some(remote_engines),
                    health,
                })
            }
        }
    }
}
