//! A request's completion as a stream of events: its choices' lanes merged, their tokens as text, one
//! terminal event.
//!
//! Dropping it cancels whatever is left of it, wherever that is: its lanes tell the queue or the
//! workers.

use std::collections::VecDeque;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use futures_core::Stream;
use metrics::Histogram;
use tokio::time::{Instant, Sleep, sleep_until};

use super::IncrementalDetokenizer;
use super::stop::StopStrings;
use crate::error::{Error, ErrorKind};
use crate::poll_on_wake::PollOnWake;
use crate::request::{FinishReason, Stopping};
use crate::runner::{ModelError, monotonic_ns};
use crate::scheduler::{Admitted, Resumer, worker_lost};
use crate::telemetry::{StageSummary, StageTimes};
use crate::tokens::TokenBatch;
use crate::worker::token_channel::{Failure, Output};

mod choice;
mod echo;

use choice::Choice;
use echo::{ScoredPrompt, echoed};

/// How many outputs of a token_channel are taken at once, and so the most tokens of one event.
const MAX_BATCH: usize = 256;

/// What the text of a token takes, about, in bytes.
const BYTES_PER_TOKEN: usize = 8;

/// What a client is told of its completion, in this order: one start, the prompt where it is asked for,
/// tokens, one summary.
#[derive(Clone, Debug, PartialEq)]
pub enum CompletionEvent {
    /// A worker has taken the first choice.
    Started,
    /// A part of the prompt.
    Prompt {
        /// Its text.
        text: String,
        /// The index of the first of its tokens within the prompt.
        first_index: u32,
        /// Its tokens, where log probabilities are asked for.
        tokens: TokenBatch,
    },
    /// Tokens of one choice that were ready together.
    Tokens {
        /// Which choice.
        choice: u32,
        /// The index of the first of them within the choice.
        first_index: u32,
        /// The tokens; empty where the choice ends without one.
        tokens: TokenBatch,
        /// Set when the choice ends here.
        finish: Option<FinishReason>,
    },
    /// Everything has ended well.
    Summary(Summary),
}

/// What a completion took.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Summary {
    /// Tokens of the prompt.
    pub prompt_tokens: u32,
    /// Tokens of all choices, shown or not.
    pub completion_tokens: u32,
    /// From arrival until a worker took the first choice.
    pub queue: Duration,
    /// From arrival until the first token.
    pub first_token: Duration,
    /// From arrival until the last choice ended.
    pub total: Duration,
    /// From each token's emission until this stream took it.
    pub engine: StageSummary,
}

/// The stream of one request's events. It ends after the summary or after the first error.
pub struct Completion {
    choices: Vec<Choice>,
    /// Where the next look at the choices begins, so that none starves another.
    cursor: usize,
    /// Events that are ready and have not been taken.
    ready: VecDeque<CompletionEvent>,
    outputs: Vec<Output>,
    arrived: Instant,
    deadline: PollOnWake<Sleep>,
    started: Option<Instant>,
    first_token: Option<Instant>,
    /// The prompt's text, until it is told; only where it is asked for.
    echo: Option<String>,
    scored_prompt: ScoredPrompt,
    /// How choices go on whose workers are lost; `None` where they cannot.
    resumer: Option<Resumer>,
    gaps: Histogram,
    prompt_tokens: u32,
    /// Why the request failed, until that is told.
    failed: Option<Error>,
    ended: bool,
    times: StageTimes,
}

impl Completion {
    /// The completion of a request that was admitted. `times` are those of the engine's stage.
    ///
    /// # Errors
    /// When a choice has ended with what the client has of it.
    pub fn new(admitted: Admitted, stopping: &Stopping, times: StageTimes) -> Result<Self, Error> {
        let strings =
            StopStrings::new(&stopping.strings).with_included_match(stopping.include_stop);
        let strings = Arc::new(strings);
        let mut resumed = admitted.resumed.into_iter();
        let mut choices = Vec::with_capacity(admitted.lanes.len());
        for (number, token_channel) in (0..).zip(admitted.lanes) {
            let text = IncrementalDetokenizer::new(Arc::clone(&strings), stopping);
            let choice = Choice::new(number, token_channel, text, admitted.resumer.is_some());
            let choice = choice.behind(resumed.next().unwrap_or_default())?;
            choices.push(choice);
        }
        Ok(Self {
            choices,
            cursor: 0,
            ready: VecDeque::new(),
            outputs: Vec::new(),
            arrived: admitted.arrived,
            deadline: PollOnWake::new(sleep_until(admitted.deadline)),
            started: None,
            first_token: None,
            scored_prompt: if admitted.scores_prompt {
                let text = admitted.echo.as_deref().unwrap_or_default();
                ScoredPrompt::new(admitted.prompt_tokens, text)
            } else {
                ScoredPrompt::default()
            },
            echo: admitted.echo,
            resumer: admitted.resumer,
            gaps: admitted.gaps,
            prompt_tokens: admitted.prompt_tokens,
            failed: None,
            ended: false,
            times,
        })
    }

    /// Looks at every open choice once. Ready when an event is, or an error.
    fn poll_choices(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let all = self.choices.len();
        let count = if self.scored_prompt.is_coming() {
            1
        } else {
            all
        };
        for step in 0..count {
            let index = (self.cursor + step) % count;
            // A batch may hold nothing to show (its tokens are held back), so look on until there is
            // something, or nothing more.
            while let Some(token_channel) = &mut self.choices[index].token_channel {
                match token_channel.poll_recv_many(cx, &mut self.outputs, MAX_BATCH) {
                    Poll::Pending if !self.choices[index].acceptance_timed_out(cx) => break,
                    Poll::Pending => self.failed = Some(worker_lost()),
                    Poll::Ready(0) => self.failed = self.resume(index).err(),
                    Poll::Ready(_) => self.take_outputs(index),
                }
                if self.failed.is_some() || !self.ready.is_empty() {
                    self.cursor = (index + 1) % count;
                    return Poll::Ready(());
                }
            }
        }
        if self
            .choices
            .iter()
            .all(|choice| choice.token_channel.is_none())
        {
            let summary = self.summary();
            self.ready.push_back(CompletionEvent::Summary(summary));
            return Poll::Ready(());
        }
        Poll::Pending
    }

    /// Has a choice go on elsewhere whose worker was lost.
    fn resume(&mut self, index: usize) -> Result<(), Error> {
        let choice = &mut self.choices[index];
        let resumer = self.resumer.as_ref().ok_or_else(worker_lost)?;
        // Only the first choice's token_channel has the prompt's tokens; they come from the beginning again.
        let scores_prompt = choice.number == 0 && self.scored_prompt.is_coming();
        choice.resume(resumer, scores_prompt)?;
        self.scored_prompt.comes_again();
        Ok(())
    }

    /// Turns a batch of one choice's outputs into events: the start if this is it, the tokens that are
    /// ready, and the end. What came before a failure is told before it.
    fn take_outputs(&mut self, index: usize) {
        record_engine_latency(&self.outputs, &self.times);
        let choice = &mut self.choices[index];
        let made_before = choice.made;
        let count = self
            .outputs
            .iter()
            .map(|it| it.completion_tokens().len())
            .sum();
        let mut tokens = TokenBatch::default();
        tokens.reserve(count, count * BYTES_PER_TOKEN);
        let mut prompt = TokenBatch::default();
        let mut end = None;
        for output in self.outputs.drain(..) {
            match output {
                Output::Accepted => {
                    choice.accepted();
                    if self.started.is_none() {
                        self.started = Some(Instant::now());
                        self.ready.push_back(CompletionEvent::Started);
                        self.ready.extend(echoed(self.echo.take()));
                    }
                }
                Output::Prompt(token) => self.scored_prompt.take(token, &mut prompt),
                Output::Token(token) => end = choice.take([token], &mut tokens),
                Output::Tokens(made) => end = choice.take(made, &mut tokens),
                Output::Finished(token, reason) => {
                    choice.made += u32::from(token.is_some());
                    let decided = tokens.len();
                    end = Some((decided, choice.text.finish(token, reason, &mut tokens)));
                }
                Output::Failed(failure) => self.failed = Some(failure_error(failure)),
            }
            if end.is_some() {
                break;
            }
        }
        if choice.made > made_before
            && let Some(gap) = choice.record_progress()
        {
            self.gaps.record(gap);
        }
        self.ready.extend(self.scored_prompt.event(prompt));
        if !tokens.is_empty() || end.is_some() {
            self.first_token.get_or_insert_with(Instant::now);
        }
        let Some((decided, reason)) = end else {
            self.ready.extend(choice.event(tokens, None));
            return;
        };
        // Dropping the token_channel ends the work on the device, where it has not ended already.
        choice.token_channel = None;
        // The reason goes with the last token only where both were decided by the same token, so that
        // the lines do not depend on what happened to be ready together.
        if tokens.len() == decided {
            self.ready.extend(choice.event(tokens, None));
            tokens = TokenBatch::default();
        }
        self.ready.extend(choice.event(tokens, Some(reason)));
    }

    fn summary(&self) -> Summary {
        let since_arrival = |at: Option<Instant>| {
            at.unwrap_or_else(Instant::now)
                .saturating_duration_since(self.arrived)
        };
        Summary {
            prompt_tokens: self.prompt_tokens,
            completion_tokens: self.choices.iter().map(|choice| choice.made).sum(),
            queue: since_arrival(self.started),
            first_token: since_arrival(self.first_token),
            total: since_arrival(None),
            engine: self.times.summary(),
        }
    }

    fn end(&mut self) {
        self.ended = true;
        for choice in &mut self.choices {
            choice.token_channel = None;
        }
    }
}

impl Stream for Completion {
    type Item = Result<CompletionEvent, Error>;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = self.get_mut();
        if this.ended {
            return Poll::Ready(None);
        }
        if this.ready.is_empty() {
            // What the device made before the deadline is told before the deadline is.
            if this.failed.is_none() && this.poll_choices(cx).is_pending() {
                ready!(this.deadline.poll(cx));
                this.failed = Some(deadline_exceeded());
            }
        }
        let Some(event) = this.ready.pop_front() else {
            this.end();
            return Poll::Ready(this.failed.take().map(Err));
        };
        if matches!(event, CompletionEvent::Summary(_)) {
            this.end();
        }
        Poll::Ready(Some(Ok(event)))
    }
}

/// Counts how long the tokens among these outputs have been on their way. It is public so that what it takes
/// can be measured.
pub fn record_engine_latency(outputs: &[Output], times: &StageTimes) {
    let emitted = outputs
        .iter()
        .flat_map(Output::completion_tokens)
        .map(|token| token.emitted_ns);
    let now_ns = monotonic_ns();
    times.record_each(emitted.map(|emitted_ns| now_ns.saturating_sub(emitted_ns)));
}

fn deadline_exceeded() -> Error {
    Error::new(
        ErrorKind::DeadlineExceeded,
        "The request's deadline passed.",
    )
}

fn failure_error(failure: Failure) -> Error {
    match failure {
        Failure::Model(ModelError::Invalid(message)) => {
            Error::new(ErrorKind::InvalidValue, message)
        }
        Failure::Model(ModelError::Unavailable(message)) => {
            Error::new(ErrorKind::NoWorker, message)
        }
        Failure::Model(ModelError::Failed(message)) => {
            tracing::error!(%message, "the model failed on a sequence");
            Error::new(ErrorKind::Internal, "The model failed on this request.")
        }
        Failure::SlowReader => Error::new(
            ErrorKind::SlowReader,
            "The stream was not read for too long, and was given up.",
        ),
        Failure::DeadlineExceeded => deadline_exceeded(),
        Failure::Draining => Error::new(
            ErrorKind::Draining,
            "The server is shutting down and could not wait for this request to end.",
        ),
    }
}

#[cfg(test)]
mod tests;
