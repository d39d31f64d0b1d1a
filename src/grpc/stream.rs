//! The response stream of a completion: converts the completion's events to proto messages, and reports the request's
//! progress to its context.

use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use futures_core::Stream;
use tonic::Status;

use crate::context::RequestContext;
use crate::delivery::{DeliveryTimer, WriteStart};
use crate::error::Error;
use crate::proto::v1;
use crate::proto::v1::completion_event::Event;
use crate::request::FinishReason;
use crate::telemetry::StageSummary;
use crate::text::completion::{Completion, CompletionEvent, Summary};
use crate::token_charges::TokenCharges;

/// Response stream of `Complete`.
pub(crate) struct EventStream {
    /// `None` after a token budget has ended the completion.
    completion: Option<Completion>,
    started: v1::Started,
    timestamps: bool,
    /// Charges the tokens to the budgets of the request's key. `None` if the key has none.
    charges: Option<TokenCharges>,
    /// Measures the delivery to a gRPC client. `None` if the HTTP API of this process delivers the tokens.
    delivery: Option<Delivery>,
}

/// Measures the delivery of a stream's tokens to a gRPC client.
pub(super) struct Delivery {
    pub(super) context: RequestContext,
    pub(super) timer: DeliveryTimer,
}

impl EventStream {
    pub(super) fn new(
        completion: Completion,
        started: v1::Started,
        timestamps: bool,
        charges: Option<TokenCharges>,
        delivery: Option<Delivery>,
    ) -> Self {
        Self {
            completion: Some(completion),
            started,
            timestamps,
            charges,
            delivery,
        }
    }

    /// Polls for the next event, and charges its tokens.
    fn poll_event(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Event, Error>>> {
        let Some(completion) = &mut self.completion else {
            return Poll::Ready(None);
        };
        let used_up = self.charges.as_mut().and_then(TokenCharges::take_error);
        if let Some(error) = used_up {
            // Dropping the completion frees its slots.
            self.completion = None;
            return Poll::Ready(Some(Err(error)));
        }
        let mut event = match ready!(Pin::new(completion).poll_next(cx)) {
            Some(Ok(event)) => self.message(event),
            Some(Err(error)) => return Poll::Ready(Some(Err(error))),
            None => return Poll::Ready(None),
        };
        if let Some(charges) = &mut self.charges
            && let Err(error) = charges.charge(&mut event)
        {
            self.completion = None;
            return Poll::Ready(Some(Err(error)));
        }
        Poll::Ready(Some(Ok(event)))
    }

    fn message(&self, event: CompletionEvent) -> Event {
        match event {
            CompletionEvent::Started => Event::Started(self.started.clone()),
            CompletionEvent::Prompt {
                text,
                first_index,
                tokens,
            } => {
                let tokens = v1::Tokens {
                    first_index,
                    tokens,
                    ..v1::Tokens::default()
                };
                Event::Prompt(v1::EchoedPrompt {
                    text,
                    tokens: Some(tokens).filter(|tokens| !tokens.tokens.is_empty()),
                })
            }
            CompletionEvent::Tokens {
                choice,
                first_index,
                mut tokens,
                finish,
            } => {
                if !self.timestamps {
                    tokens.clear_timestamps();
                }
                let finish_reason = finish_reason(finish).into();
                Event::Tokens(v1::Tokens {
                    choice,
                    first_index,
                    tokens,
                    finish_reason,
                })
            }
            CompletionEvent::Summary(summary) => {
                let timer = self.delivery.as_ref().map(|delivery| &delivery.timer);
                Event::Summary(summary_message(&summary, timer))
            }
        }
    }
}

impl Stream for EventStream {
    type Item = Result<v1::CompletionEvent, Status>;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = self.get_mut();
        let write_start = this.delivery.is_some().then(WriteStart::now);
        let Some(event) = ready!(this.poll_event(cx)) else {
            return Poll::Ready(None);
        };
        let event = match event {
            Ok(event) => event,
            Err(error) => {
                if let Some(delivery) = &mut this.delivery {
                    delivery.timer.record_end(Err(error.kind));
                }
                return Poll::Ready(Some(Err(error.into())));
            }
        };
        if let Some(delivery) = &mut this.delivery
            && let Some(write_start) = write_start
        {
            delivery.record(&event, write_start);
        }
        let event = Some(event);
        Poll::Ready(Some(Ok(v1::CompletionEvent { event })))
    }
}

impl Delivery {
    /// Records the delivery of an event. `start` is the time at which its conversion to a message started.
    fn record(&mut self, event: &Event, start: WriteStart) {
        match event {
            Event::Started(started) => self.context.record_start(started.prompt_tokens),
            Event::Prompt(_) | Event::Chat(_) => {}
            Event::Tokens(tokens) => {
                let count = u64::try_from(tokens.tokens.len()).unwrap_or(0);
                self.timer.record_written(start, tokens.choice, count);
            }
            Event::Summary(summary) => {
                let usage = summary.usage.unwrap_or_default();
                self.context
                    .set_usage(usage.prompt_tokens, usage.completion_tokens);
                self.timer.record_end(Ok(()));
            }
        }
    }
}

fn finish_reason(reason: Option<FinishReason>) -> v1::FinishReason {
    match reason {
        None => v1::FinishReason::Unspecified,
        Some(FinishReason::Stop) => v1::FinishReason::Stop,
        Some(FinishReason::Length) => v1::FinishReason::Length,
    }
}

fn summary_message(summary: &Summary, timer: Option<&DeliveryTimer>) -> v1::Summary {
    let delivery = timer.map(DeliveryTimer::summary);
    let nanoseconds = |time: Duration| u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
    v1::Summary {
        usage: Some(v1::Usage {
            prompt_tokens: summary.prompt_tokens,
            completion_tokens: summary.completion_tokens,
            cached_prompt_tokens: summary.cached_prompt_tokens,
            ..v1::Usage::default()
        }),
        timings: Some(v1::Timings {
            queue_ns: nanoseconds(summary.queue),
            first_token_ns: nanoseconds(summary.first_token),
            total_ns: nanoseconds(summary.total),
            engine: Some(summary.engine.into()),
            frontend: delivery.map(|it| it.frontend.into()),
            socket: delivery.map(|it| it.socket.into()),
            ..v1::Timings::default()
        }),
    }
}

impl From<StageSummary> for v1::StageTiming {
    fn from(summary: StageSummary) -> Self {
        let StageSummary {
            tokens,
            mean_ns,
            longest_ns,
        } = summary;
        Self {
            tokens,
            mean_ns,
            longest_ns,
        }
    }
}
