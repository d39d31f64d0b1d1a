//! An upstream for tests around a scripted engine.

use tonic::Request;

use super::*;

/// A scripted engine whose unsupported parameters and health the test sets.
pub(super) struct WrappedUpstream {
    engine: Arc<dyn Upstream>,
    unsupported: Vec<Parameter>,
    health: watch::Receiver<Health>,
}

impl WrappedUpstream {
    pub(super) fn new(engine: Arc<dyn Upstream>) -> Self {
        Self {
            unsupported: engine.unsupported().to_vec(),
            health: engine.health().clone(),
            engine,
        }
    }

    /// Declares that the engine supports all parameters except this one.
    pub(super) fn without(mut self, parameter: Parameter) -> Self {
        self.unsupported = vec![parameter];
        self
    }
}

#[tonic::async_trait]
impl Upstream for WrappedUpstream {
    async fn complete(
        &self,
        request: Request<AddressedCompletion>,
    ) -> Result<BoxedEventStream, Failure> {
        self.engine.complete(request).await
    }

    async fn list_models(
        &self,
        request: Request<v1::ListModelsRequest>,
    ) -> Result<v1::ListModelsResponse, Status> {
        self.engine.list_models(request).await
    }

    async fn get_model(
        &self,
        request: Request<v1::GetModelRequest>,
    ) -> Result<v1::GetModelResponse, Status> {
        self.engine.get_model(request).await
    }

    async fn tokenize(
        &self,
        request: Request<v1::TokenizeRequest>,
    ) -> Result<v1::TokenizeResponse, Status> {
        self.engine.tokenize(request).await
    }

    async fn detokenize(
        &self,
        request: Request<v1::DetokenizeRequest>,
    ) -> Result<v1::DetokenizeResponse, Status> {
        self.engine.detokenize(request).await
    }

    fn health(&self) -> &watch::Receiver<Health> {
        &self.health
    }

    fn unsupported(&self) -> &[Parameter] {
        &self.unsupported
    }
}
