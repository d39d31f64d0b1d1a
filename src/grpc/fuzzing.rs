//! Fuzz target of the public API: requests of gRPC clients.

use prost::Message;
use tokio::time::Instant;

use super::convert::{chat_messages, convert_with_times};
use crate::error::Error;
use crate::proto::v1;
use crate::request::{
    CompletionRequest, Input, MAX_CHOICES, MAX_LOGIT_BIASES, MAX_LOGPROBS, MAX_STOP_BYTES,
    MAX_STOP_STRINGS, MAX_STOP_TOKENS, MAX_USER_BYTES, RequestId,
};
use crate::sequence_proto;

/// An encoded `CompletionRequest` or `TokenizeRequest`. What passes the checks is within the documented limits, and
/// a worker that gets the options reads the same.
pub(crate) fn completion_request(data: &[u8]) {
    if let Ok(message) = v1::TokenizeRequest::decode(data)
        && let Some(v1::tokenize_request::Input::Chat(chat)) = message.input
        && let Err(error) = chat_messages(chat)
    {
        check_rejection(&error);
    }
    let Ok(message) = v1::CompletionRequest::decode(data) else {
        return;
    };
    let (id, now) = (RequestId::random(), Instant::now());
    match convert_with_times(message, id, now, now) {
        Ok(request) => check_request(&request),
        Err(error) => check_rejection(&error),
    }
}

fn check_request(request: &CompletionRequest) {
    assert!((1..=MAX_CHOICES).contains(&request.choices));
    assert!(request.max_tokens != Some(0) || request.echo);
    let choices = usize::try_from(request.choices).expect("at most 128");
    assert!(request.resume.len() <= choices);
    match &request.input {
        Input::TokenIds(ids) => assert!(!ids.is_empty()),
        Input::Chat(messages) => assert!(!messages.is_empty()),
        Input::Text(_) | Input::Infill { .. } => {}
    }
    let stops = &request.stopping.strings;
    assert!(stops.len() <= MAX_STOP_STRINGS);
    assert!(
        stops
            .iter()
            .all(|stop| (1..=MAX_STOP_BYTES).contains(&stop.len()))
    );
    let options = &request.options;
    assert!(options.logprobs.is_none_or(|top| top <= MAX_LOGPROBS));
    assert!(options.stop_tokens.ids.len() <= MAX_STOP_TOKENS);
    assert!(options.logit_bias.len() <= MAX_LOGIT_BIASES);
    assert!(options.logit_bias.is_sorted_by(|one, next| one.0 < next.0));
    let user = options.user.0.as_ref();
    assert!(user.is_none_or(|user| (1..=MAX_USER_BYTES).contains(&user.len())));
    let mut passed_on = sequence_proto::options_message(options);
    let read = sequence_proto::take_options(&mut passed_on);
    assert_eq!(&read.expect("valid options stay valid"), options);
}

/// A rejected request is the client's fault, and the error names a field.
fn check_rejection(error: &Error) {
    assert!(error.kind.mapping().http.is_client_error(), "{error}");
    assert!(error.param.is_some(), "{error}");
}
