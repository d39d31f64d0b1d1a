//! A completion's events as proto messages, counted at the door where the request entered.

use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use futures_core::Stream;
use tonic::Status;

use crate::proto::v1;
use crate::proto::v1::completion_event::Event;
use crate::request::FinishReason;
use crate::telemetry::CountedRequest;
use crate::text::completion::{Completion, CompletionEvent, Summary};

/// The response stream of `Complete`.
pub struct EventStream {
    completion: Completion,
    started: v1::Started,
    stamps: bool,
    counted: Option<CountedRequest>,
}

impl EventStream {
    pub(super) fn new(
        completion: Completion,
        started: v1::Started,
        stamps: bool,
        counted: Option<CountedRequest>,
    ) -> Self {
        Self {
            completion,
            started,
            stamps,
            counted,
        }
    }

    fn message(&self, event: CompletionEvent) -> v1::CompletionEvent {
        let event = match event {
            CompletionEvent::Started => Event::Started(self.started.clone()),
            CompletionEvent::Tokens {
                choice,
                first_index,
                mut tokens,
                finish,
            } => {
                if !self.stamps {
                    tokens.forget_stamps();
                }
                let finish_reason = finish_reason(finish).into();
                Event::Tokens(v1::Tokens {
                    choice,
                    first_index,
                    tokens,
                    finish_reason,
                })
            }
            CompletionEvent::Summary(summary) => Event::Summary(summary_message(&summary)),
        };
        v1::CompletionEvent { event: Some(event) }
    }
}

impl Stream for EventStream {
    type Item = Result<v1::CompletionEvent, Status>;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = self.get_mut();
        let Some(event) = ready!(Pin::new(&mut this.completion).poll_next(cx)) else {
            return Poll::Ready(None);
        };
        if let Some(counted) = &mut this.counted {
            match &event {
                Ok(CompletionEvent::Summary(_)) => counted.ended(Ok(())),
                Err(error) => counted.ended(Err(error)),
                Ok(CompletionEvent::Started | CompletionEvent::Tokens { .. }) => {}
            }
        }
        Poll::Ready(Some(match event {
            Ok(event) => Ok(this.message(event)),
            Err(error) => Err(error.into()),
        }))
    }
}

fn finish_reason(reason: Option<FinishReason>) -> v1::FinishReason {
    match reason {
        None => v1::FinishReason::Unspecified,
        Some(FinishReason::Stop) => v1::FinishReason::Stop,
        Some(FinishReason::Length) => v1::FinishReason::Length,
    }
}

fn summary_message(summary: &Summary) -> v1::Summary {
    let nanoseconds = |time: Duration| u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
    v1::Summary {
        usage: Some(v1::Usage {
            prompt_tokens: summary.prompt_tokens,
            completion_tokens: summary.completion_tokens,
        }),
        timings: Some(v1::Timings {
            queue_ns: nanoseconds(summary.queue),
            first_token_ns: nanoseconds(summary.first_token),
            total_ns: nanoseconds(summary.total),
        }),
    }
}
