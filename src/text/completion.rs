//! The stream of one request's events. It merges the token channels of the request's choices and converts their
//! tokens into text.
//!
//! Dropping the stream cancels the request, because the dropped token channels notify the queue or the workers.

use std::collections::VecDeque;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use futures_core::Stream;
use metrics::Histogram;
use tokio::time::{Instant, Sleep, sleep_until};

use super::IncrementalDetokenizer;
use super::stop::StopStrings;
use crate::error::{Error, ErrorKind};
use crate::poll_on_wake::PollOnWake;
use crate::prompt::Prompt;
use crate::request::CompletionRequest;
use crate::runner::{ModelError, monotonic_ns};
use crate::scheduler::{Admitted, Resumer, worker_lost_error};
use crate::telemetry::StageTimes;
use crate::tokens::TokenBatch;
use crate::worker::token_channel::{Failure, Output};

mod choice;
mod echo;
mod event;

use choice::Choice;
use echo::{ScoredPrompt, echo_events};
pub use event::{CompletionEvent, Summary};

/// Maximum number of outputs that are received from a token channel at once.
const MAX_BATCH: usize = 256;

/// Estimated length of a token's text in bytes, used to reserve memory.
const BYTES_PER_TOKEN: usize = 8;

/// The stream of one request's events. It ends after the summary or the first error.
pub struct Completion {
    choices: Vec<Choice>,
    /// Index of the choice that is polled first. It advances with every poll, so that no choice starves the others.
    cursor: usize,
    /// Events to return before the choices are polled again.
    ready: VecDeque<CompletionEvent>,
    outputs: Vec<Output>,
    arrived: Instant,
    deadline: PollOnWake<Sleep>,
    started: Option<Instant>,
    first_token: Option<Instant>,
    /// Text of the prompt, if the request echoes it. Taken when the completion starts.
    echo: Option<String>,
    scored_prompt: ScoredPrompt,
    /// Resumes choices whose worker was lost. `None` if the model does not support resumption.
    resumer: Option<Resumer>,
    resumption_gap_seconds: Histogram,
    prompt_tokens: u32,
    /// True if the model's runner can reuse computed prompt tokens.
    reuses_prefixes: bool,
    /// Number of prompt tokens that choice 0 reused. `None` until a worker has accepted choice 0.
    cached_tokens: Option<u32>,
    /// The error to return after the events in `ready`.
    error: Option<Error>,
    ended: bool,
    times: StageTimes,
}

impl Completion {
    /// Creates the completion of an admitted request from its prompt and its token channels. Stop strings are not
    /// matched in the first `min_tokens` tokens. `times` records the latencies of the engine stage.
    ///
    /// # Errors
    /// Returns an error if the client already has tokens that contain a stop string: that choice has ended.
    pub(crate) fn new(
        request: &CompletionRequest,
        prompt: Prompt,
        admitted: Admitted,
        times: StageTimes,
    ) -> Result<Self, Error> {
        let stopping = &request.stopping;
        let min_tokens = request.options.stop_tokens.min_tokens;
        let prompt_tokens = prompt.token_count();
        let strings =
            StopStrings::new(&stopping.strings).with_included_match(stopping.include_stop);
        let strings = Arc::new(strings);
        let mut resumed = prompt.resumed.into_iter();
        let mut choices = Vec::with_capacity(admitted.token_channels.len());
        for (number, token_channel) in (0..).zip(admitted.token_channels) {
            let detokenizer =
                IncrementalDetokenizer::new(Arc::clone(&strings), stopping, min_tokens);
            let is_resumable = admitted.resumer.is_some();
            let choice = Choice::new(number, token_channel, detokenizer, is_resumable);
            let choice = choice.resumed_after(resumed.next().unwrap_or_default())?;
            choices.push(choice);
        }
        Ok(Self {
            choices,
            cursor: 0,
            ready: VecDeque::new(),
            outputs: Vec::new(),
            arrived: request.arrived,
            deadline: PollOnWake::new(sleep_until(request.deadline)),
            started: None,
            first_token: None,
            scored_prompt: if prompt.is_scored {
                let text = prompt.echo.as_deref().unwrap_or_default();
                ScoredPrompt::new(prompt_tokens, text)
            } else {
                ScoredPrompt::default()
            },
            echo: prompt.echo,
            resumer: admitted.resumer,
            resumption_gap_seconds: admitted.resumption_gap_seconds,
            prompt_tokens,
            reuses_prefixes: admitted.reuses_prefixes,
            cached_tokens: None,
            error: None,
            ended: false,
            times,
        })
    }

    /// Polls the choices that have not ended. Ready if there is an event or an error.
    fn poll_choices(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let all = self.choices.len();
        let count = if self.scored_prompt.is_incomplete() {
            1
        } else {
            all
        };
        for step in 0..count {
            let index = (self.cursor + step) % count;
            // Stop strings may hold back all tokens of a batch. Poll until there is an event or no more output.
            while let Some(token_channel) = &mut self.choices[index].token_channel {
                match token_channel.poll_recv_many(cx, &mut self.outputs, MAX_BATCH) {
                    Poll::Pending if !self.choices[index].acceptance_timed_out(cx) => break,
                    Poll::Pending => self.error = Some(worker_lost_error()),
                    Poll::Ready(0) => self.error = self.resume(index).err(),
                    Poll::Ready(_) => self.handle_outputs(index),
                }
                if self.error.is_some() || !self.ready.is_empty() {
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

    /// Moves a choice whose worker was lost to another worker.
    fn resume(&mut self, index: usize) -> Result<(), Error> {
        let choice = &mut self.choices[index];
        let resumer = self.resumer.as_ref().ok_or_else(worker_lost_error)?;
        // Choice 0 also receives the prompt's tokens. If some are still missing, the new worker sends all of them
        // again.
        let scores_prompt = choice.number == 0 && self.scored_prompt.is_incomplete();
        choice.resume(resumer, scores_prompt)?;
        tracing::info!(
            choice = choice.number,
            "resuming a choice on another worker: its worker was lost"
        );
        self.scored_prompt.restart();
        Ok(())
    }

    /// Converts `self.outputs`, which were received from one choice, into events. Outputs that precede a failure
    /// become events that precede the error.
    fn handle_outputs(&mut self, index: usize) {
        record_engine_latency(&self.outputs, &self.times);
        let choice = &mut self.choices[index];
        let tokens_before = choice.token_count;
        let count = self
            .outputs
            .iter()
            .map(|output| output.completion_tokens().len())
            .sum();
        let mut tokens = TokenBatch::default();
        tokens.reserve(count, count * BYTES_PER_TOKEN);
        let mut prompt = TokenBatch::default();
        let mut end = None;
        for output in self.outputs.drain(..) {
            match output {
                Output::Accepted { cached_tokens } => {
                    choice.record_acceptance();
                    // Usage counts the prompt once for all choices, so only choice 0 reports cached tokens. A
                    // resumption does not change the number.
                    if choice.number == 0 {
                        self.cached_tokens.get_or_insert(cached_tokens);
                    }
                    if self.started.is_none() {
                        self.started = Some(Instant::now());
                        self.ready.push_back(CompletionEvent::Started);
                        self.ready.extend(echo_events(self.echo.take()));
                    }
                }
                Output::Prompt(token) => self.scored_prompt.push_token(token, &mut prompt),
                Output::Token(token) => end = choice.decode([token], &mut tokens),
                Output::Tokens(received) => end = choice.decode(received, &mut tokens),
                Output::Finished(token, reason) => {
                    choice.token_count += u32::from(token.is_some());
                    let decided = tokens.len();
                    end = Some((
                        decided,
                        choice.detokenizer.finish(token, reason, &mut tokens),
                    ));
                }
                Output::Failed(failure) => self.error = Some(failure_error(failure)),
            }
            if end.is_some() {
                break;
            }
        }
        if choice.token_count > tokens_before
            && let Some(gap) = choice.record_progress()
        {
            self.resumption_gap_seconds.record(gap);
        }
        self.ready.extend(self.scored_prompt.event(prompt));
        if !tokens.is_empty() || end.is_some() {
            self.first_token.get_or_insert_with(Instant::now);
        }
        let Some((decided, reason)) = end else {
            self.ready.extend(choice.event(tokens, None));
            return;
        };
        // Dropping the token channel cancels the sequence if the worker is still running it.
        choice.token_channel = None;
        // The event of the last token contains the finish reason only if that one token decided both. The events
        // therefore do not depend on how outputs were batched.
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
            cached_prompt_tokens: self.cached_tokens.filter(|_| self.reuses_prefixes),
            completion_tokens: self.choices.iter().map(|choice| choice.token_count).sum(),
            queue: since_arrival(self.started),
            first_token: since_arrival(self.first_token),
            total: since_arrival(None),
            engine: self.times.summary(),
        }
    }

    /// Ends the stream and cancels the choices that are still running.
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
            // Tokens that arrived before the deadline are returned before the deadline error.
            if this.error.is_none() && this.poll_choices(cx).is_pending() {
                ready!(this.deadline.poll(cx));
                this.error = Some(deadline_exceeded());
            }
        }
        let Some(event) = this.ready.pop_front() else {
            this.end();
            return Poll::Ready(this.error.take().map(Err));
        };
        if matches!(event, CompletionEvent::Summary(_)) {
            this.end();
        }
        Poll::Ready(Some(Ok(event)))
    }
}

/// Records the time between the emission of each token and now. Public only for a benchmark of its cost.
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

/// Converts the failure of a sequence into the error that the client receives.
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
            "The client did not read the stream for too long.",
        ),
        Failure::DeadlineExceeded => deadline_exceeded(),
        Failure::Draining => Error::new(
            ErrorKind::Draining,
            "The server is shutting down and could not wait for this request to end.",
        ),
        Failure::Displaced => Error::new(
            ErrorKind::QueueFull,
            "The queue is full, and requests of other API keys need their share of it. Try again later.",
        ),
    }
}

#[cfg(test)]
mod tests;
