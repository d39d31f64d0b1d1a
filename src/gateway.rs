//! The HTTP door: OpenAI's completions in, lines out. It turns bodies into the engine's messages and
//! the engine's events into lines; it must not know schedulers, workers or runners.

use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::rejection::PathRejection;
use axum::extract::{DefaultBodyLimit, Path, Request, State};
use axum::http::header::CONTENT_TYPE;
use axum::http::{Method, Uri};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use tokio_util::sync::CancellationToken;

use crate::cluster::Cluster;
use crate::error::{Error, ErrorKind};
use crate::telemetry::{Telemetry, WorkerCounts};

mod accept;
mod answer;
mod body;
mod buffered_request;
mod completion_stream;
mod completions;
mod echo;
mod error_response;
mod fields;
mod host;
mod json;
pub mod lines;
mod logprobs;
mod object;
mod openapi;
mod origin;
mod queued_body;
mod request_id;
mod size;
mod stream;
#[cfg(test)]
mod tests;
mod timings;
mod tokenize;
mod unary;
mod unknown;

pub use accept::StreamFormat;
use answer::{Model, ModelList, Status};
pub use body::{Route, StreamOptions};
use error_response::ErrorResponse;
pub use origin::{AllowedHost, AllowedOrigin, OriginPolicy};
pub use unknown::UnknownFields;

/// The largest body, in bytes.
const MAX_BODY_BYTES: usize = 4 * 1024 * 1024;

/// The most headers of a request.
const MAX_HEADERS: usize = 100;

/// Something that must hold; where it does not, the error says why.
pub type HealthCheck = Arc<dyn Fn() -> Result<(), Error> + Send + Sync>;

/// How many workers are in each state; `None` where the engines are elsewhere.
pub type WorkerCountsFn = Arc<dyn Fn() -> Option<WorkerCounts> + Send + Sync>;

/// What the HTTP door needs.
pub struct Gateway {
    /// Where the tokens come from.
    pub cluster: Cluster,
    /// What is counted into, and shown at `/metrics`.
    pub telemetry: Telemetry,
    /// Whether every model takes requests, and why not: what the health tells.
    pub ready: HealthCheck,
    /// What is told of the workers beside it.
    pub workers: WorkerCountsFn,
    /// Whether requests are taken at all, and why not.
    pub open: HealthCheck,
    /// The form of a completion's stream whose client has no preference.
    pub stream_format: StreamFormat,
    /// What happens to fields of a request that are unknown.
    pub unknown_fields: UnknownFields,
    /// How long a streamed request waits in the queue before its headers are sent; `None` is without end.
    pub headers_after: Option<Duration>,
    /// Under which host names, and for pages of which origins, requests are taken.
    pub origins: OriginPolicy,
    /// Cancelled when the server waits no longer for running requests.
    pub stopping: CancellationToken,
    /// How long a request may take where its client does not say.
    pub request_timeout: Duration,
}

/// The door's routes.
pub fn router(gateway: Gateway) -> Router {
    let (origins, cors) = (Arc::new(gateway.origins.clone()), gateway.origins.cors());
    let routes = Router::new()
        .route("/v1/completions", post(completions::complete))
        .route("/v1/chat/completions", post(completions::chat))
        .route("/tokenize", post(tokenize::tokenize))
        .route("/detokenize", post(tokenize::detokenize))
        .route("/tokenizer_info", get(tokenize::info))
        .route("/v1/models", get(list_models))
        .route("/v1/models/{*id}", get(get_model))
        .route("/livez", get(livez))
        .route("/readyz", get(readyz))
        .route("/health", get(health))
        .route("/metrics", get(metrics))
        .route("/openapi.json", get(openapi::openapi))
        .fallback(not_found)
        .method_not_allowed_fallback(method_not_allowed)
        .layer(DefaultBodyLimit::disable())
        .layer(tower_http::catch_panic::CatchPanicLayer::custom(
            error_response::panicked,
        ))
        .layer(middleware::from_fn(limit_headers))
        .layer(middleware::from_fn(request_id::check))
        .with_state(Arc::new(gateway));
    // Around all that can refuse a request of an allowed page, so that the page can read the error_response.
    let routes = match cors {
        Some(cors) => routes.layer(cors),
        None => routes,
    };
    routes
        .layer(middleware::from_fn_with_state(origins, origin::check))
        .layer(middleware::from_fn(request_id::carry))
}

/// HTTP/1.1 has its limit in the listener; HTTP/2 has none for how many they are.
async fn limit_headers(request: Request, next: Next) -> Result<Response, ErrorResponse> {
    if request.headers().len() > MAX_HEADERS {
        let message = format!("A request may have at most {MAX_HEADERS} headers.");
        return Err(Error::new(ErrorKind::HeadersTooLarge, message).into());
    }
    Ok(next.run(request).await)
}

/// Lists the models.
#[utoipa::path(
    get,
    path = "/v1/models",
    responses((status = 200, description = "The models.", body = ModelList))
)]
async fn list_models(State(gateway): State<Arc<Gateway>>) -> Result<Response, ErrorResponse> {
    let models = gateway.cluster.list_models().await?;
    Ok(answer::json(&ModelList {
        object: "list",
        data: models.into_iter().map(Model::from).collect(),
    }))
}

/// Describes a model.
#[utoipa::path(
    get,
    path = "/v1/models/{id}",
    params(("id" = String, Path, description = "The model's name.", min_length = 1)),
    responses((status = 200, description = "The model.", body = Model))
)]
async fn get_model(
    State(gateway): State<Arc<Gateway>>,
    id: Result<Path<String>, PathRejection>,
) -> Result<Response, ErrorResponse> {
    let Ok(Path(id)) = id else {
        let message = "A model's name is UTF-8.";
        return Err(Error::new(ErrorKind::ModelNotFound, message)
            .with_param("model")
            .into());
    };
    let model = gateway.cluster.get_model(&id).await?;
    Ok(answer::json(&Model::from(model)))
}

/// Says that the server runs.
#[utoipa::path(
    get,
    path = "/livez",
    responses((status = 200, description = "It runs.", body = Status))
)]
async fn livez() -> Response {
    answer::json(&Status::of("alive"))
}

/// Says whether the server takes requests.
#[utoipa::path(
    get,
    path = "/readyz",
    responses((status = 200, description = "It takes requests.", body = Status))
)]
async fn readyz(State(gateway): State<Arc<Gateway>>) -> Result<Response, ErrorResponse> {
    (gateway.ready)()?;
    let workers = (gateway.workers)();
    Ok(answer::json(&Status::of("ready").with_workers(workers)))
}

/// Says whether the server takes requests, in the words of other servers.
#[utoipa::path(
    get,
    path = "/health",
    responses((status = 200, description = "It takes requests.", body = Status))
)]
async fn health(State(gateway): State<Arc<Gateway>>) -> Result<Response, ErrorResponse> {
    (gateway.ready)()?;
    Ok(answer::json(&Status::of("healthy")))
}

/// Shows what is counted, in Prometheus's text format.
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
async fn metrics(State(gateway): State<Arc<Gateway>>) -> Response {
    let text = gateway.telemetry.render();
    (
        [(CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")],
        text,
    )
        .into_response()
}

async fn not_found(uri: Uri) -> ErrorResponse {
    Error::new(
        ErrorKind::NotFound,
        format!("There is nothing at {}.", uri.path()),
    )
    .into()
}

async fn method_not_allowed(method: Method, uri: Uri) -> ErrorResponse {
    let message = format!("{} does not answer {method}.", uri.path());
    Error::new(ErrorKind::MethodNotAllowed, message).into()
}
