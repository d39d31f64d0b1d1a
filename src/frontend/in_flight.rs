//! Layer that counts requests in flight. For a completion, the handler counts the end of the request; for all other
//! requests, the response does.

use crate::context::RequestContext;
use crate::telemetry::RouteKind;

/// Counts a request as in flight until its response has left. Probes are not counted: otherwise each scrape of the
/// metrics would count itself.
pub(super) fn count_in_flight(context: &RequestContext) {
    if context.route().kind != RouteKind::Probe {
        context.record().count_in_flight();
    }
}
