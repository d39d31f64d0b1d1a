//! The JSON objects of answers. The API's description is made from them.

use std::collections::BTreeMap;

use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use utoipa::ToSchema;

use super::json::to_vec;
use super::logprobs::{ChatLogprobs, CompletionLogprobs};
use crate::proto::v1;
use crate::telemetry::WorkerCounts;

/// A completion that is not streamed.
#[derive(Serialize, ToSchema)]
pub(super) struct Completion {
    /// `cmpl-` and the request's id.
    pub(super) id: String,
    /// `text_completion`.
    pub(super) object: &'static str,
    /// When it was made, in seconds since the Unix epoch.
    pub(super) created: u64,
    /// The model.
    pub(super) model: String,
    /// Each prompt's choices.
    pub(super) choices: Vec<CompletionChoice>,
    /// What was used.
    pub(super) usage: Usage,
}

/// One choice of a completion.
#[derive(Serialize, ToSchema)]
pub(super) struct CompletionChoice {
    /// Its index among all choices of the answer: prompt times `n` plus the choice of the prompt.
    pub(super) index: u32,
    /// Its text.
    pub(super) text: String,
    /// Its tokens' log probabilities, where they are asked for.
    #[schema(required)]
    pub(super) logprobs: Option<CompletionLogprobs>,
    /// `stop` or `length`.
    #[schema(required)]
    pub(super) finish_reason: Option<&'static str>,
}

/// A chat's completion that is not streamed.
#[derive(Serialize, ToSchema)]
pub(super) struct ChatCompletion {
    /// `chatcmpl-` and the request's id.
    pub(super) id: String,
    /// `chat.completion`.
    pub(super) object: &'static str,
    /// When it was made, in seconds since the Unix epoch.
    pub(super) created: u64,
    /// The model.
    pub(super) model: String,
    /// The choices.
    pub(super) choices: Vec<ChatChoice>,
    /// What was used.
    pub(super) usage: Usage,
}

/// One choice of a chat's completion.
#[derive(Serialize, ToSchema)]
pub(super) struct ChatChoice {
    /// Its index.
    pub(super) index: u32,
    /// What is answered.
    pub(super) message: ChatAnswer,
    /// Its tokens' log probabilities, where they are asked for.
    #[schema(required)]
    pub(super) logprobs: Option<ChatLogprobs>,
    /// `stop` or `length`.
    #[schema(required)]
    pub(super) finish_reason: Option<&'static str>,
}

/// What a chat's completion answers.
#[derive(Serialize, ToSchema)]
pub(super) struct ChatAnswer {
    /// `assistant`.
    pub(super) role: &'static str,
    /// The text.
    pub(super) content: String,
    /// Always null: nothing here refuses to answer.
    #[schema(required)]
    pub(super) refusal: Option<&'static str>,
}

/// Tokens that were used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, ToSchema)]
pub(super) struct Usage {
    /// Tokens of the prompts, each counted once.
    pub(super) prompt_tokens: u64,
    /// Tokens generated over all choices, shown or not.
    pub(super) completion_tokens: u64,
    /// Both together.
    pub(super) total_tokens: u64,
}

impl Usage {
    pub(super) fn new(prompt_tokens: u64, completion_tokens: u64) -> Self {
        Self {
            prompt_tokens,
            completion_tokens,
            total_tokens: prompt_tokens + completion_tokens,
        }
    }
}

impl From<v1::Usage> for Usage {
    fn from(usage: v1::Usage) -> Self {
        Self::new(usage.prompt_tokens.into(), usage.completion_tokens.into())
    }
}

/// One event of a stream of server-sent events.
#[derive(ToSchema)]
#[expect(dead_code, reason = "`LineWriter` writes it; this is its description")]
pub(super) struct ServerSentEvent {
    /// The JSON object of a line, or `[DONE]` after the last.
    data: String,
}

/// The tokens of a text.
#[derive(Serialize, ToSchema)]
pub(super) struct Tokenized {
    /// How many.
    pub(super) count: usize,
    /// The model's context, in tokens.
    pub(super) max_model_len: u32,
    /// Their ids, in order.
    pub(super) tokens: Vec<u32>,
}

/// The text of tokens.
#[derive(Serialize, ToSchema)]
pub(super) struct Detokenized {
    /// The text; bytes that are no UTF-8 are replaced by U+FFFD. Tokens that steer the model, such as the
    /// end of the sequence, have none.
    pub(super) prompt: String,
}

/// What a client must know of the tokenizer of a model to count as the model does.
#[derive(Serialize, ToSchema)]
pub(super) struct TokenizerInfo {
    /// How the token is spelled with which the model begins every prompt.
    #[schema(required)]
    bos_token: Option<String>,
    /// How the token is spelled by which the model ends its output.
    #[schema(required)]
    eos_token: Option<String>,
    /// The model's context, in tokens.
    model_max_length: u32,
}

impl From<v1::Model> for TokenizerInfo {
    fn from(model: v1::Model) -> Self {
        let known = |token_bytes: String| Some(token_bytes).filter(|it| !it.is_empty());
        Self {
            bos_token: known(model.bos_token),
            eos_token: known(model.eos_token),
            model_max_length: model.context_length,
        }
    }
}

/// All models.
#[derive(Serialize, ToSchema)]
pub(super) struct ModelList {
    /// `list`.
    pub(super) object: &'static str,
    /// The models, by name.
    pub(super) data: Vec<Model>,
}

/// One model.
#[derive(Serialize, ToSchema)]
pub(super) struct Model {
    /// The name that requests give.
    id: String,
    /// `model`.
    object: &'static str,
    /// When it began to be served, in seconds since the Unix epoch.
    created: i64,
    /// `tokenway`.
    owned_by: &'static str,
    /// Its context, in tokens.
    max_model_len: u32,
    /// Other names that requests may give.
    aliases: Vec<String>,
}

impl From<v1::Model> for Model {
    fn from(model: v1::Model) -> Self {
        Self {
            id: model.name,
            object: "model",
            created: model.created,
            owned_by: "tokenway",
            max_model_len: model.context_length,
            aliases: model.aliases,
        }
    }
}

/// The server's state.
#[derive(Serialize, ToSchema)]
pub(super) struct Status {
    /// `alive`, `ready` or `healthy`.
    status: &'static str,
    /// At `/readyz`, how many of the engine's workers are `loading`, `ready`, `lost`, `failed` or `given_up`.
    #[serde(skip_serializing_if = "Option::is_none")]
    workers: Option<BTreeMap<&'static str, u32>>,
}

impl Status {
    pub(super) fn of(status: &'static str) -> Self {
        Self {
            status,
            workers: None,
        }
    }

    pub(super) fn with_workers(self, workers: Option<WorkerCounts>) -> Self {
        let by_label = |counts: WorkerCounts| {
            let counts = counts.into_iter();
            counts
                .map(|(state, count)| (state.label(), count))
                .collect()
        };
        Self {
            workers: workers.map(by_label),
            ..self
        }
    }
}

/// OpenAI's name of a finish reason.
pub(super) fn finish_reason(reason: v1::FinishReason) -> Option<&'static str> {
    match reason {
        v1::FinishReason::Unspecified => None,
        v1::FinishReason::Stop => Some("stop"),
        v1::FinishReason::Length => Some("length"),
    }
}

/// An answer of one JSON object.
pub(super) fn json(object: &impl Serialize) -> Response {
    ([(CONTENT_TYPE, "application/json")], to_vec(object)).into_response()
}
