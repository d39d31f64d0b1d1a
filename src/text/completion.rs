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

use super::stop::StopStrings;
use super::{ChoiceText, Watch};
use crate::error::{Error, ErrorKind};
use crate::request::{FinishReason, Stopping, TokenId};
use crate::runner::{ModelError, Token, monotonic_ns};
use crate::scheduler::{Admitted, Held, Lost, Resumer, worker_lost};
use crate::seldom::Seldom;
use crate::telemetry::{StageSummary, StageTimes};
use crate::tokens::TokenBatch;
use crate::worker::lane::{Failure, LaneReceiver, Output};

mod echo;

use echo::{ScoredPrompt, echoed};

/// How many outputs of a lane are taken at once, and so the most tokens of one event.
const BATCH: usize = 256;

/// What the text of a token takes, about, in bytes.
const TEXT: usize = 8;

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
    deadline: Seldom<Sleep>,
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

struct Choice {
    number: u32,
    /// Gone when the choice has ended.
    lane: Option<LaneReceiver>,
    text: ChoiceText,
    next_index: u32,
    /// How many tokens it has, told or not.
    made: u32,
    /// How many of the next tokens the client has already: they were held back, and are no more.
    told_before: usize,
    /// Whether it may go on elsewhere.
    is_resumable: bool,
    /// What it has, to go on behind it elsewhere.
    ids: Vec<TokenId>,
    lost: Lost,
    /// Whether the worker where it is has taken it.
    is_accepted: bool,
    /// Since when it waits for the next token of another worker, and until when for that worker.
    resuming: Option<(Instant, InVain)>,
}

/// Ends when no other worker has taken a choice in time; pending once one has.
type InVain = Option<Pin<Box<dyn Future<Output = ()> + Send>>>;

impl Choice {
    fn new(number: u32, lane: LaneReceiver, text: ChoiceText, is_resumable: bool) -> Self {
        Self {
            number,
            lane: Some(lane),
            text,
            next_index: 0,
            made: 0,
            told_before: 0,
            is_resumable,
            ids: Vec::new(),
            lost: Lost::default(),
            is_accepted: false,
            resuming: None,
        }
    }

    /// The choice as it goes on behind what its client has.
    fn behind(mut self, held: Vec<Held>) -> Result<Self, Error> {
        let count = held.len();
        self.ids = held.iter().map(|(id, _)| *id).collect();
        let tokens = held.into_iter().map(|(id, bytes)| Token {
            id,
            bytes,
            due_ns: 0,
            emitted_ns: 0,
            logprobs: None,
        });
        let told = self.text.replay(tokens).ok_or_else(|| {
            let message = "resume holds a stop string, with which that choice has ended.";
            Error::invalid_value("resume", message)
        })?;
        self.told_before = count - told;
        self.next_index = u32::try_from(count).unwrap_or(u32::MAX);
        self.made = self.next_index;
        Ok(self)
    }

    /// A worker has it, for the first time or again.
    fn accepted(&mut self) {
        self.is_accepted = true;
        if let Some((_, in_vain)) = &mut self.resuming {
            *in_vain = None;
        }
    }

    /// Takes the tokens that were made, and appends those that may be told. Where one of them completes a stop string,
    /// the choice ends with those that were decided before it.
    fn take(
        &mut self,
        made: impl IntoIterator<Item = Token>,
        ready: &mut TokenBatch,
    ) -> Option<(usize, FinishReason)> {
        for token in made {
            self.made += 1;
            if self.is_resumable {
                self.ids.push(token.id);
            }
            let decided = ready.len();
            if self.text.push(token, ready) == Watch::Matched {
                return Some((decided, FinishReason::Stop));
            }
        }
        None
    }

    /// It has got a token: how long it had waited for it where it goes on elsewhere.
    fn went_on(&mut self) -> Option<Duration> {
        let (since, _) = self.resuming.take()?;
        self.lost.went_on();
        Some(since.elapsed())
    }

    /// Whether it has waited for another worker in vain.
    fn is_in_vain(&mut self, cx: &mut Context<'_>) -> bool {
        match &mut self.resuming {
            Some((_, Some(in_vain))) => in_vain.as_mut().poll(cx).is_ready(),
            Some((_, None)) | None => false,
        }
    }

    /// An event of these tokens, if there is anything to tell.
    fn event(
        &mut self,
        tokens: TokenBatch,
        finish: Option<FinishReason>,
    ) -> Option<CompletionEvent> {
        let again = self.told_before.min(tokens.len());
        self.told_before -= again;
        let tokens = tokens.without_first(again);
        if tokens.is_empty() && finish.is_none() {
            return None;
        }
        let first_index = self.next_index;
        self.next_index += u32::try_from(tokens.len()).expect("a batch is small");
        Some(CompletionEvent::Tokens {
            choice: self.number,
            first_index,
            tokens,
            finish,
        })
    }
}

impl Completion {
    /// The completion of a request that was admitted. `times` are those of the engine's stage.
    ///
    /// # Errors
    /// When a choice has ended with what the client has of it.
    pub fn new(admitted: Admitted, stopping: &Stopping, times: StageTimes) -> Result<Self, Error> {
        let strings = StopStrings::new(&stopping.strings).shown(stopping.is_shown);
        let strings = Arc::new(strings);
        let mut resumed = admitted.resumed.into_iter();
        let mut choices = Vec::with_capacity(admitted.lanes.len());
        for (number, lane) in (0..).zip(admitted.lanes) {
            let text = ChoiceText::new(Arc::clone(&strings), stopping);
            let choice = Choice::new(number, lane, text, admitted.resumer.is_some());
            let choice = choice.behind(resumed.next().unwrap_or_default())?;
            choices.push(choice);
        }
        Ok(Self {
            choices,
            cursor: 0,
            ready: VecDeque::new(),
            outputs: Vec::new(),
            arrived: admitted.arrived,
            deadline: Seldom::new(sleep_until(admitted.deadline)),
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
            while let Some(lane) = &mut self.choices[index].lane {
                match lane.poll_recv_many(cx, &mut self.outputs, BATCH) {
                    Poll::Pending if !self.choices[index].is_in_vain(cx) => break,
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
        if self.choices.iter().all(|choice| choice.lane.is_none()) {
            let summary = self.summary();
            self.ready.push_back(CompletionEvent::Summary(summary));
            return Poll::Ready(());
        }
        Poll::Pending
    }

    /// Has a choice go on elsewhere whose worker was lost.
    fn resume(&mut self, index: usize) -> Result<(), Error> {
        let choice = &mut self.choices[index];
        let by_crash = choice.lane.as_ref().is_some_and(LaneReceiver::has_crashed);
        // A worker that was killed or hung before it took the choice is none that the choice has lost. One that
        // crashed may have done so by the choice, before it came to say that it has it.
        if std::mem::take(&mut choice.is_accepted) || by_crash {
            choice.lost.again(by_crash);
        }
        let resumer = self.resumer.as_ref().ok_or_else(worker_lost)?;
        // Only the first choice's lane has the prompt's tokens; they come from the beginning again.
        let scores_prompt = choice.number == 0 && self.scored_prompt.is_coming();
        let resuming = resumer.resume(choice.number, &choice.ids, scores_prompt, &choice.lost)?;
        let since = choice.resuming.take().map(|(since, _)| since);
        choice.resuming = Some((since.unwrap_or_else(Instant::now), Some(resuming.in_vain)));
        choice.lane = Some(resuming.lane);
        self.scored_prompt.comes_again();
        Ok(())
    }

    /// Turns a batch of one choice's outputs into events: the start if this is it, the tokens that are
    /// ready, and the end. What came before a failure is told before it.
    fn take_outputs(&mut self, index: usize) {
        time_taken(&self.outputs, &self.times);
        let choice = &mut self.choices[index];
        let made_before = choice.made;
        let count = self.outputs.iter().map(|it| it.made().len()).sum();
        let mut tokens = TokenBatch::default();
        tokens.reserve(count, count * TEXT);
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
                Output::Failed(failure) => self.failed = Some(error_of(failure)),
            }
            if end.is_some() {
                break;
            }
        }
        if choice.made > made_before
            && let Some(gap) = choice.went_on()
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
        // Dropping the lane ends the work on the device, where it has not ended already.
        choice.lane = None;
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
            choice.lane = None;
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
pub fn time_taken(outputs: &[Output], times: &StageTimes) {
    let emitted = outputs
        .iter()
        .flat_map(Output::made)
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

fn error_of(failure: Failure) -> Error {
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
mod tests {
    use metrics::Counter;
    use tokio::sync::Notify;
    use tokio_stream::StreamExt;

    use super::*;
    use crate::runner::TokenBytes;
    use crate::telemetry::{Lane, Stage, Telemetry};
    use crate::worker::lane::{LaneSender, Sent, lane};

    fn send(lane: &LaneSender, text: &str) {
        let token = Token {
            id: 0,
            bytes: TokenBytes::from_slice(text.as_bytes()),
            due_ns: 0,
            emitted_ns: 0,
            logprobs: None,
        };
        assert_eq!(lane.token(token), Sent::Delivered);
    }

    /// A completion of so many choices, and the workers' ends of their lanes.
    fn completion(choices: usize) -> (Completion, Vec<LaneSender>) {
        let lanes = (0..choices).map(|_| lane(16, Arc::new(Notify::new()), Counter::noop()));
        let (senders, lanes) = lanes.unzip();
        let now = Instant::now();
        let admitted = Admitted {
            model: "m".into(),
            prompt_tokens: 1,
            echo: None,
            scores_prompt: false,
            resumed: Vec::new(),
            lanes,
            resumer: None,
            gaps: Histogram::noop(),
            arrived: now,
            deadline: now + Duration::from_secs(3_600),
        };
        let times = Telemetry::new().stage_times(Lane::Grpc, Stage::Engine);
        let completion = Completion::new(admitted, &Stopping::default(), times);
        (completion.expect("nothing is resumed"), senders)
    }

    async fn next_choice(completion: &mut Completion) -> u32 {
        match completion.next().await {
            Some(Ok(CompletionEvent::Tokens { choice, .. })) => choice,
            other => panic!("no tokens: {other:?}"),
        }
    }

    #[tokio::test]
    async fn a_choice_that_always_has_tokens_does_not_keep_another_waiting() {
        let (mut completion, lanes) = completion(3);
        for lane in &lanes {
            send(lane, "a");
        }
        let mut order = Vec::new();
        for _ in 0..4 {
            order.push(next_choice(&mut completion).await);
            send(&lanes[0], "more");
        }
        assert_eq!(order, [0, 1, 2, 0]);
    }
    #[tokio::test]
    async fn the_engines_stage_is_from_a_tokens_emission_until_it_is_taken() {
        let (mut completion, lanes) = completion(1);
        for seconds_ago in [3, 3, 1] {
            let token = Token {
                id: 0,
                bytes: TokenBytes::from_slice(b"a"),
                due_ns: 0,
                emitted_ns: monotonic_ns() - seconds_ago * 1_000_000_000,
                logprobs: None,
            };
            assert_eq!(lanes[0].token(token), Sent::Delivered);
        }
        next_choice(&mut completion).await;
        let StageSummary {
            tokens,
            mean_ns,
            longest_ns,
        } = completion.times.summary();
        let seconds = |ns: u64| Duration::from_nanos(ns).as_secs();
        assert_eq!((tokens, seconds(mean_ns), seconds(longest_ns)), (3, 2, 3));
    }
}
