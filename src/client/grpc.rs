//! A completion over the gRPC door.

use std::io::Write;

use tonic::transport::Endpoint;

use super::{CONNECT_TIMEOUT, ClientError, ClientOptions, show};
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
    let endpoint = Endpoint::from_shared(address.clone())
        .map_err(|_| ClientError::Address(address.clone()))?
        .connect_timeout(CONNECT_TIMEOUT);
    let channel = endpoint
        .connect()
        .await
        .map_err(|error| ClientError::Connect {
            address,
            problem: deepest(&error),
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
    let response = InferenceClient::new(channel).complete(request).await;
    let mut events = response.map_err(|status| refused(&status))?.into_inner();
    while let Some(event) = events.message().await.map_err(|status| refused(&status))? {
        match event.event {
            Some(Event::Tokens(tokens)) => {
                let text: String = tokens.tokens.into_iter().map(|token| token.text).collect();
                show(out, &text)?;
            }
            Some(Event::Summary(_)) => return Ok(()),
            Some(Event::Started(_)) | None => {}
        }
    }
    Err(ClientError::CutShort(
        "the stream ended without its summary".to_owned(),
    ))
}

fn refused(status: &tonic::Status) -> ClientError {
    let error = Error::from(status);
    ClientError::Server {
        code: error.kind.row().code.to_owned(),
        message: error.message,
    }
}

/// The innermost reason, which says the most: that a connection was refused, for one.
fn deepest(error: &dyn std::error::Error) -> String {
    let mut reason = error;
    while let Some(source) = reason.source() {
        reason = source;
    }
    reason.to_string()
}
