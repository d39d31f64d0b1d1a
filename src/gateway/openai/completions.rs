//! The dialect of `/v1/completions`: the route, and the response that is not streamed.
//!
//! `completions/body.rs` reads the body, and `lines.rs` writes a stream.

use axum::http::HeaderMap;
use serde::Serialize;
use utoipa::ToSchema;
use utoipa::openapi::OpenApi;

use super::description::{Operation, describe};
use super::lines::LineWriter;
use super::logprobs::CompletionLogprobs;
use super::metadata::{CompletionRoute, ResponseMetadata};
use super::stream_options::StreamOptions;
use super::usage::{Usage, finish_reason_name};
use crate::error::Error;
use crate::gateway::accept::{StreamFormat, negotiate};
use crate::gateway::dialect::{self, Dialect, ParsedBody, ResponseFacts, StreamRequest};
use crate::gateway::error_response::ErrorObject;
use crate::gateway::fields::Fields;
use crate::proto::v1;

mod body;

use body::CompletionsBody;

/// `/v1/completions`.
pub(in crate::gateway) struct Completions;

impl Dialect for Completions {
    const PATH: &'static str = "/v1/completions";

    type ErrorObject<'a> = ErrorObject<'a>;
    type StreamOptions = StreamOptions;
    type Writer = LineWriter;

    fn describe() -> OpenApi {
        describe::<CompletionsBody, Completion>(&Operation {
            path: Self::PATH,
            id: "complete",
            summary: "Completes prompts.",
            unsupported: CompletionsBody::UNSUPPORTED,
            embed_more: |_, _| (),
        })
    }

    fn parse(fields: &mut Fields) -> Result<ParsedBody<StreamOptions>, Error> {
        CompletionsBody::parse(fields)
    }

    fn stream_format(headers: &HeaderMap, configured: StreamFormat) -> Result<StreamFormat, Error> {
        negotiate(headers, configured)
    }

    fn writer(stream: StreamRequest<StreamOptions>, facts: ResponseFacts) -> LineWriter {
        LineWriter::for_request(
            &stream,
            ResponseMetadata::new(CompletionRoute::Completions, facts),
        )
    }

    fn unary_body(
        facts: ResponseFacts,
        choices: Vec<dialect::CollectedChoice>,
        usage: v1::Usage,
    ) -> impl Serialize {
        let metadata = ResponseMetadata::new(CompletionRoute::Completions, facts);
        Completion {
            id: metadata.id,
            object: "text_completion",
            created: metadata.created,
            model: metadata.model,
            choices: (0..).zip(choices).map(completion_choice).collect(),
            usage: usage.into(),
        }
    }
}

/// A completion that is not streamed.
#[derive(Serialize, ToSchema)]
struct Completion {
    /// `cmpl-` followed by the request id.
    id: String,
    /// `text_completion`.
    object: &'static str,
    /// Creation time, in seconds since the Unix epoch.
    created: u64,
    /// Name of the model.
    model: String,
    /// Choices of all prompts, ordered by index.
    choices: Vec<CompletionChoice>,
    /// Token counts.
    usage: Usage,
}

/// One choice of a completion.
#[derive(Serialize, ToSchema)]
struct CompletionChoice {
    /// Index among all choices of the response: the prompt's index times `n`, plus the index within the prompt.
    index: u32,
    /// Generated text, after the prompt if `echo` is set.
    text: String,
    /// Log probabilities of the tokens; null unless `logprobs` is set.
    #[schema(required)]
    logprobs: Option<CompletionLogprobs>,
    /// `stop` or `length`.
    #[schema(required)]
    finish_reason: Option<&'static str>,
}

fn completion_choice((index, choice): (u32, dialect::CollectedChoice)) -> CompletionChoice {
    CompletionChoice {
        index,
        logprobs: choice.scored.as_ref().map(CompletionLogprobs::of_choice),
        text: choice.text,
        finish_reason: choice.finish_reason.map(finish_reason_name),
    }
}
