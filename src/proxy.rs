//! The gRPC API of a gateway: the service `tokenway.v1.Inference` in front of a cluster of engines. Requests, events
//! and errors pass unchanged. This module must not know how an engine is chosen.

use std::sync::Arc;

use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status};

use crate::cluster::{CallContext, Cluster, Failure, Via};
use crate::context::RequestContext;
use crate::error::Error;
use crate::grpc::MAX_MESSAGE_BYTES;
use crate::proto::v1;
use crate::proto::v1::inference_server::{Inference, InferenceServer};

mod stream;

pub(crate) use stream::ForwardedEvents;

/// Implementation of `tokenway.v1.Inference` for the models of a cluster.
#[derive(Clone)]
pub(crate) struct Proxy {
    parts: Arc<ProxyParts>,
}

/// Parts of a [`Proxy`].
pub(crate) struct ProxyParts {
    /// Cluster that completes the requests.
    pub cluster: Cluster,
    /// Checks that this gateway accepts requests, that is, that it is not shutting down.
    pub check_accepting: Box<dyn Fn() -> Result<(), Error> + Send + Sync>,
    /// Cancelled when the drain has timed out and running requests must end.
    pub stopping: CancellationToken,
}

impl Proxy {
    /// Creates the service.
    #[must_use]
    pub(crate) fn new(parts: ProxyParts) -> Self {
        Self {
            parts: Arc::new(parts),
        }
    }

    /// Returns the tonic server of this service, with its message size limits.
    #[must_use]
    pub(crate) fn into_server(self) -> InferenceServer<Self> {
        InferenceServer::new(self)
            .max_decoding_message_size(MAX_MESSAGE_BYTES)
            .max_encoding_message_size(MAX_MESSAGE_BYTES)
    }

    /// Sends a completion request to an engine and starts its stream, or returns the reason for its rejection.
    async fn start(
        &self,
        request: Request<v1::CompletionRequest>,
    ) -> Result<ForwardedEvents, Failure> {
        let call = call_context(&request)?;
        let parts = &self.parts;
        (parts.check_accepting)()?;
        let message = request.into_inner();
        let events = self.until_stopped(parts.cluster.complete(message, &call));
        Ok(ForwardedEvents::new(
            events.await?,
            call.request,
            parts.stopping.clone(),
        ))
    }

    /// Waits for a call to an engine. Fails once the drain has timed out.
    async fn until_stopped<T>(
        &self,
        call: impl Future<Output = Result<T, Failure>>,
    ) -> Result<T, Failure> {
        tokio::select! {
            result = call => result,
            () = self.parts.stopping.cancelled() => Err(Error::shutting_down().into()),
        }
    }
}

/// Creates the context of a call to an engine from the client's request.
fn call_context<T>(request: &Request<T>) -> Result<CallContext, Error> {
    Ok(CallContext {
        request: RequestContext::from_extensions(request.extensions())?,
        via: Via::from_metadata(request.metadata()),
    })
}

#[tonic::async_trait]
impl Inference for Proxy {
    type CompleteStream = ForwardedEvents;

    async fn complete(
        &self,
        request: Request<v1::CompletionRequest>,
    ) -> Result<Response<ForwardedEvents>, Status> {
        Ok(Response::new(self.start(request).await?))
    }

    async fn list_models(
        &self,
        request: Request<v1::ListModelsRequest>,
    ) -> Result<Response<v1::ListModelsResponse>, Status> {
        let context = call_context(&request)?;
        let models = self.parts.cluster.list_models(&context);
        let models = self.until_stopped(models).await?;
        Ok(Response::new(v1::ListModelsResponse { models }))
    }

    async fn get_model(
        &self,
        request: Request<v1::GetModelRequest>,
    ) -> Result<Response<v1::GetModelResponse>, Status> {
        let context = call_context(&request)?;
        let model = &request.get_ref().model;
        let model = self.parts.cluster.get_model(model, &context);
        let model = Some(self.until_stopped(model).await?);
        Ok(Response::new(v1::GetModelResponse { model }))
    }

    async fn tokenize(
        &self,
        request: Request<v1::TokenizeRequest>,
    ) -> Result<Response<v1::TokenizeResponse>, Status> {
        let context = call_context(&request)?;
        let tokenized = self.parts.cluster.tokenize(request.get_ref(), &context);
        Ok(Response::new(self.until_stopped(tokenized).await?))
    }

    async fn detokenize(
        &self,
        request: Request<v1::DetokenizeRequest>,
    ) -> Result<Response<v1::DetokenizeResponse>, Status> {
        let context = call_context(&request)?;
        let detokenized = self.parts.cluster.detokenize(request.get_ref(), &context);
        Ok(Response::new(self.until_stopped(detokenized).await?))
    }
}
