//! The gRPC service `tokenway.v1.Inference`: requests in, events out. It must not know HTTP or how tokens are
//! generated.

use std::time::Duration;

use tonic::{Request, Response, Status};

use crate::delivery::{DeliveryTimer, FlushHandle};
use crate::error::{Error, ErrorKind};
use crate::models::{ModelEntry, Models};
use crate::prompt::{Prompt, Tokenizer};
use crate::proto::v1;
use crate::proto::v1::inference_server::{Inference, InferenceServer};
use crate::proto::v1::tokenize_request::Input as TokenizeInput;
use crate::request::RequestId;
use crate::runner::BosPolicy;
use crate::scheduler::{NewRequest, Scheduler};
use crate::telemetry::{
    CountedRequest, DeliveryContext, Frontend, ResponseFormat, Stage, Telemetry,
};
use crate::text::completion::Completion;

mod convert;
pub(crate) mod metadata;
mod stream;
mod tonic_errors;

pub use convert::first_used;
pub use stream::EventStream;
use stream::RequestMetrics;
pub use tonic_errors::with_error_details;

/// Maximum size of a message in either direction, in bytes.
pub const MAX_MESSAGE_BYTES: usize = 4 * 1024 * 1024;

/// Implementation of `tokenway.v1.Inference` for the models of one engine.
#[derive(Clone)]
pub struct Service {
    models: Models,
    scheduler: Scheduler,
    telemetry: Telemetry,
    /// Frontend under which requests are counted. `None` if another frontend has counted them already.
    frontend: Option<Frontend>,
    default_timeout: Duration,
}

impl Service {
    /// Creates a service for gRPC clients. It counts its requests.
    #[must_use]
    pub fn new(
        models: Models,
        scheduler: Scheduler,
        telemetry: Telemetry,
        default_timeout: Duration,
    ) -> Self {
        Self {
            models,
            scheduler,
            telemetry,
            frontend: Some(Frontend::Grpc),
            default_timeout,
        }
    }

    /// Returns the same service for the HTTP API of this process, which counts the requests itself.
    #[must_use]
    pub fn uncounted(&self) -> Self {
        Self {
            frontend: None,
            ..self.clone()
        }
    }

    /// Returns the tonic server of this service, with its message size limits.
    #[must_use]
    pub fn into_server(self) -> InferenceServer<Self> {
        InferenceServer::new(self)
            .max_decoding_message_size(MAX_MESSAGE_BYTES)
            .max_encoding_message_size(MAX_MESSAGE_BYTES)
    }

    /// Admits a request and starts its stream, or returns the reason for its rejection.
    async fn start(
        &self,
        request: Request<v1::CompletionRequest>,
        id: Result<RequestId, Error>,
    ) -> Result<EventStream, Error> {
        let (id, timeout) = (id?, metadata::timeout(request.metadata())?);
        let timeout = timeout.unwrap_or(self.default_timeout);
        // The HTTP API of this process sets the delivery context, because it delivers the tokens.
        let delivery_context = request.extensions().get::<DeliveryContext>().cloned();
        let flush = request.extensions().get::<FlushHandle>().cloned();
        let request = convert::completion_request(request.into_inner(), id, timeout)?;
        // During a drain, even an invalid request is rejected with `draining`: it may be valid on another server.
        self.scheduler.check_accepting()?;
        let model = self.models.find(request.model.as_deref())?;
        let prompt = Prompt::prepare(model, &request).await?;
        let new_request = NewRequest {
            model: model.id,
            priority: request.priority,
            deadline: request.deadline,
            choices: prompt.sequences(&request),
        };
        let admitted = self.scheduler.submit(new_request).await?;
        let started = v1::Started {
            request_id: request.id.0.to_string(),
            model: model.name.to_string(),
            prompt_tokens: prompt.token_count(),
            seed: request.options.seed.cast_signed(),
        };
        let format = delivery_context
            .as_ref()
            .map_or(ResponseFormat::Grpc, |context| context.format);
        let counted = self
            .frontend
            .map(|frontend| self.telemetry.track_request(frontend));
        let own = counted.as_ref().map(CountedRequest::stream);
        if let Some(stream) = own.or(delivery_context.and_then(|context| context.stream)) {
            admitted.set_stream_count(&stream);
        }
        let engine = self.telemetry.stage_times(format, Stage::Engine);
        let completion = Completion::new(&request, prompt, admitted, engine)?;
        let metrics = counted.map(|counted| RequestMetrics {
            counted,
            timer: DeliveryTimer::new(&self.telemetry, format, flush),
        });
        Ok(EventStream::new(
            completion,
            started,
            request.options.timestamps,
            metrics,
        ))
    }

    /// Counts a rejected request and returns its gRPC status.
    fn reject(&self, error: Error) -> Status {
        if let Some(frontend) = self.frontend {
            self.telemetry.count_rejected_request(frontend, &error);
        }
        error.into()
    }
}

#[tonic::async_trait]
impl Inference for Service {
    type CompleteStream = EventStream;

    async fn complete(
        &self,
        request: Request<v1::CompletionRequest>,
    ) -> Result<Response<EventStream>, Status> {
        let id = metadata::request_id(request.metadata());
        let echoed = id.clone().unwrap_or_else(|_| RequestId::random());
        match self.start(request, id).await {
            Ok(stream) => {
                let mut response = Response::new(stream);
                metadata::echo_request_id(response.metadata_mut(), &echoed);
                Ok(response)
            }
            Err(error) => {
                let mut status = self.reject(error);
                metadata::echo_request_id(status.metadata_mut(), &echoed);
                Err(status)
            }
        }
    }

    async fn list_models(
        &self,
        _request: Request<v1::ListModelsRequest>,
    ) -> Result<Response<v1::ListModelsResponse>, Status> {
        // A model that is still loading has no facts yet, so it is not listed.
        let entries = self.models.entries().iter();
        let models = entries.filter_map(|entry| model(entry).ok()).collect();
        Ok(Response::new(v1::ListModelsResponse { models }))
    }

    async fn get_model(
        &self,
        request: Request<v1::GetModelRequest>,
    ) -> Result<Response<v1::GetModelResponse>, Status> {
        let name = request.into_inner().model;
        let name = convert::model_name(&name);
        let entry = self.models.find(name)?;
        Ok(Response::new(v1::GetModelResponse {
            model: Some(model(entry)?),
        }))
    }

    async fn tokenize(
        &self,
        request: Request<v1::TokenizeRequest>,
    ) -> Result<Response<v1::TokenizeResponse>, Status> {
        let message = request.into_inner();
        let name = convert::model_name(&message.model);
        let model = self.models.find(name)?;
        let bos_policy = if message.add_special_tokens.unwrap_or(true) {
            BosPolicy::Add
        } else {
            BosPolicy::Omit
        };
        let token_ids = match message.input {
            None => {
                let message = "One of text and chat is required.";
                return Err(Error::new(ErrorKind::MissingParameter, message)
                    .with_param("text")
                    .into());
            }
            Some(TokenizeInput::Text(text)) => {
                let tokenizer = Tokenizer::new(model)?;
                tokenizer.tokenize(&text, bos_policy, "text").await?
            }
            Some(TokenizeInput::Chat(chat)) => {
                let messages = convert::chat_messages(chat)?;
                let tokenizer = Tokenizer::new(model)?;
                let text = tokenizer.render_chat(&messages).await?;
                tokenizer.tokenize(&text, bos_policy, "chat").await?
            }
        };
        let context_length = model.model()?.facts().context_length;
        Ok(Response::new(v1::TokenizeResponse {
            token_ids,
            context_length,
        }))
    }

    async fn detokenize(
        &self,
        request: Request<v1::DetokenizeRequest>,
    ) -> Result<Response<v1::DetokenizeResponse>, Status> {
        let v1::DetokenizeRequest { model, token_ids } = request.into_inner();
        let model = self.models.find(convert::model_name(&model))?;
        let text = Tokenizer::new(model)?
            .detokenize(token_ids, "token_ids")
            .await?;
        Ok(Response::new(v1::DetokenizeResponse { text }))
    }
}

fn model(entry: &ModelEntry) -> Result<v1::Model, Error> {
    let facts = entry.model()?.facts();
    let unsupported = facts.unsupported.iter();
    Ok(v1::Model {
        name: entry.name.to_string(),
        runner: entry.runner.to_owned(),
        context_length: facts.context_length,
        created: entry.created,
        aliases: entry.aliases.to_vec(),
        unsupported: unsupported
            .map(|parameter| parameter.name().to_owned())
            .collect(),
        bos_token: facts.bos_token.clone().unwrap_or_default(),
        eos_token: facts.eos_token.clone().unwrap_or_default(),
    })
}
