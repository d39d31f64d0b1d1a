//! The layers around every route of the HTTP API and every RPC of the gRPC API.
//!
//! Both APIs are axum routers, so one chain of layers serves both; [`with_layers`] builds it. The layers create the
//! [`RequestContext`](crate::context::RequestContext) of each request. They must not know what a route does.

use axum::Router;
use axum::middleware::{from_fn, from_fn_with_state, map_response};
use tonic::service::Routes;
use tower::ServiceBuilder;

use crate::gateway::{self, BrowserCheck, Gateway, OriginPolicy};
use crate::grpc;
use crate::telemetry::Api;

mod access_log;
mod browser;
mod deadline;
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) mod fuzzing;
mod in_flight;
mod layers;
mod panics;
mod request_id;
mod response;
mod route;
#[cfg(test)]
mod tests;

pub(crate) use layers::LayerSettings;
use layers::Layers;

/// The HTTP API. Browsers may use it from the allowed hosts and origins.
pub(crate) fn http_router(
    gateway: Gateway,
    origins: OriginPolicy,
    settings: LayerSettings,
) -> Router {
    let layers = Layers {
        api: Api::Http,
        browser_check: Some(BrowserCheck::new(origins)),
        settings,
    };
    with_layers(gateway::routes(gateway), layers)
}

/// Builds the gRPC API from these services.
pub(crate) fn grpc_router(services: Routes, settings: LayerSettings) -> Router {
    let layers = Layers {
        api: Api::Grpc,
        browser_check: None,
        settings,
    };
    let routes = services.into_axum_router();
    let routes = routes.layer(map_response(async |response| {
        grpc::replace_tonic_error(response)
    }));
    with_layers(routes, layers)
}

/// Wraps the routes of an API in all layers. The layer that is applied last is the outermost.
fn with_layers(routes: Router, layers: Layers) -> Router {
    routes.layer(
        ServiceBuilder::new()
            // Creates the request's context, with the client's request id or a random one. Returns the id in the
            // response.
            .layer(from_fn_with_state(
                layers.clone(),
                request_id::assign_request_id,
            ))
            // Runs the handler and the response body in a tracing span with the request id. Logs the request when it
            // ends.
            .layer(from_fn_with_state(layers.clone(), access_log::log_request))
            // Checks host and origin, and adds CORS headers to every response of the layers below (HTTP API only).
            .layer(from_fn_with_state(layers, browser::check_browser))
            // Answers `internal_error` if a handler panics.
            .layer(from_fn(panics::catch_panics))
            // Authentication, rate limits and concurrency limits belong here.
            //
            // Counts the request as in flight.
            .layer(from_fn(in_flight::count_in_flight))
            // Rejects an invalid id or timeout, and ends a request whose deadline passes before it is answered.
            .layer(from_fn(deadline::enforce_deadline)),
    )
}
