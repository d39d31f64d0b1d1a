//! The event stream of one completion, with checks: no token is missing, repeated or out of order, and nothing
//! follows the terminal event.

use std::error::Error as _;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::sync::{OwnedSemaphorePermit, mpsc};
use tokio_stream::Stream;
use tonic::{Code, Status};

use super::engine::{EventStream, InFlightGuard};
use crate::error::{Error, ErrorKind};
use crate::proto::v1;
use crate::proto::v1::completion_event::Event;

/// Events of one completion. The stream ends after the summary or after one error.
pub struct CheckedEvents {
    source: EventSource,
    /// Expected index of the next token, for each choice.
    next_indices: Vec<u32>,
    /// Expected index of the next prompt token.
    next_prompt_index: u32,
    ended: bool,
}

/// An event that was read before its reader asked for it, with the read-ahead permits of its tokens.
pub(super) struct BufferedEvent {
    pub(super) event: Result<v1::CompletionEvent, Status>,
    pub(super) _permit: OwnedSemaphorePermit,
}

/// Source of the events.
pub(super) enum EventSource {
    InProcess(
        EventStream,
        #[expect(dead_code, reason = "dropping it decrements the engine's load")] InFlightGuard,
    ),
    ReadAhead(mpsc::Receiver<BufferedEvent>),
}

impl CheckedEvents {
    pub(super) fn new(source: EventSource, choices: u32) -> Self {
        Self {
            source,
            next_indices: vec![0; usize::try_from(choices).unwrap_or(0)],
            next_prompt_index: 0,
            ended: false,
        }
    }

    /// Returns true if the tokens belong to a requested choice and continue it without a gap.
    fn tokens_follow(&mut self, tokens: &v1::Tokens) -> bool {
        let choice = usize::try_from(tokens.choice).ok();
        let Some(next) = choice.and_then(|at| self.next_indices.get_mut(at)) else {
            return false;
        };
        let follows = tokens.first_index == *next;
        *next += u32::try_from(tokens.tokens.len()).unwrap_or(u32::MAX);
        follows
    }

    /// Returns true if this part continues the prompt without a gap.
    fn prompt_follows(&mut self, prompt: &v1::EchoedPrompt) -> bool {
        let Some(tokens) = &prompt.tokens else {
            return true;
        };
        let follows = tokens.first_index == self.next_prompt_index;
        self.next_prompt_index += u32::try_from(tokens.tokens.len()).unwrap_or(u32::MAX);
        follows
    }

    fn check(&mut self, event: v1::CompletionEvent) -> Result<Event, Error> {
        match event.event {
            Some(Event::Prompt(prompt)) if !self.prompt_follows(&prompt) => Err(upstream_error(
                "The engine sent prompt tokens with an unexpected index.",
            )),
            Some(Event::Tokens(tokens)) if !self.tokens_follow(&tokens) => Err(upstream_error(
                "The engine sent tokens with an unexpected choice or index.",
            )),
            Some(event) => {
                self.ended = matches!(event, Event::Summary(_));
                Ok(event)
            }
            None => Err(upstream_error(
                "The engine sent an event of an unknown type.",
            )),
        }
    }
}

impl Stream for CheckedEvents {
    type Item = Result<Event, Error>;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = self.get_mut();
        if this.ended {
            return Poll::Ready(None);
        }
        let next = match &mut this.source {
            EventSource::InProcess(stream, _) => ready!(stream.as_mut().poll_next(cx)),
            EventSource::ReadAhead(events) => ready!(events.poll_recv(cx)).map(|read| read.event),
        };
        let event = match next {
            Some(Ok(event)) => this.check(event),
            Some(Err(status)) => Err(in_stream_error(&status)),
            None => Err(upstream_error(
                "The engine's stream ended without a summary.",
            )),
        };
        this.ended |= event.is_err();
        Poll::Ready(Some(event))
    }
}

/// Converts the status of a rejected call. A status without details does not come from a Tokenway engine: the engine is
/// unreachable, did not answer in time, or its connection broke.
pub(super) fn rejection(status: &Status) -> Error {
    let error = Error::from(status);
    let has_no_details = status.details().is_empty();
    match status.code() {
        // tonic's channel returns CANCELLED when the request's deadline passes.
        Code::Cancelled if has_no_details => Error::new(
            ErrorKind::DeadlineExceeded,
            "The engine did not answer before the request's deadline.",
        ),
        Code::Unknown | Code::Internal | Code::DataLoss if has_no_details => broken_connection(),
        // tonic maps the HTTP/2 errors ENHANCE_YOUR_CALM and INADEQUATE_SECURITY to these codes. Such a status has a
        // source; a status that an engine sent has none.
        Code::ResourceExhausted | Code::PermissionDenied
            if has_no_details && status.source().is_some() =>
        {
            broken_connection()
        }
        Code::Ok
        | Code::Cancelled
        | Code::Unknown
        | Code::InvalidArgument
        | Code::DeadlineExceeded
        | Code::NotFound
        | Code::AlreadyExists
        | Code::PermissionDenied
        | Code::ResourceExhausted
        | Code::FailedPrecondition
        | Code::Aborted
        | Code::OutOfRange
        | Code::Unimplemented
        | Code::Internal
        | Code::Unavailable
        | Code::DataLoss
        | Code::Unauthenticated => error,
    }
}

/// Converts the status that ended a running stream. A status without details, such as that of a broken connection, is
/// an upstream error whatever its code: a killed peer shows as `Unknown`, for example.
fn in_stream_error(status: &Status) -> Error {
    let error = Error::from(status);
    if status.details().is_empty() && error.kind != ErrorKind::DeadlineExceeded {
        return broken_connection();
    }
    error
}

fn broken_connection() -> Error {
    upstream_error("The connection to the engine broke.")
}

fn upstream_error(message: &str) -> Error {
    Error::new(ErrorKind::UpstreamError, message)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use tokio::sync::Semaphore;
    use tokio_stream::StreamExt;

    use super::*;

    fn tokens(choice: u32, first_index: u32, count: usize) -> v1::CompletionEvent {
        let tokens = std::iter::repeat_n(v1::Token::default(), count).collect();
        v1::CompletionEvent {
            event: Some(Event::Tokens(v1::Tokens {
                choice,
                first_index,
                tokens,
                ..v1::Tokens::default()
            })),
        }
    }

    /// Runs the checks on an engine's stream of these events.
    async fn checked(
        engine: Vec<Result<v1::CompletionEvent, Status>>,
    ) -> Vec<Result<Event, ErrorKind>> {
        let (sender, receiver) = mpsc::channel(engine.len().max(1));
        let permits = Arc::new(Semaphore::new(engine.len()));
        for event in engine {
            let permit = Arc::clone(&permits).try_acquire_owned().unwrap();
            let buffered = BufferedEvent {
                event,
                _permit: permit,
            };
            sender.try_send(buffered).ok().unwrap();
        }
        drop(sender);
        CheckedEvents::new(EventSource::ReadAhead(receiver), 2)
            .map(|event| event.map_err(|error| error.kind))
            .collect()
            .await
    }

    #[tokio::test]
    async fn a_gap_or_repeated_index_ends_the_stream_with_an_error() {
        for wrong in [1, 3] {
            let engine = vec![
                Ok(tokens(0, 0, 2)),
                Ok(tokens(1, 0, 1)),
                Ok(tokens(0, wrong, 1)),
                Ok(tokens(0, 2, 1)),
            ];
            let events = checked(engine).await;
            assert_eq!(events.len(), 3, "{events:?}");
            assert_eq!(events[2], Err(ErrorKind::UpstreamError));
        }
    }

    #[tokio::test]
    async fn tokens_of_an_unrequested_choice_are_an_upstream_error() {
        for choice in [2, u32::MAX] {
            let events = checked(vec![Ok(tokens(choice, 0, 1)), Ok(tokens(0, 0, 1))]).await;
            assert_eq!(events, [Err(ErrorKind::UpstreamError)]);
        }
    }

    #[tokio::test]
    async fn a_stream_without_a_summary_ends_with_an_upstream_error() {
        let events = checked(vec![Ok(tokens(0, 0, 1))]).await;
        assert_eq!(events.last(), Some(&Err(ErrorKind::UpstreamError)));
    }

    #[test]
    fn an_http2_protocol_error_is_not_reported_as_a_full_queue() {
        let closed = h2::Error::from(h2::Reason::ENHANCE_YOUR_CALM);
        let status = Status::from_error(Box::new(closed));
        assert_eq!(status.code(), Code::ResourceExhausted);
        assert_eq!(rejection(&status).kind, ErrorKind::UpstreamError);
        // An engine that is not Tokenway's may report a full queue without error details.
        let full = Status::resource_exhausted("full");
        assert_ne!(rejection(&full).kind, ErrorKind::UpstreamError);
        let full = Status::from(Error::new(ErrorKind::QueueFull, "The queue is full."));
        assert_eq!(rejection(&full).kind, ErrorKind::QueueFull);
    }

    #[tokio::test]
    async fn a_broken_connection_is_an_upstream_error_whatever_its_code() {
        for status in [
            Status::unknown("h2"),
            Status::unavailable("h2"),
            Status::cancelled("h2"),
        ] {
            let events = checked(vec![Err(status)]).await;
            assert_eq!(events, [Err(ErrorKind::UpstreamError)]);
        }
    }
}
