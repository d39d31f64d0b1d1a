//! Fuzz target of the responses of OpenAI-compatible engines.

use bytes::Bytes;
use http::header::RETRY_AFTER;
use http::{HeaderMap, HeaderValue, StatusCode};
use tokio::time::Instant;

use super::progress::{Progress, RequestFacts};
use super::rejection;
use super::request_body::Api;
use super::server_sent_events::EventSplitter;
use super::watch_models::facts_from;
use crate::cluster::events::UpstreamChecks;
use crate::proto::v1;
use crate::proto::v1::completion_event::Event;
use crate::proto::v1::completion_request::Input;

/// A byte that selects the options of the request, the size of the frames in which the body arrives, and the body.
/// Whatever the engine sends, the events start with `started`, and their tokens have no gap. The same body is also read
/// as an error response, with its first line as the header `retry-after`; the result is always an error. The body is
/// also read as a list of models.
pub(crate) fn responses(data: &[u8]) {
    let [options, frame_size, body @ ..] = data else {
        return;
    };
    let choices = u32::from(options & 3) + 1;
    let mut progress = Progress::new(RequestFacts {
        api: match options & 32 {
            0 => Api::Completions,
            _ => Api::LlamaCpp,
        },
        request_id: String::new(),
        model: String::new(),
        choices,
        seed: 0,
        has_token_ids: options & 4 != 0,
        logprobs: (options & 8 != 0).then_some(2),
        echo: (options & 16 != 0).then(|| "p".to_owned()),
        arrived: Instant::now(),
    });
    let request = v1::CompletionRequest {
        n: Some(choices),
        input: Some(Input::Chat(v1::Chat::default())),
        ..v1::CompletionRequest::default()
    };
    let mut checks = UpstreamChecks::new(&request);
    let mut count = 0;
    read_frames(
        &mut progress,
        body,
        usize::from(*frame_size).max(1),
        |event| {
            assert_eq!(matches!(event, Event::Started(_)), count == 0, "{event:?}");
            count += 1;
            let checked = checks.check(v1::CompletionEvent { event: Some(event) });
            assert!(checked.is_ok(), "{checked:?}");
        },
    );
    if progress.check_end().is_ok() {
        assert!(progress.all_choices_ended());
        let _ = progress.summary();
    }
    let status = StatusCode::from_u16(400 + u16::from(*options)).unwrap_or_default();
    let first_line = body.split(|byte| *byte == b'\n').next();
    let retry_after = HeaderValue::from_bytes(first_line.unwrap_or_default());
    let retry_after = retry_after.map(|value| (RETRY_AFTER, value));
    let headers: HeaderMap = retry_after.into_iter().collect();
    let error = rejection::rejection(status, &headers, body);
    assert!(error.retry_after <= Some(rejection::MAX_RETRY_AFTER));
    assert!(error.kind.mapping().http.as_u16() >= 400, "{error}");
    let _ = facts_from(body, None);
}

/// Reads a body until it ends or is malformed. Passes every event on.
fn read_frames(
    progress: &mut Progress,
    body: &[u8],
    frame_size: usize,
    mut pass_on: impl FnMut(Event),
) {
    let mut splitter = EventSplitter::default();
    for frame in body.chunks(frame_size) {
        splitter.push(Bytes::copy_from_slice(frame));
        loop {
            let event = match splitter.next_event() {
                Ok(Some(event)) => event,
                Ok(None) => break,
                Err(_) => return,
            };
            let read = progress.read(&event);
            progress.ready.drain(..).for_each(&mut pass_on);
            if read.is_err() {
                return;
            }
        }
    }
}
