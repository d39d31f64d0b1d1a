//! Merges the streams that continue the choices of one completion separately.

use std::collections::VecDeque;
use std::pin::Pin;
use std::task::{Context, Poll};

use tokio_stream::Stream;
use tonic::Status;

use super::ladder::Delivered;
use super::upstream::BoxedEventStream;
use crate::error::{Error, ErrorKind};
use crate::proto::v1;
use crate::proto::v1::completion_event::Event;

/// The events of several streams of one choice each. The stream ends with one summary for all choices.
pub(super) struct MergedChoices {
    streams: Vec<ChoiceStream>,
    /// Events to return before those of the streams.
    ready: VecDeque<Event>,
    /// Position of the stream that is polled first.
    cursor: usize,
    usage: v1::Usage,
    timings: Option<v1::Timings>,
    has_started: bool,
    has_ended: bool,
}

struct ChoiceStream {
    choice: u32,
    /// Number of delivered tokens in the prompt, which the engine counts as part of it.
    delivered_tokens: u32,
    events: BoxedEventStream,
    has_ended: bool,
}

impl MergedChoices {
    /// Creates the streams of a completion of which the client has this part. The usage of the summary includes it.
    pub(super) fn new(delivered: &Delivered) -> Self {
        Self {
            streams: Vec::new(),
            ready: VecDeque::new(),
            cursor: 0,
            usage: v1::Usage {
                prompt_tokens: delivered.prompt_length(),
                completion_tokens: delivered.token_count(),
                ..v1::Usage::default()
            },
            timings: None,
            has_started: false,
            has_ended: false,
        }
    }

    /// Adds the stream that continues a choice after this number of delivered tokens. The engine generates
    /// `repeated_tokens` again, and its usage counts them.
    pub(super) fn push(
        &mut self,
        choice: u32,
        delivered_tokens: u32,
        repeated_tokens: u32,
        events: BoxedEventStream,
    ) {
        let total = &mut self.usage.completion_tokens;
        *total = total.saturating_sub(repeated_tokens);
        self.streams.push(ChoiceStream {
            choice,
            delivered_tokens,
            events,
            has_ended: false,
        });
    }

    /// Adds a choice that has reached its limit of tokens.
    pub(super) fn push_ended(&mut self, choice: u32) {
        self.ready.push_back(Event::Tokens(v1::Tokens {
            choice,
            finish_reason: v1::FinishReason::Length.into(),
            ..v1::Tokens::default()
        }));
    }

    /// Renumbers an event of the stream at this position. Returns `None` for an event that is not passed on.
    fn merge(&mut self, at: usize, event: Event) -> Result<Option<Event>, Status> {
        match event {
            Event::Started(started) => {
                let is_first = !std::mem::replace(&mut self.has_started, true);
                Ok(is_first.then_some(Event::Started(started)))
            }
            Event::Tokens(mut tokens) if tokens.choice == 0 => {
                tokens.choice = self.streams[at].choice;
                Ok(Some(Event::Tokens(tokens)))
            }
            Event::Summary(summary) => {
                self.streams[at].has_ended = true;
                let usage = summary.usage.unwrap_or_default();
                self.usage.completion_tokens = self
                    .usage
                    .completion_tokens
                    .saturating_add(usage.completion_tokens);
                if self.usage.prompt_tokens == 0 {
                    let delivered = self.streams[at].delivered_tokens;
                    self.usage.prompt_tokens = usage.prompt_tokens.saturating_sub(delivered);
                }
                self.timings = self.timings.or(summary.timings);
                Ok(None)
            }
            Event::Chat(mut delta) if delta.choice == 0 => {
                delta.choice = self.streams[at].choice;
                Ok(Some(Event::Chat(delta)))
            }
            Event::Tokens(_) | Event::Chat(_) | Event::Prompt(_) => {
                let message = "The engine sent an event that was not asked for.";
                Err(Error::new(ErrorKind::UpstreamError, message).into())
            }
        }
    }

    fn poll_event(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Event, Status>>> {
        if let Some(event) = self.ready.pop_front() {
            return Poll::Ready(Some(Ok(event)));
        }
        let count = self.streams.len();
        for step in 0..count {
            let at = (self.cursor + step) % count;
            while !self.streams[at].has_ended
                && let Poll::Ready(event) = self.streams[at].events.as_mut().poll_next(cx)
            {
                let event = match event {
                    Some(Ok(v1::CompletionEvent { event: Some(event) })) => event,
                    Some(Ok(v1::CompletionEvent { event: None })) | None => {
                        return Poll::Ready(None);
                    }
                    Some(Err(status)) => return Poll::Ready(Some(Err(status))),
                };
                if let Some(event) = self.merge(at, event).transpose() {
                    self.cursor = (at + 1) % count;
                    return Poll::Ready(Some(event));
                }
            }
        }
        if self.streams.iter().any(|stream| !stream.has_ended) {
            return Poll::Pending;
        }
        Poll::Ready(Some(Ok(Event::Summary(v1::Summary {
            usage: Some(self.usage),
            timings: self.timings,
        }))))
    }
}

impl Stream for MergedChoices {
    type Item = Result<v1::CompletionEvent, Status>;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = self.get_mut();
        if this.has_ended {
            return Poll::Ready(None);
        }
        let event = std::task::ready!(this.poll_event(cx));
        this.has_ended = !matches!(
            event,
            Some(Ok(Event::Started(_)
                | Event::Tokens(_)
                | Event::Chat(_)
                | Event::Prompt(_)))
        );
        Poll::Ready(
            event.map(|event| event.map(|event| v1::CompletionEvent { event: Some(event) })),
        )
    }
}
