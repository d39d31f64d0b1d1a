//! Tests of the shares of several callers.

use super::*;

const SECOND: Duration = Duration::from_secs(1);
const IN_AN_HOUR: Duration = Duration::from_secs(3_600);

fn caller(key: &str, weight: i64) -> CallerShare {
    CallerShare {
        key: Some(key.parse().unwrap()),
        weight: weight.try_into().unwrap(),
        priority_reach: PriorityReach::OwnRequests,
    }
}

/// Creates a request of one choice for each of these names.
fn work(caller: &CallerShare, priority: i32, names: &[&'static str]) -> NewWork<NamedJob> {
    NewWork {
        model: model(0),
        caller: caller.clone(),
        priority,
        deadline: Instant::now() + IN_AN_HOUR,
        choices: names.iter().map(|name| job(name)).collect(),
    }
}

/// Admits requests of one choice, which must be admitted and displace nothing.
fn flood(plan: &mut TestPlan, caller: &CallerShare, name: &'static str, requests: usize) {
    for _ in 0..requests {
        let admitting = plan.admit_work(work(caller, 0, &[name]));
        assert_eq!(admitting.admission, Admission::Admitted);
        assert!(admitting.displaced.is_empty());
    }
}

/// Ends the oldest job after `time`, and returns the names of the jobs that start.
fn next(plan: &mut TestPlan, time: Duration) -> Vec<&'static str> {
    plan.advance(time);
    let started = plan.release(0);
    started.iter().map(|placed| placed.job.name).collect()
}

/// Counts the running jobs with this name.
fn running(plan: &TestPlan, name: &str) -> usize {
    let running = plan.running.iter();
    running.filter(|placed| placed.job.name == name).count()
}

#[test]
fn a_single_request_gets_the_next_slot_before_a_thousand_of_another_caller() {
    for slots in [1, 2, 8] {
        let mut plan = plan(&[slots], 1_024);
        flood(&mut plan, &caller("a", 1), "a", 1_000);
        for _ in 0..10 {
            flood(&mut plan, &caller("b", 1), "b", 1);
            assert_eq!(next(&mut plan, SECOND), ["b"], "slots: {slots}");
            while running(&plan, "b") > 0 {
                next(&mut plan, SECOND);
            }
        }
    }
}

#[test]
fn single_requests_of_several_callers_run_before_the_backlog_of_others_in_the_order_of_arrival() {
    let mut plan = plan(&[1], 1_024);
    for name in ["a", "b"] {
        flood(&mut plan, &caller(name, 1), name, 100);
    }
    for _ in 0..10 {
        next(&mut plan, SECOND);
    }
    for name in ["z", "y", "x"] {
        flood(&mut plan, &caller(name, 1), name, 1);
    }
    let order: Vec<_> = (0..3).flat_map(|_| next(&mut plan, SECOND)).collect();
    assert_eq!(order, ["z", "y", "x"]);
}

#[test]
fn slots_are_shared_by_weight_and_none_idles() {
    let mut plan = plan(&[8], 1_024);
    flood(&mut plan, &caller("a", 3), "a", 300);
    flood(&mut plan, &caller("b", 1), "b", 100);
    for _ in 0..50 {
        assert_eq!(next(&mut plan, SECOND).len(), 1);
    }
    assert_eq!((running(&plan, "a"), running(&plan, "b")), (6, 2));
    // Without waiting requests of another caller, a caller gets all slots.
    while plan.plan.queued() > 0 {
        assert_eq!(next(&mut plan, SECOND).len(), 1);
    }
}

#[test]
fn one_slot_is_shared_by_weight_and_time() {
    for (weights, times, expected) in [
        // Times of the jobs of `a` and `b`, and the number of jobs that run in 1,200 seconds.
        ([3, 1], [1, 1], [900, 300]),
        ([1, 1], [5, 1], [120, 600]),
        ([4, 1], [2, 4], [480, 60]),
    ] {
        let mut plan = plan(&[1], 2_048);
        let callers = [caller("a", weights[0]), caller("b", weights[1])];
        flood(&mut plan, &callers[0], "a", 1_000);
        flood(&mut plan, &callers[1], "b", 1_000);
        let (mut ended, mut left) = ([0_i32; 2], 1_200);
        while left > 0 {
            let at = usize::from(running(&plan, "b") == 1);
            next(&mut plan, Duration::from_secs(times[at]));
            ended[at] += 1;
            left -= i64::try_from(times[at]).unwrap();
        }
        for (ended, expected) in ended.into_iter().zip(expected) {
            let difference = (ended - expected).abs();
            assert!(difference <= 2, "{weights:?} {times:?} {ended} {expected}");
        }
    }
}

#[test]
fn each_choice_of_a_request_counts_as_a_slot() {
    let mut plan = plan(&[4], 8);
    let choices = ["a"; 8];
    let admitting = plan.admit_work(work(&caller("a", 1), 0, &choices));
    assert_eq!(admitting.placements.len(), 4);
    flood(&mut plan, &caller("b", 1), "b", 3);
    let order: Vec<_> = (0..4).flat_map(|_| next(&mut plan, SECOND)).collect();
    assert_eq!(order, ["b", "b", "a", "a"], "each has two slots");
}

#[test]
fn a_caller_saves_nothing_up_while_it_is_away() {
    let mut plan = plan(&[1], 1_024);
    flood(&mut plan, &caller("b", 1), "b", 1);
    flood(&mut plan, &caller("a", 1), "a", 200);
    for _ in 0..100 {
        next(&mut plan, SECOND);
    }
    flood(&mut plan, &caller("b", 1), "b", 100);
    let order: Vec<_> = (0..6).flat_map(|_| next(&mut plan, SECOND)).collect();
    assert_eq!(order, ["b", "a", "b", "a", "b", "a"]);
}

#[test]
fn a_caller_that_leaves_for_a_moment_owes_what_it_has_used() {
    let mut plan = plan(&[1], 1_024);
    flood(&mut plan, &caller("b", 1), "b", 1);
    flood(&mut plan, &caller("a", 1), "a", 100);
    assert_eq!(next(&mut plan, SECOND * 5), ["a"]);
    flood(&mut plan, &caller("b", 1), "b", 1);
    let order: Vec<_> = (0..6).flat_map(|_| next(&mut plan, SECOND)).collect();
    assert_eq!(order, ["a", "a", "a", "a", "b", "a"]);
}

#[test]
fn the_slots_of_a_lost_worker_no_longer_count() {
    let mut plan = plan(&[2], 1_024);
    let [a, b] = [caller("a", 1), caller("b", 1)];
    flood(&mut plan, &b, "b", 2);
    add_ready(&mut plan, 1, model(0), 3);
    flood(&mut plan, &a, "a", 10);
    flood(&mut plan, &b, "b", 10);
    plan.plan.set_worker_lost(WorkerId(1));
    let placed = plan.set_worker_ready(WorkerId(1), Generation(2), 1);
    assert_eq!(names(&placed), [("a", 1)]);
}

#[test]
fn a_changed_weight_applies_from_the_callers_next_request() {
    let mut plan = plan(&[8], 1_024);
    flood(&mut plan, &caller("a", 1), "a", 200);
    flood(&mut plan, &caller("b", 1), "b", 200);
    for _ in 0..20 {
        next(&mut plan, SECOND);
    }
    assert_eq!(running(&plan, "a"), 4);
    flood(&mut plan, &caller("a", 3), "a", 1);
    for _ in 0..20 {
        next(&mut plan, SECOND);
    }
    assert_eq!(running(&plan, "a"), 6);
}

#[test]
fn a_resumed_choice_goes_before_every_caller_and_counts_as_a_slot() {
    let mut plan = plan(&[2], 1_024);
    let [a, b] = [caller("a", 1), caller("b", 1)];
    flood(&mut plan, &a, "a", 10);
    flood(&mut plan, &b, "b", 10);
    let placed = plan.resume_for(a, model(0), 9, job("resumed"));
    assert!(placed.is_empty());
    assert_eq!(next(&mut plan, SECOND), ["resumed"]);
    // `a` has both slots.
    assert_eq!(next(&mut plan, SECOND), ["b"]);
}

#[test]
fn priorities_act_against_other_callers_only_with_the_reach() {
    for (reach, expected) in [
        (PriorityReach::OwnRequests, ["b", "a0", "a9"]),
        (PriorityReach::AllRequests, ["a0", "b", "a9"]),
    ] {
        let mut plan = plan(&[1], 8);
        let a = CallerShare {
            priority_reach: reach,
            ..caller("a", 1)
        };
        flood(&mut plan, &a, "runs", 1);
        let _ = plan.admit_work(work(&a, 9, &["a9"]));
        let _ = plan.admit_work(work(&a, -1, &["a0"]));
        let _ = plan.admit_work(work(&caller("b", 1), 5, &["b"]));
        let order: Vec<_> = (0..3).flat_map(|_| next(&mut plan, SECOND)).collect();
        assert_eq!(order, expected, "{reach:?}");
    }
}

/// Admits a request. Returns the result, and the names of the displaced jobs.
fn submit(
    plan: &mut TestPlan,
    caller: &CallerShare,
    priority: i32,
    name: &'static str,
) -> (Admission, Vec<&'static str>) {
    let admitting = plan.admit_work(work(caller, priority, &[name]));
    let displaced = admitting.displaced.iter().map(|job| job.name);
    (admitting.admission, displaced.collect())
}

#[test]
fn a_full_queue_of_one_caller_makes_room_for_the_share_of_another() {
    let mut plan = plan(&[1], 4);
    let [a, b] = [caller("a", 1), caller("b", 1)];
    for name in ["runs", "first", "second", "third"] {
        assert_eq!(submit(&mut plan, &a, 0, name).0, Admission::Admitted);
    }
    let low = submit(&mut plan, &a, 7, "low");
    assert_eq!(low, (Admission::Admitted, vec![]));
    assert_eq!(submit(&mut plan, &a, 0, "more").0, Admission::QueueFull);
    // The caller's last request leaves the queue: the lowest priority first, then the newest.
    let admitted = |displaced| (Admission::Admitted, vec![displaced]);
    assert_eq!(submit(&mut plan, &b, 0, "b"), admitted("low"));
    assert_eq!(submit(&mut plan, &b, 0, "b"), admitted("third"));
    // Now both callers have two queued requests.
    let full = (Admission::QueueFull, vec![]);
    assert_eq!(submit(&mut plan, &b, 0, "b"), full);
    assert_eq!(submit(&mut plan, &a, 0, "a"), full);
    assert_eq!(plan.plan.queued(), 4);
}

#[test]
fn the_queue_is_shared_by_weight() {
    let mut plan = plan(&[1], 8);
    let [a, b] = [caller("a", 1), caller("b", 3)];
    flood(&mut plan, &a, "a", 9);
    for request in 0..10 {
        let expected = match request < 6 {
            true => (Admission::Admitted, vec!["a"]),
            false => (Admission::QueueFull, vec![]),
        };
        assert_eq!(submit(&mut plan, &b, 0, "b"), expected, "{request}");
    }
}

#[test]
fn a_request_with_a_slot_is_never_displaced() {
    let mut plan = plan(&[1], 2);
    let [a, b] = [caller("a", 1), caller("b", 1)];
    let _ = plan.admit_work(work(&a, 9, &["started"; 3]));
    let _ = submit(&mut plan, &a, 0, "a");
    let _ = submit(&mut plan, &a, 0, "a");
    assert_eq!(submit(&mut plan, &b, 0, "b").1, ["a"]);
    assert_eq!(submit(&mut plan, &b, 0, "b").0, Admission::QueueFull);
    assert_eq!(plan.plan.queued(), 2);
}

/// Creates a plan with 100 queued requests of caller `a`, whose only slot became free every second.
fn busy_plan() -> TestPlan {
    let mut plan = plan(&[1], 1_024);
    flood(&mut plan, &caller("a", 1), "a", 141);
    for _ in 0..40 {
        next(&mut plan, SECOND);
    }
    plan
}

/// Admits a request of this caller with a deadline in `left`.
fn with_deadline(plan: &mut TestPlan, key: &str, priority: i32, left: Duration) -> Admission {
    let work = NewWork {
        deadline: plan.now + left,
        ..work(&caller(key, 1), priority, &["x"])
    };
    plan.admit_work(work).admission
}

#[test]
fn a_deadline_that_the_queue_cannot_meet_is_refused_at_once() {
    let mut plan = busy_plan();
    let refused = Admission::DeadlineTooEarly {
        estimated_wait: SECOND * 100,
        left: SECOND * 49,
    };
    assert_eq!(with_deadline(&mut plan, "a", 0, SECOND * 49), refused);
    assert_eq!(plan.plan.queued(), 100);
    // A deadline after half of the estimated wait is accepted: the requests ahead may be twice as fast.
    let met = with_deadline(&mut plan, "a", 0, SECOND * 50);
    assert_eq!(met, Admission::Admitted);
}

#[test]
fn only_requests_ahead_of_the_same_caller_make_a_deadline_impossible() {
    let mut plan = busy_plan();
    for (key, priority) in [("b", 0), ("a", -1)] {
        let admission = with_deadline(&mut plan, key, priority, SECOND / 10);
        assert_eq!(admission, Admission::Admitted, "{key} {priority}");
    }
}

#[test]
fn a_deadline_is_refused_only_if_slots_became_free_often_enough() {
    let soon = SECOND / 10;
    let mut few = plan(&[1], 1_024);
    flood(&mut few, &caller("a", 1), "a", 101);
    for _ in 0..31 {
        next(&mut few, SECOND);
        assert_eq!(with_deadline(&mut few, "a", 0, soon), Admission::Admitted);
    }
    next(&mut few, SECOND);
    assert_ne!(with_deadline(&mut few, "a", 0, soon), Admission::Admitted);
    // The times of the lost worker's slots do not count.
    few.plan.set_worker_lost(WorkerId(0));
    few.running.clear();
    few.set_worker_ready(WorkerId(0), Generation(2), 1);
    assert_eq!(with_deadline(&mut few, "a", 0, soon), Admission::Admitted);
}
