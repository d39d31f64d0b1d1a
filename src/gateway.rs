//! The HTTP API: OpenAI-compatible completions, the tokenizer, models, and the routes for operators.
//!
//! It converts request bodies into messages for the engine, and the engine's events into responses. It must not
//! know schedulers, workers or runners.

use std::sync::{Arc, LazyLock};
use std::time::Duration;

use axum::Router;
use axum::extract::rejection::PathRejection;
use axum::extract::{DefaultBodyLimit, Path, Request, State};
use axum::http::{Method, Uri};
use axum::middleware::{self, Next};
use axum::response::Response;
use axum::routing::{get, post};
use tokio_util::sync::CancellationToken;

use crate::cluster::{CallContext, Cluster};
use crate::context::RequestContext;
use crate::error::{Error, ErrorKind};
use crate::telemetry::{RouteKind, Telemetry};

// The modules are listed in the order of a request's path. A module uses only modules below it.

#[cfg(any(test, feature = "fuzzing"))]
pub(crate) mod fuzzing;

mod openapi;

mod origin;

mod host;

mod extract;

mod operations;

mod tokenize;

mod complete;

mod unary;

mod queued_body;

mod stream_body;

mod keep_alive;
mod large_json;

mod openai;

mod dialect;

#[cfg(test)]
mod arbitrary;
mod body_schema;

mod buffered_request;

mod extra_fields;

mod fields;

mod json_object;

mod unknown;

mod accept;

mod completion_stream;

mod timings;

mod collected_message;

mod echoed_prompts;

mod field_names;

mod error_response;

mod response;

mod response_size;

mod json;

#[cfg(test)]
mod tests;

pub use accept::StreamFormat;
use complete::DialectRoute;
pub(crate) use error_response::ErrorResponse;
pub use large_json::LargeJson;
pub use openai::{CompletionRoute, StreamOptions, lines};
pub use operations::{DevicesFn, HealthCheck, Operations, OperatorRoutes, WorkerCountsFn};
pub(crate) use origin::BrowserCheck;
pub use origin::{AllowedHost, AllowedOrigin, OriginPolicy};
use response::{Model, ModelList};
pub use unknown::UnknownFieldPolicy;

/// Maximum number of headers of a request.
const MAX_HEADERS: usize = 100;

/// Everything that the HTTP API's handlers use.
pub struct Gateway {
    /// Engines that serve the requests.
    pub cluster: Cluster,
    /// Metrics.
    pub telemetry: Telemetry,
    /// Fails if the server rejects every request, for example because it is draining.
    pub check_accepting: HealthCheck,
    /// Format of a `/v1/completions` stream, if the client's `Accept` header has no preference.
    pub stream_format: StreamFormat,
    /// Policy for unknown fields of a request body.
    pub unknown_fields: UnknownFieldPolicy,
    /// Maximum time for which a streamed request waits in the queue before its headers are sent. `None`: no maximum.
    pub headers_after: Option<Duration>,
    /// Cancelled when the drain has timed out and running requests must end.
    pub stopping: CancellationToken,
    /// Parses large bodies and writes large responses.
    pub large_json: LargeJson,
    /// The routes for operators that the HTTP API has.
    pub operator_routes: OperatorRoutes,
}

/// The dialects of the HTTP API. Each is a route that completes prompts.
const DIALECTS: &[DialectRoute] = &[
    DialectRoute::of::<openai::Completions>(),
    DialectRoute::of::<openai::Chat>(),
];

/// Paths of the other routes.
const OTHER_ROUTES: [(&str, RouteKind); 11] = [
    ("/tokenize", RouteKind::Unary),
    ("/detokenize", RouteKind::Unary),
    ("/tokenizer_info", RouteKind::Unary),
    ("/v1/models", RouteKind::Unary),
    ("/v1/models/{*id}", RouteKind::Unary),
    ("/livez", RouteKind::Probe),
    ("/readyz", RouteKind::Probe),
    ("/health", RouteKind::Probe),
    ("/metrics", RouteKind::Probe),
    ("/admin/drain", RouteKind::Admin),
    ("/openapi.json", RouteKind::Unary),
];

/// Paths of all routes.
pub(crate) static ROUTES: LazyLock<Vec<(&'static str, RouteKind)>> = LazyLock::new(|| {
    let dialects = completion_paths().map(|path| (path, RouteKind::Completion));
    dialects.chain(OTHER_ROUTES).collect()
});

/// Returns the paths of the dialects.
pub(crate) fn completion_paths() -> impl Iterator<Item = &'static str> {
    DIALECTS.iter().map(|dialect| dialect.path)
}

/// Builds the routes of the HTTP API. Each request carries a [`RequestContext`], which `frontend` inserts.
pub fn routes(gateway: Gateway, operations: Operations) -> Router {
    let for_operators = operations::routes(operations, gateway.operator_routes);
    let dialects = DIALECTS.iter().fold(Router::new(), |router, dialect| {
        router.route(dialect.path, (dialect.handler)())
    });
    let for_clients = dialects
        .route("/tokenize", post(tokenize::tokenize))
        .route("/detokenize", post(tokenize::detokenize))
        .route("/tokenizer_info", get(tokenize::info))
        .route("/v1/models", get(list_models))
        .route("/v1/models/{*id}", get(get_model))
        .route("/openapi.json", get(openapi::openapi))
        .with_state(Arc::new(gateway));
    with_errors(for_clients.merge(for_operators))
}

/// Builds the routes of a listener for operators. Each request carries a [`RequestContext`].
pub(crate) fn admin_routes(operations: Operations) -> Router {
    with_errors(operations::routes(operations, OperatorRoutes::All))
}

/// Adds the errors for requests that no route accepts.
fn with_errors(router: Router) -> Router {
    router
        .fallback(not_found)
        .method_not_allowed_fallback(method_not_allowed)
        .layer(DefaultBodyLimit::disable())
        .layer(middleware::from_fn(limit_headers))
}

/// Limits the number of headers on HTTP/2, which has no limit of its own. The listener limits HTTP/1.1.
async fn limit_headers(request: Request, next: Next) -> Result<Response, ErrorResponse> {
    if request.headers().len() > MAX_HEADERS {
        let message = format!("The request has more than {MAX_HEADERS} headers. Send fewer.");
        return Err(Error::new(ErrorKind::HeadersTooLarge, message).into());
    }
    Ok(next.run(request).await)
}

/// Lists the models.
#[utoipa::path(
    get,
    path = "/v1/models",
    responses((status = 200, description = "All models.", body = ModelList))
)]
async fn list_models(
    State(gateway): State<Arc<Gateway>>,
    context: RequestContext,
) -> Result<Response, ErrorResponse> {
    let models = gateway
        .cluster
        .list_models(&CallContext::new(&context))
        .await
        .map_err(Error::from)?;
    Ok(response::json(&ModelList {
        object: "list",
        data: models.into_iter().map(Model::from).collect(),
    }))
}

/// Describes one model.
#[utoipa::path(
    get,
    path = "/v1/models/{id}",
    params(("id" = String, Path, description = "Name or alias of the model.", min_length = 1)),
    responses((status = 200, description = "The model.", body = Model))
)]
async fn get_model(
    State(gateway): State<Arc<Gateway>>,
    context: RequestContext,
    id: Result<Path<String>, PathRejection>,
) -> Result<Response, ErrorResponse> {
    let Ok(Path(id)) = id else {
        let message = "The model name in the path must be percent-encoded UTF-8.";
        return Err(Error::new(ErrorKind::ModelNotFound, message)
            .with_param("model")
            .into());
    };
    let model = gateway
        .cluster
        .get_model(&id, &CallContext::new(&context))
        .await
        .map_err(Error::from)?;
    Ok(response::json(&Model::from(model)))
}

async fn not_found(uri: Uri) -> ErrorResponse {
    Error::new(
        ErrorKind::NotFound,
        format!("The path {} does not exist.", uri.path()),
    )
    .into()
}

async fn method_not_allowed(method: Method, uri: Uri) -> ErrorResponse {
    let message = format!("{} does not support the method {method}.", uri.path());
    Error::new(ErrorKind::MethodNotAllowed, message).into()
}
