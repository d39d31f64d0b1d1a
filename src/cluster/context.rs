//! The context of a call: the request that makes it, and the gateways that the request has passed.

use tokio::time::Instant;
use tonic::Request;
use tonic::metadata::MetadataValue;

use super::via::{GatewayId, Via};
use crate::context::RequestContext;

/// Context of a call.
#[derive(Clone)]
pub struct CallContext {
    /// Request that makes the call. The engine in this process gets its context; a remote engine gets its id and the
    /// time that is left, and treats this gateway as its client.
    pub request: RequestContext,
    /// Gateways that the request has passed before this process.
    pub via: Via,
}

impl CallContext {
    /// Creates the context of a call for a request that has passed no gateway.
    #[must_use]
    pub fn new(request: &RequestContext) -> Self {
        Self {
            request: request.clone(),
            via: Via::default(),
        }
    }

    /// Builds the request for an upstream. `gateway` is this process, if its upstreams are remote.
    pub(super) fn request<T>(&self, message: T, gateway: Option<&GatewayId>) -> Request<T> {
        let mut request = Request::new(message);
        let deadline = self.request.deadline();
        request.set_timeout(deadline.saturating_duration_since(Instant::now()));
        request.extensions_mut().insert(self.request.clone());
        let metadata = request.metadata_mut();
        let id = MetadataValue::try_from(&*self.request.id().0);
        let id = id.expect("an id consists of visible ASCII characters");
        metadata.insert("x-request-id", id);
        if let Some(gateway) = gateway {
            self.via.write_with(gateway, metadata);
        }
        request
    }
}
