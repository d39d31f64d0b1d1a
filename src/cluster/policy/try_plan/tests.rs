//! Tests of the tries of one request.

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
    warm_tokens: 0,
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

#[test]
fn among_equals_the_request_goes_where_its_prefix_is_warm() {
    let warm = |tokens| TargetView {
        warm_tokens: tokens,
        ..loaded(10)
    };
    assert_eq!(Case::new(&[UP, warm(11)]).next(), NextTry::Send(1));
    assert_eq!(Case::new(&[UP, warm(9)]).next(), NextTry::Send(0));
    // A less preferred target does not get the request, however warm it is.
    for unpreferred in [
        TargetView {
            is_busy: true,
            ..warm(1_000)
        },
        TargetView {
            tier: 1,
            ..warm(1_000)
        },
        TargetView {
            is_saturated: true,
            ..warm(1_000)
        },
        TargetView {
            has_recent_fault: true,
            ..warm(1_000)
        },
    ] {
        assert_eq!(Case::new(&[UP, unpreferred]).next(), NextTry::Send(0));
    }
}

#[test]
fn a_warm_prefix_does_not_draw_a_request_back_to_a_target_that_failed_it() {
    let warm = TargetView {
        warm_tokens: 1_000,
        ..UP
    };
    for fault in [Fault::Unreachable, Fault::Cut] {
        let mut case = Case::new(&[loaded(5), warm]);
        case.fail(1, fault);
        case.fail(0, Fault::Busy(None));
        // Both targets are ready again.
        case.now += Duration::from_secs(3);
        case.views[1] = TargetView {
            load: loaded(6).load,
            ..warm
        };
        assert_eq!(case.next(), NextTry::Send(0), "{fault:?}");
        case.plan.record_progress();
        assert_eq!(case.next(), NextTry::Send(0), "{fault:?}");
    }
}
