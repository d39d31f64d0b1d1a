//! Completion over the gRPC API.

use std::io::Write;

use http::HeaderMap;
use http::header::{AUTHORIZATION, CONTENT_TYPE};
use http::uri::Scheme;
use tonic::Request;
use tonic::metadata::MetadataMap;
use tonic::transport::Endpoint;

use super::options::{CONNECT_TIMEOUT, ClientError, ClientOptions};
use super::terminal::write_text;
use crate::error::Error;
use crate::proto::v1;
use crate::proto::v1::completion_event::Event;
use crate::proto::v1::completion_request::Input;
use crate::proto::v1::inference_client::InferenceClient;

pub(super) async fn complete(
    options: &ClientOptions,
    out: &mut dyn Write,
) -> Result<(), ClientError> {
    let address = options.address("http://127.0.0.1:50051");
    let invalid = || ClientError::Address(address.clone());
    let mut endpoint = Endpoint::from_shared(address.clone())
        .map_err(|_| invalid())?
        .connect_timeout(CONNECT_TIMEOUT);
    if endpoint.uri().scheme() == Some(&Scheme::HTTPS) {
        let tls = options.tls()?.tonic_config();
        endpoint = endpoint.tls_config(tls).map_err(|_| invalid())?;
    }
    let channel = endpoint
        .connect()
        .await
        .map_err(|error| ClientError::Connect {
            address: address.clone(),
            problem: root_cause(&error),
        })?;
    let request = v1::CompletionRequest {
        model: options.model.clone().unwrap_or_default(),
        input: Some(Input::Prompt(options.prompt.clone())),
        max_tokens: Some(options.max_tokens),
        temperature: Some(options.temperature),
        seed: options.seed,
        stop: options.stop.clone(),
        ..v1::CompletionRequest::default()
    };
    let mut request = Request::new(request);
    if let Some(key) = &options.api_key {
        let headers = HeaderMap::from_iter([(AUTHORIZATION, key.authorization())]);
        *request.metadata_mut() = MetadataMap::from_headers(headers);
    }
    let response = InferenceClient::new(channel).complete(request).await;
    let response = response.map_err(|status| server_error(&status))?;
    if !is_grpc(response.metadata()) {
        return Err(ClientError::WrongProtocol {
            address,
            expected: "gRPC",
            advice: "leave out --grpc to use the HTTP API",
        });
    }
    let mut events = response.into_inner();
    while let Some(event) = events
        .message()
        .await
        .map_err(|status| server_error(&status))?
    {
        match event.event {
            Some(Event::Tokens(tokens)) => {
                write_text(out, tokens.tokens.text())?;
            }
            Some(Event::Summary(_)) => return Ok(()),
            Some(Event::Started(_) | Event::Prompt(_) | Event::Chat(_)) | None => {}
        }
    }
    Err(ClientError::Truncated(
        "the stream ended without a summary".to_owned(),
    ))
}

/// Returns true if the response is gRPC, judged by its content type. tonic accepts any HTTP/2 response.
fn is_grpc(headers: &MetadataMap) -> bool {
    let content_type = headers.get(CONTENT_TYPE.as_str());
    content_type.is_some_and(|kind| kind.as_bytes().starts_with(b"application/grpc"))
}

fn server_error(status: &tonic::Status) -> ClientError {
    let error = Error::from(status);
    ClientError::Server {
        code: error.kind.mapping().code.to_owned(),
        message: error.message,
    }
}

/// Returns the message of the innermost error, which is the most specific one, such as "connection refused".
fn root_cause(error: &dyn std::error::Error) -> String {
    let mut cause = error;
    while let Some(source) = cause.source() {
        cause = source;
    }
    cause.to_string()
}
