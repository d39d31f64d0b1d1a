//! The gateways that a request has passed through, recorded in its gRPC metadata or HTTP headers. A gateway rejects a request that
//! has already passed through it, so a gateway that lists itself as an engine cannot send a request in circles.

use http::HeaderMap;
use tonic::Status;
use tonic::metadata::{Ascii, MetadataMap, MetadataValue};

use crate::error::{Error, ErrorKind};
use crate::request::RequestId;

/// Name of the metadata or header. In a request: the ids of the gateways that have passed it on. In a rejection: the id of the gateway
/// that detected the circle.
const VIA: &str = "x-tokenway-via";

/// Random id of a gateway process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct GatewayId(MetadataValue<Ascii>);

impl GatewayId {
    pub(super) fn random() -> Self {
        let id = RequestId::random().0;
        Self(
            MetadataValue::try_from(&*id)
                .expect("a random gateway id contains only visible ASCII characters"),
        )
    }

    /// Returns true if `status` is this gateway's rejection of a circular request.
    pub(super) fn has_detected_loop(&self, status: &Status) -> bool {
        status.metadata().get(VIA) == Some(&self.0)
    }

    /// Creates the rejection of a request that has already passed through this gateway.
    pub(super) fn loop_detected_status(&self) -> Status {
        let message = "The gateway is an engine of itself. Check the gateway's list of engines.";
        let mut status = Status::from(Error::new(ErrorKind::UpstreamError, message));
        status.metadata_mut().insert(VIA, self.0.clone());
        status
    }
}

/// Ids of the gateways that a request has passed through. Empty for a request that comes directly from a client.
#[derive(Clone, Debug, Default)]
pub(crate) struct Via(Vec<MetadataValue<Ascii>>);

impl Via {
    /// Reads the gateways from the metadata of a request.
    #[must_use]
    pub(crate) fn from_metadata(metadata: &MetadataMap) -> Self {
        Self::from_headers(metadata.as_ref())
    }

    /// Reads the gateways from the headers of a request.
    #[must_use]
    pub(crate) fn from_headers(headers: &HeaderMap) -> Self {
        let values = headers.get_all(VIA).iter();
        let ids = values.filter_map(|value| MetadataValue::try_from(value.as_bytes()).ok());
        Self(ids.collect())
    }

    /// Adds the gateways of a request's metadata to the headers of an HTTP request.
    pub(super) fn copy_to_headers(metadata: &MetadataMap, headers: &mut HeaderMap) {
        for value in metadata.as_ref().get_all(VIA) {
            headers.append(VIA, value.clone());
        }
    }

    pub(super) fn contains(&self, gateway: &GatewayId) -> bool {
        self.0.contains(&gateway.0)
    }

    /// Writes these gateways, followed by `gateway`, to the metadata of a request.
    pub(super) fn write_with(&self, gateway: &GatewayId, metadata: &mut MetadataMap) {
        for id in self.0.iter().chain([&gateway.0]) {
            metadata.append(VIA, id.clone());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_gateway_adds_itself_to_those_that_passed_a_request_on_before() {
        let [first, second, third] = [(); 3].map(|()| GatewayId::random());
        let [mut to_second, mut to_third] = [(); 2].map(|()| MetadataMap::new());
        Via::default().write_with(&first, &mut to_second);
        Via::from_metadata(&to_second).write_with(&second, &mut to_third);
        let via = Via::from_metadata(&to_third);
        let passed = [&first, &second, &third].map(|gateway| via.contains(gateway));
        assert_eq!(passed, [true, true, false]);
    }
}
