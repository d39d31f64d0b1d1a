//! Layer that assigns the request id: the client's `x-request-id` (a header or gRPC metadata), or a random id. Every
//! response returns the id.

use axum::extract::Request;
use axum::http::{HeaderMap, HeaderName, HeaderValue};
use axum::response::Response;

use super::layers::Layers;
use super::{deadline, route};
use crate::caller::{Caller, PrefixSharing};
use crate::context::{Arrival, RequestContext};
use crate::delivery::FlushHandle;
use crate::error::Error;
use crate::request::{MAX_REQUEST_ID_BYTES, RequestId};
use crate::runner::monotonic_ns;
use crate::telemetry::{RequestRecord, RouteKind};

const X_REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// Creates the context of the request, and inserts it into the request's extensions. An invalid id is replaced by a
/// random one here. An inner layer then rejects the request, so that the rejection is logged and browsers can read it.
///
/// # Errors
/// Returns `internal_error` if the request has no flush handle. That is a bug.
pub(super) fn create_context(
    layers: &Layers,
    request: &mut Request,
) -> Result<RequestContext, Error> {
    let arrived_ns = monotonic_ns();
    let (api, settings) = (layers.api, &layers.settings);
    let Some(flush) = request.extensions_mut().remove::<FlushHandle>() else {
        tracing::error!("a request has no flush handle of its connection, so it is rejected");
        return Err(Error::internal());
    };
    let route = route::find_route(api, request);
    let (id, valid_id) = match request_id(request.headers()) {
        Ok(id) => (id, Ok(())),
        Err(error) => (RequestId::random(), Err(error)),
    };
    let timeout = match route.kind {
        RouteKind::Completion | RouteKind::Unary | RouteKind::Admin => {
            deadline::client_timeout(api, request.headers())
        }
        RouteKind::Probe | RouteKind::Unmatched => Ok(None),
    };
    let invalid = valid_id.err().or(timeout.as_ref().err().cloned());
    let timeout = timeout.ok().flatten().unwrap_or(settings.request_timeout);
    let context = RequestContext::new(Arrival {
        id,
        deadline: deadline::deadline_after(timeout),
        flush,
        record: RequestRecord::new(&settings.telemetry, api, route, arrived_ns),
        caller: match settings.prefix_sharing {
            PrefixSharing::All => None,
            PrefixSharing::Caller => Some(Caller::from_headers(request.headers())),
        },
        invalid,
        memory: settings.request_memory.clone(),
    });
    request.extensions_mut().insert(context.clone());
    Ok(context)
}

/// Adds the request id to the response.
pub(super) fn return_id(context: &RequestContext, response: &mut Response) {
    let id = HeaderValue::from_str(&context.id().0);
    let id = id.expect("a request id contains only visible ASCII characters");
    response.headers_mut().insert(X_REQUEST_ID, id);
}

/// Returns the client's request id, or a random one if the client sent none.
pub(super) fn request_id(headers: &HeaderMap) -> Result<RequestId, Error> {
    let Some(value) = headers.get(&X_REQUEST_ID) else {
        return Ok(RequestId::random());
    };
    let id = value.to_str().ok().and_then(RequestId::parse);
    id.ok_or_else(|| {
        let message =
            format!("x-request-id must have 1 to {MAX_REQUEST_ID_BYTES} visible ASCII characters.");
        Error::invalid_value("x-request-id", message)
    })
}
