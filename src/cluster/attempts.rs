//! Sends a request to targets until one of them answers it.
//!
//! The decisions are those of [`TryPlan`], the retry budget, the breakers and the ladder. This module sends, waits and
//! reports. Dropping a future cancels what it waits for, so a client that leaves ends the tries.

use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::OwnedSemaphorePermit;
use tokio::time::{Instant, sleep_until, timeout_at};
use tonic::Request;

use super::context::CallContext;
use super::failure::Failure;
use super::ladder::{
    Case, Continuation, Delivered, Requests, Rung, Seam, TargetFacts, continuation, rungs,
};
use super::member::EnginePass;
use super::merged_choices::MergedChoices;
use super::policy::{Fault, NextTry, OutstandingTokens, RetryBudget, TargetView, TryPlan};
use super::route::{Route, Target};
use super::selection::more_informative;
use super::upstream::{BoxedEventStream, ContinuesMessage};
use super::via::GatewayId;
use crate::error::{Error, ErrorKind};
use crate::grpc;
use crate::proto::v1;
use crate::proto::v1::completion_request::Input;
use crate::proto::v1::tokenize_request::Input as TokenizeInput;
use crate::request::TokenId;

/// The tries of one request.
pub(super) struct Attempts {
    route: Arc<Route>,
    message: Arc<v1::CompletionRequest>,
    context: CallContext,
    gateway: GatewayId,
    budget: Arc<Mutex<RetryBudget>>,
    plan: TryPlan,
    /// Seed of the completion: the client's, or that of the first engine.
    seed: Option<i64>,
    /// The failure to report if no target answers.
    failure: Option<Failure>,
    /// True if a stream broke after its first token and has not been continued yet.
    is_interrupted: bool,
    /// True if the next try takes a retry from the budget.
    costs_retry: bool,
}

/// A request to a cluster, and what its tries need.
pub(super) struct NewRequest {
    pub(super) route: Arc<Route>,
    pub(super) message: Arc<v1::CompletionRequest>,
    pub(super) context: CallContext,
    pub(super) gateway: GatewayId,
    pub(super) budget: Arc<Mutex<RetryBudget>>,
}

/// A stream that an engine has opened for a request.
pub(super) struct OpenStream {
    pub(super) events: BoxedEventStream,
    pub(super) seam: Seam,
    /// Position of the target in the route.
    pub(super) target: usize,
    /// Name under which the engine lists the model.
    pub(super) model: String,
    /// The rung that was taken. `None` if the client had nothing yet.
    pub(super) rung: Option<Rung>,
    pub(super) opened: Instant,
    pub(super) pass: EnginePass,
    pub(super) outstanding: OutstandingTokens,
    _permit: Option<OwnedSemaphorePermit>,
}

impl Attempts {
    pub(super) fn new(request: NewRequest) -> Self {
        let NewRequest {
            route,
            message,
            context,
            gateway,
            budget,
        } = request;
        let tries = route.spec.policy.tries;
        let plan = TryPlan::new(route.targets.len(), tries, rand::random());
        lock(&budget).add_request(Instant::now());
        Self {
            plan,
            seed: message.seed,
            route,
            message,
            context,
            gateway,
            budget,
            failure: None,
            is_interrupted: false,
            costs_retry: false,
        }
    }

    pub(super) fn context(&self) -> &CallContext {
        &self.context
    }

    pub(super) fn route(&self) -> &Route {
        &self.route
    }

    pub(super) fn target(&self, at: usize) -> &Target {
        &self.route.targets[at]
    }

    /// Records the seed that an engine reports.
    pub(super) fn record_seed(&mut self, seed: i64) {
        self.seed.get_or_insert(seed);
    }

    /// Records that the client has received a token of the current stream.
    pub(super) fn record_progress(&mut self) {
        self.plan.record_progress();
        self.failure = None;
        self.is_interrupted = false;
    }

    /// Returns true if another target could take over from this one.
    pub(super) fn has_alternative(&self, target: usize) -> bool {
        let views = self.route.views(Instant::now());
        self.plan.has_alternative(target, &views)
    }

    /// Records that a stream broke after its first token. If no target continues it, the client gets this failure.
    pub(super) fn record_interruption(&mut self, target: usize, failure: Failure) {
        let failure = failure.after_first_token();
        let fault = failure.fault();
        self.plan.record_failure(target, fault, Instant::now());
        self.is_interrupted = true;
        self.failure = Some(failure);
    }

    /// Records that a try failed.
    pub(super) fn record_failure(&mut self, target: usize, failure: Failure) {
        let fault = failure.fault();
        self.plan.record_failure(target, fault, Instant::now());
        if failure.error().kind == ErrorKind::ContextLengthExceeded {
            self.exclude_smaller_contexts(target);
        }
        // An engine that did no work for the request does not make a retry cost anything.
        self.costs_retry = matches!(fault, Fault::Busy(_) | Fault::Passing | Fault::Silent);
        if !self.is_interrupted {
            self.failure = Some(more_informative(self.failure.take(), failure));
        }
    }

    /// Excludes the targets whose context is not known to be larger than that of this one.
    fn exclude_smaller_contexts(&mut self, target: usize) {
        let context_length = |target: &Target| {
            let model = target.listed_model();
            model.map_or(0, |model| model.context_length)
        };
        let limit = context_length(&self.route.targets[target]);
        for (at, other) in self.route.targets.iter().enumerate() {
            if limit == 0 || context_length(other) <= limit {
                self.plan.exclude(at);
            }
        }
    }

    /// Sends the request, or what is left of it, to the next targets until one opens a stream.
    ///
    /// # Errors
    /// Returns the most informative failure if no target opens a stream.
    pub(super) async fn open(&mut self, delivered: &mut Delivered) -> Result<OpenStream, Failure> {
        loop {
            let views = self.route.views(Instant::now());
            let deadline = self.context.request.deadline();
            match self.plan.next(&views, Instant::now(), deadline) {
                NextTry::GiveUp => return Err(self.final_failure(&views)),
                NextTry::WaitUntil(time) => sleep_until(time).await,
                NextTry::Send(_) if !self.take_retry() => {
                    tracing::warn!("the retry budget is used up");
                    return Err(self.final_failure(&views));
                }
                NextTry::Send(target) => match self.send(target, delivered).await {
                    Ok(open) => return Ok(open),
                    Err((target, failure)) => self.record_failure(target, failure),
                },
            }
        }
    }

    fn take_retry(&mut self) -> bool {
        let costs_retry = std::mem::take(&mut self.costs_retry);
        !costs_retry || lock(&self.budget).take_retry(Instant::now())
    }

    fn final_failure(&mut self, views: &[TargetView]) -> Failure {
        self.failure.take().unwrap_or_else(|| {
            let is_blocked = views.iter().any(|view| view.is_blocked);
            let message = match is_blocked {
                true => "The model's engines failed too often. Try again in a few seconds.",
                false => "There is no engine for the model.",
            };
            Error::new(ErrorKind::NoWorker, message).into()
        })
    }

    /// Opens a stream on a target, or on another one that has room earlier. On failure, returns the target that failed.
    async fn send(
        &mut self,
        target: usize,
        delivered: &mut Delivered,
    ) -> Result<OpenStream, (usize, Failure)> {
        self.check_supported(target)
            .map_err(|failure| (target, failure))?;
        let acquired = self.route.acquire(target).await;
        let (target, permit) = acquired.map_err(|full| {
            // All targets of the route share the queue.
            (0..self.route.targets.len()).for_each(|at| self.plan.exclude(at));
            (target, full.into())
        })?;
        let Some(mut pass) = self.target(target).member.pass() else {
            return Err((target, Failure::blocked()));
        };
        let opened = Instant::now();
        let opening = self.open_on(target, delivered);
        let opening = async {
            match self.has_alternative(target) {
                true => {
                    let limit = opened + self.route.spec.policy.first_token_timeout;
                    let opened = timeout_at(limit, opening).await;
                    opened.unwrap_or_else(|_| Err(Failure::silent()))
                }
                false => opening.await,
            }
        };
        match opening.await {
            Ok(Opened { events, seam, rung }) => Ok(OpenStream {
                events,
                seam,
                target,
                model: self.target(target).served_model(),
                rung,
                opened,
                pass,
                outstanding: self.target(target).member.load.add(&self.message),
                _permit: permit,
            }),
            Err(failure) => {
                pass.record_failure(&failure);
                let (engine, error) = (&*self.target(target).member.name, failure.error());
                tracing::info!(engine, %error, "an engine did not take a request");
                Err((target, failure))
            }
        }
    }

    /// Checks that a target's engine supports all parameters of the request.
    fn check_supported(&self, target: usize) -> Result<(), Failure> {
        let unsupported = self.target(target).member.upstream.unsupported();
        match grpc::first_used_parameter(&self.message, unsupported)? {
            None => Ok(()),
            Some(parameter) => Err(Failure::unsupported(parameter.name())),
        }
    }

    /// Opens a stream on a target by the first rung that it accepts.
    async fn open_on(&self, target: usize, delivered: &mut Delivered) -> Result<Opened, Failure> {
        let target = self.target(target);
        let upstream = &target.member.upstream;
        if delivered.is_empty() {
            let message = v1::CompletionRequest {
                // The client may know the seed of an earlier try.
                seed: self.seed,
                ..(*self.message).clone()
            };
            let message = self.addressed_to(target, message);
            let events = upstream.complete(self.request(message)).await?;
            return Ok(Opened {
                events,
                seam: Seam::continuing(delivered),
                rung: None,
            });
        }
        let case = Case {
            message: &self.message,
            delivered,
            abilities: upstream.abilities(),
            is_same_model: delivered.is_same_model(&target.served_model()),
        };
        let mut refused = None;
        for rung in rungs(&case) {
            match self.climb(rung, target, delivered).await {
                Ok(opened) => return Ok(opened),
                // The rung, not the client's request, is at fault.
                Err(failure) if matches!(failure.fault(), Fault::Request | Fault::NotServed) => {
                    refused = Some(failure);
                }
                Err(failure) => return Err(failure),
            }
        }
        Err(Failure::not_continued(refused, &self.message))
    }

    /// Opens the stream of one rung.
    async fn climb(
        &self,
        rung: Rung,
        target: &Target,
        delivered: &mut Delivered,
    ) -> Result<Opened, Failure> {
        if rung == Rung::Text {
            self.count_tokens(target, delivered).await;
        }
        let facts = TargetFacts {
            prompt_ids: match rung {
                Rung::TokenIds => self.prompt_ids(target).await?,
                Rung::Resume | Rung::Text | Rung::Replay => Vec::new(),
            },
            seed: self.seed.unwrap_or_default(),
        };
        let Continuation { requests, seam } = continuation(rung, &self.message, delivered, &facts);
        let events: BoxedEventStream = match requests {
            Requests::Whole(message) => {
                let message = self.addressed_to(target, *message);
                target
                    .member
                    .upstream
                    .complete(self.request(message))
                    .await?
            }
            Requests::PerChoice(requests) => {
                let mut merged = MergedChoices::new(delivered);
                for request in requests {
                    if request.tokens_left == Some(0) {
                        merged.push_ended(request.choice);
                        continue;
                    }
                    let message = self.addressed_to(target, request.message);
                    let mut sent = self.request(message);
                    if request.continues_message {
                        sent.extensions_mut().insert(ContinuesMessage);
                    }
                    let events = target.member.upstream.complete(sent).await?;
                    merged.push(request.choice, request.delivered_tokens, events);
                }
                Box::pin(merged)
            }
        };
        let rung = Some(rung);
        Ok(Opened { events, seam, rung })
    }

    /// Counts the delivered tokens with the target's tokenizer, if it has one. Otherwise each piece of text that an
    /// engine has sent counts as a token.
    async fn count_tokens(&self, target: &Target, delivered: &mut Delivered) {
        for (choice, text) in delivered.uncounted_texts() {
            let request = self.request(v1::TokenizeRequest {
                model: target.model.clone(),
                input: Some(TokenizeInput::Text(text)),
                add_special_tokens: Some(false),
            });
            if let Ok(tokenized) = target.member.upstream.tokenize(request).await {
                delivered.set_token_count(choice, tokenized.token_ids.len());
            }
        }
    }

    /// Returns the ids of the prompt's tokens, with the target's tokenizer.
    async fn prompt_ids(&self, target: &Target) -> Result<Vec<TokenId>, Failure> {
        let input = match &self.message.input {
            Some(Input::PromptTokenIds(prompt)) => return Ok(prompt.ids.clone()),
            Some(Input::Prompt(text)) => TokenizeInput::Text(text.clone()),
            Some(Input::Chat(chat)) => TokenizeInput::Chat(chat.clone()),
            None => return Ok(Vec::new()),
        };
        let request = self.request(v1::TokenizeRequest {
            model: target.model.clone(),
            input: Some(input),
            add_special_tokens: None,
        });
        let tokenized = target.member.upstream.tokenize(request).await;
        let tokenized = tokenized.map_err(|status| Failure::rejection(&status))?;
        Ok(tokenized.token_ids)
    }

    fn addressed_to(
        &self,
        target: &Target,
        message: v1::CompletionRequest,
    ) -> v1::CompletionRequest {
        v1::CompletionRequest {
            model: target.model.clone(),
            ..message
        }
    }

    fn request<T>(&self, message: T) -> Request<T> {
        self.context.build_request(message, Some(&self.gateway))
    }
}

/// A stream that an upstream has opened, and its seam to the delivered tokens.
struct Opened {
    events: BoxedEventStream,
    seam: Seam,
    rung: Option<Rung>,
}

fn lock(budget: &Mutex<RetryBudget>) -> std::sync::MutexGuard<'_, RetryBudget> {
    // The budget is valid after every statement, so a panic of another thread does not matter.
    budget.lock().unwrap_or_else(PoisonError::into_inner)
}
