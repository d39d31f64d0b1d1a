//! The upstream for the engine in this process. Its gRPC service is called directly: encoding and decoding messages
//! was half of the cost of a token.

use futures_util::StreamExt;
use tokio::sync::watch;
use tonic::{Request, Status};

use super::upstream::{BoxedEventStream, Health, OpenStreams, Upstream};
use crate::proto::v1;
use crate::proto::v1::inference_server::Inference;
use crate::request::Parameter;

/// The engine in this process. It always counts as up, because it rejects requests itself when it cannot accept them.
pub(super) struct LocalUpstream<I> {
    service: I,
    health: watch::Receiver<Health>,
    load: OpenStreams,
}

impl<I: Inference> LocalUpstream<I> {
    pub(super) fn new(service: I) -> Self {
        Self {
            service,
            health: watch::channel(Health::always_up()).1,
            load: OpenStreams::default(),
        }
    }
}

#[tonic::async_trait]
impl<I: Inference> Upstream for LocalUpstream<I> {
    async fn complete(
        &self,
        request: Request<v1::CompletionRequest>,
    ) -> Result<BoxedEventStream, Status> {
        let guard = self.load.track_stream();
        let events = self.service.complete(request).await?.into_inner();
        Ok(Box::pin(events.map(move |event| {
            let _open_stream = &guard;
            event
        })))
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

    fn load(&self) -> usize {
        self.load.get()
    }

    /// The engine itself rejects all other parameters, with an error that names the model.
    fn unsupported(&self) -> &[Parameter] {
        &[Parameter::ExtraFields]
    }
}
