//! The gRPC API of a gateway: the service `tokenway.v1.Inference` over a cluster. Requests and events pass unchanged, and
//! so do the errors of an engine. This module must not know how an engine is chosen.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tonic::metadata::MetadataMap;
use tonic::{Request, Response, Status};

use crate::cluster::{CallContext, Cluster, Failure, Via};
use crate::delivery::{DeliveryTimer, FlushHandle};
use crate::error::Error;
use crate::grpc::MAX_MESSAGE_BYTES;
use crate::grpc::metadata::{echo_request_id, request_id, timeout};
use crate::proto::v1;
use crate::proto::v1::inference_server::{Inference, InferenceServer};
use crate::request::{MAX_TIMEOUT, RequestId};
use crate::telemetry::{CountedRequest, Frontend, ResponseFormat, Telemetry};

mod stream;

pub use stream::ForwardedEvents;

/// Implementation of `tokenway.v1.Inference` for the models of a cluster.
#[derive(Clone)]
pub struct Proxy {
    parts: Arc<ProxyParts>,
}

/// Parts of a [`Proxy`].
pub struct ProxyParts {
    /// Cluster that completes the requests.
    pub cluster: Cluster,
    /// Metrics of the server.
    pub telemetry: Telemetry,
    /// Checks that the server accepts requests.
    pub check_accepting: Box<dyn Fn() -> Result<(), Error> + Send + Sync>,
    /// Cancelled when the server stops waiting for running requests.
    pub stopping: CancellationToken,
    /// Timeout of a request whose client sets none.
    pub request_timeout: Duration,
}

impl Proxy {
    /// Creates the service.
    #[must_use]
    pub fn new(parts: ProxyParts) -> Self {
        Self {
            parts: Arc::new(parts),
        }
    }

    /// Returns the tonic server of this service, with its message size limits.
    #[must_use]
    pub fn into_server(self) -> InferenceServer<Self> {
        InferenceServer::new(self)
            .max_decoding_message_size(MAX_MESSAGE_BYTES)
            .max_encoding_message_size(MAX_MESSAGE_BYTES)
    }

    /// Reads the context of a call from its metadata.
    fn context(
        &self,
        id: Result<RequestId, Error>,
        metadata: &MetadataMap,
    ) -> Result<CallContext, Error> {
        let id = Some(id?);
        let timeout = timeout(metadata)?.unwrap_or(self.parts.request_timeout);
        Ok(CallContext {
            id,
            deadline: Some(Instant::now() + timeout.min(MAX_TIMEOUT)),
            delivery: None,
            via: Via::of(metadata),
        })
    }

    /// Admits a request and starts its stream, or returns the reason for its rejection.
    async fn start(
        &self,
        request: Request<v1::CompletionRequest>,
        id: Result<RequestId, Error>,
    ) -> Result<ForwardedEvents, Failure> {
        let parts = &self.parts;
        let counted = parts.telemetry.track_request(Frontend::Grpc);
        let flush = request.extensions().get::<FlushHandle>().cloned();
        let started = async {
            let context = self.context(id, request.metadata())?;
            (parts.check_accepting)()?;
            let message = request.into_inner();
            self.until_stopped(parts.cluster.complete(&message, &context))
                .await
        };
        match started.await {
            Ok(events) => Ok(ForwardedEvents::new(
                events,
                counted,
                DeliveryTimer::new(&parts.telemetry, ResponseFormat::Grpc, flush),
                parts.stopping.clone(),
            )),
            Err(failure) => Err(self.count_rejection(counted, failure)),
        }
    }

    fn count_rejection(&self, mut counted: CountedRequest, failure: Failure) -> Failure {
        counted.ended(Err(failure.error()));
        let telemetry = &self.parts.telemetry;
        telemetry.count_rejection(Frontend::Grpc, failure.error());
        failure
    }

    /// Waits for a call until the server stops waiting for running requests.
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

#[tonic::async_trait]
impl Inference for Proxy {
    type CompleteStream = ForwardedEvents;

    async fn complete(
        &self,
        request: Request<v1::CompletionRequest>,
    ) -> Result<Response<ForwardedEvents>, Status> {
        let id = request_id(request.metadata());
        let echoed = id.clone().unwrap_or_else(|_| RequestId::random());
        match self.start(request, id).await {
            Ok(events) => {
                let mut response = Response::new(events);
                echo_request_id(response.metadata_mut(), &echoed);
                Ok(response)
            }
            Err(failure) => {
                let mut status = Status::from(failure);
                echo_request_id(status.metadata_mut(), &echoed);
                Err(status)
            }
        }
    }

    async fn list_models(
        &self,
        request: Request<v1::ListModelsRequest>,
    ) -> Result<Response<v1::ListModelsResponse>, Status> {
        let metadata = request.metadata();
        let context = self.context(request_id(metadata), metadata)?;
        let models = self.parts.cluster.list_models(&context);
        let models = self.until_stopped(models).await?;
        Ok(Response::new(v1::ListModelsResponse { models }))
    }

    async fn get_model(
        &self,
        request: Request<v1::GetModelRequest>,
    ) -> Result<Response<v1::GetModelResponse>, Status> {
        let metadata = request.metadata();
        let context = self.context(request_id(metadata), metadata)?;
        let model = &request.get_ref().model;
        let model = self.parts.cluster.get_model(model, &context);
        let model = Some(self.until_stopped(model).await?);
        Ok(Response::new(v1::GetModelResponse { model }))
    }

    async fn tokenize(
        &self,
        request: Request<v1::TokenizeRequest>,
    ) -> Result<Response<v1::TokenizeResponse>, Status> {
        let metadata = request.metadata();
        let context = self.context(request_id(metadata), metadata)?;
        let tokenized = self.parts.cluster.tokenize(request.get_ref(), &context);
        Ok(Response::new(self.until_stopped(tokenized).await?))
    }

    async fn detokenize(
        &self,
        request: Request<v1::DetokenizeRequest>,
    ) -> Result<Response<v1::DetokenizeResponse>, Status> {
        let metadata = request.metadata();
        let context = self.context(request_id(metadata), metadata)?;
        let detokenized = self.parts.cluster.detokenize(request.get_ref(), &context);
        Ok(Response::new(self.until_stopped(detokenized).await?))
    }
}
