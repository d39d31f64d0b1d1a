//! The gRPC service `tokenway.v1.Inference`: requests in, events out. It must not know HTTP or how tokens are
//! generated.

use std::sync::Arc;

use tonic::{Request, Response, Status};

use crate::context::RequestContext;
use crate::delivery::DeliveryTimer;
use crate::error::{Error, ErrorKind};
use crate::models::{ModelEntry, Models};
use crate::prompt::{Prompt, Tokenizer};
use crate::proto::v1;
use crate::proto::v1::inference_server::{Inference, InferenceServer};
use crate::proto::v1::tokenize_request::Input as TokenizeInput;
use crate::request::Parameter;
use crate::runner::BosPolicy;
use crate::scheduler::{NewRequest, Scheduler};
use crate::telemetry::{Api, RouteKind, Stage, Telemetry};
use crate::text::completion::Completion;
use crate::token_charges::TokenCharges;

mod convert;
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) mod fuzzing;
mod large_resume;
mod passed_on;
mod stream;
mod tonic_errors;
mod without_prompt;

pub(crate) use convert::first_used_parameter;
use large_resume::LargeResumes;
use stream::Delivery;
pub(crate) use stream::EventStream;
pub(crate) use tonic_errors::replace_tonic_error;

/// Maximum size of a message in either direction, in bytes.
pub(crate) const MAX_MESSAGE_BYTES: usize = 4 * 1024 * 1024;

/// Paths of the service's RPCs.
pub(crate) const RPCS: [(&str, RouteKind); 5] = [
    ("/tokenway.v1.Inference/Complete", RouteKind::Completion),
    ("/tokenway.v1.Inference/ListModels", RouteKind::Unary),
    ("/tokenway.v1.Inference/GetModel", RouteKind::Unary),
    ("/tokenway.v1.Inference/Tokenize", RouteKind::Unary),
    ("/tokenway.v1.Inference/Detokenize", RouteKind::Unary),
];

/// Implementation of `tokenway.v1.Inference` for the models of one engine. Every request must carry a
/// [`RequestContext`].
#[derive(Clone)]
pub(crate) struct InferenceService {
    models: Models,
    scheduler: Arc<Scheduler>,
    telemetry: Telemetry,
    large_resumes: LargeResumes,
}

impl InferenceService {
    /// Creates the service.
    #[must_use]
    pub(crate) fn new(models: Models, scheduler: Arc<Scheduler>, telemetry: Telemetry) -> Self {
        Self {
            models,
            scheduler,
            telemetry,
            large_resumes: LargeResumes::default(),
        }
    }

    /// Returns the tonic server of this service, with its message size limits.
    #[must_use]
    pub(crate) fn into_server(self) -> InferenceServer<Self> {
        InferenceServer::new(self)
            .max_decoding_message_size(MAX_MESSAGE_BYTES)
            .max_encoding_message_size(MAX_MESSAGE_BYTES)
    }

    /// Submits a completion request and starts its stream, or returns the reason for its rejection.
    async fn start(&self, request: Request<v1::CompletionRequest>) -> Result<EventStream, Error> {
        let context = RequestContext::from_extensions(request.extensions())?;
        let message = request.into_inner();
        // The model is looked up before the fields are checked, so that a request with an invalid field is counted
        // with its model. If both are wrong, the error names the field.
        let model = self.find_model(&context, &message.model);
        let mut request = convert::completion_request(message, &context)?;
        request.scope_cache_salt(|user, salt| context.cache_salt(user, salt));
        // During a drain, even an invalid request is rejected with `draining`, because another server may accept it.
        self.scheduler.check_accepting()?;
        let model = model?;
        let turn = self.large_resumes.wait_for_turn(&request).await?;
        let prompt = Prompt::prepare(model, &request).await?;
        let reservation = context.reserve_tokens(prompt.token_need(&request))?;
        let new_request = NewRequest {
            model: model.id,
            caller: context.caller_share(),
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
            text_only: false,
        };
        let record = context.record();
        admitted.set_request_gauge(record.request_gauge());
        let engine = self.telemetry.stage_times(record.format(), Stage::Engine);
        let timestamps = request.options.timestamps;
        let resumed = request.resumed_tokens();
        let create = move || Completion::new(&request, prompt, admitted, engine);
        let completion = match turn {
            None => create()?,
            Some(turn) => turn.run(create).await?,
        };
        let delivery = match context.api() {
            Api::Grpc => Some(Delivery {
                timer: DeliveryTimer::new(record, context.flush_handle().clone()),
                context,
            }),
            // The HTTP API of this process measures the delivery of the tokens itself.
            Api::Http => None,
        };
        Ok(EventStream::new(
            completion,
            started,
            timestamps,
            reservation.map(|it| TokenCharges::new(it, resumed)),
            delivery,
        ))
    }

    /// Finds a model by name, and reports the model to the request's context.
    fn find_model(&self, context: &RequestContext, name: &str) -> Result<&ModelEntry, Error> {
        context.record().set_requested_model(name);
        let found = self.models.find(convert::model_name(name));
        // The key is checked first: the error for an unknown model lists all models.
        match &found {
            Ok(entry) if entry.names().any(|own| own == name) => {
                context.check_model(name, Some(&entry.name))?;
            }
            // Without a name, or with --any-model, the request gets a model that it did not name.
            Ok(entry) => context.check_model("", Some(&entry.name))?,
            Err(_) => context.check_model(name, None)?,
        }
        let entry = found.map_err(|error| context.hide_models(error, name))?;
        context.record().set_model(&entry.name);
        Ok(entry)
    }
}

#[tonic::async_trait]
impl Inference for InferenceService {
    type CompleteStream = EventStream;

    async fn complete(
        &self,
        request: Request<v1::CompletionRequest>,
    ) -> Result<Response<EventStream>, Status> {
        let stream = self.start(request).await?;
        Ok(Response::new(stream))
    }

    async fn list_models(
        &self,
        request: Request<v1::ListModelsRequest>,
    ) -> Result<Response<v1::ListModelsResponse>, Status> {
        let context = RequestContext::from_extensions(request.extensions())?;
        // A model that is still loading has no facts yet, so the list leaves it out.
        let entries = self.models.entries().iter();
        let models = entries
            .filter(|entry| context.allows_model(entry.names()))
            .filter_map(|entry| model_message(entry).ok())
            .collect();
        Ok(Response::new(v1::ListModelsResponse { models }))
    }

    async fn get_model(
        &self,
        request: Request<v1::GetModelRequest>,
    ) -> Result<Response<v1::GetModelResponse>, Status> {
        let context = RequestContext::from_extensions(request.extensions())?;
        let entry = self.find_model(&context, &request.get_ref().model)?;
        Ok(Response::new(v1::GetModelResponse {
            model: Some(model_message(entry)?),
        }))
    }

    async fn tokenize(
        &self,
        request: Request<v1::TokenizeRequest>,
    ) -> Result<Response<v1::TokenizeResponse>, Status> {
        let context = RequestContext::from_extensions(request.extensions())?;
        let message = request.into_inner();
        let model = self.find_model(&context, &message.model)?;
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
                passed_on::check_plain_chat(&chat)?;
                let messages = convert::chat_messages(chat)?;
                let tokenizer = Tokenizer::new(model)?;
                let text = tokenizer.render_chat(&messages).await?;
                tokenizer.tokenize(&text, bos_policy, "chat").await?
            }
        };
        let context_length = model.loaded_model()?.facts().context_length;
        Ok(Response::new(v1::TokenizeResponse {
            token_ids,
            context_length,
        }))
    }

    async fn detokenize(
        &self,
        request: Request<v1::DetokenizeRequest>,
    ) -> Result<Response<v1::DetokenizeResponse>, Status> {
        let context = RequestContext::from_extensions(request.extensions())?;
        let v1::DetokenizeRequest { model, token_ids } = request.into_inner();
        let model = self.find_model(&context, &model)?;
        let text = Tokenizer::new(model)?
            .detokenize(token_ids, "token_ids")
            .await?;
        Ok(Response::new(v1::DetokenizeResponse { text }))
    }
}

fn model_message(entry: &ModelEntry) -> Result<v1::Model, Error> {
    let facts = entry.loaded_model()?.facts();
    let unsupported = facts.unsupported.iter().chain(&Parameter::PASSED_ON);
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
