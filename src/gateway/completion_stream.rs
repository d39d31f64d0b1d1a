//! The RPCs of one HTTP request, merged: its prompts' choices are numbered through.

use std::future::poll_fn;
use std::pin::Pin;
use std::task::{Context, Poll};

use tokio::time::{Instant, sleep_until};
use tokio_stream::Stream;
use tokio_util::sync::CancellationToken;

use super::timings;
use crate::cluster::CheckedEvents;
use crate::error::{Error, ErrorKind};
use crate::poll_on_wake::PollOnWake;
use crate::proto::v1;
use crate::proto::v1::completion_event::Event;

/// The streams of a request's prompts.
pub(super) struct MergedStreams {
    prompts: Vec<CheckedEvents>,
    /// Which prompts have not ended.
    open: Vec<bool>,
    /// Where the next look begins, so that no prompt starves another.
    cursor: usize,
    choices_per_prompt: u32,
    usage: v1::Usage,
    timings: Option<v1::Timings>,
}

/// One step of the merged streams.
#[derive(Debug)]
pub(super) enum MergedEvent {
    /// A prompt has begun.
    Started(v1::Started),
    /// A part of a prompt, the first being 0.
    Prompt(u32, v1::EchoedPrompt),
    /// Tokens, their choice numbered through all prompts.
    Tokens(v1::Tokens),
    /// Every prompt has ended well: what they used, and what they took.
    Ended(v1::Usage, v1::Timings),
}

impl MergedStreams {
    pub(super) fn new(choices_per_prompt: u32) -> Self {
        Self {
            prompts: Vec::new(),
            open: Vec::new(),
            cursor: 0,
            choices_per_prompt,
            usage: v1::Usage::default(),
            timings: None,
        }
    }

    pub(super) fn push(&mut self, events: CheckedEvents) {
        self.prompts.push(events);
        self.open.push(true);
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Result<MergedEvent, Error>> {
        let count = self.prompts.len();
        for step in 0..count {
            let at = (self.cursor + step) % count;
            while self.open[at]
                && let Poll::Ready(event) = Pin::new(&mut self.prompts[at]).poll_next(cx)
            {
                let Some(event) = event.transpose()? else {
                    self.open[at] = false;
                    break;
                };
                if let Some(event) = self.take(at, event) {
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

    fn take(&mut self, prompt: usize, event: Event) -> Option<MergedEvent> {
        let prompt = u32::try_from(prompt).expect("there are at most 128 prompts");
        match event {
            Event::Started(started) => Some(MergedEvent::Started(started)),
            Event::Prompt(part) => Some(MergedEvent::Prompt(prompt, part)),
            Event::Tokens(mut tokens) => {
                tokens.choice += prompt * self.choices_per_prompt;
                Some(MergedEvent::Tokens(tokens))
            }
            Event::Summary(summary) => {
                let usage = summary.usage.unwrap_or_default();
                self.usage.prompt_tokens += usage.prompt_tokens;
                self.usage.completion_tokens += usage.completion_tokens;
                let taken = summary.timings.unwrap_or_default();
                self.timings = Some(timings::merge(self.timings, taken));
                None
            }
        }
    }
}

/// A request of which a worker has begun.
pub(super) struct CompletionStream {
    merged: MergedStreams,
    /// What was told of the first prompt that began.
    first: v1::Started,
    /// Why the server waits no longer for this request.
    given_up: PollOnWake<Pin<Box<dyn Future<Output = Error> + Send>>>,
}

impl CompletionStream {
    /// Waits for the first prompt to begin, in whatever order the engines take them.
    ///
    /// # Errors
    /// The first refusal of any prompt.
    pub(super) async fn wait_for_start(
        mut merged: MergedStreams,
        deadline: Instant,
        stopping: CancellationToken,
    ) -> Result<Self, Error> {
        let first = match poll_fn(|cx| merged.poll(cx)).await? {
            MergedEvent::Started(started) => started,
            MergedEvent::Prompt(..) | MergedEvent::Tokens(_) | MergedEvent::Ended(..) => {
                tracing::error!("an engine's stream did not begin with its start");
                return Err(Error::internal());
            }
        };
        Ok(Self {
            merged,
            first,
            given_up: PollOnWake::new(Box::pin(given_up(deadline, stopping))),
        })
    }

    /// What was told of the first prompt that began.
    pub(super) fn first(&self) -> &v1::Started {
        &self.first
    }

    /// How many choices the answer has.
    pub(super) fn choices(&self) -> usize {
        let per_prompt = usize::try_from(self.merged.choices_per_prompt).unwrap_or(1);
        self.merged.prompts.len() * per_prompt
    }

    /// The next tokens, or the end.
    pub(super) fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Result<MergedEvent, Error>> {
        if let Poll::Ready(event) = self.merged.poll(cx) {
            return Poll::Ready(event);
        }
        self.given_up.poll(cx).map(Err)
    }

    /// The next tokens, or the end.
    pub(super) async fn next(&mut self) -> Result<MergedEvent, Error> {
        poll_fn(|cx| self.poll_next(cx)).await
    }
}

/// Waits until the server is told to stop, or the deadline has passed.
async fn given_up(deadline: Instant, stopping: CancellationToken) -> Error {
    tokio::select! {
        biased;
        () = stopping.cancelled() => stopped(),
        () = sleep_until(deadline) => deadline_exceeded(),
    }
}

pub(super) fn deadline_exceeded() -> Error {
    Error::new(
        ErrorKind::DeadlineExceeded,
        "The request's deadline passed.",
    )
}

/// What is told where the server ends before the request does.
pub(super) fn stopped() -> Error {
    Error::new(
        ErrorKind::Draining,
        "The server is shutting down and could not wait for this request to end.",
    )
}
