//! The layers around every route of the HTTP API and every RPC of the gRPC API.
//!
//! Both APIs are axum routers, so one chain of layers serves both: [`run_layers`]. The layers create the
//! [`RequestContext`](crate::context::RequestContext) of each request. They must not know what a route does.

use axum::Router;
use axum::extract::{Request, State};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::Response;
use tonic::service::Routes;

use crate::context::RequestContext;
use crate::gateway::{BrowserCheck, OriginPolicy};
use crate::grpc;
use crate::telemetry::Api;

mod access_log;
mod authentication;
mod body_memory;
mod browser;
mod deadline;
mod failed_attempts;
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) mod fuzzing;
mod grpc_content_type;
mod http1;
mod in_flight;
mod layers;
mod panics;
mod rate_limits;
mod request_id;
mod response;
mod route;
#[cfg(test)]
mod tests;

pub(crate) use authentication::Authenticator;
pub(crate) use layers::LayerSettings;
use layers::Layers;

/// Wraps routes of the HTTP API in the layers. Browsers may use them from the allowed hosts and origins.
pub(crate) fn http_router(
    routes: Router,
    origins: OriginPolicy,
    settings: LayerSettings,
) -> Router {
    let layers = Layers {
        api: Api::Http,
        browser_check: Some(BrowserCheck::new(origins)),
        settings,
    };
    with_layers(routes, layers)
}

/// Builds the gRPC API from these services.
pub(crate) fn grpc_router(services: Routes, settings: LayerSettings) -> Router {
    let layers = Layers {
        api: Api::Grpc,
        browser_check: None,
        settings,
    };
    with_layers(services.into_axum_router(), layers)
}

/// Wraps the routes of an API in all layers.
fn with_layers(routes: Router, layers: Layers) -> Router {
    routes.layer(from_fn_with_state(layers, run_layers))
}

/// Runs a request through the layers, from the outermost to [`run_inner_layers`].
///
/// Each layer is a function that gets the rest of the chain as a future. As tower services, the layers were boxed and
/// cloned for every request, which took a fifth of the CPU time of a short request. Two futures are boxed here, because
/// an `async fn` with a future as its argument takes twice that future's size.
async fn run_layers(State(layers): State<Layers>, mut request: Request, next: Next) -> Response {
    // Creates the request's context, with the client's request id or a random one.
    let context = match request_id::create_context(&layers, &mut request) {
        Ok(context) => context,
        Err(error) => return response::error_response(layers.api, error),
    };
    // Checks host and origin, and adds CORS headers to every response of the layers below (HTTP API only).
    let handled = Box::pin(browser::check_browser(
        layers.browser_check.as_ref(),
        request,
        |request| run_inner_layers(&layers, &context, request, next),
    ));
    // Runs the layers and the response body in a tracing span with the request id. Logs the request when it ends.
    let mut response = access_log::log_request(&layers, &context, handled).await;
    // Returns the request id in the response.
    request_id::return_id(&context, &mut response);
    response
}

/// Runs a request through the layers below the CORS headers, and then the handler of its route.
async fn run_inner_layers(
    layers: &Layers,
    context: &RequestContext,
    request: Request,
    next: Next,
) -> Response {
    // Rejects an ambiguous HTTP/1.1 request.
    if let Some(rejection) = http1::rejection(&request) {
        return rejection;
    }
    // Rejects a request to the gRPC API that is not gRPC.
    if let Some(rejection) = grpc_content_type::rejection(layers.api, &request) {
        return rejection;
    }
    // Rejects a request without a valid API key, and sets the key of the context.
    if let Some(authenticator) = &layers.settings.authenticator
        && let Err(rejection) = authenticator.authenticate(context, &request)
    {
        return Box::pin(rejection.into_response(layers.api)).await;
    }
    // Rejects a request that exceeds a limit of its key.
    if let Err(error) = rate_limits::start_limited(context) {
        let mut response = response::error_response(layers.api, error);
        rate_limits::add_headers(context, &mut response);
        return response;
    }
    in_flight::count_in_flight(context);
    // Limits the memory of large bodies.
    let request = body_memory::limit_body(context, request);
    // Rejects an invalid id or timeout, and ends a request whose deadline passes before it is answered.
    let handled = deadline::enforce_deadline(context, Box::pin(next.run(request)));
    // Answers `internal_error` if the handler panics.
    let mut response = panics::catch_panics(context, handled).await;
    if context.api() == Api::Grpc {
        response = grpc::replace_tonic_error(response);
    }
    rate_limits::add_headers(context, &mut response);
    response
}
