//! The dialect of `/v1/chat/completions`: the route, and the response that is not streamed.
//!
//! `chat/body.rs` reads the body, and `lines.rs` writes a stream.

use axum::http::HeaderMap;
use serde::Serialize;
use utoipa::ToSchema;
use utoipa::openapi::OpenApi;

use super::description::{Operation, describe, embed};
use super::lines::LineWriter;
use super::logprobs::ChatLogprobs;
use super::metadata::{CompletionRoute, ResponseMetadata};
use super::stream_options::StreamOptions;
use super::usage::{Usage, finish_reason_name};
use crate::error::Error;
use crate::gateway::accept::{StreamFormat, negotiate};
use crate::gateway::collected_message::CollectedMessage;
use crate::gateway::dialect::{self, Dialect, ParsedBody, ResponseFacts, StreamRequest};
use crate::gateway::error_response::ErrorObject;
use crate::gateway::fields::Fields;
use crate::proto::v1;

mod body;
mod tools;

use body::ChatBody;
use tools::ToolFields;

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
            embed_more: embed::<ToolFields>,
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
    /// `stop`, `length`, `tool_calls` or `content_filter`.
    #[schema(required)]
    finish_reason: Option<&'static str>,
}

/// The generated message of a chat completion.
#[derive(Serialize, ToSchema)]
struct ChatAnswer {
    /// `assistant`.
    role: &'static str,
    /// Generated text; null if the message has only tool calls or a refusal.
    #[schema(required)]
    content: Option<String>,
    /// Refusal of the model; null unless the engine reports one.
    #[schema(required)]
    refusal: Option<String>,
    /// Reasoning before the answer, if the engine reports it.
    #[serde(skip_serializing_if = "Option::is_none")]
    reasoning_content: Option<String>,
    /// Tools that the model calls, if any.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    #[schema(required = false)]
    tool_calls: Vec<ToolCall>,
}

/// A call of a tool.
#[derive(Serialize, ToSchema)]
struct ToolCall {
    /// Id of the call, which the tool's answer repeats.
    id: String,
    /// `function`.
    r#type: String,
    /// The called function.
    function: CalledFunction,
}

/// A called function.
#[derive(Serialize, ToSchema)]
struct CalledFunction {
    /// Name of the function.
    name: String,
    /// Arguments as the model wrote them: JSON as text, possibly invalid.
    arguments: String,
}

fn chat_choice((index, choice): (u32, dialect::CollectedChoice)) -> ChatChoice {
    ChatChoice {
        index,
        logprobs: choice.scored.as_ref().map(ChatLogprobs::of_choice),
        message: ChatAnswer::new(choice.text, choice.chat),
        finish_reason: choice.finish_reason.map(finish_reason_name),
    }
}

impl ChatAnswer {
    fn new(text: String, mut parts: CollectedMessage) -> Self {
        let non_empty = |text: String| Some(text).filter(|text| !text.is_empty());
        let reasoning_content = non_empty(std::mem::take(&mut parts.reasoning));
        let refusal = non_empty(std::mem::take(&mut parts.refusal));
        let has_no_text = text.is_empty() && (parts.has_tool_calls() || refusal.is_some());
        Self {
            role: "assistant",
            content: (!has_no_text).then_some(text),
            refusal,
            reasoning_content,
            tool_calls: parts.into_tool_calls().map(ToolCall::from).collect(),
        }
    }
}

impl From<v1::ToolCallDelta> for ToolCall {
    fn from(call: v1::ToolCallDelta) -> Self {
        let has_type = !call.r#type.is_empty();
        Self {
            id: call.id,
            // Some engines leave out the only type that they have.
            r#type: if has_type {
                call.r#type
            } else {
                "function".to_owned()
            },
            function: CalledFunction {
                name: call.name,
                arguments: call.arguments,
            },
        }
    }
}
