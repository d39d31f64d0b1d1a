//! The response stream of a completion on a gateway: the engine's events, with the timings and metrics of this
//! gateway.

use std::pin::Pin;
use std::task::{Context, Poll};

use futures_core::Stream;
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};
use tonic::Status;

use crate::cluster::{CheckedEvents, Failure};
use crate::context::RequestContext;
use crate::delivery::{DeliveryTimer, WriteStart};
use crate::error::Error;
use crate::poll_on_wake::PollOnWake;
use crate::proto::v1;
use crate::proto::v1::completion_event::Event;

/// Response stream of `Complete`.
pub(crate) struct ForwardedEvents {
    events: CheckedEvents,
    context: RequestContext,
    timer: DeliveryTimer,
    /// True if the engine reports only text. A part of a chat message then counts as one token.
    is_text_only: bool,
    /// Completes when the drain has timed out and the stream must end.
    stopped: PollOnWake<Pin<Box<WaitForCancellationFutureOwned>>>,
    ended: bool,
}

impl ForwardedEvents {
    pub(super) fn new(
        events: CheckedEvents,
        context: RequestContext,
        stopping: CancellationToken,
    ) -> Self {
        Self {
            events,
            timer: DeliveryTimer::new(context.record(), context.flush_handle().clone()),
            context,
            is_text_only: false,
            stopped: PollOnWake::new(Box::pin(stopping.cancelled_owned())),
            ended: false,
        }
    }

    /// Polls for the next event. Delivers events that are ready before it reports a shutdown.
    fn poll_event(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Event, Failure>>> {
        if let Poll::Ready(event) = self.events.poll_event(cx) {
            return Poll::Ready(event);
        }
        let stopped = self.stopped.poll(cx);
        stopped.map(|()| Some(Err(Error::shutting_down().into())))
    }

    /// Counts an event. Replaces the timings of the engine's API by the timings of this gateway's API.
    fn deliver(&mut self, event: &mut Event, start: WriteStart) {
        match event {
            Event::Started(started) => {
                // The engine reports the served name of the model, which may differ from the alias in the request.
                self.context.record().set_model(&started.model);
                self.context.record_start(started.prompt_tokens);
                self.is_text_only = started.text_only;
            }
            Event::Prompt(_) => {}
            Event::Chat(delta) => {
                let count = self.is_text_only.into();
                self.timer.record_written(start, delta.choice, count);
            }
            Event::Tokens(tokens) => {
                let count = u64::try_from(tokens.tokens.len()).unwrap_or(0);
                self.timer.record_written(start, tokens.choice, count);
            }
            Event::Summary(summary) => {
                if let Some(timings) = &mut summary.timings {
                    let delivery = self.timer.summary();
                    timings.frontend = Some(delivery.frontend.into());
                    timings.socket = Some(delivery.socket.into());
                }
                let usage = summary.usage.unwrap_or_default();
                self.context
                    .set_usage(usage.prompt_tokens, usage.completion_tokens);
                self.timer.record_end(Ok(()));
            }
        }
    }
}

impl Stream for ForwardedEvents {
    type Item = Result<v1::CompletionEvent, Status>;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = self.get_mut();
        if this.ended {
            return Poll::Ready(None);
        }
        let start = WriteStart::now();
        this.poll_event(cx).map(|event| match event {
            None => {
                this.ended = true;
                None
            }
            Some(Ok(mut event)) => {
                this.deliver(&mut event, start);
                Some(Ok(v1::CompletionEvent { event: Some(event) }))
            }
            Some(Err(failure)) => {
                this.ended = true;
                this.timer.record_end(Err(failure.error().kind));
                Some(Err(failure.into()))
            }
        })
    }
}
