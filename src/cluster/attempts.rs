//! Sends a request to targets until one of them answers it.
//!
//! The decisions are those of [`TryPlan`], the retry budget, the breakers and the ladder. This module sends, waits and
//! reports. Dropping a future cancels what it waits for, so a client that leaves ends the tries.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::OwnedSemaphorePermit;
use tokio::time::{Instant, sleep_until, timeout_at};

use super::context::CallContext;
use super::failure::Failure;
use super::ladder::{Delivered, Rung, Seam};
use super::member::EnginePass;
use super::policy::{Fault, NextTry, OutstandingTokens, RetryBudget, TargetView, TryPlan};
use super::prefixes::PromptPrefix;
use super::route::{QueueLimit, Route, Target};
use super::selection::more_informative;
use super::target_call::{Opened, TargetCall};
use super::upstream::BoxedEventStream;
use super::via::GatewayId;
use crate::error::{Error, ErrorKind};
use crate::proto::v1;

/// Extra time for an engine to report a passed deadline before the gateway does.
const DEADLINE_GRACE: Duration = Duration::from_secs(1);

/// The tries of one request.
pub(super) struct Attempts {
    route: Arc<Route>,
    message: Arc<v1::CompletionRequest>,
    context: CallContext,
    gateway: GatewayId,
    budget: Arc<Mutex<RetryBudget>>,
    prefix: Option<PromptPrefix>,
    plan: TryPlan,
    /// Seed of the completion: the client's, or that of the first engine.
    seed: Option<i64>,
    /// The failure to report if no target answers.
    failure: Option<Failure>,
    /// True if a stream broke after its first token and has not been continued yet.
    is_interrupted: bool,
    /// True if a retry on a target that has failed takes from the budget.
    costs_retry: bool,
}

/// A request to a cluster, and what its tries need.
pub(super) struct NewRequest {
    pub(super) route: Arc<Route>,
    pub(super) message: Arc<v1::CompletionRequest>,
    pub(super) context: CallContext,
    pub(super) gateway: GatewayId,
    pub(super) budget: Arc<Mutex<RetryBudget>>,
    /// Hashes of the request's prompt. `None` if the prompt does not influence the choice of a target.
    pub(super) prefix: Option<PromptPrefix>,
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
            prefix,
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
            prefix,
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

    /// Records that the client has received a part of the current stream.
    pub(super) fn record_progress(&mut self) {
        self.plan.record_progress();
        self.failure = None;
        self.is_interrupted = false;
    }

    /// Returns the time at which the gateway ends the request, if this target's engine has not done so.
    pub(super) fn deadline(&self, target: usize) -> Instant {
        let deadline = self.context.request.deadline();
        match self.target(target).member.upstream.knows_deadline() {
            true => deadline + DEADLINE_GRACE,
            false => deadline,
        }
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
        self.plan.wait_for_breakers(Instant::now());
        self.is_interrupted = true;
        self.failure = Some(failure);
        // The rest of the completion is one more request to an engine, which may have to be retried like the first.
        lock(&self.budget).add_request(Instant::now());
    }

    /// Ends the tries: the next call of [`Self::open`] returns the last failure.
    pub(super) fn give_up(&mut self) {
        (0..self.route.targets.len()).for_each(|at| self.plan.exclude(at));
    }

    /// Records that a try failed.
    pub(super) fn record_failure(&mut self, target: usize, failure: Failure) {
        let fault = failure.fault();
        self.plan.record_failure(target, fault, Instant::now());
        if failure.error().kind == ErrorKind::ContextLengthExceeded {
            self.exclude_smaller_contexts(target);
        }
        // Only a request that reached the engine makes a retry cost something.
        self.costs_retry = matches!(fault, Fault::Busy(_) | Fault::Passing | Fault::Silent);
        if failure.error().kind == ErrorKind::DeadlineExceeded {
            self.failure = Some(failure);
        } else if !self.is_interrupted {
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
            let views = self.views();
            let deadline = self.context.request.deadline();
            match self.plan.next(&views, Instant::now(), deadline) {
                NextTry::GiveUp => return Err(self.final_failure(&views)),
                NextTry::WaitUntil(time) => sleep_until(time).await,
                NextTry::Send(target) if !self.take_retry(target) => {
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

    /// Returns the state of the targets, with the number of prompt tokens that each is expected to reuse.
    fn views(&self) -> Vec<TargetView> {
        let mut views = self.route.views(Instant::now());
        if let Some(prefix) = &self.prefix {
            prefix.set_warm_tokens(&self.route.targets, &mut views);
        }
        views
    }

    /// Takes a retry from the budget if the request goes to a target that has failed it. Returns false if the budget is
    /// used up.
    fn take_retry(&mut self, target: usize) -> bool {
        let costs_retry = std::mem::take(&mut self.costs_retry) && self.plan.has_failed(target);
        !costs_retry || lock(&self.budget).take_retry(Instant::now())
    }

    fn final_failure(&mut self, views: &[TargetView]) -> Failure {
        self.failure.take().unwrap_or_else(|| {
            let is_blocked = views.iter().any(|view| view.blocked_until.is_some());
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
        let supported = self.call(target).check_supported();
        supported.map_err(|failure| (target, failure))?;
        let (target, permit) = self.acquire(target, delivered).await?;
        let Some(mut pass) = self.target(target).member.pass() else {
            return Err((target, Failure::blocked()));
        };
        let (opened, is_empty) = (Instant::now(), delivered.is_empty());
        let outstanding = self.target(target).member.load.add(&self.message);
        let opening = self.call(target).open(delivered);
        let is_resumption = !is_empty;
        let limit = self.first_token_limit(target, is_resumption);
        let silent_at = limit.map(|limit| opened + limit);
        let deadline = self.deadline(target);
        let silent_at = silent_at.filter(|at| *at < deadline);
        let end = silent_at.unwrap_or(deadline);
        let result = match timeout_at(end, opening).await {
            Ok(result) => result,
            Err(_) if silent_at.is_some() => Err(Failure::silent()),
            // A passed deadline says nothing about the engine.
            Err(_) => return Err((target, Failure::deadline_exceeded())),
        };
        match result {
            Ok(Opened { events, seam, rung }) => {
                if let Some(prefix) = &self.prefix {
                    let telemetry = self.context.request.record().telemetry();
                    prefix.record(&self.route.targets, target, telemetry);
                }
                Ok(OpenStream {
                    events,
                    seam,
                    target,
                    model: self.target(target).served_model(),
                    rung,
                    opened,
                    pass,
                    outstanding,
                    _permit: permit,
                })
            }
            Err(failure) => {
                pass.record_failure(&failure, false);
                // The message may repeat a part of the prompt, so it is not logged.
                let error = failure.error().kind.mapping().code;
                let engine = &*self.target(target).member.name;
                tracing::info!(engine, error, "an engine did not take a request");
                Err((target, failure))
            }
        }
    }

    /// Waits until the target or another one of its tier has room for the request.
    async fn acquire(
        &mut self,
        target: usize,
        delivered: &Delivered,
    ) -> Result<(usize, Option<OwnedSemaphorePermit>), (usize, Failure)> {
        let wait = match delivered.is_empty() {
            true => QueueLimit::Depth,
            false => QueueLimit::None,
        };
        let acquiring = self.route.acquire(target, wait);
        match timeout_at(self.context.request.deadline(), acquiring).await {
            Ok(Ok(acquired)) => Ok(acquired),
            Ok(Err(full)) => {
                let tier = self.target(target).tier;
                for (at, other) in self.route.targets.iter().enumerate() {
                    if other.tier == tier {
                        self.plan.exclude(at);
                    }
                }
                Err((target, Failure::not_served(full)))
            }
            Err(_) => {
                let message = "The request's deadline passed while it waited for an engine.";
                let error = Error::new(ErrorKind::DeadlineExceeded, message);
                Err((target, error.into()))
            }
        }
    }

    /// Returns the longest wait for the first token of a stream. `None` if only the deadline limits it, because no
    /// other target can take over and the client has nothing yet.
    pub(super) fn first_token_limit(&self, target: usize, is_resumption: bool) -> Option<Duration> {
        let policy = &self.route.spec.policy;
        match is_resumption {
            true => Some(policy.first_token_timeout.max(policy.stall_timeout)),
            false => self
                .has_alternative(target)
                .then_some(policy.first_token_timeout),
        }
    }

    /// Prepares calls of a target for this request.
    fn call(&self, target: usize) -> TargetCall<'_> {
        TargetCall {
            target: self.target(target),
            message: &self.message,
            context: &self.context,
            gateway: &self.gateway,
            seed: self.seed,
        }
    }
}

fn lock(budget: &Mutex<RetryBudget>) -> std::sync::MutexGuard<'_, RetryBudget> {
    // The budget is valid after every statement, so a panic of another thread does not matter.
    budget.lock().unwrap_or_else(PoisonError::into_inner)
}
