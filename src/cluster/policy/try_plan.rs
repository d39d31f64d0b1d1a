//! Decides to which target a request is sent next, after each failure. It is a pure struct: the caller sends, waits and
//! reports.

use std::cmp::Ordering;
use std::time::Duration;

use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};
use tokio::time::Instant;

use super::load::WeightedLoad;

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
        if let Some(best) = ready.min_by(|a, b| compare(&views[*a], &views[*b])) {
            return NextTry::Send(best);
        }
        match candidates.into_iter().map(ready_at).min() {
            Some(at) if at <= (now + MAX_WAIT).min(deadline) => NextTry::WaitUntil(at),
            Some(_) => NextTry::GiveUp,
            None => self.wait_for_breaker(views, deadline),
        }
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

    /// Lets the request wait for breakers, for some seconds from now on. A completion that the client has begun to read is
    /// worth waiting for.
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

/// Orders targets by preference: busy ones last, then by tier, then by free capacity and load. A fallback is not
/// preferred to a queue.
fn compare(one: &TargetView, other: &TargetView) -> Ordering {
    let rank = |view: &TargetView| {
        (
            view.is_busy,
            view.tier,
            view.is_saturated,
            view.has_recent_fault,
        )
    };
    let by_rank = rank(one).cmp(&rank(other));
    by_rank.then_with(|| one.load.cmp(&other.load))
}

#[cfg(test)]
mod tests {
    use super::*;

    const UP: TargetView = TargetView {
        tier: 0,
        is_down: false,
        blocked_until: None,
        is_busy: false,
        is_saturated: false,
        has_recent_fault: false,
        load: WeightedLoad {
            tokens: 0,
            weight: 1,
        },
    };

    /// A plan and its targets, at a time that the test moves.
    struct Case {
        plan: TryPlan,
        views: Vec<TargetView>,
        now: Instant,
    }

    impl Case {
        fn new(views: &[TargetView]) -> Self {
            Self {
                plan: TryPlan::new(views.len(), 3, 7),
                views: views.to_vec(),
                now: Instant::now(),
            }
        }

        fn next(&self) -> NextTry {
            let deadline = self.now + Duration::from_secs(600);
            self.plan.next(&self.views, self.now, deadline)
        }

        fn fail(&mut self, target: usize, fault: Fault) {
            assert_eq!(self.next(), NextTry::Send(target));
            self.plan.record_failure(target, fault, self.now);
        }

        /// Waits as the plan says. Returns the delay.
        fn wait(&mut self) -> Duration {
            let NextTry::WaitUntil(time) = self.next() else {
                panic!("expected a delay: {:?}", self.next())
            };
            let delay = time - self.now;
            self.now = time;
            delay
        }
    }

    fn loaded(tokens: u64) -> TargetView {
        let load = WeightedLoad { tokens, weight: 1 };
        TargetView { load, ..UP }
    }

    fn fallback() -> TargetView {
        TargetView { tier: 1, ..UP }
    }

    #[test]
    fn the_target_with_the_lowest_load_is_tried_first_and_fallbacks_last() {
        let mut case = Case::new(&[loaded(9), loaded(3), fallback()]);
        case.fail(1, Fault::NotServed);
        case.fail(0, Fault::NotServed);
        case.fail(2, Fault::NotServed);
        assert_eq!(case.next(), NextTry::GiveUp);
    }

    #[test]
    fn a_busy_target_is_left_at_once_or_waited_for_as_it_says() {
        let two_seconds = Some(Duration::from_secs(2));
        let mut case = Case::new(&[UP, fallback()]);
        case.fail(0, Fault::Busy(two_seconds));
        assert_eq!(case.next(), NextTry::Send(1));
        let mut case = Case::new(&[UP]);
        for told in [two_seconds, None] {
            case.fail(0, Fault::Busy(told));
            let least = told.unwrap_or(Duration::from_secs(1));
            let delay = case.wait();
            assert!(delay >= least && delay <= least * 2, "{delay:?}");
        }
        case.fail(0, Fault::Busy(None));
        assert_eq!(case.next(), NextTry::GiveUp, "three tries");
    }

    #[test]
    fn a_delay_that_is_too_long_or_exceeds_the_deadline_is_not_waited_for() {
        let mut case = Case::new(&[UP]);
        case.fail(0, Fault::Busy(Some(Duration::from_secs(11))));
        assert_eq!(case.next(), NextTry::GiveUp);
        let mut case = Case::new(&[UP]);
        case.fail(0, Fault::Busy(None));
        let deadline = case.now + Duration::from_millis(999);
        let next = case.plan.next(&case.views, case.now, deadline);
        assert_eq!(next, NextTry::GiveUp);
    }

    #[test]
    fn a_passing_fault_is_retried_once_on_the_same_target_and_then_elsewhere() {
        let mut case = Case::new(&[UP, fallback()]);
        case.fail(0, Fault::Passing);
        assert!(case.wait() <= PASSING_DELAY);
        case.fail(0, Fault::Passing);
        assert_eq!(case.next(), NextTry::Send(1));
    }

    #[test]
    fn a_silent_or_unavailable_target_is_not_tried_again() {
        for fault in [Fault::Silent, Fault::Unavailable] {
            let mut case = Case::new(&[UP, fallback()]);
            case.fail(0, fault);
            case.fail(1, fault);
            assert_eq!(case.next(), NextTry::GiveUp, "{fault:?}");
        }
    }

    #[test]
    fn progress_gives_an_unavailable_target_another_chance_but_not_a_silent_one() {
        let mut case = Case::new(&[UP, fallback()]);
        case.fail(0, Fault::Unavailable);
        case.plan.record_progress();
        case.fail(0, Fault::Silent);
        case.plan.record_progress();
        assert_eq!(case.next(), NextTry::Send(1));
    }

    #[test]
    fn an_unreachable_target_costs_no_try_and_is_tried_twice() {
        let mut case = Case::new(&[UP, loaded(1), loaded(2), loaded(3), loaded(4)]);
        for target in 0..5 {
            case.fail(target, Fault::Unreachable);
        }
        let mut case = Case::new(&[UP]);
        case.fail(0, Fault::Unreachable);
        case.wait();
        case.fail(0, Fault::Unreachable);
        assert_eq!(case.next(), NextTry::GiveUp);
    }

    #[test]
    fn a_fault_of_the_request_ends_the_tries() {
        let mut case = Case::new(&[UP, fallback()]);
        case.fail(0, Fault::Request);
        assert_eq!(case.next(), NextTry::GiveUp);
    }

    #[test]
    fn tries_are_limited_until_a_token_arrives() {
        let mut case = Case::new(&[UP]);
        for _ in 0..2 {
            case.fail(0, Fault::Cut);
            case.wait();
        }
        case.plan.record_progress();
        for _ in 0..2 {
            case.fail(0, Fault::Cut);
            case.wait();
        }
        case.fail(0, Fault::Cut);
        assert_eq!(case.next(), NextTry::GiveUp);
    }

    #[test]
    fn a_target_that_is_down_is_tried_only_if_none_is_up() {
        let down = TargetView {
            is_down: true,
            ..UP
        };
        assert_eq!(Case::new(&[down, loaded(9)]).next(), NextTry::Send(1));
        assert_eq!(Case::new(&[down, down]).next(), NextTry::Send(0));
        let case = Case::new(&[down, loaded(9)]);
        assert!(!case.plan.has_alternative(1, &case.views));
        assert!(case.plan.has_alternative(0, &case.views));
    }

    #[test]
    fn a_target_that_failed_a_moment_ago_comes_after_its_equals_but_before_fallbacks() {
        let failed = TargetView {
            has_recent_fault: true,
            ..UP
        };
        assert_eq!(Case::new(&[failed, loaded(9)]).next(), NextTry::Send(1));
        assert_eq!(Case::new(&[failed, fallback()]).next(), NextTry::Send(0));
    }

    #[test]
    fn an_open_breaker_blocks_a_target_even_if_it_is_the_only_one() {
        let (case, _) = blocked_case(&[fallback()]);
        assert_eq!(case.next(), NextTry::Send(1));
        let (case, _) = blocked_case(&[]);
        assert_eq!(case.next(), NextTry::GiveUp);
    }

    #[test]
    fn a_completion_under_way_waits_for_a_breaker() {
        let (mut case, until) = blocked_case(&[]);
        case.plan.wait_for_breakers(case.now);
        assert_eq!(case.next(), NextTry::WaitUntil(until));
        case.views[0].blocked_until = Some(case.now + MAX_WAIT + Duration::from_secs(1));
        assert_eq!(case.next(), NextTry::GiveUp);
    }

    /// Returns a case whose first target has an open breaker, and the time until which it is open.
    fn blocked_case(others: &[TargetView]) -> (Case, Instant) {
        let mut case = Case::new(&[&[UP], others].concat());
        let until = case.now + Duration::from_secs(2);
        case.views[0].blocked_until = Some(until);
        (case, until)
    }

    #[test]
    fn a_target_that_was_busy_a_moment_ago_is_the_last_choice() {
        let busy = TargetView {
            is_busy: true,
            ..UP
        };
        assert_eq!(Case::new(&[busy, fallback()]).next(), NextTry::Send(1));
        assert_eq!(Case::new(&[busy]).next(), NextTry::Send(0));
    }
}
