//! Whether the server takes requests, and how both doors tell it.

use http::Response;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tonic::body::Body;
use tonic::service::Routes;
use tonic_health::ServingStatus;
use tonic_health::server::HealthReporter;
use tower::util::MapResponse;

use super::StartError;
use crate::cluster::Cluster;
use crate::critical::CriticalTasks;
use crate::error::{Error, ErrorKind};
use crate::grpc;
use crate::proto::DESCRIPTORS;
use crate::scheduler::{Readiness, Scheduler};
use crate::telemetry::WorkerCounts;

/// The names under which health is asked for: the whole server, and its service.
const SERVICES: [&str; 2] = ["", "tokenway.v1.Inference"];

/// Whether requests are taken. Clones know the same.
#[derive(Clone)]
pub(super) struct Ready {
    backend: Backend,
    draining: CancellationToken,
    stopped: CancellationToken,
}

#[derive(Clone)]
enum Backend {
    Engine(watch::Receiver<Readiness>, watch::Receiver<WorkerCounts>),
    Cluster(Cluster),
}

impl Ready {
    pub(super) fn of_engine(scheduler: &Scheduler) -> Self {
        Self {
            backend: Backend::Engine(scheduler.readiness(), scheduler.workers()),
            draining: CancellationToken::new(),
            stopped: CancellationToken::new(),
        }
    }

    /// `stopped` is cancelled when nobody asks any more.
    pub(super) fn of_cluster(cluster: Cluster, stopped: CancellationToken) -> Self {
        Self {
            backend: Backend::Cluster(cluster),
            draining: CancellationToken::new(),
            stopped,
        }
    }

    /// Whether requests for every model are taken now: what the health tells.
    pub(super) fn check(&self) -> Result<(), Error> {
        self.check_open()?;
        let Backend::Engine(readiness, _) = &self.backend else {
            return Ok(());
        };
        let (kind, message) = match &*readiness.borrow() {
            Readiness::Ready => return Ok(()),
            Readiness::Loading(_) => (
                ErrorKind::NotReady,
                "Not every model is loaded yet.".to_owned(),
            ),
            Readiness::Failed { model, .. } => (
                ErrorKind::NotReady,
                format!("The model '{model}' cannot be loaded. It is tried again."),
            ),
            Readiness::GivenUp { model, .. } => (
                ErrorKind::NotReady,
                format!(
                    "The model '{model}' cannot be loaded. Its workers were started too often in vain, and are \
                     not started again: the server's log says why."
                ),
            ),
            Readiness::NoWorker(model) => (
                ErrorKind::NoWorker,
                format!("No worker of the model '{model}' has dialled in."),
            ),
            Readiness::Lost(model) => (
                ErrorKind::NoWorker,
                format!("No worker of the model '{model}' is up. They are being restarted."),
            ),
        };
        Err(Error::new(kind, message))
    }

    /// How many of this engine's workers are in each state; `None` without an engine of its own.
    pub(super) fn workers(&self) -> Option<WorkerCounts> {
        match &self.backend {
            Backend::Engine(_, workers) => Some(workers.borrow().clone()),
            Backend::Cluster(_) => None,
        }
    }

    /// Whether requests are taken at all. The engine of this process says itself which of its models
    /// takes none.
    pub(super) fn check_open(&self) -> Result<(), Error> {
        if self.draining.is_cancelled() {
            return Err(Error::new(
                ErrorKind::Draining,
                "The server is shutting down.",
            ));
        }
        match &self.backend {
            Backend::Engine(..) => Ok(()),
            Backend::Cluster(cluster) if cluster.is_up() => Ok(()),
            Backend::Cluster(_) => Err(Error::new(ErrorKind::NoWorker, "No engine is up.")),
        }
    }

    /// Waits until one of the engines elsewhere takes requests.
    pub(super) async fn up(&self) {
        match &self.backend {
            Backend::Cluster(cluster) => cluster.up().await,
            Backend::Engine(..) => {}
        }
    }

    pub(super) fn set_draining(&self) {
        self.draining.cancel();
    }

    pub(super) fn set_stopped(&self) {
        self.stopped.cancel();
    }
}

/// The gRPC door's services: inference, health and reflection.
///
/// Once `closing` is cancelled, whoever watches the health is let go: an open stream would hold up
/// the drain.
pub(super) async fn routes(
    service: grpc::Service,
    ready: Ready,
    (tasks, critical): (&TaskTracker, &CriticalTasks),
    closing: CancellationToken,
) -> MapResponse<Routes, fn(Response<Body>) -> Response<Body>> {
    let (reporter, health) = tonic_health::server::health_reporter();
    tell(&reporter, &ready).await;
    let stopped = ready.stopped.clone();
    critical.spawn(tasks, "health", async move {
        let follow = follow(reporter, ready, closing);
        stopped.run_until_cancelled_owned(follow).await;
    });
    let reflection = || {
        tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(DESCRIPTORS)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
            // Each version would name itself only.
            .include_reflection_service(false)
            .register_encoded_file_descriptor_set(tonic_reflection::pb::v1::FILE_DESCRIPTOR_SET)
            .register_encoded_file_descriptor_set(
                tonic_reflection::pb::v1alpha::FILE_DESCRIPTOR_SET,
            )
    };
    let invariant = "the descriptors were compiled with the crate";
    let routes = Routes::new(service.into_server())
        .add_service(health)
        .add_service(reflection().build_v1().expect(invariant))
        .add_service(reflection().build_v1alpha().expect(invariant))
        .prepare();
    MapResponse::new(routes, grpc::with_error_details)
}

/// Tells the health service of every change.
async fn follow(mut reporter: HealthReporter, mut ready: Ready, closing: CancellationToken) {
    let draining = ready.draining.clone();
    let mut is_draining = false;
    while !is_draining {
        let Backend::Engine(readiness, _) = &mut ready.backend else {
            return;
        };
        tokio::select! {
            changed = readiness.changed() => if changed.is_err() { return },
            () = draining.cancelled() => is_draining = true,
        }
        tell(&reporter, &ready).await;
    }
    closing.cancelled().await;
    for service in SERVICES {
        reporter.clear_service_status(service).await;
    }
}

async fn tell(reporter: &HealthReporter, ready: &Ready) {
    let status = match ready.check() {
        Ok(()) => ServingStatus::Serving,
        Err(_) => ServingStatus::NotServing,
    };
    for service in SERVICES {
        reporter.set_service_status(service, status).await;
    }
}

/// Waits until all models are loaded.
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
