//! An engine behind the gateway: its upstream, its load and its circuit breaker.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

use super::failure::Failure;
use super::policy::{Breaker, BreakerState, EngineResult, Fault, Load, Passage};
use super::upstream::Upstream;
use crate::telemetry::{GaugeGuard, Telemetry};

/// Time for which an engine that is busy gets no requests that another one can take, if it names no time.
const BUSY_TIME: Duration = Duration::from_secs(1);

/// Time for which an engine that failed gets no requests that another target of the same rank can take. An engine that
/// fails at once would otherwise always have the lowest load.
const FAULT_MEMORY: Duration = Duration::from_secs(1);

/// An engine of the cluster.
pub(super) struct Member {
    pub(super) name: Arc<str>,
    pub(super) upstream: Arc<dyn Upstream>,
    pub(super) load: Load,
    /// Part of [`CacheId`]. It changes when a request cannot reach the engine.
    cache: AtomicU64,
    state: Mutex<MemberState>,
    telemetry: Telemetry,
}

struct MemberState {
    breaker: Breaker,
    busy_until: Option<Instant>,
    /// Time of the last fault.
    last_fault: Option<Instant>,
    /// Time of the last first token of a request.
    last_first_token: Option<Instant>,
}

/// Identifies the prefix cache of an engine. No two engines have the same id. The id changes when the engine was down
/// or could not be reached, because its process may have ended, and its cache with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct CacheId {
    number: u64,
    health_changes: u64,
}

/// Permission to send one request to an engine. Dropping it without a result leaves the breaker as it was.
pub(super) struct EnginePass {
    member: Arc<Member>,
    passage: Passage,
    since: Instant,
    /// True once the result of the try is recorded, so that a probe has ended.
    has_result: bool,
    has_first_token: bool,
}

impl Member {
    pub(super) fn new(name: &Arc<str>, upstream: Arc<dyn Upstream>, telemetry: &Telemetry) -> Self {
        Self {
            name: Arc::clone(name),
            upstream,
            load: Load::default(),
            cache: AtomicU64::new(next_cache()),
            state: Mutex::new(MemberState {
                breaker: Breaker::new(Instant::now()),
                busy_until: None,
                last_fault: None,
                last_first_token: None,
            }),
            telemetry: telemetry.clone(),
        }
    }

    /// Returns the id of the engine's current prefix cache.
    pub(super) fn cache_id(&self) -> CacheId {
        CacheId {
            number: self.cache.load(Ordering::Relaxed),
            health_changes: self.upstream.health().borrow().changes,
        }
    }

    /// Gives the engine's prefix cache another id, so that earlier prompts no longer count as warm.
    fn forget_cache(&self) {
        self.cache.store(next_cache(), Ordering::Relaxed);
    }

    /// Returns true unless the engine is known to be unavailable.
    pub(super) fn is_up(&self) -> bool {
        self.upstream.health().borrow().is_up()
    }

    /// Returns the time until which the breaker lets no request pass. `None` if one may pass now.
    pub(super) fn blocked_until(&self, now: Instant) -> Option<Instant> {
        self.state().breaker.blocked_until(now)
    }

    /// Returns true if the engine answered a moment ago that it is busy.
    pub(super) fn is_busy(&self, now: Instant) -> bool {
        self.state().busy_until.is_some_and(|until| until > now)
    }

    /// Counts a request as waiting for this engine until the guard is dropped.
    pub(super) fn count_queued_request(&self) -> GaugeGuard {
        GaugeGuard::new(self.telemetry.requests_queued.clone())
    }

    /// Returns true if the engine failed a moment ago.
    pub(super) fn has_recent_fault(&self, now: Instant) -> bool {
        let last = self.state().last_fault;
        last.is_some_and(|last| now.saturating_duration_since(last) < FAULT_MEMORY)
    }

    /// Asks the breaker to send a request. Returns `None` if it must not be sent.
    pub(super) fn pass(self: &Arc<Self>) -> Option<EnginePass> {
        let passage = self.change_breaker(|breaker, now| breaker.pass(now));
        match passage {
            Passage::Refused(_) => None,
            Passage::Pass | Passage::Probe(_) => Some(EnginePass {
                member: Arc::clone(self),
                passage,
                since: Instant::now(),
                has_result: false,
                has_first_token: false,
            }),
        }
    }

    /// Changes the breaker. Logs and counts a change of its state.
    fn change_breaker<T>(&self, change: impl FnOnce(&mut Breaker, Instant) -> T) -> T {
        let (result, before, after) = {
            let mut state = self.state();
            let before = state.breaker.state();
            let result = change(&mut state.breaker, Instant::now());
            (result, before, state.breaker.state())
        };
        if before != after {
            self.report_breaker(after);
        }
        result
    }

    fn report_breaker(&self, state: BreakerState) {
        let engine = &*self.name;
        self.telemetry.count_breaker_change(engine, state.label());
        match state {
            BreakerState::Open => tracing::warn!(
                engine,
                "the circuit breaker of an engine opened: it gets no requests for some seconds"
            ),
            BreakerState::HalfOpen => tracing::info!(
                engine,
                "the circuit breaker of an engine is half-open: one request tests the engine"
            ),
            BreakerState::Closed => {
                tracing::info!(engine, "the circuit breaker of an engine closed");
            }
        }
    }

    fn state(&self) -> MutexGuard<'_, MemberState> {
        // The state is valid after every statement, so a panic of another thread does not matter.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl EnginePass {
    /// Records that the engine has sent the first token of the request.
    pub(super) fn record_first_token(&mut self) {
        let telemetry = &self.member.telemetry;
        telemetry.count_engine_try(&self.member.name, Ok(()));
        self.has_first_token = true;
        self.member.state().last_first_token = Some(Instant::now());
        self.record(EngineResult::Works);
    }

    /// Records that the try failed. Also after [`Self::record_first_token`], if the stream broke later. `is_clients` is
    /// true if the client may have caused the failure.
    pub(super) fn record_failure(&mut self, failure: &Failure, is_clients: bool) {
        let member = Arc::clone(&self.member);
        let kind = failure.error().kind;
        member.telemetry.count_engine_try(&member.name, Err(kind));
        if let Fault::Busy(told) = failure.fault() {
            let time = told.unwrap_or(BUSY_TIME);
            member.state().busy_until = Some(Instant::now() + time);
        }
        if failure.fault() == Fault::Unreachable {
            member.forget_cache();
        }
        if !failure.is_engine_fault() {
            self.record(EngineResult::Works);
        } else if !is_clients && !self.is_only_slow(failure) {
            member.state().last_fault = Some(Instant::now());
            self.record(match self.has_first_token {
                true => EngineResult::Cut,
                false => EngineResult::Fault,
            });
        }
    }

    /// Returns true if the engine was silent for this request only: other requests have received tokens meanwhile, so
    /// this one may have a long prompt.
    fn is_only_slow(&self, failure: &Failure) -> bool {
        let last_first_token = self.member.state().last_first_token;
        failure.fault() == Fault::Silent && last_first_token.is_some_and(|it| it > self.since)
    }

    fn record(&mut self, result: EngineResult) {
        self.has_result = true;
        let passage = self.passage;
        self.member
            .change_breaker(|breaker, now| breaker.record(passage, result, now));
    }
}

impl Drop for EnginePass {
    fn drop(&mut self) {
        if let Passage::Probe(since) = self.passage
            && !self.has_result
        {
            self.member
                .change_breaker(|breaker, _| breaker.abandon_probe(since));
        }
    }
}

/// Returns a number that no engine's prefix cache has had in this process.
fn next_cache() -> u64 {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    NEXT.fetch_add(1, Ordering::Relaxed)
}
