//! The interface of a dialect: one HTTP API for completions, such as OpenAI's chat completions.
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
use super::echo::Prompt;
use super::field_names::FieldNames;
use super::fields::Fields;
use crate::delivery::DeliverySummary;
use crate::error::Error;
use crate::proto::v1;
use crate::request::{FinishReason, RequestId};
use crate::tokens::TokenBatch;

/// An HTTP API for completions.
pub(super) trait Dialect: 'static {
    /// Path of the route. Its method is `POST`.
    const PATH: &'static str;

    /// The JSON object of an error that is sent instead of a completion.
    type ErrorObject<'a>: From<&'a Error> + Serialize + ToSchema;

    /// Options of a streamed response that only this dialect knows.
    type StreamOptions: Clone + Send + Sync + 'static;

    /// Writer of a streamed response.
    type Writer: RecordWriter;

    /// Describes the route and its schemas. The headers and errors of every route are added later.
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
    fn answer(facts: ResponseFacts, choices: Vec<Choice>, usage: v1::Usage) -> impl Serialize;
}

/// Writes the records of one streamed response. Each method appends whole records, or nothing.
pub(super) trait RecordWriter: Send + Unpin + 'static {
    /// A worker has started a prompt. Called once per prompt, and before all other events of that prompt.
    fn started(&mut self, out: &mut BytesMut, started: &v1::Started);

    /// A choice starts with its prompt. Only for requests that set `echo`.
    fn prompt(&mut self, out: &mut BytesMut, choice: u32, prompt: &Prompt);

    /// A choice has new tokens, or ends.
    fn tokens(&mut self, out: &mut BytesMut, tokens: &ChoiceTokens<'_>);

    /// The completion has succeeded.
    fn end(&mut self, out: &mut BytesMut, end: &StreamEnd);

    /// The completion has failed. Writes at least one byte. Nothing follows.
    fn error(&mut self, out: &mut BytesMut, error: &Error, tokens_delivered: u64);

    /// Returns a record that keeps an idle connection open; `None` if the format has none.
    fn keep_alive(&self) -> Option<Bytes>;
}

/// A completion request, parsed from its body.
#[derive(Debug)]
pub(super) struct ParsedBody<O> {
    /// One engine request per prompt.
    pub(super) messages: Vec<v1::CompletionRequest>,
    /// Choices that the engine generates per prompt. More than the response has with `best_of`.
    pub(super) candidates: u32,
    pub(super) response: ResponseOptions,
    /// Options of a streamed response; `None` if the response is not streamed.
    pub(super) stream: Option<O>,
    /// Maps field names in engine errors to the client's field names.
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
    /// Choices to return per prompt. If the engine generated more, the likeliest are returned.
    pub(super) choices: u32,
    /// Top log probabilities to return per token; `None` for no log probabilities.
    pub(super) logprobs: Option<u32>,
}

/// Facts about a response that every dialect shows.
pub(super) struct ResponseFacts {
    pub(super) request_id: RequestId,
    /// Creation time, in seconds since the Unix epoch.
    pub(super) created: u64,
    /// Name of the model; empty if no worker has started the request.
    pub(super) model: String,
}

/// Tokens of one choice.
pub struct ChoiceTokens<'a> {
    /// Index of the choice in the response.
    pub index: u32,
    /// Tokens, in order.
    pub tokens: &'a TokenBatch,
    /// Finish reason, if these are the last tokens of the choice.
    pub finish_reason: Option<FinishReason>,
}

/// End of a successful stream.
pub(super) struct StreamEnd {
    pub(super) usage: v1::Usage,
    /// Times in the engine.
    pub(super) timings: v1::Timings,
    /// Time per token in the stages that the gateway measures.
    pub(super) delivery: DeliverySummary,
}

/// A choice of a response that is not streamed.
#[derive(Default)]
pub(super) struct Choice {
    /// Generated text, after the prompt if the request sets `echo`.
    pub(super) text: String,
    pub(super) finish_reason: Option<FinishReason>,
    /// Tokens with log probabilities; `None` unless the response has them.
    pub(super) scored: Option<ScoredTokens>,
}

/// The tokens of a choice with their log probabilities.
#[derive(Default)]
pub(super) struct ScoredTokens {
    /// The prompt before the choice, if the request sets `echo`.
    pub(super) prompt: Option<Arc<Prompt>>,
    /// Generated tokens, in order.
    pub(super) generated: Vec<TokenBatch>,
}
