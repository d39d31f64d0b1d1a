//! Layer that checks the `Host` and `Origin` headers of an API that browsers can use.

use std::convert::Infallible;

use axum::extract::Request;
use axum::response::{IntoResponse, Response};
use tower::{Layer, ServiceExt, service_fn};
use tower_http::cors::CorsLayer;

use crate::gateway::{BrowserCheck, ErrorResponse};

/// Rejects a request whose host name or origin is not allowed. CORS headers are added to every other response, also to
/// errors, so that a page of an allowed origin can read them.
pub(super) async fn check_browser<F>(
    check: Option<&BrowserCheck>,
    request: Request,
    handle: impl FnOnce(Request) -> F + Send,
) -> Response
where
    F: Future<Output = Response> + Send,
{
    let Some(check) = check else {
        return handle(request).await;
    };
    if let Err(error) = check.check(&request) {
        return ErrorResponse::from(error).into_response();
    }
    match check.cors() {
        None => handle(request).await,
        // The future is boxed so that requests are not larger if there are no CORS headers to add.
        Some(cors) => Box::pin(add_cors_headers(cors, request, handle)).await,
    }
}

async fn add_cors_headers<F>(
    cors: &CorsLayer,
    request: Request,
    handle: impl FnOnce(Request) -> F,
) -> Response
where
    F: Future<Output = Response>,
{
    let mut handle = Some(handle);
    let handler = service_fn(|request| {
        let handle = handle.take().expect("the service is called once");
        let handled = handle(request);
        async { Ok::<_, Infallible>(handled.await) }
    });
    match cors.layer(handler).oneshot(request).await {
        Ok(response) => response,
        Err(never) => match never {},
    }
}
