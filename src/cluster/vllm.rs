//! vLLM's own gRPC API as an upstream: `vllm.Inference` for completions, `vllm.Control` for the names of the model.
//!
//! Each completion is one `GenerateStream`. This module must not know how an upstream is chosen.

use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::{CancellationToken, DropGuard};
use tokio_util::task::TaskTracker;
use tonic::transport::Endpoint;
use tonic::{Request, Status};
use vllm_proto::inference_client::InferenceClient;

use super::failure::Failure;
use super::health::{Health, HealthPublisher};
use super::ladder::Abilities;
use super::remote::connections::{Connections, connect, with_options};
use super::remote::read_ahead;
use super::remote::watch_health::HealthWatch;
use super::spec::EngineSpec;
use super::upstream::{AddressedCompletion, BoxedEventStream, Upstream};
use crate::context::RequestContext;
use crate::critical::CriticalTasks;
use crate::error::{Error, ErrorKind};
use crate::proto::v1;
use crate::request::{MAX_CHOICES, Parameter};

mod events;
#[cfg(any(test, feature = "fuzzing"))]
pub(super) mod fuzzing;
mod model_info;
mod progress;
mod rejection;
mod request;

use events::EngineEvents;
use model_info::VllmModel;
use progress::RequestFacts;

/// Request parameters that vLLM's gRPC API does not have. `request::check_supported` rejects the other fields.
const UNSUPPORTED: [Parameter; 2] = [Parameter::EchoLogprobs, Parameter::Suffix];

/// A vLLM server. It serves one model.
pub(super) struct VllmUpstream {
    connections: Connections,
    health: watch::Receiver<Health>,
    /// Tracks the tasks that read the streams.
    tasks: TaskTracker,
    /// Ends the health watch when the engine is dropped. Running streams continue.
    _watch: DropGuard,
}

impl VllmUpstream {
    /// Creates the upstream and starts to watch the engine's health. The engine may be started later. `stop` is
    /// cancelled when the server stops.
    pub(super) fn connect(
        engine: &EngineSpec,
        url: http::Uri,
        critical: &CriticalTasks,
        stop: &CancellationToken,
    ) -> Self {
        let endpoint = with_options(Endpoint::from(url));
        let api_key = engine.api_key.as_ref();
        let (publisher, health) = HealthPublisher::new(engine);
        let channel = connect(&endpoint, api_key);
        let watching = HealthWatch {
            models: VllmModel::new(channel.clone(), &engine.name),
            health: publisher,
        }
        .run(channel);
        let stop = stop.child_token();
        let watch = stop.clone().drop_guard();
        critical.spawn("engine watch", async move {
            stop.run_until_cancelled_owned(watching).await;
        });
        Self {
            connections: Connections::new(&endpoint, api_key),
            health,
            tasks: critical.tracker().clone(),
            _watch: watch,
        }
    }

    /// Returns the model with this name or alias. `None` if the engine has not listed its models yet.
    fn find_model(&self, name: &str) -> Result<Option<v1::Model>, Error> {
        self.health.borrow().find_model(name)
    }
}

#[tonic::async_trait]
impl Upstream for VllmUpstream {
    async fn complete(
        &self,
        request: Request<AddressedCompletion>,
    ) -> Result<BoxedEventStream, Failure> {
        let context = RequestContext::from_extensions(request.extensions())?;
        let mut message = request.into_inner().into_message();
        if let Some(model) = self.find_model(&message.model)? {
            message.model = model.name;
        }
        // The seed is sent even if the client sets none, so that the request can be repeated.
        let seed = message.seed.unwrap_or_else(|| rand::random::<u32>().into());
        let facts = RequestFacts {
            request_id: context.id().0.to_string(),
            model: message.model.clone(),
            choices: message.n.unwrap_or(1).min(MAX_CHOICES),
            seed,
            has_logprobs: message.logprobs.is_some(),
            arrived: Instant::now(),
        };
        let message = request::generate_request(message, &facts.request_id, seed)?;
        let channel = self.connections.next();
        let responses = InferenceClient::new(channel.clone())
            .generate_stream(message)
            .await
            .map_err(|status| Failure::foreign(rejection::rejection(&status), &status))?
            .into_inner();
        let events = EngineEvents::new(responses, facts);
        Ok(read_ahead::start(events, channel, &self.tasks))
    }

    async fn list_models(
        &self,
        _request: Request<v1::ListModelsRequest>,
    ) -> Result<v1::ListModelsResponse, Status> {
        let health = self.health.borrow();
        if !health.is_up() {
            return Err(unreachable_engine().into());
        }
        Ok(v1::ListModelsResponse {
            models: health.models.clone(),
        })
    }

    async fn get_model(
        &self,
        request: Request<v1::GetModelRequest>,
    ) -> Result<v1::GetModelResponse, Status> {
        match self.find_model(&request.get_ref().model)? {
            Some(model) => Ok(v1::GetModelResponse { model: Some(model) }),
            None => Err(unreachable_engine().into()),
        }
    }

    async fn tokenize(
        &self,
        _request: Request<v1::TokenizeRequest>,
    ) -> Result<v1::TokenizeResponse, Status> {
        Err(no_tokenizer().into())
    }

    async fn detokenize(
        &self,
        _request: Request<v1::DetokenizeRequest>,
    ) -> Result<v1::DetokenizeResponse, Status> {
        Err(no_tokenizer().into())
    }

    fn health(&self) -> &watch::Receiver<Health> {
        &self.health
    }

    fn abilities(&self) -> Abilities {
        Abilities {
            takes_token_ids: true,
            ..Abilities::default()
        }
    }

    fn unsupported(&self) -> &[Parameter] {
        &UNSUPPORTED
    }
}

fn unreachable_engine() -> Error {
    Error::new(ErrorKind::NoWorker, "The engine cannot be reached.")
}

fn no_tokenizer() -> Error {
    let message = "The model's engine has no tokenizer API.";
    Error::new(ErrorKind::NotFound, message)
}
