//! The dialect of `/v1/chat/completions`: the route, and the response that is not streamed.
//!
//! `chat/body.rs` reads the body, and `lines.rs` writes a stream.

use axum::http::HeaderMap;
use serde::Serialize;
use utoipa::ToSchema;
use utoipa::openapi::OpenApi;

use super::description::{Operation, describe};
use super::lines::LineWriter;
use super::logprobs::ChatLogprobs;
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

use body::ChatBody;

/// `/v1/chat/completions`.
pub(in crate::gateway) struct Chat;

impl Dialect for Chat {
    const PATH: &'static str = "/v1/chat/completions";

    type ErrorObject<'a> = ErrorObject<'a>;
    type StreamOptions = StreamOptions;
    type Writer = LineWriter;

    fn describe() -> OpenApi {
        describe::<ChatBody, ChatCompletion>(&Operation {
            path: Self::PATH,
            id: "chat",
            summary: "Completes a chat.",
            unsupported: ChatBody::UNSUPPORTED,
        })
    }

    fn parse(fields: &mut Fields) -> Result<ParsedBody<StreamOptions>, Error> {
        ChatBody::parse(fields)
    }

    /// Returns server-sent events unless the client prefers another format, because chat clients expect them.
    fn stream_format(headers: &HeaderMap, _: StreamFormat) -> Result<StreamFormat, Error> {
        negotiate(headers, StreamFormat::Sse)
    }

    fn writer(stream: StreamRequest<StreamOptions>, facts: ResponseFacts) -> LineWriter {
        LineWriter::for_request(&stream, ResponseMetadata::new(CompletionRoute::Chat, facts))
    }

    fn unary_body(
        facts: ResponseFacts,
        choices: Vec<dialect::CollectedChoice>,
        usage: v1::Usage,
    ) -> impl Serialize {
        let metadata = ResponseMetadata::new(CompletionRoute::Chat, facts);
        ChatCompletion {
            id: metadata.id,
            object: "chat.completion",
            created: metadata.created,
            model: metadata.model,
            choices: (0..).zip(choices).map(chat_choice).collect(),
            usage: usage.into(),
        }
    }
}

/// A chat completion that is not streamed.
#[derive(Serialize, ToSchema)]
struct ChatCompletion {
    /// `chatcmpl-` followed by the request id.
    id: String,
    /// `chat.completion`.
    object: &'static str,
    /// Creation time, in seconds since the Unix epoch.
    created: u64,
    /// Name of the model.
    model: String,
    /// Choices, ordered by index.
    choices: Vec<ChatChoice>,
    /// Token counts.
    usage: Usage,
}

/// One choice of a chat completion.
#[derive(Serialize, ToSchema)]
struct ChatChoice {
    /// Index of the choice, from 0.
    index: u32,
    /// Generated message.
    message: ChatAnswer,
    /// Log probabilities of the tokens; null unless `logprobs` is set.
    #[schema(required)]
    logprobs: Option<ChatLogprobs>,
    /// `stop` or `length`.
    #[schema(required)]
    finish_reason: Option<&'static str>,
}

/// The generated message of a chat completion.
#[derive(Serialize, ToSchema)]
struct ChatAnswer {
    /// `assistant`.
    role: &'static str,
    /// Generated text.
    content: String,
    /// Always null: the server does not detect refusals.
    #[schema(required)]
    refusal: Option<&'static str>,
}

fn chat_choice((index, choice): (u32, dialect::CollectedChoice)) -> ChatChoice {
    ChatChoice {
        index,
        logprobs: choice.scored.as_ref().map(ChatLogprobs::of_choice),
        message: ChatAnswer {
            role: "assistant",
            content: choice.text,
            refusal: None,
        },
        finish_reason: choice.finish_reason.map(finish_reason_name),
    }
}
