//! The context of a call: what its upstream gets besides the message.

use tokio::time::Instant;
use tonic::Request;
use tonic::metadata::MetadataValue;

use super::via::{GatewayId, Via};
use crate::request::RequestId;
use crate::telemetry::DeliveryContext;

/// Context of a call.
#[derive(Clone, Default)]
pub struct CallContext {
    /// Id of the request.
    pub id: Option<RequestId>,
    /// Time at which the client stops waiting.
    pub deadline: Option<Instant>,
    /// Delivery of the tokens by this process. Reaches only the engine in this process: a remote engine treats this
    /// gateway as its client.
    pub delivery: Option<DeliveryContext>,
    /// Gateways that the request has passed before this process.
    pub via: Via,
}

impl CallContext {
    /// Builds the request for an upstream. `gateway` is this process, if its upstreams are remote.
    pub(super) fn request<T>(&self, message: T, gateway: Option<&GatewayId>) -> Request<T> {
        let mut request = Request::new(message);
        if let Some(deadline) = self.deadline {
            request.set_timeout(deadline.saturating_duration_since(Instant::now()));
        }
        if let Some(delivery) = &self.delivery {
            request.extensions_mut().insert(delivery.clone());
        }
        let metadata = request.metadata_mut();
        let id = self.id.as_ref();
        if let Some(Ok(id)) = id.map(|id| MetadataValue::try_from(&*id.0)) {
            metadata.insert("x-request-id", id);
        }
        if let Some(gateway) = gateway {
            self.via.write_with(gateway, metadata);
        }
        request
    }
}
