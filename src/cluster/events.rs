//! The event stream of one completion, with checks: tokens are complete and in order, and nothing follows the
//! terminal event.

use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio_stream::Stream;

use super::failure::Failure;
use super::resilient_events::ResilientEvents;
use super::upstream::BoxedEventStream;
use crate::error::{Error, ErrorKind};
use crate::proto::v1;
use crate::proto::v1::completion_event::Event;
use crate::proto::v1::completion_request::Input;
use crate::request::MAX_CHOICES;
use crate::token_charges::TokenCharges;

/// Events of one completion. The stream ends after the summary or after one error.
pub struct CheckedEvents(Source);

enum Source {
    /// The events of one upstream, which are checked.
    Checked(BoxedEventStream, UpstreamChecks),
    /// The events of remote engines. They are checked where the streams of two engines are joined.
    Resilient(Box<ResilientEvents>, Option<TokenCharges>),
    /// A token budget of the request's key has ended the completion.
    UsedUp,
}

/// Checks of one upstream's events. The tokens of a resumed choice must continue after the tokens that the client
/// already has.
pub(super) struct UpstreamChecks {
    /// Expected index of the next token, for each choice.
    next_indices: Vec<u32>,
    /// Expected index of the next prompt token.
    next_prompt_index: u32,
    /// True if the request is a chat. Only a chat has `chat` events.
    is_chat: bool,
    ended: bool,
}

impl CheckedEvents {
    /// Checks an upstream's events.
    pub(super) fn checked(events: BoxedEventStream, checks: UpstreamChecks) -> Self {
        Self(Source::Checked(events, checks))
    }

    /// Wraps the events of remote engines. `charges` charges their tokens, if the key of the request has budgets.
    pub(super) fn resilient(events: ResilientEvents, charges: Option<TokenCharges>) -> Self {
        Self(Source::Resilient(Box::new(events), charges))
    }

    /// Polls for the next event. Returns `None` after the summary or an error.
    pub(crate) fn poll_event(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Event, Failure>>> {
        match &mut self.0 {
            Source::Resilient(events, None) => events.poll_event(cx),
            Source::Resilient(events, Some(charges)) => {
                let event = match charges.take_error() {
                    Some(error) => Err(error),
                    None => match ready!(events.poll_event(cx)) {
                        Some(Ok(mut event)) => charges.charge(&mut event).map(|()| event),
                        end @ (Some(Err(_)) | None) => return Poll::Ready(end),
                    },
                };
                if event.is_err() {
                    // Dropping the events cancels the completion on its engine.
                    self.0 = Source::UsedUp;
                }
                Poll::Ready(Some(event.map_err(Failure::from)))
            }
            Source::UsedUp => Poll::Ready(None),
            Source::Checked(_, checks) if checks.ended => Poll::Ready(None),
            Source::Checked(events, checks) => {
                let event = match ready!(events.as_mut().poll_next(cx)) {
                    Some(Ok(event)) => checks.check(event).map_err(Failure::from),
                    Some(Err(status)) => Err(Failure::in_stream(&status)),
                    None => {
                        let message = "The engine's stream ended without a summary.";
                        Err(upstream_error(message).into())
                    }
                };
                checks.ended |= event.is_err();
                Poll::Ready(Some(event))
            }
        }
    }
}

impl UpstreamChecks {
    /// Creates the checks of the events for this request.
    pub(super) fn new(request: &v1::CompletionRequest) -> Self {
        // An engine rejects a larger `n`, so the limit only bounds the memory here.
        let choices = request.n.unwrap_or(1).min(MAX_CHOICES);
        let mut next_indices = vec![0; usize::try_from(choices).unwrap_or(0)];
        for resumed in &request.resume {
            let choice = usize::try_from(resumed.choice).ok();
            if let Some(next) = choice.and_then(|at| next_indices.get_mut(at)) {
                *next = u32::try_from(resumed.token_ids.len()).unwrap_or(u32::MAX);
            }
        }
        Self {
            next_indices,
            next_prompt_index: 0,
            is_chat: matches!(request.input, Some(Input::Chat(_))),
            ended: false,
        }
    }

    /// Checks that tokens belong to a requested choice and continue it without a gap.
    fn record_tokens(&mut self, tokens: &v1::Tokens) -> bool {
        let choice = usize::try_from(tokens.choice).ok();
        let Some(next) = choice.and_then(|at| self.next_indices.get_mut(at)) else {
            return false;
        };
        let follows = tokens.first_index == *next;
        *next += u32::try_from(tokens.tokens.len()).unwrap_or(u32::MAX);
        follows
    }

    /// Checks that a part of the prompt continues the previous part without a gap.
    fn record_prompt(&mut self, prompt: &v1::EchoedPrompt) -> bool {
        let Some(tokens) = &prompt.tokens else {
            return true;
        };
        let follows = tokens.first_index == self.next_prompt_index;
        self.next_prompt_index += u32::try_from(tokens.tokens.len()).unwrap_or(u32::MAX);
        follows
    }

    /// Checks that a part of a message belongs to a requested choice of a chat.
    fn allows_chat_delta(&self, delta: &v1::ChatDelta) -> bool {
        let choice = usize::try_from(delta.choice).ok();
        self.is_chat && choice.is_some_and(|choice| choice < self.next_indices.len())
    }

    pub(super) fn check(&mut self, event: v1::CompletionEvent) -> Result<Event, Error> {
        match event.event {
            Some(Event::Prompt(prompt)) if !self.record_prompt(&prompt) => Err(upstream_error(
                "The engine sent prompt tokens with an unexpected index.",
            )),
            Some(Event::Tokens(tokens)) if !self.record_tokens(&tokens) => Err(upstream_error(
                "The engine sent tokens with an unexpected choice or index.",
            )),
            Some(Event::Chat(delta)) if !self.allows_chat_delta(&delta) => Err(upstream_error(
                "The engine sent a part of a chat message with an unexpected choice.",
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
        let event = ready!(self.get_mut().poll_event(cx));
        Poll::Ready(event.map(|event| event.map_err(Error::from)))
    }
}

fn upstream_error(message: &str) -> Error {
    Error::new(ErrorKind::UpstreamError, message)
}

#[cfg(test)]
mod tests {
    use tokio_stream::StreamExt;
    use tonic::Status;

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

    /// Feeds an engine's events for a request of two choices through the checks, and returns the results.
    async fn checked(
        engine: Vec<Result<v1::CompletionEvent, Status>>,
    ) -> Vec<Result<Event, ErrorKind>> {
        let request = v1::CompletionRequest {
            n: Some(2),
            ..v1::CompletionRequest::default()
        };
        checked_for(&request, engine).await
    }

    async fn checked_for(
        request: &v1::CompletionRequest,
        engine: Vec<Result<v1::CompletionEvent, Status>>,
    ) -> Vec<Result<Event, ErrorKind>> {
        CheckedEvents::checked(
            Box::pin(tokio_stream::iter(engine)),
            UpstreamChecks::new(request),
        )
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
    async fn a_part_of_a_message_needs_a_chat_and_a_requested_choice() {
        let delta = |choice| v1::CompletionEvent {
            event: Some(Event::Chat(v1::ChatDelta {
                choice,
                ..v1::ChatDelta::default()
            })),
        };
        let chat = v1::CompletionRequest {
            input: Some(Input::Chat(v1::Chat::default())),
            ..v1::CompletionRequest::default()
        };
        let events = checked_for(&chat, vec![Ok(delta(0)), Ok(delta(1))]).await;
        assert!(events[0].is_ok());
        assert_eq!(events[1..], [Err(ErrorKind::UpstreamError)]);
        let text = v1::CompletionRequest::default();
        let events = checked_for(&text, vec![Ok(delta(0))]).await;
        assert_eq!(events, [Err(ErrorKind::UpstreamError)]);
    }

    #[tokio::test]
    async fn a_stream_without_a_summary_ends_with_an_upstream_error() {
        let events = checked(vec![Ok(tokens(0, 0, 1))]).await;
        assert_eq!(events.last(), Some(&Err(ErrorKind::UpstreamError)));
    }

    #[tokio::test]
    async fn a_resumed_choice_continues_after_the_tokens_that_the_client_has() {
        let request = v1::CompletionRequest {
            resume: vec![v1::ResumedChoice {
                choice: 0,
                token_ids: vec![7, 8],
            }],
            ..v1::CompletionRequest::default()
        };
        let events = checked_for(&request, vec![Ok(tokens(0, 2, 1)), Ok(tokens(0, 3, 1))]).await;
        assert!(events[..2].iter().all(Result::is_ok), "{events:?}");
        let events = checked_for(&request, vec![Ok(tokens(0, 0, 1))]).await;
        assert_eq!(events, [Err(ErrorKind::UpstreamError)]);
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
