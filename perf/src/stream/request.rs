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
    pub(crate) prompt: &'a str,
    pub(crate) max_tokens: u32,
    pub(crate) stream: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) seed: Option<i64>,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub(crate) ignore_eos: bool,
    #[serde(rename = "stream_options", serialize_with = "stream_options")]
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub(crate) stamps: bool,
}

/// Writes the request option that asks the server for timestamps.
fn stream_options<S: serde::Serializer>(stamps: &bool, serializer: S) -> Result<S::Ok, S::Error> {
    #[derive(Serialize)]
    struct StreamOptions {
        include_stamps: bool,
    }
    let include_stamps = *stamps;
    StreamOptions { include_stamps }.serialize(serializer)
}

impl CompletionRequest<'_> {
    /// Returns a request for a stream of this many tokens. The test runner's tokens do not depend on the prompt.
    pub(crate) fn of_tokens(max_tokens: u32) -> Self {
        Self {
            model: None,
            prompt: "Count the tokens.",
            max_tokens,
            stream: true,
            seed: None,
            ignore_eos: false,
            stamps: false,
        }
    }

    pub(crate) fn to_json(self) -> String {
        serde_json::to_string(&self).expect("a request has no keys that JSON cannot have")
    }

    pub(crate) fn to_message(self) -> v1::CompletionRequest {
        v1::CompletionRequest {
            model: self.model.unwrap_or_default().to_owned(),
            input: Some(Input::Prompt(self.prompt.to_owned())),
            max_tokens: Some(self.max_tokens),
            seed: self.seed,
            ignore_eos: self.ignore_eos,
            include_stamps: self.stamps,
            ..v1::CompletionRequest::default()
        }
    }
}

/// Returns a `POST /v1/completions` request that accepts this content type.
pub(crate) fn http_request(
    url: &ServerUrl,
    accept: &str,
    completion: &CompletionRequest<'_>,
) -> Request<Bytes> {
    Request::post(format!("{url}/v1/completions"))
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
