//! The events of a completion on remote engines. When an engine's stream breaks or falls silent, the completion goes on
//! with another stream, and the client sees only a pause.

use std::collections::VecDeque;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use futures_util::future::BoxFuture;
use tokio::time::{Instant, Sleep, sleep_until};

use super::attempts::{Attempts, OpenStream};
use super::failure::Failure;
use super::ladder::{Delivered, PromptPosition, Rung};
use super::silence::SilenceTimer;
use super::stream_times::StreamTimes;
use crate::error::{Error, ErrorKind};
use crate::poll_on_wake::PollOnWake;
use crate::proto::v1;
use crate::proto::v1::completion_event::Event;

/// Time without reading after which the end of an engine's stream may be the client's fault.
const UNREAD_TIME: Duration = Duration::from_secs(1);

/// Maximum number of times that one completion is continued. An engine that breaks every stream after a token would
/// otherwise be asked without an end.
const MAX_RESUMPTIONS: u32 = 32;

/// The events of one completion. The stream ends after the summary or after one error.
pub(super) struct ResilientEvents {
    state: State,
    delivered: Delivered,
    /// The event that reports the start of the completion, until something else follows it. If the engine fails before
    /// that, the client sees only the engine that answers.
    started: Option<v1::Started>,
    has_reported_start: bool,
    /// Events to return.
    ready: VecDeque<Event>,
    resumptions: u32,
    times: StreamTimes,
    /// The rung of the last resumption.
    last_rung: Option<Rung>,
    /// Completes when the request's deadline has passed and the engine has not reported that in time.
    deadline: PollOnWake<Pin<Box<Sleep>>>,
}

enum State {
    Open(Box<Running>),
    /// The next stream is being opened.
    Opening(BoxFuture<'static, Reopened>),
    Ended,
}

/// A stream of an engine, and what is needed to replace it.
struct Running {
    stream: OpenStream,
    attempts: Attempts,
    silence: SilenceTimer,
    prompt: PromptPosition,
    /// True once a worker of the engine has started the request.
    has_started: bool,
    /// Number of tokens that the client has received from this stream.
    tokens: u32,
    has_first_token: bool,
    /// True if the client has received something from this stream.
    has_delivered: bool,
    /// Time of the engine's last event. `None` while the stream waits for the next.
    last_event: Option<Instant>,
    /// True if the last event had waited for the client to read. The engine may have given the client up.
    was_unread: bool,
}

/// Result of opening the next stream.
struct Reopened {
    attempts: Attempts,
    delivered: Delivered,
    result: Result<OpenStream, Failure>,
}

/// What an event of an engine means for the completion.
enum Step {
    /// Events may be ready.
    Continue,
    /// The summary is ready. Nothing follows.
    End,
}

impl ResilientEvents {
    pub(super) fn new(stream: OpenStream, attempts: Attempts, delivered: Delivered) -> Self {
        let arrived = attempts.context().request.arrived();
        Self {
            times: StreamTimes::new(arrived, stream.opened),
            deadline: PollOnWake::new(Box::pin(sleep_until(attempts.deadline(stream.target)))),
            state: State::Open(Box::new(Running::new(stream, attempts))),
            delivered,
            started: None,
            has_reported_start: false,
            ready: VecDeque::new(),
            resumptions: 0,
            last_rung: None,
        }
    }

    /// Polls for the next event. Returns `None` after the summary or an error.
    pub(super) fn poll_event(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Event, Failure>>> {
        if let Poll::Ready(event) = self.poll_engines(cx) {
            return Poll::Ready(event);
        }
        ready!(self.deadline.poll(cx));
        self.state = State::Ended;
        Poll::Ready(Some(Err(Failure::deadline_exceeded())))
    }

    /// Polls the engine's stream, or the opening of the next stream.
    fn poll_engines(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Event, Failure>>> {
        loop {
            if let Some(event) = self.ready.pop_front() {
                return Poll::Ready(Some(Ok(event)));
            }
            match &mut self.state {
                State::Ended => return Poll::Ready(None),
                State::Opening(opening) => {
                    let reopened = ready!(opening.as_mut().poll(cx));
                    if let Err(failure) = self.resume(reopened) {
                        self.state = State::Ended;
                        return Poll::Ready(Some(Err(failure)));
                    }
                }
                State::Open(running) => {
                    let item = ready!(running.poll_item(cx));
                    let step = item.and_then(|event| self.record(event));
                    match step {
                        Ok(Step::Continue) => {}
                        Ok(Step::End) => self.state = State::Ended,
                        Err(failure) => self.interrupt(failure),
                    }
                }
            }
        }
    }

    /// Takes an event of the engine, and makes the events that the client gets ready.
    ///
    /// # Errors
    /// The engine's stream cannot go on.
    fn record(&mut self, event: Event) -> Result<Step, Failure> {
        let State::Open(running) = &mut self.state else {
            return Ok(Step::Continue);
        };
        match event {
            Event::Started(started) => {
                running.has_started = true;
                running.attempts.record_seed(started.seed);
                let stream = &running.stream;
                let upstream = &running.attempts.target(stream.target).member.upstream;
                let always_has_ids = upstream.abilities().resumes;
                let model = &stream.model;
                self.delivered.record_start(&started, model, always_has_ids);
                if !self.has_reported_start {
                    self.started = Some(started);
                }
                // Without another target, the client will see no other engine.
                if !running.attempts.has_alternative(running.stream.target) {
                    self.report_start();
                }
                Ok(Step::Continue)
            }
            Event::Prompt(mut part) => {
                let follows = part
                    .tokens
                    .as_ref()
                    .is_none_or(|tokens| tokens.first_index == running.prompt.tokens);
                if !follows {
                    let message = "The engine sent prompt tokens with an unexpected index.";
                    return Err(upstream_error(message));
                }
                let prompt = &mut running.prompt;
                if self.delivered.record_prompt(&mut part, prompt) {
                    self.report_start();
                    self.ready.push_back(Event::Prompt(part));
                }
                Ok(Step::Continue)
            }
            Event::Tokens(tokens) => {
                running.record_arrival(tokens.tokens.len());
                if let Some(tokens) = running.stream.seam.join(tokens, &self.delivered)? {
                    let count = tokens.tokens.len();
                    running.record_delivery(count);
                    self.times.record_token(Instant::now);
                    self.delivered.record_tokens(&tokens);
                    self.report_start();
                    self.ready.push_back(Event::Tokens(tokens));
                }
                Ok(Step::Continue)
            }
            Event::Chat(delta) => {
                running.record_arrival(1);
                if let Some(delta) = running.stream.seam.join_chat(delta, &self.delivered)? {
                    running.record_delivery(0);
                    self.times.record_token(Instant::now);
                    self.delivered.record_chat(&delta);
                    self.report_start();
                    self.ready.push_back(Event::Chat(delta));
                }
                Ok(Step::Continue)
            }
            Event::Summary(summary) => {
                if !self.delivered.has_all_choices() {
                    let message = "The engine ended the stream before all choices had ended.";
                    return Err(upstream_error(message));
                }
                running.record_first_token();
                self.end(summary);
                Ok(Step::End)
            }
        }
    }

    /// Makes the start ready, unless the client has it.
    fn report_start(&mut self) {
        if let Some(started) = self.started.take() {
            self.has_reported_start = true;
            self.ready.push_back(Event::Started(started));
        }
    }

    fn end(&mut self, mut summary: v1::Summary) {
        self.report_start();
        let is_partial = self.resumptions > 0 || summary.timings.is_none();
        let engine = summary.timings.unwrap_or_default();
        let whole = self.times.whole(engine, is_partial, Instant::now());
        summary.timings = Some(v1::Timings {
            resumptions: self.resumptions,
            resumption_method: v1::ResumptionMethod::from(self.last_rung).into(),
            ..whole
        });
        self.ready.push_back(Event::Summary(summary));
    }

    /// Replaces the engine's stream, which broke because of this failure.
    fn interrupt(&mut self, failure: Failure) {
        let State::Open(running) = std::mem::replace(&mut self.state, State::Ended) else {
            return;
        };
        if self.has_whole_completion() {
            // Only the summary is missing.
            self.end(v1::Summary {
                usage: Some(v1::Usage {
                    prompt_tokens: self.delivered.prompt_length(),
                    completion_tokens: self.delivered.token_count(),
                    ..v1::Usage::default()
                }),
                timings: None,
            });
            return;
        }
        let is_last = self.resumptions >= MAX_RESUMPTIONS;
        let mut attempts = running.into_attempts(failure);
        if is_last {
            attempts.give_up();
        }
        let mut delivered = self.delivered.clone();
        self.state = State::Opening(Box::pin(async move {
            let result = attempts.open(&mut delivered).await;
            Reopened {
                attempts,
                delivered,
                result,
            }
        }));
    }

    fn has_whole_completion(&self) -> bool {
        !self.delivered.is_empty() && self.delivered.has_all_choices()
    }

    /// Continues the completion with the next stream.
    fn resume(&mut self, reopened: Reopened) -> Result<(), Failure> {
        let Reopened {
            attempts,
            delivered,
            result,
        } = reopened;
        let stream = result?;
        self.times.record_stream(stream.opened);
        let deadline = attempts.deadline(stream.target);
        self.deadline = PollOnWake::new(Box::pin(sleep_until(deadline)));
        self.delivered = delivered;
        let method = stream.rung.map_or("restart", Rung::label);
        let engine = &*attempts.target(stream.target).member.name;
        tracing::info!(engine, method, "a stream goes on with another request");
        let record = attempts.context().request.record();
        record.telemetry().count_stream_resumption(method);
        if stream.rung.is_some() {
            self.resumptions += 1;
            self.last_rung = stream.rung;
            record.set_resumption(method);
        }
        self.state = State::Open(Box::new(Running::new(stream, attempts)));
        Ok(())
    }
}

impl Running {
    fn new(stream: OpenStream, attempts: Attempts) -> Self {
        Self {
            silence: SilenceTimer::new(stream.opened),
            stream,
            attempts,
            prompt: PromptPosition::default(),
            has_started: false,
            tokens: 0,
            has_first_token: false,
            has_delivered: false,
            last_event: None,
            was_unread: false,
        }
    }

    /// Polls for the next event of the engine.
    fn poll_item(&mut self, cx: &mut Context<'_>) -> Poll<Result<Event, Failure>> {
        match self.stream.events.as_mut().poll_next(cx) {
            Poll::Ready(item) => {
                self.silence.record_event();
                let now = Instant::now();
                let last = self.last_event.replace(now);
                self.was_unread = last.is_some_and(|last| now - last > UNREAD_TIME);
                Poll::Ready(match item {
                    Some(Ok(v1::CompletionEvent { event: Some(event) })) => Ok(event),
                    Some(Ok(v1::CompletionEvent { event: None })) => Err(upstream_error(
                        "The engine sent an event of an unknown type.",
                    )),
                    Some(Err(status)) => Err(Failure::in_stream(&status)),
                    None => Err(upstream_error(
                        "The engine's stream ended without a summary.",
                    )),
                })
            }
            Poll::Pending => {
                self.last_event = None;
                ready!(self.poll_silence(cx));
                Poll::Ready(Err(Failure::silent()))
            }
        }
    }

    /// Completes when the engine has been silent for too long.
    fn poll_silence(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let upstream = &self.attempts.target(self.stream.target).member.upstream;
        if upstream.reports_start() && !self.has_started {
            // The request waits in the engine's queue.
            return Poll::Pending;
        }
        let policy = &self.attempts.route().spec.policy;
        let is_resumption = self.stream.rung.is_some();
        let limit = match (self.has_first_token, is_resumption) {
            (true, _) => policy.stall_timeout,
            (false, true) => policy.first_token_timeout.max(policy.stall_timeout),
            (false, false) => policy.first_token_timeout,
        };
        loop {
            ready!(self.silence.poll(limit, cx));
            let target = self.stream.target;
            let first = || self.attempts.first_token_limit(target, is_resumption);
            if self.has_first_token || first().is_some() {
                return Poll::Ready(());
            }
            // Only the deadline limits the wait for the first token, as long as there is no other target.
            self.silence.record_event();
        }
    }

    /// Records tokens that have arrived from the engine.
    fn record_arrival(&mut self, tokens: usize) {
        self.stream.outstanding.record_tokens(tokens);
        if tokens > 0 {
            self.record_first_token();
        }
    }

    fn record_first_token(&mut self) {
        if !std::mem::replace(&mut self.has_first_token, true) {
            self.stream.pass.record_first_token();
        }
    }

    /// Records that the client gets something now, with this number of tokens.
    fn record_delivery(&mut self, tokens: usize) {
        if !std::mem::replace(&mut self.has_delivered, true) {
            self.attempts.record_progress();
        }
        let tokens = u32::try_from(tokens).unwrap_or(u32::MAX);
        self.tokens = self.tokens.saturating_add(tokens);
    }

    /// Ends the stream because of a failure. Returns the tries, which go on.
    fn into_attempts(self, failure: Failure) -> Attempts {
        let Self {
            mut stream,
            mut attempts,
            tokens,
            has_first_token,
            was_unread,
            ..
        } = self;
        stream.pass.record_failure(&failure, was_unread);
        let engine = &*attempts.target(stream.target).member.name;
        let telemetry = attempts.context().request.record().telemetry();
        telemetry.count_failed_try_tokens(engine, tokens);
        let error = failure.error().kind.mapping().code;
        tracing::warn!(engine, tokens, error, "the stream of an engine broke");
        match has_first_token {
            true => attempts.record_interruption(stream.target, failure),
            false => attempts.record_failure(stream.target, failure),
        }
        attempts
    }
}

fn upstream_error(message: &str) -> Failure {
    Error::new(ErrorKind::UpstreamError, message).into()
}
