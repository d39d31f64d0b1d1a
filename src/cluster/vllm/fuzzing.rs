//! Fuzz target of vLLM's responses.

use futures_util::{FutureExt, StreamExt, stream};
use prost::Message;
use tokio::time::Instant;
use tonic::{Code, Status};
use vllm_proto::GenerateResponse;

use super::events::EngineEvents;
use super::progress::RequestFacts;
use crate::cluster::events::{CheckedEvents, UpstreamChecks};
use crate::error::Error;
use crate::proto::v1;
use crate::proto::v1::completion_event::Event;

/// A byte that selects the options of the request, and the length-delimited responses of the engine. The first invalid
/// one becomes the status that ends the stream. Whatever the engine sends, the events start with `started`, their
/// tokens have no gap, and they end with one summary or one error of the engine or of the request.
pub(crate) fn responses(data: &[u8]) {
    let Some((options, responses)) = data.split_first() else {
        return;
    };
    let choices = u32::from(options & 3) + 1;
    let facts = RequestFacts {
        request_id: String::new(),
        model: String::new(),
        choices,
        seed: 0,
        has_logprobs: options & 4 != 0,
        arrived: Instant::now(),
    };
    let request = v1::CompletionRequest {
        n: Some(choices),
        ..v1::CompletionRequest::default()
    };
    // `tokio_stream::iter` returns `Pending` after 32 responses, but this function polls only once.
    let responses = stream::iter(decode(responses, Code::from(i32::from(options >> 4))));
    let events = Box::pin(EngineEvents::new(responses, facts));
    let events: Vec<Result<Event, Error>> =
        CheckedEvents::checked(events, UpstreamChecks::new(&request))
            .collect()
            .now_or_never()
            .expect("the responses are ready");
    if let Some(Err(error)) = events.last() {
        let is_gap = error.message.contains("unexpected choice or index");
        assert!(
            !is_gap && !error.message.contains("without a summary"),
            "{error}"
        );
    }
    let (last, earlier) = events.split_last().expect("a stream has a terminal event");
    assert!(matches!(last, Ok(Event::Summary(_)) | Err(_)), "{last:?}");
    for (at, event) in earlier.iter().enumerate() {
        assert_eq!(matches!(event, Ok(Event::Started(_))), at == 0, "{event:?}");
    }
}

fn decode(mut responses: &[u8], code: Code) -> Vec<Result<GenerateResponse, Status>> {
    let mut items = Vec::new();
    while !responses.is_empty() {
        match GenerateResponse::decode_length_delimited(&mut responses) {
            Ok(response) => items.push(Ok(response)),
            Err(_) => {
                items.push(Err(Status::new(code, "invalid")));
                break;
            }
        }
    }
    items
}
