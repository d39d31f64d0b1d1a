//! An OpenAI-compatible server as an upstream, such as vLLM, llama.cpp's server, SGLang or Ollama.
//!
//! Requests become `/completions` or `/chat/completions`, or llama.cpp's own `/completion`, and the engine streams each
//! answer. This module must not know how an upstream is chosen.

use http::Request as HttpRequest;
use http::header::{ACCEPT, CONTENT_TYPE};
use http_body_util::Full;
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::{CancellationToken, DropGuard};
use tonic::{Request, Status};

use super::failure::Failure;
use super::health::{Health, HealthPublisher};
use super::ladder::Abilities;
use super::spec::EngineSpec;
use super::upstream::{AddressedCompletion, BoxedEventStream, Upstream};
use super::via::Via;
use crate::context::RequestContext;
use crate::critical::CriticalTasks;
use crate::error::{Error, ErrorKind};
use crate::proto::v1;
use crate::proto::v1::completion_request::Input;
use crate::request::{MAX_CHOICES, Parameter};

mod chunk;
mod client;
mod events;
mod flavor;
#[cfg(any(test, feature = "fuzzing"))]
pub(super) mod fuzzing;
mod json_text;
mod logprobs;
mod progress;
mod rejection;
mod request_body;
mod server_sent_events;
mod tokenizer;
mod watch_models;

use client::EngineClient;
use events::EngineEvents;
use flavor::Flavor;
use progress::RequestFacts;
use request_body::{Api, BodyFacts, EngineRequest};
use tokenizer::EngineTokenizer;
use watch_models::ModelWatch;

/// An OpenAI-compatible engine.
pub(super) struct OpenAiUpstream {
    client: EngineClient,
    health: watch::Receiver<Health>,
    flavor: watch::Receiver<Flavor>,
    /// Ends the checks of the engine when it is dropped. Running streams continue.
    _watch: DropGuard,
}

impl OpenAiUpstream {
    /// Creates the upstream and starts to watch the engine. The engine may be started later. `stop` is cancelled when
    /// the server stops.
    pub(super) fn connect(
        engine: &EngineSpec,
        base_url: http::Uri,
        critical: &CriticalTasks,
        stop: &CancellationToken,
    ) -> Self {
        let tls = Some(&engine.tls).filter(|_| engine.address.uses_tls());
        let client = EngineClient::new(base_url, engine.api_key.as_ref(), tls);
        let (publisher, health) = HealthPublisher::new(engine);
        let known = engine.server.map(Flavor::from);
        let (facts, flavor) = watch::channel(known.unwrap_or_default());
        let watching = ModelWatch {
            client: client.clone(),
            health: publisher,
            known,
            facts,
        }
        .run();
        let stop = stop.child_token();
        let watch = stop.clone().drop_guard();
        critical.spawn("engine watch", async move {
            stop.run_until_cancelled_owned(watching).await;
        });
        Self {
            client,
            health,
            flavor,
            _watch: watch,
        }
    }

    fn flavor(&self) -> Flavor {
        *self.flavor.borrow()
    }

    /// Returns the tokenizer of a model. `requested` is the name in the request, which is used if the engine has not
    /// listed its models yet.
    fn tokenizer<'a>(
        &'a self,
        model: &'a v1::Model,
        requested: &'a str,
        context: &'a RequestContext,
    ) -> EngineTokenizer<'a> {
        EngineTokenizer {
            client: &self.client,
            flavor: self.flavor(),
            model: if model.name.is_empty() {
                requested
            } else {
                &model.name
            },
            request_id: context.id(),
        }
    }

    /// Returns the model with this name or alias. `None` if the engine has not listed its models yet.
    fn find_model(&self, name: &str) -> Result<Option<v1::Model>, Error> {
        self.health.borrow().find_model(name)
    }
}

#[tonic::async_trait]
impl Upstream for OpenAiUpstream {
    async fn complete(
        &self,
        request: Request<AddressedCompletion>,
    ) -> Result<BoxedEventStream, Failure> {
        let context = RequestContext::from_extensions(request.extensions())?;
        let (metadata, _, completion) = request.into_parts();
        let AddressedCompletion {
            message,
            model,
            seed,
            continues_message,
        } = completion;
        let listed = self.find_model(&model)?;
        let model = listed.map_or(model, |listed| listed.name);
        // The seed is sent even if the client sets none, so that the request can be repeated.
        let seed = seed.unwrap_or_else(|| rand::random::<u32>().into());
        let flavor = self.flavor();
        let facts = BodyFacts {
            model: &model,
            seed,
            flavor,
            continues_message,
        };
        let engine_request = EngineRequest::new(&message, &facts)?;
        let api = engine_request.api;
        let target = match api {
            Api::Completions => self.client.target("/completions"),
            Api::Chats => self.client.target("/chat/completions"),
            Api::LlamaCpp => self.client.root_target("/completion"),
        };
        let request = HttpRequest::post(target)
            .header(CONTENT_TYPE, "application/json")
            .header(ACCEPT, "text/event-stream")
            .header("x-request-id", &*context.id().0)
            .body(Full::from(engine_request.body));
        let mut request = request.map_err(|_| Error::internal())?;
        Via::copy_to_headers(&metadata, request.headers_mut());
        let response = self.client.send(request).await?;
        if !response.status().is_success() {
            return Err(rejection::read_rejection(response).await);
        }
        let facts = RequestFacts {
            api,
            request_id: context.id().0.to_string(),
            model,
            choices: message.n.unwrap_or(1).min(MAX_CHOICES),
            seed,
            has_token_ids: engine_request.reports_token_ids,
            logprobs: message.logprobs,
            echo: echoed_prompt(&message),
            arrived: Instant::now(),
        };
        let body = response.into_body();
        Ok(Box::pin(EngineEvents::new(body, facts)))
    }

    async fn list_models(
        &self,
        _request: Request<v1::ListModelsRequest>,
    ) -> Result<v1::ListModelsResponse, Status> {
        let health = self.health.borrow();
        if !health.is_up() {
            return Err(Error::new(ErrorKind::NoWorker, "The engine cannot be reached.").into());
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
            None => Err(Error::new(ErrorKind::NoWorker, "The engine cannot be reached.").into()),
        }
    }

    async fn tokenize(
        &self,
        request: Request<v1::TokenizeRequest>,
    ) -> Result<v1::TokenizeResponse, Status> {
        let context = RequestContext::from_extensions(request.extensions())?;
        let message = request.into_inner();
        let model = self.find_model(&message.model)?.unwrap_or_default();
        let tokenizer = self.tokenizer(&model, &message.model, &context);
        Ok(v1::TokenizeResponse {
            token_ids: tokenizer.tokenize(&message).await?,
            context_length: model.context_length,
        })
    }

    async fn detokenize(
        &self,
        request: Request<v1::DetokenizeRequest>,
    ) -> Result<v1::DetokenizeResponse, Status> {
        let context = RequestContext::from_extensions(request.extensions())?;
        let message = request.into_inner();
        let model = self.find_model(&message.model)?.unwrap_or_default();
        let tokenizer = self.tokenizer(&model, &message.model, &context);
        Ok(v1::DetokenizeResponse {
            text: tokenizer.detokenize(&message.token_ids).await?,
        })
    }

    fn health(&self) -> &watch::Receiver<Health> {
        &self.health
    }

    fn abilities(&self) -> Abilities {
        self.flavor().abilities()
    }

    fn unsupported(&self) -> &[Parameter] {
        self.flavor().unsupported()
    }
}

/// Returns the prompt that the engine repeats, if the request asks for it.
fn echoed_prompt(message: &v1::CompletionRequest) -> Option<String> {
    match &message.input {
        Some(Input::Prompt(prompt)) if message.echo => Some(prompt.clone()),
        Some(Input::Prompt(_) | Input::PromptTokenIds(_) | Input::Chat(_)) | None => None,
    }
}
