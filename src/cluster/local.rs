//! The upstream for the engine in this process. Its gRPC service is called directly: encoding and decoding messages
//! was half of the cost of a token.

use tokio::sync::watch;
use tonic::{Request, Status};

use super::failure::Failure;
use super::health::Health;
use super::upstream::{AddressedCompletion, BoxedEventStream, Upstream};
use crate::proto::v1;
use crate::proto::v1::inference_server::Inference;
use crate::request::Parameter;

/// The engine in this process. It always counts as up, because it rejects requests itself when it cannot accept them.
pub(super) struct LocalUpstream<I> {
    service: I,
    health: watch::Receiver<Health>,
}

impl<I: Inference> LocalUpstream<I> {
    pub(super) fn new(service: I) -> Self {
        Self {
            service,
            health: watch::channel(Health::always_up()).1,
        }
    }
}

#[tonic::async_trait]
impl<I: Inference> Upstream for LocalUpstream<I> {
    async fn complete(
        &self,
        request: Request<AddressedCompletion>,
    ) -> Result<BoxedEventStream, Failure> {
        let request = request.map(AddressedCompletion::into_message);
        let events = self.service.complete(request).await;
        let events = events.map_err(|status| Failure::rejection(&status))?;
        Ok(Box::pin(events.into_inner()))
    }

    async fn list_models(
        &self,
        request: Request<v1::ListModelsRequest>,
    ) -> Result<v1::ListModelsResponse, Status> {
        Ok(self.service.list_models(request).await?.into_inner())
    }

    async fn get_model(
        &self,
        request: Request<v1::GetModelRequest>,
    ) -> Result<v1::GetModelResponse, Status> {
        Ok(self.service.get_model(request).await?.into_inner())
    }

    async fn tokenize(
        &self,
        request: Request<v1::TokenizeRequest>,
    ) -> Result<v1::TokenizeResponse, Status> {
        Ok(self.service.tokenize(request).await?.into_inner())
    }

    async fn detokenize(
        &self,
        request: Request<v1::DetokenizeRequest>,
    ) -> Result<v1::DetokenizeResponse, Status> {
        Ok(self.service.detokenize(request).await?.into_inner())
    }

    fn health(&self) -> &watch::Receiver<Health> {
        &self.health
    }

    /// The engine itself rejects all other parameters, with an error that names the model.
    fn unsupported(&self) -> &[Parameter] {
        &[Parameter::ExtraFields]
    }
}
