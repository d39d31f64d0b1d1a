//! Layer that checks the `Host` and `Origin` headers of an API that browsers can use.

use axum::extract::{Request, State};
use axum::middleware::Next;
use axum::response::Response;

use super::layers::Layers;

pub(super) async fn check_browser(
    State(layers): State<Layers>,
    request: Request,
    next: Next,
) -> Response {
    match &layers.browser_check {
        Some(browser_check) => browser_check.run(request, next).await,
        None => next.run(request).await,
    }
}
