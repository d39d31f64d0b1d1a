//! Random events, checked against a simple model of the plan.
//!
//! The model keeps plain lists and searches them for each decision. After each event, the plan must have started
//! exactly the jobs that the model expects, in the same order. So no job is lost or started twice, no slot idles while
//! a job waits that may use the slot, and callers get their shares.

use proptest::collection::vec;
use proptest::prelude::*;
use proptest::test_runner::Config;

use super::*;

mod world;

use world::World;

const CALLERS: usize = 4;
const WORKERS: usize = 3;
const DEPTH: usize = 5;
/// Common multiple of all weights, so that counts per weight are whole numbers.
const MULTIPLE: usize = 12;

#[derive(Clone, Debug)]
enum Event {
    Advance(u16),
    Submit {
        caller: usize,
        priority: i32,
        choices: usize,
    },
    /// Ends a running job.
    Finish(usize),
    /// Reports the end of a job that has ended before.
    FinishAgain,
    /// Drops the readers of a waiting job, or of all jobs of its request.
    Cancel {
        job: usize,
        whole_request: bool,
    },
    DropAbandoned,
    Ready {
        worker: usize,
        slots: usize,
    },
    Lose(usize),
    Leave(usize),
    Stick {
        worker: usize,
        is_stuck: bool,
    },
    /// Resumes a job that a worker has lost.
    Resume {
        job: usize,
        is_suspect: bool,
    },
    ClearSuspect(usize),
    /// Changes the weight and the priority reach of a caller's next requests.
    Reload {
        caller: usize,
        weight: usize,
        reaches_all: bool,
    },
}

fn event() -> impl Strategy<Value = Event> {
    let (index, worker) = (0..1_000_usize, 0..WORKERS);
    prop_oneof![
        2 => (0..5_000_u16).prop_map(Event::Advance),
        8 => (0..CALLERS, -1..=1, 1..=3_usize).prop_map(|(caller, priority, choices)| {
            Event::Submit { caller, priority, choices }
        }),
        8 => index.clone().prop_map(Event::Finish),
        1 => Just(Event::FinishAgain),
        2 => (index.clone(), any::<bool>())
            .prop_map(|(job, whole_request)| Event::Cancel { job, whole_request }),
        1 => Just(Event::DropAbandoned),
        2 => (worker.clone(), 0..=3_usize)
            .prop_map(|(worker, slots)| Event::Ready { worker, slots }),
        1 => worker.clone().prop_map(Event::Lose),
        1 => worker.clone().prop_map(Event::Leave),
        1 => (worker.clone(), any::<bool>())
            .prop_map(|(worker, is_stuck)| Event::Stick { worker, is_stuck }),
        3 => (index, any::<bool>())
            .prop_map(|(job, is_suspect)| Event::Resume { job, is_suspect }),
        1 => worker.prop_map(Event::ClearSuspect),
        1 => (0..CALLERS, 1..=4_usize, any::<bool>()).prop_map(|(caller, weight, reaches_all)| {
            Event::Reload { caller, weight, reaches_all }
        }),
    ]
}

proptest! {
    #![proptest_config(Config {
        failure_persistence: None,
        ..Config::default()
    })]

    #[test]
    fn the_plan_starts_the_same_jobs_as_a_simple_model(events in vec(event(), 1..150)) {
        let mut world = World::new();
        for event in &events {
            world.apply(event);
        }
        world.drain();
    }
}
