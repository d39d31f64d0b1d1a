//! The request for a completion, as JSON over HTTP and as a message over gRPC.

use bytes::Bytes;
use http::Request;
use http::header::{ACCEPT, CONTENT_TYPE, HOST, TE};
use prost::Message;
use serde::Serialize;
use tokenway::proto::v1;
use tokenway::proto::v1::completion_request::Input;

use crate::arguments::ServerUrl;

/// Request for a completion. The default is a stream whose model the server chooses.
#[derive(Clone, Copy, Debug, Serialize)]
pub(crate) struct CompletionRequest<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) model: Option<&'a str>,
    #[serde(flatten)]
    pub(crate) input: RequestInput<'a>,
    pub(crate) max_tokens: u32,
    pub(crate) stream: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) seed: Option<i64>,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub(crate) ignore_eos: bool,
    /// Sampling temperature. 0 always chooses the most probable token.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) temperature: Option<f32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) stream_options: Option<StreamOptions>,
}

/// Text or token ids to complete, or the messages of a chat.
#[derive(Clone, Copy, Debug, Serialize)]
#[serde(untagged)]
pub(crate) enum RequestInput<'a> {
    Text { prompt: &'a str },
    TokenIds { prompt: &'a [u32] },
    Chat { messages: &'a [ChatMessage<'a>] },
}

#[derive(Clone, Copy, Debug, Serialize)]
pub(crate) struct ChatMessage<'a> {
    pub(crate) role: &'a str,
    pub(crate) content: &'a str,
}

/// Requests the timestamps of tokens, or the timings or the usage at the end of the stream.
#[derive(Clone, Copy, Debug, Serialize)]
#[serde(rename_all = "snake_case")]
#[expect(
    clippy::enum_variant_names,
    reason = "the names of the API's fields have this prefix"
)]
pub(crate) enum StreamOptions {
    IncludeStamps(bool),
    IncludeTimings(bool),
    IncludeUsage(bool),
}

impl CompletionRequest<'_> {
    /// Returns a request for a stream of this many tokens. The test runner's tokens do not depend on the prompt.
    pub(crate) fn of_tokens(max_tokens: u32) -> Self {
        Self {
            model: None,
            input: RequestInput::Text {
                prompt: "Count the tokens.",
            },
            max_tokens,
            stream: true,
            seed: None,
            ignore_eos: false,
            temperature: None,
            stream_options: None,
        }
    }

    pub(crate) fn to_json(self) -> String {
        serde_json::to_string(&self).expect("a request has no keys that JSON cannot have")
    }

    pub(crate) fn to_message(self) -> v1::CompletionRequest {
        v1::CompletionRequest {
            model: self.model.unwrap_or_default().to_owned(),
            input: Some(self.input.to_message()),
            max_tokens: Some(self.max_tokens),
            seed: self.seed,
            ignore_eos: self.ignore_eos,
            temperature: self.temperature,
            include_stamps: matches!(self.stream_options, Some(StreamOptions::IncludeStamps(_))),
            ..v1::CompletionRequest::default()
        }
    }
}

impl RequestInput<'_> {
    pub(crate) fn path(self) -> &'static str {
        match self {
            Self::Text { .. } | Self::TokenIds { .. } => "/v1/completions",
            Self::Chat { .. } => "/v1/chat/completions",
        }
    }

    fn to_message(self) -> Input {
        match self {
            Self::Text { prompt } => Input::Prompt(prompt.to_owned()),
            Self::TokenIds { prompt } => Input::PromptTokenIds(v1::TokenIds {
                ids: prompt.to_vec(),
            }),
            Self::Chat { messages } => Input::Chat(v1::Chat {
                messages: messages
                    .iter()
                    .map(|ChatMessage { role, content }| v1::ChatMessage {
                        role: (*role).to_owned(),
                        content: (*content).to_owned(),
                        ..v1::ChatMessage::default()
                    })
                    .collect(),
            }),
        }
    }
}

/// Returns a `POST` request to an API for completions that accepts this content type.
pub(crate) fn http_request(
    url: &ServerUrl,
    accept: &str,
    completion: &CompletionRequest<'_>,
) -> Request<Bytes> {
    Request::post(format!("{url}{}", completion.input.path()))
        .header(HOST, &url.authority)
        .header(CONTENT_TYPE, "application/json")
        .header(ACCEPT, accept)
        .body(completion.to_json().into())
        .expect("the request is valid")
}

/// Returns the HTTP/2 request of a gRPC call to a method of the inference service.
pub(crate) fn grpc_request(url: &ServerUrl, method: &str, message: &[u8]) -> Request<Bytes> {
    Request::post(format!("{url}/tokenway.v1.Inference/{method}"))
        .header(CONTENT_TYPE, "application/grpc")
        .header(TE, "trailers")
        .body(frame_message(message))
        .expect("the request is valid")
}

pub(crate) fn grpc_completion_request(
    url: &ServerUrl,
    completion: &CompletionRequest<'_>,
) -> Request<Bytes> {
    grpc_request(url, "Complete", &completion.to_message().encode_to_vec())
}

/// Returns a gRPC message with its five-byte head: a flag and the length.
pub(crate) fn frame_message(message: &[u8]) -> Bytes {
    let length = u32::try_from(message.len()).expect("a message is short");
    [&[0][..], &length.to_be_bytes(), message].concat().into()
}
