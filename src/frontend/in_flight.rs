//! Layer that counts requests in flight. For a completion, the handler counts the end of the request; for all other
//! requests, the response does.

use axum::extract::Request;
use axum::middleware::Next;
use axum::response::Response;

use crate::context::RequestContext;
use crate::telemetry::RouteKind;

/// Counts a request as in flight until its response has left. Probes are not counted: otherwise each scrape of the
/// metrics would count itself.
pub(super) async fn count_in_flight(
    context: RequestContext,
    request: Request,
    next: Next,
) -> Response {
    if context.route().kind != RouteKind::Probe {
        context.record().count_in_flight();
    }
    next.run(request).await
}
