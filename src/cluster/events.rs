//! One completion's events from an engine, checked: nothing is missing, and the end is the end.

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

/// The events of one completion. It ends after the summary, or after one error.
pub struct CheckedEvents {
    source: EventSource,
    /// For each choice, the index that its next token must have.
    next_indices: Vec<u32>,
    /// The index that the prompt's next token must have.
    next_of_prompt: u32,
    ended: bool,
}

/// An event that was read ahead of its reader, with its share of what may be.
pub(super) struct ReadAhead {
    pub(super) event: Result<v1::CompletionEvent, Status>,
    pub(super) _share: OwnedSemaphorePermit,
}

/// Where events come from.
pub(super) enum EventSource {
    InProcess(
        EventStream,
        #[expect(dead_code, reason = "its drop counts")] InFlightGuard,
    ),
    ReadAhead(mpsc::Receiver<ReadAhead>),
}

impl CheckedEvents {
    pub(super) fn new(source: EventSource, choices: u32) -> Self {
        Self {
            source,
            next_indices: vec![0; usize::try_from(choices).unwrap_or(0)],
            next_of_prompt: 0,
            ended: false,
        }
    }

    /// Whether the tokens are of a choice that was asked for, and follow on from those before them.
    fn follows(&mut self, tokens: &v1::Tokens) -> bool {
        let choice = usize::try_from(tokens.choice).ok();
        let Some(next) = choice.and_then(|at| self.next_indices.get_mut(at)) else {
            return false;
        };
        let follows = tokens.first_index == *next;
        *next += u32::try_from(tokens.tokens.len()).unwrap_or(u32::MAX);
        follows
    }

    /// Whether a part of the prompt follows on from those before it.
    fn prompt_follows(&mut self, prompt: &v1::EchoedPrompt) -> bool {
        let Some(tokens) = &prompt.tokens else {
            return true;
        };
        let follows = tokens.first_index == self.next_of_prompt;
        self.next_of_prompt += u32::try_from(tokens.tokens.len()).unwrap_or(u32::MAX);
        follows
    }

    fn check(&mut self, event: v1::CompletionEvent) -> Result<Event, Error> {
        match event.event {
            Some(Event::Prompt(prompt)) if !self.prompt_follows(&prompt) => Err(upstream_error(
                "The engine's prompt tokens are not those that come next.",
            )),
            Some(Event::Tokens(tokens)) if !self.follows(&tokens) => Err(upstream_error(
                "The engine's tokens are not those that come next.",
            )),
            Some(event) => {
                self.ended = matches!(event, Event::Summary(_));
                Ok(event)
            }
            None => Err(upstream_error(
                "The engine sent an event that this gateway does not know.",
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
            None => Err(upstream_error("The engine's stream was cut off.")),
        };
        this.ended |= event.is_err();
        Poll::Ready(Some(event))
    }
}

/// What an engine's refusal means, or that of the connection to it: nobody there, no answer in time, or
/// a break.
pub(super) fn refusal(status: &Status) -> Error {
    let error = Error::from(status);
    let is_foreign = status.details().is_empty();
    match status.code() {
        // tonic's channel gives up at the request's deadline with this.
        Code::Cancelled if is_foreign => Error::new(
            ErrorKind::DeadlineExceeded,
            "The request's deadline passed, and the engine had not answered.",
        ),
        Code::Unknown | Code::Internal | Code::DataLoss if is_foreign => {
            upstream_error("The connection to the engine broke.")
        }
        // HTTP/2's own words for a connection that is closed over what it carried (ENHANCE_YOUR_CALM,
        // INADEQUATE_SECURITY). The engine has said nothing.
        Code::ResourceExhausted | Code::PermissionDenied
            if is_foreign && status.source().is_some() =>
        {
            upstream_error("The connection to the engine broke.")
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

/// What ends a stream in the middle. Whatever an engine did not say itself, such as a connection that
/// broke, is the engine's failure; its gRPC code is no guide (a killed peer shows as `Unknown`).
fn in_stream_error(status: &Status) -> Error {
    let error = Error::from(status);
    if status.details().is_empty() && error.kind != ErrorKind::DeadlineExceeded {
        return upstream_error("The connection to the engine broke.");
    }
    error
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

    /// What a gateway makes of these events of an engine, whose stream then ends.
    async fn checked(
        engine: Vec<Result<v1::CompletionEvent, Status>>,
    ) -> Vec<Result<Event, ErrorKind>> {
        let (sender, receiver) = mpsc::channel(engine.len().max(1));
        let shares = Arc::new(Semaphore::new(engine.len()));
        for event in engine {
            let share = Arc::clone(&shares).try_acquire_owned().unwrap();
            let read = ReadAhead {
                event,
                _share: share,
            };
            sender.try_send(read).ok().unwrap();
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
        assert_eq!(refusal(&status).kind, ErrorKind::UpstreamError);
        // An engine of somebody else's may say that it is full without saying more.
        let full = Status::resource_exhausted("full");
        assert_ne!(refusal(&full).kind, ErrorKind::UpstreamError);
        let full = Status::from(Error::new(ErrorKind::QueueFull, "The queue is full."));
        assert_eq!(refusal(&full).kind, ErrorKind::QueueFull);
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
