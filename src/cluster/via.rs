//! The gateways that a request has passed, in its metadata. A gateway rejects a request that it has passed on before,
//! so a gateway that lists itself as an engine cannot send a request in circles.

use tonic::Status;
use tonic::metadata::{Ascii, MetadataMap, MetadataValue};

use crate::error::{Error, ErrorKind};
use crate::request::RequestId;

/// Metadata key of a request: the id of each gateway that has passed it on. In a rejection: the id of the gateway that
/// has found the circle.
const VIA: &str = "x-tokenway-via";

/// Random id of a gateway process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct GatewayId(MetadataValue<Ascii>);

impl GatewayId {
    pub(super) fn random() -> Self {
        let id = RequestId::random().0;
        Self(MetadataValue::try_from(&*id).expect("a random id is visible ASCII"))
    }

    /// Returns true if `status` is the rejection of a circle by this gateway.
    pub(super) fn rejected_circle(&self, status: &Status) -> bool {
        status.metadata().get(VIA) == Some(&self.0)
    }

    /// Returns the rejection of a request that this gateway has passed on before.
    pub(super) fn circle(&self) -> Status {
        let message = "The gateway is an engine of itself. Check the gateway's list of engines.";
        let mut status = Status::from(Error::new(ErrorKind::UpstreamError, message));
        status.metadata_mut().insert(VIA, self.0.clone());
        status
    }
}

/// Gateways that a request has passed. Empty for a request from a client.
#[derive(Clone, Debug, Default)]
pub struct Via(Vec<MetadataValue<Ascii>>);

impl Via {
    /// Returns the gateways in the metadata of a request.
    #[must_use]
    pub fn of(metadata: &MetadataMap) -> Self {
        Self(metadata.get_all(VIA).iter().cloned().collect())
    }

    pub(super) fn contains(&self, gateway: &GatewayId) -> bool {
        self.0.contains(&gateway.0)
    }

    /// Writes these gateways, and then `gateway`, to the metadata of a request.
    pub(super) fn write_with(&self, gateway: &GatewayId, metadata: &mut MetadataMap) {
        for id in self.0.iter().chain([&gateway.0]) {
            metadata.append(VIA, id.clone());
        }
    }
}
