//! Decides to which target a request is sent next, after each failure. It is a pure struct: the caller sends, waits and
//! reports.

use std::time::Duration;

use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};
use tokio::time::Instant;

use super::load::WeightedLoad;
use super::placement::{Candidate, best_candidate};

#[cfg(test)]
mod tests;

/// Shortest time between two tries of one request on a target that is busy.
const BUSY_DELAY: Duration = Duration::from_secs(1);
/// Longest delay before the only retry of a fault that may have passed.
const PASSING_DELAY: Duration = Duration::from_millis(100);
/// Longest delay before a target is tried again after any other fault. It doubles with each failure.
const FAULT_DELAY: Duration = Duration::from_millis(250);
/// Longest time that a request waits for a target. A target that asks for a longer delay is not waited for.
const MAX_WAIT: Duration = Duration::from_secs(10);
/// Number of times that one request is sent to a target that cannot be reached.
const MAX_UNREACHABLE: u32 = 2;

/// The tries of one request.
#[derive(Debug)]
pub(in crate::cluster) struct TryPlan {
    /// Number of tries that are left until the request makes progress.
    left: u32,
    limit: u32,
    targets: Vec<TargetTries>,
    /// Target of the only retry of a fault that may have passed.
    retry: Option<usize>,
    /// Time until which the request waits for a breaker, if no other target is left. `None` if it does not wait.
    waits_for_breakers: Option<Instant>,
    has_ended: bool,
    random: SmallRng,
}

#[derive(Clone, Debug, Default)]
struct TargetTries {
    /// Failures in a row.
    failures: u32,
    /// Time before which the target is not tried again.
    not_before: Option<Instant>,
    is_excluded: bool,
    /// True if the target was silent for too long. It is not tried again, even after progress.
    was_silent: bool,
    /// True if the target's engine failed this request. Its warm tokens no longer count, so that they do not draw the
    /// request back to it.
    had_fault: bool,
}

/// State of a target at the time of a decision.
#[derive(Clone, Copy, Debug)]
pub(in crate::cluster) struct TargetView {
    /// 0 for the targets of the route, then one number for each fallback.
    pub(in crate::cluster) tier: usize,
    /// True if the health checks of its engine fail.
    pub(in crate::cluster) is_down: bool,
    /// Time until which its breaker is open. `None` if it is not.
    pub(in crate::cluster) blocked_until: Option<Instant>,
    /// True if its engine has just answered that it is busy.
    pub(in crate::cluster) is_busy: bool,
    /// True if it runs as many requests as its route allows. A request for it waits in the queue of the route.
    pub(in crate::cluster) is_saturated: bool,
    /// True if its engine failed a moment ago.
    pub(in crate::cluster) has_recent_fault: bool,
    pub(in crate::cluster) load: WeightedLoad,
    /// Expected number of prompt tokens that its engine can reuse. 0 if the number is not known.
    pub(in crate::cluster) warm_tokens: u64,
}

/// The next step of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::cluster) enum NextTry {
    /// Send the request to this target.
    Send(usize),
    /// Wait until this time, then ask again.
    WaitUntil(Instant),
    /// Report the failure to the client.
    GiveUp,
}

/// The reason why a try failed, as far as the next try depends on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::cluster) enum Fault {
    /// The request itself is at fault. Every target would reject it.
    Request,
    /// This target cannot serve the request, for example because it does not have the model. Another one may.
    NotServed,
    /// The target is saturated. It may have named the delay after which to try again.
    Busy(Option<Duration>),
    /// The target's engine does not accept requests now.
    Unavailable,
    /// The engine could not be reached, so it has done nothing for the request.
    Unreachable,
    /// The engine failed in a way that may pass at once, such as an internal error or a connection that broke.
    Passing,
    /// The engine was silent for too long.
    Silent,
    /// The stream broke after its first token.
    Cut,
}

impl TryPlan {
    /// Creates the plan of a request for this many targets. `tries` is the maximum number of times that the request is
    /// sent without making progress. `seed` determines the jitter.
    pub(in crate::cluster) fn new(targets: usize, tries: u32, seed: u64) -> Self {
        Self {
            left: tries,
            limit: tries,
            targets: vec![TargetTries::default(); targets],
            retry: None,
            waits_for_breakers: None,
            has_ended: false,
            random: SmallRng::seed_from_u64(seed),
        }
    }

    /// Decides what to do next. `views` are the targets in the order of the route.
    pub(in crate::cluster) fn next(
        &self,
        views: &[TargetView],
        now: Instant,
        deadline: Instant,
    ) -> NextTry {
        if self.left == 0 || self.has_ended {
            return NextTry::GiveUp;
        }
        let retried = self.retry.filter(|at| views[*at].blocked_until.is_none());
        let candidates = match retried {
            Some(at) => vec![at],
            None => self.candidates(views),
        };
        let ready_at = |at: usize| self.targets[at].not_before.unwrap_or(now);
        let ready = candidates.iter().copied().filter(|at| ready_at(*at) <= now);
        if let Some(best) = self.best(ready.collect(), views) {
            return NextTry::Send(best);
        }
        match candidates.into_iter().map(ready_at).min() {
            Some(at) if at <= (now + MAX_WAIT).min(deadline) => NextTry::WaitUntil(at),
            Some(_) => NextTry::GiveUp,
            None => self.wait_for_breaker(views, deadline),
        }
    }

    /// Returns the best of these targets.
    fn best(&self, mut targets: Vec<usize>, views: &[TargetView]) -> Option<usize> {
        let preferred = targets.iter().map(|at| rank(&views[*at])).min()?;
        targets.retain(|at| rank(&views[*at]) == preferred);
        let candidates = targets.into_iter().map(|target| Candidate {
            target,
            load: views[target].load,
            warm_tokens: match self.targets[target].had_fault {
                true => 0,
                false => views[target].warm_tokens,
            },
        });
        best_candidate(&candidates.collect::<Vec<_>>())
    }

    /// Waits for the first breaker that lets a request pass, if the request may.
    fn wait_for_breaker(&self, views: &[TargetView], deadline: Instant) -> NextTry {
        let targets = self.targets.iter().zip(views);
        let usable = targets.filter(|(target, _)| !target.is_excluded);
        let first = usable.filter_map(|(_, view)| view.blocked_until).min();
        match (first, self.waits_for_breakers) {
            (Some(first), Some(limit)) if first <= limit.min(deadline) => NextTry::WaitUntil(first),
            (_, _) => NextTry::GiveUp,
        }
    }

    /// Returns the targets that may get the request, now or later.
    fn candidates(&self, views: &[TargetView]) -> Vec<usize> {
        let usable =
            |at: &usize| !self.targets[*at].is_excluded && views[*at].blocked_until.is_none();
        let mut candidates: Vec<_> = (0..views.len()).filter(usable).collect();
        // The health checks are trusted, unless they say that everything is down.
        if views.iter().any(|view| !view.is_down) {
            candidates.retain(|at| !views[*at].is_down);
        }
        candidates
    }

    /// Returns true if a target other than this one may get the request.
    pub(in crate::cluster) fn has_alternative(&self, target: usize, views: &[TargetView]) -> bool {
        let is_up = |at: &usize| !views[*at].is_down && *at != target;
        self.candidates(views).iter().any(is_up)
    }

    /// Records that a try failed.
    pub(in crate::cluster) fn record_failure(&mut self, target: usize, fault: Fault, now: Instant) {
        self.retry = None;
        let is_counted = !matches!(fault, Fault::NotServed | Fault::Unreachable);
        self.left = self.left.saturating_sub(u32::from(is_counted));
        let jitter: f64 = self.random.random();
        let tries = &mut self.targets[target];
        tries.failures += 1;
        tries.had_fault |= match fault {
            Fault::Request | Fault::NotServed | Fault::Busy(_) => false,
            Fault::Unavailable
            | Fault::Unreachable
            | Fault::Passing
            | Fault::Silent
            | Fault::Cut => true,
        };
        let doubled = |delay: Duration| delay * 2_u32.saturating_pow(tries.failures.min(8) - 1);
        let delay = match fault {
            Fault::Request => {
                self.has_ended = true;
                return;
            }
            Fault::NotServed | Fault::Unavailable | Fault::Silent => {
                tries.is_excluded = true;
                tries.was_silent |= fault == Fault::Silent;
                return;
            }
            Fault::Unreachable if tries.failures >= MAX_UNREACHABLE => {
                tries.is_excluded = true;
                return;
            }
            Fault::Busy(told) => {
                let told = told.unwrap_or_default().max(BUSY_DELAY);
                told + doubled(BUSY_DELAY).min(told).mul_f64(jitter)
            }
            Fault::Passing if tries.failures == 1 => {
                self.retry = Some(target);
                PASSING_DELAY.mul_f64(jitter)
            }
            Fault::Passing | Fault::Unreachable | Fault::Cut => {
                doubled(FAULT_DELAY).mul_f64(jitter)
            }
        };
        tries.not_before = Some(now + delay);
    }

    /// Returns true if the target has failed before.
    pub(in crate::cluster) fn has_failed(&self, target: usize) -> bool {
        self.targets[target].failures > 0
    }

    /// Lets the request wait for breakers, for some seconds from now on. A completion that the client has begun to read
    /// is worth waiting for.
    pub(in crate::cluster) fn wait_for_breakers(&mut self, now: Instant) {
        self.waits_for_breakers = Some(now + MAX_WAIT);
    }

    /// Excludes a target from further tries.
    pub(in crate::cluster) fn exclude(&mut self, target: usize) {
        self.targets[target].is_excluded = true;
    }

    /// Records that the request has received a token. All tries are available again.
    pub(in crate::cluster) fn record_progress(&mut self) {
        self.left = self.limit;
        self.retry = None;
        for target in &mut self.targets {
            target.failures = 0;
            target.not_before = None;
            target.is_excluded = target.was_silent;
        }
    }
}

/// Returns the sort key of a target: the lowest key is preferred. Busy targets come last. The tier comes before free
/// capacity, so a request waits for a saturated target rather than going to a fallback.
fn rank(view: &TargetView) -> (bool, usize, bool, bool) {
    (
        view.is_busy,
        view.tier,
        view.is_saturated,
        view.has_recent_fault,
    )
}
