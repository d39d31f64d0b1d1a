//! The context of a call to an upstream: the request that causes the call, and the gateways that the request has
//! passed through.

use http::HeaderMap;
use tokio::time::Instant;
use tonic::Request;
use tonic::metadata::MetadataValue;

use super::via::{GatewayId, Via};
use crate::context::RequestContext;

/// Context of a call.
#[derive(Clone)]
pub struct CallContext {
    /// The request that causes the call. The engine in this process receives its context. A remote engine receives
    /// only its id and its remaining time, because this gateway is the remote engine's client.
    pub request: RequestContext,
    /// The gateways that the request passed through before it reached this process.
    pub(crate) via: Via,
}

impl CallContext {
    /// Creates the context of a call for a request that comes directly from a client.
    #[must_use]
    pub fn new(request: &RequestContext) -> Self {
        Self::with_headers(request, &HeaderMap::new())
    }

    /// Creates the context of a call for a request with these HTTP headers.
    #[must_use]
    pub fn with_headers(request: &RequestContext, headers: &HeaderMap) -> Self {
        Self {
            request: request.clone(),
            via: Via::from_headers(headers),
        }
    }

    /// Builds the gRPC request for an upstream. `gateway` identifies this process if the upstream is remote.
    pub(super) fn build_request<T>(&self, message: T, gateway: Option<&GatewayId>) -> Request<T> {
        let mut request = Request::new(message);
        let deadline = self.request.deadline();
        request.set_timeout(deadline.saturating_duration_since(Instant::now()));
        request.extensions_mut().insert(self.request.clone());
        let metadata = request.metadata_mut();
        let id = MetadataValue::try_from(&*self.request.id().0);
        let id = id.expect("a request id contains only visible ASCII characters");
        metadata.insert("x-request-id", id);
        if let Some(gateway) = gateway {
            self.via.write_with(gateway, metadata);
        }
        request
    }
}
