//! Health of the server. The HTTP health endpoints and the gRPC health service report it.

use std::collections::BTreeMap;

use tokio::sync::watch;
use tokio::sync::watch::error::RecvError;
use tokio_util::sync::CancellationToken;
use tonic::service::Routes;
use tonic_health::ServingStatus;
use tonic_health::server::HealthReporter;

use super::start_error::StartError;
use crate::cluster::Cluster;
use crate::critical::CriticalTasks;
use crate::error::{Error, ErrorKind};
use crate::models::{Models, Readiness};
use crate::proto::DESCRIPTORS;
use crate::proto::v1::inference_server::{Inference, InferenceServer};
use crate::runner::DeviceFacts;
use crate::scheduler::Scheduler;
use crate::telemetry::WorkerCounts;

/// Service names for which the gRPC health service reports a status: the whole server (empty name) and the inference
/// service.
const SERVICES: [&str; 2] = ["", "tokenway.v1.Inference"];

/// Health of a server. Clones share it.
#[derive(Clone)]
pub(super) struct ServerHealth {
    backend: HealthSource,
    draining: CancellationToken,
    stopped: CancellationToken,
}

#[derive(Clone)]
enum HealthSource {
    Engine(EngineHealth),
    Cluster(Cluster),
}

/// Sources of an engine's health.
#[derive(Clone)]
struct EngineHealth {
    readiness: watch::Receiver<Readiness>,
    workers: watch::Receiver<WorkerCounts>,
    models: Models,
}

impl HealthSource {
    /// Waits until the server's health may have changed. `is_serving` is the last reported health.
    async fn changed(&mut self, is_serving: bool) -> Result<(), RecvError> {
        match self {
            Self::Engine(engine) => engine.readiness.changed().await,
            Self::Cluster(cluster) => {
                cluster.wait_for_change(is_serving).await;
                Ok(())
            }
        }
    }
}

impl ServerHealth {
    pub(super) fn for_engine(scheduler: &Scheduler) -> Self {
        Self {
            backend: HealthSource::Engine(EngineHealth {
                readiness: scheduler.readiness(),
                workers: scheduler.workers(),
                models: scheduler.models().clone(),
            }),
            draining: CancellationToken::new(),
            stopped: CancellationToken::new(),
        }
    }

    /// Creates the health of a gateway. Cancelling `stopped` ends the tasks that watch the engines.
    pub(super) fn for_cluster(cluster: Cluster, stopped: CancellationToken) -> Self {
        Self {
            backend: HealthSource::Cluster(cluster),
            draining: CancellationToken::new(),
            stopped,
        }
    }

    /// Checks that the server accepts requests for every model. The HTTP health endpoints return this result.
    pub(super) fn check_ready(&self) -> Result<(), Error> {
        self.check_accepting()?;
        let HealthSource::Engine(engine) = &self.backend else {
            return Ok(());
        };
        let (kind, message) = match &*engine.readiness.borrow() {
            Readiness::Ready => return Ok(()),
            Readiness::Loading(_) => (
                ErrorKind::NotReady,
                "Not every model is loaded yet.".to_owned(),
            ),
            Readiness::Failed { model, .. } => (
                ErrorKind::NotReady,
                format!("The model '{model}' could not be loaded. The server tries again."),
            ),
            Readiness::GivenUp { model, .. } => (
                ErrorKind::NotReady,
                format!(
                    "The model '{model}' could not be loaded. Its workers failed too often and are not started \
                     again. The server log has the reason."
                ),
            ),
            Readiness::NoWorker(model) => (
                ErrorKind::NoWorker,
                format!("No worker of the model '{model}' has connected."),
            ),
            Readiness::Lost(model) => (
                ErrorKind::NoWorker,
                format!("No worker of the model '{model}' is up. They are being restarted."),
            ),
        };
        Err(Error::new(kind, message))
    }

    /// Returns the number of workers in each state, or `None` for a gateway.
    pub(super) fn worker_counts(&self) -> Option<WorkerCounts> {
        match &self.backend {
            HealthSource::Engine(engine) => Some(engine.workers.borrow().clone()),
            HealthSource::Cluster(_) => None,
        }
    }

    /// Returns the device of each loaded model whose runner describes it, by the model's name.
    pub(super) fn devices(&self) -> BTreeMap<String, DeviceFacts> {
        let HealthSource::Engine(engine) = &self.backend else {
            return BTreeMap::new();
        };
        let entries = engine.models.entries().iter();
        let devices = entries.filter_map(|entry| {
            let device = entry.loaded_model().ok()?.facts().device.clone()?;
            Some((entry.name.to_string(), device))
        });
        devices.collect()
    }

    /// Checks that the server accepts any requests, that is, that it is not shutting down. Readiness of a single
    /// model is checked by the engine itself.
    pub(super) fn check_accepting(&self) -> Result<(), Error> {
        if self.draining.is_cancelled() {
            return Err(Error::new(
                ErrorKind::Draining,
                "The server is shutting down.",
            ));
        }
        match &self.backend {
            HealthSource::Engine(..) => Ok(()),
            HealthSource::Cluster(cluster) if cluster.is_up() => Ok(()),
            HealthSource::Cluster(_) => Err(Error::new(ErrorKind::NoWorker, "No engine is up.")),
        }
    }

    /// Waits until a remote engine accepts requests. Returns at once for a server with an engine in its own process.
    pub(super) async fn wait_until_up(&self) {
        match &self.backend {
            HealthSource::Cluster(cluster) => cluster.wait_until_up().await,
            HealthSource::Engine(..) => {}
        }
    }

    pub(super) fn set_draining(&self) {
        self.draining.cancel();
    }

    /// Waits until [`Self::set_draining`] was called.
    pub(super) async fn drain_requested(&self) {
        self.draining.cancelled().await;
    }

    pub(super) fn set_stopped(&self) {
        self.stopped.cancel();
    }
}

/// Builds the services of the gRPC API: inference, health and reflection.
///
/// Cancelling `closing` ends the open health watch streams, which would otherwise delay the drain.
pub(super) async fn grpc_services(
    inference: InferenceServer<impl Inference>,
    health: ServerHealth,
    critical: &CriticalTasks,
    closing: CancellationToken,
) -> Routes {
    let (reporter, health_service) = tonic_health::server::health_reporter();
    let is_serving = report_health(&reporter, &health).await;
    let stopped = health.stopped.clone();
    critical.spawn("health", async move {
        let reporting = report_changes(reporter, health, is_serving, closing);
        stopped.run_until_cancelled_owned(reporting).await;
    });
    let reflection = || {
        tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(DESCRIPTORS)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
            // tonic's two reflection versions each describe only themselves. Registering the descriptors of both by
            // hand makes each list the other too.
            .include_reflection_service(false)
            .register_encoded_file_descriptor_set(tonic_reflection::pb::v1::FILE_DESCRIPTOR_SET)
            .register_encoded_file_descriptor_set(
                tonic_reflection::pb::v1alpha::FILE_DESCRIPTOR_SET,
            )
    };
    let invariant = "the compiled protobuf descriptors are valid";
    Routes::new(inference)
        .add_service(health_service)
        .add_service(reflection().build_v1().expect(invariant))
        .add_service(reflection().build_v1alpha().expect(invariant))
        .prepare()
}

/// Reports every change of the server's health to the gRPC health service, until `closing` is cancelled.
async fn report_changes(
    mut reporter: HealthReporter,
    mut health: ServerHealth,
    mut is_serving: bool,
    closing: CancellationToken,
) {
    let draining = health.draining.clone();
    let mut is_draining = false;
    while !is_draining {
        tokio::select! {
            changed = health.backend.changed(is_serving) => if changed.is_err() { return },
            () = draining.cancelled() => is_draining = true,
        }
        is_serving = report_health(&reporter, &health).await;
    }
    closing.cancelled().await;
    for service in SERVICES {
        reporter.clear_service_status(service).await;
    }
}

/// Reports the current health to the gRPC health service. Returns true if the server is serving.
async fn report_health(reporter: &HealthReporter, health: &ServerHealth) -> bool {
    let is_serving = health.check_ready().is_ok();
    let status = if is_serving {
        ServingStatus::Serving
    } else {
        ServingStatus::NotServing
    };
    for service in SERVICES {
        reporter.set_service_status(service, status).await;
    }
    is_serving
}

/// Waits until every model is loaded. Returns an error as soon as a model fails to load.
pub(super) async fn wait_for_models(
    mut readiness: watch::Receiver<Readiness>,
    mut progress: impl FnMut(f32),
) -> Result<(), StartError> {
    loop {
        match &*readiness.borrow_and_update() {
            Readiness::Ready => return Ok(()),
            Readiness::Failed { model, reason } | Readiness::GivenUp { model, reason } => {
                return Err(StartError::Model {
                    model: model.to_string(),
                    reason: reason.clone(),
                });
            }
            Readiness::Loading(fraction) => progress(*fraction),
            Readiness::NoWorker(_) | Readiness::Lost(_) => {}
        }
        if readiness.changed().await.is_err() {
            return Err(StartError::Ended);
        }
    }
}
