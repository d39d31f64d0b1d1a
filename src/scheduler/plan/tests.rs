//! Tests of admission, order and placement, with one caller.

use std::cell::Cell;
use std::collections::VecDeque;
use std::hash::RandomState;
use std::rc::Rc;

use super::*;
use crate::models::Models;
use crate::prefix_index::BlockHasher;

mod fairness;
mod random_events;
mod test_plan;

use test_plan::*;

#[test]
fn a_request_is_placed_on_a_free_slot_at_once() {
    let (admission, placements) = plan(&[1], 0).admit(model(0), 0, vec![job("a")]);
    assert_eq!(
        (admission, names(&placements)),
        (Admission::Admitted, vec![("a", 0)])
    );
}

#[test]
fn a_full_queue_rejects_new_requests_and_keeps_the_waiting_ones() {
    let mut plan = plan(&[1], 1);
    assert_eq!(admit(&mut plan, 0, "runs"), Admission::Admitted);
    assert_eq!(admit(&mut plan, 0, "waits"), Admission::Admitted);
    assert_eq!(admit(&mut plan, 0, "rejected"), Admission::QueueFull);
    assert_eq!(plan.plan.queued(), 1);
    assert_eq!(release(&mut plan, 0), [("waits", 0)]);
}

#[test]
fn requests_run_by_priority_and_then_by_arrival() {
    let mut plan = plan(&[1], 8);
    admit(&mut plan, 0, "runs");
    admit(&mut plan, 5, "last");
    admit(&mut plan, 0, "second");
    admit(&mut plan, -1, "first");
    admit(&mut plan, 0, "third");
    let order: Vec<_> = (0..4).map(|_| release(&mut plan, 0)[0].0).collect();
    assert_eq!(order, ["first", "second", "third", "last"]);
}

#[test]
fn the_worker_with_the_fewest_outstanding_tokens_takes_the_next() {
    let mut plan = plan(&[2, 2], 8);
    let long = NamedJob {
        max_tokens: 1_000,
        ..job("long")
    };
    assert_eq!(names(&plan.admit(model(0), 0, vec![long]).1), [("long", 0)]);
    let (_, placements) = plan.admit(model(0), 0, vec![job("b"), job("c"), job("d")]);
    assert_eq!(names(&placements), [("b", 1), ("c", 1), ("d", 0)]);
}

#[test]
fn more_choices_than_slots_run_in_turn() {
    let mut plan = plan(&[2], 0);
    let choices = vec![job("a"), job("b"), job("c")];
    let (admission, placements) = plan.admit(model(0), 0, choices);
    assert_eq!(admission, Admission::Admitted);
    assert_eq!(names(&placements), [("a", 0), ("b", 0)]);
    assert_eq!(
        plan.plan.queued(),
        0,
        "a started request does not count as queued"
    );
    assert_eq!(release(&mut plan, 0), [("c", 0)]);
}

#[test]
fn an_abandoned_request_is_never_placed() {
    let mut plan = plan(&[1], 8);
    admit(&mut plan, 0, "runs");
    let gone = job("gone");
    plan.admit(model(0), 0, vec![gone.clone()]);
    admit(&mut plan, 0, "next");
    gone.has_reader.set(false);
    assert_eq!(release(&mut plan, 0), [("next", 0)]);
    let gone = job("gone");
    plan.admit(model(0), 0, vec![gone.clone()]);
    gone.has_reader.set(false);
    plan.plan.drop_abandoned();
    assert_eq!(plan.plan.queued(), 0);
}

#[test]
fn models_are_scheduled_independently() {
    let mut plan = two_models([8, 8]);
    add_ready(&mut plan, 0, model(0), 1);
    add_ready(&mut plan, 1, model(1), 1);
    plan.admit(model(0), 0, vec![job("runs")]);
    plan.admit(model(0), 0, vec![job("waits")]);
    assert_eq!(
        names(&plan.admit(model(1), 0, vec![job("other")]).1),
        [("other", 1)]
    );
}

#[test]
fn a_full_queue_of_one_model_does_not_affect_another() {
    let mut plan = two_models([1, 2]);
    add_ready(&mut plan, 0, model(0), 1);
    add_ready(&mut plan, 1, model(1), 1);
    let mut admit = |index| plan.admit(model(index), 0, vec![job("any")]).0;
    let (admitted, full) = (Admission::Admitted, Admission::QueueFull);
    // The first request of each model runs, and the others wait.
    assert_eq!([admit(0), admit(0), admit(0)], [admitted, admitted, full]);
    for expected in [admitted, admitted, admitted, full] {
        assert_eq!(admit(1), expected);
    }
    assert_eq!(admit(0), full);
    assert_eq!(plan.plan.queued(), 3, "queued requests of both models");
}

#[test]
fn a_lost_worker_takes_nothing_until_it_is_ready_again() {
    let mut plan = plan(&[1], 8);
    admit(&mut plan, 0, "runs");
    admit(&mut plan, 0, "waits");
    plan.plan.set_worker_lost(WorkerId(0));
    assert_eq!(admit(&mut plan, 0, "rejected"), Admission::NoWorker);
    assert!(
        release(&mut plan, 0).is_empty(),
        "the job belongs to an earlier generation"
    );
    let placed = plan.set_worker_ready(WorkerId(0), Generation(2), 1);
    assert_eq!(names(&placed), [("waits", 0)]);
}

#[test]
fn a_resumed_choice_goes_before_new_requests_of_any_priority() {
    let mut plan = plan(&[1], 1);
    admit(&mut plan, 0, "runs");
    admit(&mut plan, -9, "new");
    assert!(plan.resume(model(0), 9, job("resumed")).is_empty());
    assert_eq!(
        plan.plan.queued(),
        1,
        "a resumed choice does not count as queued"
    );
    assert_eq!(release(&mut plan, 0), [("resumed", 0)]);
    assert_eq!(release(&mut plan, 0), [("new", 0)]);
}

#[test]
fn a_resumed_choice_waits_when_no_worker_is_up() {
    let mut plan = plan(&[1], 0);
    plan.plan.set_worker_lost(WorkerId(0));
    assert!(plan.resume(model(0), 0, job("resumed")).is_empty());
    assert_eq!(admit(&mut plan, 0, "new"), Admission::NoWorker);
    let placed = plan.set_worker_ready(WorkerId(0), Generation(2), 1);
    assert_eq!(names(&placed), [("resumed", 0)]);
}

#[test]
fn a_worker_that_left_takes_nothing_and_a_new_one_does() {
    let mut plan = plan(&[1], 8);
    plan.plan.remove_worker(WorkerId(0));
    assert_eq!(admit(&mut plan, 0, "rejected"), Admission::NoWorker);
    add_ready(&mut plan, 7, model(0), 1);
    assert_eq!(
        names(&plan.admit(model(0), 0, vec![job("a")]).1),
        [("a", 7)]
    );
}

#[test]
fn a_stuck_worker_takes_nothing_until_its_device_call_returns() {
    let mut plan = plan(&[2], 8);
    admit(&mut plan, 0, "runs");
    assert!(plan.set_stuck(WorkerId(0), true).is_empty());
    assert_eq!(admit(&mut plan, 0, "rejected"), Admission::NoWorker);
    assert!(plan.resume(model(0), 0, job("waits")).is_empty());
    assert_eq!(names(&plan.set_stuck(WorkerId(0), false)), [("waits", 0)]);
}

#[test]
fn a_worker_has_at_most_one_suspect_and_suspects_do_not_block_others() {
    let mut plan = plan(&[4], 8);
    assert_eq!(
        names(&plan.resume(model(0), 0, job("suspect 1"))),
        [("suspect 1", 0)]
    );
    assert!(plan.resume(model(0), 0, job("suspect 2")).is_empty());
    assert_eq!(
        names(&plan.admit(model(0), 0, vec![job("new")]).1),
        [("new", 0)]
    );
    let placed = plan.clear_suspect(WorkerId(0), Generation(1));
    assert_eq!(names(&placed), [("suspect 2", 0)]);
}

/// Creates jobs of 16 tokens whose prompts are hashed with one key.
#[derive(Default)]
struct Prompts(RandomState);

impl Prompts {
    /// A job whose prompt has these blocks of 100 tokens.
    fn job(&self, blocks: &[u32]) -> NamedJob {
        let mut hasher = BlockHasher::new(&self.0, &0);
        for block in blocks {
            hasher.push(block, 100);
        }
        NamedJob {
            prompt: hasher.finish(),
            ..job("prompt")
        }
    }
}

/// Places a job, which must not wait, and returns its worker.
fn place(plan: &mut TestPlan, job: NamedJob) -> usize {
    let (_, placements) = plan.admit(model(0), 0, vec![job]);
    let [placement] = &placements[..] else {
        panic!("{} placements", placements.len());
    };
    placement.worker.0
}

#[test]
fn a_chat_returns_to_the_worker_that_has_computed_its_turns() {
    let (prompts, mut plan) = (Prompts::default(), plan(&[4, 4, 4], 0));
    for chat in 0..3 {
        let worker = place(&mut plan, prompts.job(&[chat]));
        assert_eq!(worker, usize::try_from(chat).unwrap());
    }
    for chat in [2, 0, 1, 1] {
        let worker = place(&mut plan, prompts.job(&[chat, 10]));
        assert_eq!(worker, usize::try_from(chat).unwrap());
    }
}

#[test]
fn a_warm_worker_that_is_ahead_by_more_work_than_reuse_saves_is_left_alone() {
    let (prompts, mut plan) = (Prompts::default(), plan(&[20, 20], 0));
    // Reuse saves 100 tokens: more than six jobs of 16 tokens, and less than seven.
    let workers: Vec<_> = (0..9)
        .map(|_| place(&mut plan, prompts.job(&[1])))
        .collect();
    assert_eq!(workers, [0, 0, 0, 0, 0, 0, 0, 1, 1]);
}

#[test]
fn one_popular_prefix_uses_all_workers() {
    let (prompts, mut plan) = (Prompts::default(), plan(&[8; 4], 0));
    let mut running = VecDeque::new();
    let mut placed = [0_u32; 4];
    for request in 0..1_000 {
        // Ten common blocks and one of its own.
        let mut blocks: Vec<u32> = (0..10).collect();
        blocks.push(1_000 + request);
        let worker = place(
            &mut plan,
            NamedJob {
                max_tokens: 200,
                ..prompts.job(&blocks)
            },
        );
        placed[worker] += 1;
        running.push_back(worker);
        if running.len() == 24 {
            let ended = running.pop_front().unwrap();
            plan.release(ended);
        }
    }
    assert!(placed.iter().all(|count| *count > 150), "{placed:?}");
}

#[test]
fn a_worker_that_was_lost_has_computed_nothing() {
    let (prompts, mut plan) = (Prompts::default(), plan(&[4, 4], 0));
    assert_eq!(place(&mut plan, prompts.job(&[1])), 0);
    plan.plan.set_worker_lost(WorkerId(0));
    plan.set_worker_ready(WorkerId(0), Generation(2), 4);
    assert_eq!(place(&mut plan, job("busy")), 0);
    assert_eq!(place(&mut plan, prompts.job(&[1])), 1);
}

#[test]
fn a_job_counts_as_at_most_max_expected_tokens() {
    let (prompts, mut plan) = (Prompts::default(), plan(&[4, 4], 0));
    let long = NamedJob {
        max_tokens: 100_000,
        ..prompts.job(&[1, 2, 3])
    };
    assert_eq!(place(&mut plan, long.clone()), 0);
    assert_eq!(place(&mut plan, long), 0);
}
