//! The interface of a dialect. A dialect is one HTTP API for completions, such as OpenAI's chat completions.
//!
//! A dialect reads a request's body into requests for the engine, and writes the engine's events as the response. The
//! code around it is the same for every dialect: `complete.rs` admits the request, `stream_body.rs` sends a stream,
//! and `unary.rs` collects a response that is not streamed. That code is generic, so a token costs no virtual call.

use std::sync::Arc;

use axum::http::HeaderMap;
use bytes::{Bytes, BytesMut};
use serde::Serialize;
use utoipa::ToSchema;
use utoipa::openapi::OpenApi;

use super::accept::StreamFormat;
use super::collected_message::CollectedMessage;
use super::echoed_prompts::PromptEcho;
use super::field_names::FieldNames;
use super::fields::Fields;
use crate::delivery::DeliverySummary;
use crate::error::Error;
use crate::proto::v1;
use crate::request::RequestId;
use crate::tokens::TokenBatch;

/// An HTTP API for completions.
pub(super) trait Dialect: 'static {
    /// Path of the route. Its HTTP method is `POST`.
    const PATH: &'static str;

    /// The JSON object of an error response.
    type ErrorObject<'a>: From<&'a Error> + Serialize + ToSchema;

    /// Options of a streamed response that only this dialect knows.
    type StreamOptions: Clone + Send + Sync + 'static;

    /// Writer of a streamed response.
    type Writer: RecordWriter;

    /// Describes the route and its schemas for OpenAPI. The headers and errors that all routes share are added later.
    fn describe() -> OpenApi;

    /// Reads a body.
    ///
    /// # Errors
    /// An error that names the first invalid field.
    fn parse(fields: &mut Fields) -> Result<ParsedBody<Self::StreamOptions>, Error>;

    /// Selects the format of a streamed response. `configured` is the server's default format.
    ///
    /// # Errors
    /// The client accepts none of the dialect's formats.
    fn stream_format(headers: &HeaderMap, configured: StreamFormat) -> Result<StreamFormat, Error>;

    /// Creates the writer of a streamed response.
    fn writer(stream: StreamRequest<Self::StreamOptions>, facts: ResponseFacts) -> Self::Writer;

    /// Builds the JSON object of a response that is not streamed.
    fn unary_body(
        facts: ResponseFacts,
        choices: Vec<CollectedChoice>,
        usage: v1::Usage,
    ) -> impl Serialize;
}

/// Writes the records of one streamed response. Each method appends whole records, or nothing.
pub(super) trait RecordWriter: Send + Unpin + 'static {
    /// Called when a worker has started a prompt: once per prompt, before all other events of that prompt.
    fn write_start(&mut self, out: &mut BytesMut, started: &v1::Started);

    /// Called when a choice starts, with its prompt. Only for a request that sets `echo`.
    fn write_prompt(&mut self, out: &mut BytesMut, choice: u32, prompt: &PromptEcho);

    /// Called when a choice has new tokens or ends.
    fn write_tokens(&mut self, out: &mut BytesMut, tokens: &ChoiceTokens<'_>);

    /// Called when a choice of a chat has new parts besides its text. Never called for other requests.
    fn write_chat_delta(&mut self, out: &mut BytesMut, delta: &v1::ChatDelta);

    /// Called when the completion has succeeded.
    fn write_end(&mut self, out: &mut BytesMut, end: &StreamEnd);

    /// Called when the completion has failed. Writes at least one byte. No other call follows.
    fn write_error(&mut self, out: &mut BytesMut, error: &Error, tokens_delivered: u64);

    /// Returns a record that keeps an idle connection open, or `None` if the format has no such record.
    fn keep_alive(&self) -> Option<Bytes>;
}

/// A completion request, parsed from its body.
#[derive(Debug)]
pub(super) struct ParsedBody<O> {
    /// One engine request per prompt.
    pub(super) messages: Vec<v1::CompletionRequest>,
    /// Number of choices that the engine generates per prompt. With `best_of`, it is larger than the number in the
    /// response.
    pub(super) candidates: u32,
    pub(super) response: ResponseOptions,
    /// Options of a streamed response; `None` if the response is not streamed.
    pub(super) stream: Option<O>,
    /// The client's names of the fields that the engine's errors name.
    pub(super) names: FieldNames,
}

/// The stream that a request asks for.
#[derive(Clone)]
pub(super) struct StreamRequest<O> {
    pub(super) format: StreamFormat,
    pub(super) options: O,
    pub(super) response: ResponseOptions,
}

/// Number of choices and log probabilities in the response.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct ResponseOptions {
    /// Number of choices to return per prompt. If the engine generated more, the most likely ones are returned.
    pub(super) choices: u32,
    /// Number of top log probabilities to return per token. `None` returns no log probabilities.
    pub(super) logprobs: Option<u32>,
}

/// Facts that every dialect shows in a response.
pub(super) struct ResponseFacts {
    pub(super) request_id: RequestId,
    /// Creation time, in seconds since the Unix epoch.
    pub(super) created: u64,
    /// Name of the model. Empty if no worker has started the request.
    pub(super) model: String,
}

/// The reason why a choice ended successfully.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FinishReason {
    /// The model ended the text, or a stop string or stop token matched.
    Stop,
    /// The choice reached `max_tokens`.
    Length,
    /// The engine's content filter ended the choice.
    ContentFilter,
    /// The model called tools.
    ToolCalls,
}

/// Tokens of one choice.
pub struct ChoiceTokens<'a> {
    /// Index of the choice in the response.
    pub index: u32,
    /// Tokens, in order.
    pub tokens: &'a TokenBatch,
    /// Finish reason, if these are the choice's last tokens.
    pub finish_reason: Option<FinishReason>,
}

/// The end of a successful stream.
pub(super) struct StreamEnd {
    pub(super) usage: v1::Usage,
    /// Times in the engine.
    pub(super) timings: v1::Timings,
    /// Time per token in the stages that the gateway measures.
    pub(super) delivery: DeliverySummary,
}

/// A choice of a response that is not streamed.
#[derive(Default)]
pub(super) struct CollectedChoice {
    /// Generated text, after the prompt if the request sets `echo`.
    pub(super) text: String,
    pub(super) finish_reason: Option<FinishReason>,
    /// Tokens with their log probabilities. `None` if the response has none.
    pub(super) scored: Option<ScoredTokens>,
    /// Parts of a chat message besides its text.
    pub(super) chat: CollectedMessage,
}

/// The tokens of a choice with their log probabilities.
#[derive(Default)]
pub(super) struct ScoredTokens {
    /// The prompt before the choice, if the request sets `echo`.
    pub(super) prompt: Option<Arc<PromptEcho>>,
    /// Generated tokens, in order.
    pub(super) generated: Vec<TokenBatch>,
}
