//! Merges the engine streams of one HTTP request into a single stream of events. There is one engine stream per
//! prompt.
//!
//! Choice indices are made unique across the prompts. This module must not know how events are written.

use std::future::poll_fn;
use std::pin::Pin;
use std::task::{Context, Poll};

use tokio::time::{Instant, sleep_until};
use tokio_stream::Stream;
use tokio_util::sync::CancellationToken;

use super::dialect::FinishReason;
use super::timings;
use crate::cluster::CheckedEvents;
use crate::error::{Error, ErrorKind};
use crate::poll_on_wake::PollOnWake;
use crate::proto::v1;
use crate::proto::v1::completion_event::Event;

/// The engine streams of a request, one per prompt.
pub(super) struct MergedStreams {
    streams: Vec<CheckedEvents>,
    /// For each stream, true until the stream has ended.
    open: Vec<bool>,
    /// Index of the stream that is polled first. It advances after each event, so that no prompt starves the others.
    cursor: usize,
    choices_per_prompt: u32,
    /// Token counts of the prompts that have ended.
    usage: v1::Usage,
    timings: Option<v1::Timings>,
}

/// An event of the merged streams.
#[derive(Debug)]
pub(super) enum MergedEvent {
    /// A worker has started a prompt.
    Started(v1::Started),
    /// A part of an echoed prompt, with the index of the prompt.
    Prompt(u32, v1::EchoedPrompt),
    /// Tokens of a choice. `choice` is unique across all prompts.
    Tokens(v1::Tokens),
    /// Parts of a chat message besides its text. `choice` is unique across all prompts.
    Chat(v1::ChatDelta),
    /// Every prompt has succeeded.
    Ended(v1::Usage, v1::Timings),
}

impl MergedStreams {
    pub(super) fn new(choices_per_prompt: u32) -> Self {
        Self {
            streams: Vec::new(),
            open: Vec::new(),
            cursor: 0,
            choices_per_prompt,
            usage: v1::Usage::default(),
            timings: None,
        }
    }

    pub(super) fn push(&mut self, events: CheckedEvents) {
        self.streams.push(events);
        self.open.push(true);
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Result<MergedEvent, Error>> {
        let count = self.streams.len();
        for step in 0..count {
            let at = (self.cursor + step) % count;
            while self.open[at]
                && let Poll::Ready(event) = Pin::new(&mut self.streams[at]).poll_next(cx)
            {
                let Some(event) = event.transpose()? else {
                    self.open[at] = false;
                    break;
                };
                if let Some(event) = self.merge(at, event) {
                    self.cursor = (at + 1) % count;
                    return Poll::Ready(Ok(event));
                }
            }
        }
        if self.open.iter().any(|open| *open) {
            return Poll::Pending;
        }
        let timings = self.timings.unwrap_or_default();
        Poll::Ready(Ok(MergedEvent::Ended(self.usage, timings)))
    }

    /// Makes the event's choice index unique. Returns `None` for a summary, which is collected instead.
    fn merge(&mut self, prompt: usize, event: Event) -> Option<MergedEvent> {
        let prompt = u32::try_from(prompt).expect("there are at most 128 prompts");
        match event {
            Event::Started(started) => Some(MergedEvent::Started(started)),
            Event::Prompt(part) => Some(MergedEvent::Prompt(prompt, part)),
            Event::Tokens(mut tokens) => {
                tokens.choice += prompt * self.choices_per_prompt;
                Some(MergedEvent::Tokens(tokens))
            }
            Event::Chat(mut delta) => {
                delta.choice += prompt * self.choices_per_prompt;
                Some(MergedEvent::Chat(delta))
            }
            Event::Summary(summary) => {
                let usage = summary.usage.unwrap_or_default();
                let total = &mut self.usage;
                // A remote engine may report any number.
                total.prompt_tokens = total.prompt_tokens.saturating_add(usage.prompt_tokens);
                total.completion_tokens = total
                    .completion_tokens
                    .saturating_add(usage.completion_tokens);
                add_reported(&mut total.cached_prompt_tokens, usage.cached_prompt_tokens);
                add_reported(&mut total.reasoning_tokens, usage.reasoning_tokens);
                let timings = summary.timings.unwrap_or_default();
                self.timings = Some(timings::merge(self.timings, timings));
                None
            }
        }
    }
}

/// Adds a number that not every engine reports. The total stays unset until an engine reports it.
fn add_reported(total: &mut Option<u32>, reported: Option<u32>) {
    if let Some(number) = reported {
        *total = Some(total.unwrap_or(0).saturating_add(number));
    }
}

/// The stream of a request that a worker has started.
pub(super) struct CompletionStream {
    merged: MergedStreams,
    first_started: v1::Started,
    /// Completes with an error when the drain has timed out or the deadline has passed.
    aborted: PollOnWake<Pin<Box<dyn Future<Output = Error> + Send>>>,
}

impl CompletionStream {
    /// Waits until a worker starts one of the prompts.
    ///
    /// # Errors A prompt is rejected before a worker starts one.
    pub(super) async fn wait_for_start(
        mut merged: MergedStreams,
        deadline: Instant,
        stopping: CancellationToken,
    ) -> Result<Self, Error> {
        let first_started = match poll_fn(|cx| merged.poll(cx)).await? {
            MergedEvent::Started(started) => started,
            MergedEvent::Prompt(..)
            | MergedEvent::Tokens(_)
            | MergedEvent::Chat(_)
            | MergedEvent::Ended(..) => {
                tracing::error!("an engine sent a completion event before `started`");
                return Err(Error::internal());
            }
        };
        Ok(Self {
            merged,
            first_started,
            aborted: PollOnWake::new(Box::pin(wait_for_abort(deadline, stopping))),
        })
    }

    /// Returns the `started` event of the prompt that started first.
    pub(super) fn first_started(&self) -> &v1::Started {
        &self.first_started
    }

    /// Total number of choices, over all prompts.
    pub(super) fn choices(&self) -> usize {
        let per_prompt = usize::try_from(self.merged.choices_per_prompt).unwrap_or(1);
        self.merged.streams.len() * per_prompt
    }

    /// Polls for the next event. Returns events that are ready before it reports a deadline or a shutdown.
    pub(super) fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Result<MergedEvent, Error>> {
        if let Poll::Ready(event) = self.merged.poll(cx) {
            return Poll::Ready(event);
        }
        self.aborted.poll(cx).map(Err)
    }

    /// Waits for the next event.
    pub(super) async fn next(&mut self) -> Result<MergedEvent, Error> {
        poll_fn(|cx| self.poll_next(cx)).await
    }
}

/// Waits until the drain has timed out or the deadline has passed. Returns the error for the client.
async fn wait_for_abort(deadline: Instant, stopping: CancellationToken) -> Error {
    tokio::select! {
        biased;
        () = stopping.cancelled() => Error::shutting_down(),
        () = sleep_until(deadline) => deadline_exceeded(),
    }
}

/// Returns the reason why a choice ends with these tokens, or `None` if it continues.
pub(super) fn finish_reason(tokens: &v1::Tokens) -> Option<FinishReason> {
    match tokens.finish_reason() {
        v1::FinishReason::Unspecified => None,
        v1::FinishReason::Stop => Some(FinishReason::Stop),
        v1::FinishReason::Length => Some(FinishReason::Length),
        v1::FinishReason::ContentFilter => Some(FinishReason::ContentFilter),
        v1::FinishReason::ToolCalls => Some(FinishReason::ToolCalls),
    }
}

pub(super) fn deadline_exceeded() -> Error {
    Error::new(
        ErrorKind::DeadlineExceeded,
        "The request's deadline passed.",
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_usage_of_several_prompts_is_their_sum_up_to_the_largest_number() {
        let usage = |prompt_tokens, completion_tokens, cached_prompt_tokens| v1::Usage {
            prompt_tokens,
            completion_tokens,
            cached_prompt_tokens,
            reasoning_tokens: None,
        };
        let mut merged = MergedStreams::new(1);
        let reported = [
            usage(3, 4, None),
            usage(u32::MAX, 5, Some(2)),
            usage(0, 0, Some(1)),
        ];
        for (prompt, usage) in reported.into_iter().enumerate() {
            let summary = v1::Summary {
                usage: Some(usage),
                timings: None,
            };
            assert!(merged.merge(prompt, Event::Summary(summary)).is_none());
        }
        assert_eq!(merged.usage, usage(u32::MAX, 9, Some(3)));
    }
}
