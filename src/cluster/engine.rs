//! One engine: how it is called, and how busy it is.

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
use super::remote::{self, Health};
use crate::proto::v1;
use crate::proto::v1::inference_client::InferenceClient;
use crate::proto::v1::inference_server::Inference;

/// A connection to an engine elsewhere.
pub(super) type EngineChannel = BoxCloneSyncService<HttpRequest<Body>, HttpResponse<Body>, Status>;

/// The events of a completion, from the service in this process.
pub(super) type EventStream =
    Pin<Box<dyn Stream<Item = Result<v1::CompletionEvent, Status>> + Send>>;

pub(super) struct Engine {
    backend: Backend,
    in_flight: Arc<AtomicUsize>,
    health: Health,
}

enum Backend {
    /// It is in this process: its service is a value to be called. To encode and decode what it says was
    /// half of what a token cost.
    InProcess(Box<dyn InProcess>),
    /// It is elsewhere. A stream is read on into a buffer of its own, so that one that nobody reads takes
    /// nothing from the others of its connection.
    Remote(Connections),
}

/// An engine's connections, which take turns.
struct Connections {
    channels: Vec<EngineChannel>,
    next: AtomicUsize,
    /// They read its streams.
    tasks: TaskTracker,
}

impl Connections {
    fn client(&self) -> InferenceClient<EngineChannel> {
        let turn = self.next.fetch_add(1, Ordering::Relaxed);
        InferenceClient::new(self.channels[turn % self.channels.len()].clone())
    }
}

/// The service `Inference` as a gateway calls it.
#[tonic::async_trait]
trait InProcess: Send + Sync {
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
impl<I: Inference> InProcess for I {
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
    /// The engine of this process.
    pub(super) fn local(service: impl Inference) -> Self {
        Self::new(Backend::InProcess(Box::new(service)), Health::always())
    }

    /// An engine elsewhere. `tasks` read its streams.
    pub(super) fn remote(channels: Vec<EngineChannel>, health: Health, tasks: TaskTracker) -> Self {
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

    /// Whether it takes requests, as far as is known.
    pub(super) fn is_up(&self) -> bool {
        self.health.is_up()
    }

    /// Waits until it has said that it takes requests.
    pub(super) async fn up(&self) {
        self.health.clone().up().await;
    }

    /// Its models, as far as is known; none of an engine of this process, which says itself.
    pub(super) fn models(&self) -> watch::Ref<'_, Vec<v1::Model>> {
        self.health.models()
    }

    /// How many of its streams are open.
    pub(super) fn in_flight(&self) -> usize {
        self.in_flight.load(Ordering::Relaxed)
    }

    pub(super) async fn complete(
        &self,
        request: Request<v1::CompletionRequest>,
    ) -> Result<EventSource, Status> {
        let guard = self.guard();
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

    fn guard(&self) -> InFlightGuard {
        self.in_flight.fetch_add(1, Ordering::Relaxed);
        InFlightGuard {
            in_flight: Arc::clone(&self.in_flight),
        }
    }
}

/// Counts a stream towards its engine's load.
pub(super) struct InFlightGuard {
    in_flight: Arc<AtomicUsize>,
}

impl Drop for InFlightGuard {
    fn drop(&mut self) {
        self.in_flight.fetch_sub(1, Ordering::Relaxed);
    }
}
