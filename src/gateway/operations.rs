//! The routes for operators: health, metrics, and the drain of the server.
//!
//! The HTTP API has these routes, or a separate listener, which an engine without the HTTP API can have too. This
//! module must not know models and completions.

use std::collections::BTreeMap;
use std::sync::Arc;

use axum::Router;
use axum::extract::State;
use axum::http::StatusCode;
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};

use super::error_response::ErrorResponse;
use super::response::{self, Status};
use crate::context::RequestContext;
use crate::error::Error;
use crate::runner::DeviceFacts;
use crate::telemetry::{Telemetry, WorkerCounts};

/// A check of the server's state. Its error is the response to the client.
pub type HealthCheck = Arc<dyn Fn() -> Result<(), Error> + Send + Sync>;

/// Returns the number of workers in each state; `None` if only remote engines are used.
pub type WorkerCountsFn = Arc<dyn Fn() -> Option<WorkerCounts> + Send + Sync>;

/// Returns the device of each model whose runner describes it, by the model's name. Empty if only remote engines are
/// used.
pub type DevicesFn = Arc<dyn Fn() -> BTreeMap<String, DeviceFacts> + Send + Sync>;

/// Everything that the routes for operators use.
#[derive(Clone)]
pub struct Operations {
    /// Metrics, shown at `/metrics`.
    pub telemetry: Telemetry,
    /// Succeeds if every model accepts requests. `/readyz` and `/health` return this result.
    pub check_ready: HealthCheck,
    /// Worker counts that `/readyz` shows.
    pub worker_counts: WorkerCountsFn,
    /// Devices of the models, which `/readyz` shows.
    pub devices: DevicesFn,
    /// Starts the drain of the server. Further calls have no effect.
    pub start_drain: Arc<dyn Fn() + Send + Sync>,
}

/// Routes for operators that a listener has besides `/livez`, `/readyz` and `/health`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OperatorRoutes {
    /// None.
    None,
    /// `/metrics`.
    Metrics,
    /// `/metrics` and the routes under `/admin`.
    All,
}

impl OperatorRoutes {
    /// Returns the paths of these routes.
    pub(crate) fn paths(self) -> &'static [&'static str] {
        match self {
            Self::None => &[],
            Self::Metrics => &["/metrics"],
            Self::All => &["/metrics", "/admin/drain"],
        }
    }

    /// Returns the paths of the routes for operators that are not among these routes.
    pub(super) fn missing_paths(self) -> impl Iterator<Item = &'static str> {
        let all = Self::All.paths().iter().copied();
        all.filter(move |path| !self.paths().contains(path))
    }
}

/// Builds the health routes, and the given routes for operators.
pub(super) fn routes(operations: Operations, routes: OperatorRoutes) -> Router {
    let health = Router::new()
        .route("/livez", get(livez))
        .route("/readyz", get(readyz))
        .route("/health", get(health));
    let router = match routes {
        OperatorRoutes::None => health,
        OperatorRoutes::Metrics => health.route("/metrics", get(metrics)),
        OperatorRoutes::All => health
            .route("/metrics", get(metrics))
            .route("/admin/drain", post(drain)),
    };
    router.with_state(Arc::new(operations))
}

/// Liveness: the server process runs.
#[utoipa::path(
    get,
    path = "/livez",
    responses((status = 200, description = "The server runs.", body = Status))
)]
async fn livez() -> Response {
    response::json(&Status::new("alive"))
}

/// Readiness: every model accepts requests.
#[utoipa::path(
    get,
    path = "/readyz",
    responses((status = 200, description = "The server accepts requests.", body = Status))
)]
async fn readyz(State(operations): State<Arc<Operations>>) -> Result<Response, ErrorResponse> {
    (operations.check_ready)()?;
    let status = Status::new("ready")
        .with_workers((operations.worker_counts)())
        .with_devices((operations.devices)());
    Ok(response::json(&status))
}

/// Readiness at the path that other inference servers use.
#[utoipa::path(
    get,
    path = "/health",
    responses((status = 200, description = "The server accepts requests.", body = Status))
)]
async fn health(State(operations): State<Arc<Operations>>) -> Result<Response, ErrorResponse> {
    (operations.check_ready)()?;
    Ok(response::json(&Status::new("healthy")))
}

/// Metrics in the Prometheus text format.
#[utoipa::path(
    get,
    path = "/metrics",
    responses((
        status = 200,
        description = "The metrics.",
        body = String,
        content_type = "text/plain"
    ))
)]
async fn metrics(State(operations): State<Arc<Operations>>) -> Response {
    let text = operations.telemetry.render();
    (
        [(CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")],
        text,
    )
        .into_response()
}

/// Starts the drain: the server rejects new requests, and exits when the running streams have finished.
#[utoipa::path(
    post,
    path = "/admin/drain",
    responses((status = 202, description = "The server drains.", body = Status))
)]
async fn drain(State(operations): State<Arc<Operations>>, context: RequestContext) -> Response {
    let key = context.record().key().map(|key| key.as_str());
    tracing::info!(key, "POST /admin/drain: the server drains");
    (operations.start_drain)();
    (
        StatusCode::ACCEPTED,
        response::json(&Status::new("draining")),
    )
        .into_response()
}
