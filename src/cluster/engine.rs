//! One engine: the calls of its service, and its number of open streams.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use http::{Request as HttpRequest, Response as HttpResponse};
use tokio::sync::watch;
use tokio_stream::Stream;
use tokio_util::task::TaskTracker;
use tonic::body::Body;
use tonic::{Request, Status};
use tower::util::BoxCloneSyncService;

use super::events::EventSource;
use super::remote::{self, Health, RemoteEngine};
use crate::proto::v1;
use crate::proto::v1::inference_client::InferenceClient;
use crate::proto::v1::inference_server::Inference;

/// A connection to a remote engine.
pub(super) type EngineChannel = BoxCloneSyncService<HttpRequest<Body>, HttpResponse<Body>, Status>;

/// Events of a completion by the engine in this process.
pub(super) type EventStream =
    Pin<Box<dyn Stream<Item = Result<v1::CompletionEvent, Status>> + Send>>;

/// An engine that completes requests.
pub(super) struct Engine {
    backend: Backend,
    in_flight: Arc<AtomicUsize>,
    health: Health,
}

/// Connection to the service of an engine.
enum Backend {
    /// An engine in this process, whose service is called directly. Encoding and decoding its messages was half of the
    /// cost of a token.
    InProcess(Box<dyn InferenceService>),
    /// A remote engine. Each stream is read into a buffer of its own, so that an unread stream does not use up the
    /// flow-control window that its connection shares with other streams.
    Remote(Connections),
}

/// Connections to one remote engine, used in turn.
struct Connections {
    channels: Vec<EngineChannel>,
    next: AtomicUsize,
    /// Tasks that read the streams of the engine.
    tasks: TaskTracker,
}

impl Connections {
    /// Returns a client on the next connection.
    fn client(&self) -> InferenceClient<EngineChannel> {
        let index = self.next.fetch_add(1, Ordering::Relaxed) % self.channels.len();
        InferenceClient::new(self.channels[index].clone())
    }
}

/// Object-safe form of [`Inference`], without the parts of gRPC that this process does not need.
#[tonic::async_trait]
trait InferenceService: Send + Sync {
    async fn complete(
        &self,
        request: Request<v1::CompletionRequest>,
    ) -> Result<EventStream, Status>;

    async fn list_models(&self) -> Result<v1::ListModelsResponse, Status>;

    async fn get_model(&self, request: v1::GetModelRequest)
    -> Result<v1::GetModelResponse, Status>;

    async fn tokenize(&self, request: v1::TokenizeRequest) -> Result<v1::TokenizeResponse, Status>;

    async fn detokenize(
        &self,
        request: v1::DetokenizeRequest,
    ) -> Result<v1::DetokenizeResponse, Status>;
}

#[tonic::async_trait]
impl<I: Inference> InferenceService for I {
    async fn complete(
        &self,
        request: Request<v1::CompletionRequest>,
    ) -> Result<EventStream, Status> {
        let response = Inference::complete(self, request).await?;
        Ok(Box::pin(response.into_inner()))
    }

    async fn list_models(&self) -> Result<v1::ListModelsResponse, Status> {
        let request = Request::new(v1::ListModelsRequest {});
        Ok(Inference::list_models(self, request).await?.into_inner())
    }

    async fn get_model(
        &self,
        request: v1::GetModelRequest,
    ) -> Result<v1::GetModelResponse, Status> {
        let request = Request::new(request);
        Ok(Inference::get_model(self, request).await?.into_inner())
    }

    async fn tokenize(&self, request: v1::TokenizeRequest) -> Result<v1::TokenizeResponse, Status> {
        let request = Request::new(request);
        Ok(Inference::tokenize(self, request).await?.into_inner())
    }

    async fn detokenize(
        &self,
        request: v1::DetokenizeRequest,
    ) -> Result<v1::DetokenizeResponse, Status> {
        let request = Request::new(request);
        Ok(Inference::detokenize(self, request).await?.into_inner())
    }
}

impl Engine {
    /// Creates the engine in this process.
    pub(super) fn local(service: impl Inference) -> Self {
        Self::new(Backend::InProcess(Box::new(service)), Health::always_up())
    }

    /// Creates a remote engine. Its streams are read by tasks in `tasks`.
    pub(super) fn remote(engine: RemoteEngine, tasks: TaskTracker) -> Self {
        let RemoteEngine { channels, health } = engine;
        let connections = Connections {
            channels,
            next: AtomicUsize::new(0),
            tasks,
        };
        Self::new(Backend::Remote(connections), health)
    }

    fn new(backend: Backend, health: Health) -> Self {
        Self {
            backend,
            in_flight: Arc::default(),
            health,
        }
    }

    /// Returns true unless the engine is known to be down.
    pub(super) fn is_up(&self) -> bool {
        self.health.is_up()
    }

    /// Waits until the engine reports that it accepts requests.
    pub(super) async fn wait_until_up(&self) {
        self.health.clone().wait_until_up().await;
    }

    /// Returns the models that a remote engine listed when it last came up. Empty for the engine in this process, which
    /// checks model names itself.
    pub(super) fn models(&self) -> watch::Ref<'_, Vec<v1::Model>> {
        self.health.models()
    }

    /// Returns the number of open streams.
    pub(super) fn in_flight(&self) -> usize {
        self.in_flight.load(Ordering::Relaxed)
    }

    pub(super) async fn complete(
        &self,
        request: Request<v1::CompletionRequest>,
    ) -> Result<EventSource, Status> {
        let guard = self.in_flight_guard();
        match &self.backend {
            Backend::InProcess(service) => {
                let stream = service.complete(request).await?;
                Ok(EventSource::InProcess(stream, guard))
            }
            Backend::Remote(connections) => {
                let response = connections.client().complete(request).await?;
                let events = remote::read_ahead(response.into_inner(), guard, &connections.tasks);
                Ok(EventSource::ReadAhead(events))
            }
        }
    }

    pub(super) async fn list_models(&self) -> Result<Vec<v1::Model>, Status> {
        let listed = match &self.backend {
            Backend::InProcess(service) => service.list_models().await?,
            Backend::Remote(connections) => {
                let request = v1::ListModelsRequest {};
                connections
                    .client()
                    .list_models(request)
                    .await?
                    .into_inner()
            }
        };
        Ok(listed.models)
    }

    pub(super) async fn get_model(&self, model: &str) -> Result<Option<v1::Model>, Status> {
        let request = v1::GetModelRequest {
            model: model.to_owned(),
        };
        let found = match &self.backend {
            Backend::InProcess(service) => service.get_model(request).await?,
            Backend::Remote(connections) => {
                connections.client().get_model(request).await?.into_inner()
            }
        };
        Ok(found.model)
    }

    pub(super) async fn tokenize(
        &self,
        request: v1::TokenizeRequest,
    ) -> Result<v1::TokenizeResponse, Status> {
        match &self.backend {
            Backend::InProcess(service) => service.tokenize(request).await,
            Backend::Remote(connections) => {
                let response = connections.client().tokenize(request).await?;
                Ok(response.into_inner())
            }
        }
    }

    pub(super) async fn detokenize(
        &self,
        request: v1::DetokenizeRequest,
    ) -> Result<v1::DetokenizeResponse, Status> {
        match &self.backend {
            Backend::InProcess(service) => service.detokenize(request).await,
            Backend::Remote(connections) => {
                let response = connections.client().detokenize(request).await?;
                Ok(response.into_inner())
            }
        }
    }

    fn in_flight_guard(&self) -> InFlightGuard {
        self.in_flight.fetch_add(1, Ordering::Relaxed);
        InFlightGuard {
            in_flight: Arc::clone(&self.in_flight),
        }
    }
}

/// Counts a stream in the load of its engine until it is dropped.
pub(super) struct InFlightGuard {
    in_flight: Arc<AtomicUsize>,
}

impl Drop for InFlightGuard {
    fn drop(&mut self) {
        self.in_flight.fetch_sub(1, Ordering::Relaxed);
    }
}
