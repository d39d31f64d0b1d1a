//! Asks a Tokenway engine for its models.

use tonic::Request;

use super::connections::EngineChannel;
use super::watch_health::{ListedModels, ModelSource};
use crate::cluster::via::{GatewayId, Via};
use crate::proto::v1;
use crate::proto::v1::inference_client::InferenceClient;

/// The models of a Tokenway engine.
pub(super) struct TokenwayModels {
    client: InferenceClient<EngineChannel>,
    /// Id of this gateway, to recognise an engine that is this gateway itself.
    gateway: GatewayId,
}

impl TokenwayModels {
    pub(super) fn new(channel: EngineChannel, gateway: GatewayId) -> Self {
        let client = InferenceClient::new(channel);
        Self { client, gateway }
    }
}

impl ModelSource for TokenwayModels {
    async fn list(&mut self) -> ListedModels {
        let mut request = Request::new(v1::ListModelsRequest {});
        Via::default().write_with(&self.gateway, request.metadata_mut());
        match self.client.list_models(request).await {
            Ok(listed) => ListedModels::Models(listed.into_inner().models),
            Err(status) if self.gateway.has_detected_loop(&status) => ListedModels::Loop,
            Err(_) => ListedModels::Unknown,
        }
    }
}
