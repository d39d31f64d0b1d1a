//! The scheduler's decisions: who waits, in which order, and which worker takes the next sequence.
//!
//! A plain synchronous struct: no I/O, no clock. `J` is what waits for a slot.

use std::collections::{BTreeMap, VecDeque};
use std::ops::Bound;

use crate::worker::{Life, WorkerId};

/// What goes on elsewhere goes before what is new; then lower priority numbers go first; within one, whoever
/// came first.
type Order = (Kind, i32, u64);

/// Whether a request has run before.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Kind {
    Resumed,
    New,
}

/// Who waits and who could take them.
pub struct Plan<J> {
    /// One for each model: a model's full queue refuses nothing of another's.
    queues: Vec<Queue<J>>,
    workers: BTreeMap<WorkerId, WorkerState>,
    arrivals: u64,
}

struct Queue<J> {
    /// The requests that still have choices without a slot.
    waiting: BTreeMap<Order, Waiting<J>>,
    /// The most of them that may wait for their first.
    depth: usize,
}

struct Waiting<J> {
    choices: VecDeque<J>,
    /// Whether a choice has a slot already: then the request is no longer counted as queued.
    begun: bool,
}

struct WorkerState {
    model: usize,
    slots: usize,
    /// `None` while the worker has no model.
    life: Option<Life>,
    used: usize,
    /// Whether a call of its device does not return: it gets nothing until that does.
    is_stuck: bool,
    /// Whether it has a suspect: it gets no second one, which would not be told from the first.
    has_suspect: bool,
    /// The tokens that its sequences have asked for.
    outstanding: u64,
}

/// Something to be run by a worker.
#[derive(Debug, PartialEq, Eq)]
pub struct Placement<J> {
    /// Who runs it.
    pub worker: WorkerId,
    /// The worker's life that it is meant for.
    pub life: Life,
    /// What is run.
    pub job: J,
}

/// What the plan must know of a job.
pub trait Job {
    /// The most tokens it asks for.
    fn max_tokens(&self) -> u32;

    /// Whether somebody still waits for it.
    fn is_wanted(&self) -> bool;

    /// Whether it was on a worker when that crashed, and may be why.
    fn is_suspect(&self) -> bool;
}

/// Whether a request got its place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Admission {
    /// It runs, or waits in the queue.
    Admitted,
    /// The queue is full.
    QueueFull,
    /// No worker of its model is up.
    NoWorker,
}

impl<J: Job> Plan<J> {
    /// Models are given as the depths of their queues. There are no workers yet.
    #[must_use]
    pub fn new(queue_depths: &[usize]) -> Self {
        let queues = queue_depths.iter().map(|depth| Queue {
            waiting: BTreeMap::new(),
            depth: *depth,
        });
        Self {
            queues: queues.collect(),
            workers: BTreeMap::new(),
            arrivals: 0,
        }
    }

    /// There is such a worker of this model, which has not loaded it yet.
    pub fn joined(&mut self, worker: WorkerId, model: usize) {
        let state = WorkerState {
            model,
            slots: 0,
            life: None,
            used: 0,
            is_stuck: false,
            has_suspect: false,
            outstanding: 0,
        };
        self.workers.insert(worker, state);
    }

    /// There is no such worker any more.
    pub(super) fn left(&mut self, worker: WorkerId) {
        self.workers.remove(&worker);
    }

    /// Takes a request, and says what is to be started now.
    pub fn admit(
        &mut self,
        model: usize,
        priority: i32,
        choices: Vec<J>,
    ) -> (Admission, Vec<Placement<J>>) {
        if !self
            .workers
            .values()
            .any(|worker| worker.model == model && worker.is_up())
        {
            return (Admission::NoWorker, Vec::new());
        }
        let order = (Kind::New, priority, self.arrivals);
        self.arrivals += 1;
        let waiting = Waiting {
            choices: choices.into(),
            begun: false,
        };
        self.queues[model].waiting.insert(order, waiting);
        let placements = self.place(model);
        let queue = &mut self.queues[model];
        // The queue was not over its depth before, so it is this request that is one too many.
        if queue.queued() > queue.depth {
            queue.waiting.remove(&order);
            return (Admission::QueueFull, placements);
        }
        (Admission::Admitted, placements)
    }

    /// Takes a choice whose worker was lost. It was admitted before: it waits, also where no worker is up, and is
    /// not counted as queued.
    pub fn resume(&mut self, model: usize, priority: i32, choice: J) -> Vec<Placement<J>> {
        let order = (Kind::Resumed, priority, self.arrivals);
        self.arrivals += 1;
        let waiting = Waiting {
            choices: [choice].into(),
            begun: true,
        };
        self.queues[model].waiting.insert(order, waiting);
        self.place(model)
    }

    /// A worker has loaded its model and has all its slots free.
    pub fn ready(&mut self, worker: WorkerId, life: Life, slots: usize) -> Vec<Placement<J>> {
        let Some(state) = self.workers.get_mut(&worker) else {
            return Vec::new();
        };
        *state = WorkerState {
            model: state.model,
            slots,
            life: Some(life),
            used: 0,
            is_stuck: false,
            has_suspect: false,
            outstanding: 0,
        };
        let model = state.model;
        self.place(model)
    }

    /// A worker has gone, with everything on it.
    pub(super) fn lost(&mut self, worker: WorkerId) {
        if let Some(state) = self.workers.get_mut(&worker) {
            state.life = None;
        }
    }

    /// A call of a worker's device does not return, or has returned after all.
    pub(super) fn stuck(&mut self, worker: WorkerId, is_stuck: bool) -> Vec<Placement<J>> {
        let Some(state) = self.workers.get_mut(&worker) else {
            return Vec::new();
        };
        state.is_stuck = is_stuck;
        let model = state.model;
        self.place(model)
    }

    /// A worker's suspect is none any more.
    pub(super) fn cleared(&mut self, worker: WorkerId, life: Life) -> Vec<Placement<J>> {
        match self.workers.get_mut(&worker) {
            Some(state) if state.life == Some(life) => {
                state.has_suspect = false;
                let model = state.model;
                self.place(model)
            }
            Some(_) | None => Vec::new(),
        }
    }

    /// A worker's slot is free again.
    pub fn released(&mut self, worker: WorkerId, life: Life, max_tokens: u32) -> Vec<Placement<J>> {
        let state = self.workers.get_mut(&worker);
        let Some(state) = state.filter(|state| state.life == Some(life)) else {
            return Vec::new();
        };
        state.used = state.used.saturating_sub(1);
        state.outstanding = state.outstanding.saturating_sub(u64::from(max_tokens));
        let model = state.model;
        self.place(model)
    }

    /// Drops what nobody waits for any more.
    pub fn sweep(&mut self) {
        for queue in &mut self.queues {
            queue.waiting.retain(|_, waiting| {
                waiting.choices.retain(Job::is_wanted);
                !waiting.choices.is_empty()
            });
        }
    }

    /// Takes out everything that waits.
    pub(super) fn clear(&mut self) -> Vec<J> {
        let queues = self.queues.iter_mut();
        let waiting = queues.flat_map(|queue| std::mem::take(&mut queue.waiting).into_values());
        waiting.flat_map(|waiting| waiting.choices).collect()
    }

    /// How many requests of all models wait for their first slot.
    pub(super) fn queued(&self) -> usize {
        self.queues.iter().map(Queue::queued).sum()
    }

    /// Gives free slots to those who wait, in their order. A suspect may have to wait for a worker without another;
    /// who comes behind it does not.
    fn place(&mut self, model: usize) -> Vec<Placement<J>> {
        let mut placements = Vec::new();
        let mut after = None;
        while let Some(order) = self.queues[model].next_after(after) {
            let waiting = self.queues[model].waiting.get_mut(&order);
            let choices = waiting.map(|waiting| &mut waiting.choices);
            let Some(job) = choices.and_then(VecDeque::pop_front) else {
                self.queues[model].waiting.remove(&order);
                continue;
            };
            if !job.is_wanted() {
                continue;
            }
            let is_suspect = job.is_suspect();
            let chosen = least_loaded(&self.workers, model, is_suspect);
            let Some(waiting) = self.queues[model].waiting.get_mut(&order) else {
                continue;
            };
            let Some((worker, life)) = chosen else {
                waiting.choices.push_front(job);
                if !is_suspect {
                    break;
                }
                after = Some(order);
                continue;
            };
            waiting.begun = true;
            if waiting.choices.is_empty() {
                self.queues[model].waiting.remove(&order);
            }
            if let Some(state) = self.workers.get_mut(&worker) {
                state.used += 1;
                state.has_suspect |= is_suspect;
                state.outstanding += u64::from(job.max_tokens());
            }
            placements.push(Placement { worker, life, job });
        }
        placements
    }
}

impl WorkerState {
    fn is_up(&self) -> bool {
        self.life.is_some() && !self.is_stuck
    }
}

impl<J> Queue<J> {
    /// Who is next, or next behind this one.
    fn next_after(&self, order: Option<Order>) -> Option<Order> {
        match order {
            None => self.waiting.keys().next().copied(),
            Some(order) => {
                let behind = (Bound::Excluded(order), Bound::Unbounded);
                self.waiting.range(behind).next().map(|(order, _)| *order)
            }
        }
    }

    fn queued(&self) -> usize {
        let waiting = self.waiting.values();
        waiting.filter(|waiting| !waiting.begun).count()
    }
}

/// The worker with a free slot that has the fewest tokens before it.
fn least_loaded(
    workers: &BTreeMap<WorkerId, WorkerState>,
    model: usize,
    is_suspect: bool,
) -> Option<(WorkerId, Life)> {
    let candidates = workers.iter().filter_map(|(id, worker)| {
        let is_free = worker.model == model && worker.is_up() && worker.used < worker.slots;
        let may_take = is_free && !(is_suspect && worker.has_suspect);
        let life = worker.life.filter(|_| may_take)?;
        Some((worker.outstanding, *id, life))
    });
    let least = candidates.min_by_key(|(outstanding, id, _)| (*outstanding, *id));
    least.map(|(_, id, life)| (id, life))
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::rc::Rc;

    use super::*;

    #[derive(Clone, Debug)]
    struct Named(&'static str, u32, Rc<Cell<bool>>);

    /// The names of those who may be why a worker crashed begin so.
    const SUSPECT: &str = "suspect";

    impl Job for Named {
        fn max_tokens(&self) -> u32 {
            self.1
        }

        fn is_wanted(&self) -> bool {
            self.2.get()
        }

        fn is_suspect(&self) -> bool {
            self.0.starts_with(SUSPECT)
        }
    }

    fn job(name: &'static str) -> Named {
        Named(name, 16, Rc::new(Cell::new(true)))
    }

    fn names(placements: &[Placement<Named>]) -> Vec<(&'static str, usize)> {
        placements
            .iter()
            .map(|placement| (placement.job.0, placement.worker.0))
            .collect()
    }

    /// One model on workers with these numbers of slots, all of them ready.
    fn plan(slots: &[usize], queue_depth: usize) -> Plan<Named> {
        let mut plan = Plan::new(&[queue_depth]);
        for (worker, slots) in slots.iter().enumerate() {
            add_ready(&mut plan, (worker, 0), *slots);
        }
        plan
    }

    /// Adds a worker of a model.
    fn add_ready(plan: &mut Plan<Named>, (worker, model): (usize, usize), slots: usize) {
        plan.joined(WorkerId(worker), model);
        assert!(plan.ready(WorkerId(worker), Life(1), slots).is_empty());
    }

    fn admit(plan: &mut Plan<Named>, priority: i32, name: &'static str) -> Admission {
        plan.admit(0, priority, vec![job(name)]).0
    }

    fn release(plan: &mut Plan<Named>, worker: usize) -> Vec<(&'static str, usize)> {
        names(&plan.released(WorkerId(worker), Life(1), 16))
    }

    #[test]
    fn a_free_slot_is_given_at_once() {
        let (admission, placements) = plan(&[1], 0).admit(0, 0, vec![job("a")]);
        assert_eq!(
            (admission, names(&placements)),
            (Admission::Admitted, vec![("a", 0)])
        );
    }

    #[test]
    fn a_full_queue_refuses_and_keeps_those_who_wait() {
        let mut plan = plan(&[1], 1);
        assert_eq!(admit(&mut plan, 0, "runs"), Admission::Admitted);
        assert_eq!(admit(&mut plan, 0, "waits"), Admission::Admitted);
        assert_eq!(admit(&mut plan, 0, "refused"), Admission::QueueFull);
        assert_eq!(plan.queued(), 1);
        assert_eq!(release(&mut plan, 0), [("waits", 0)]);
    }

    #[test]
    fn the_lower_priority_number_goes_first_and_then_the_earlier_arrival() {
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
    fn the_worker_with_the_fewest_tokens_before_it_takes_the_next() {
        let mut plan = plan(&[2, 2], 8);
        let long = Named("long", 1_000, Rc::new(Cell::new(true)));
        assert_eq!(names(&plan.admit(0, 0, vec![long]).1), [("long", 0)]);
        let (_, placements) = plan.admit(0, 0, vec![job("b"), job("c"), job("d")]);
        assert_eq!(names(&placements), [("b", 1), ("c", 1), ("d", 0)]);
    }

    #[test]
    fn more_choices_than_slots_run_in_turn() {
        let mut plan = plan(&[2], 0);
        let choices = vec![job("a"), job("b"), job("c")];
        let (admission, placements) = plan.admit(0, 0, choices);
        assert_eq!(admission, Admission::Admitted);
        assert_eq!(names(&placements), [("a", 0), ("b", 0)]);
        assert_eq!(plan.queued(), 0, "a request that has begun is not queued");
        assert_eq!(release(&mut plan, 0), [("c", 0)]);
    }

    #[test]
    fn what_nobody_waits_for_is_never_placed() {
        let mut plan = plan(&[1], 8);
        admit(&mut plan, 0, "runs");
        let gone = job("gone");
        plan.admit(0, 0, vec![gone.clone()]);
        admit(&mut plan, 0, "next");
        gone.2.set(false);
        assert_eq!(release(&mut plan, 0), [("next", 0)]);
        let gone = job("gone");
        plan.admit(0, 0, vec![gone.clone()]);
        gone.2.set(false);
        plan.sweep();
        assert_eq!(plan.queued(), 0);
    }

    #[test]
    fn models_do_not_wait_for_each_other() {
        let mut plan = Plan::new(&[8, 8]);
        add_ready(&mut plan, (0, 0), 1);
        add_ready(&mut plan, (1, 1), 1);
        plan.admit(0, 0, vec![job("runs")]);
        plan.admit(0, 0, vec![job("waits")]);
        assert_eq!(
            names(&plan.admit(1, 0, vec![job("other")]).1),
            [("other", 1)]
        );
    }

    #[test]
    fn a_full_queue_of_one_model_refuses_nothing_of_another() {
        let mut plan = Plan::new(&[1, 2]);
        add_ready(&mut plan, (0, 0), 1);
        add_ready(&mut plan, (1, 1), 1);
        let mut admit = |model| plan.admit(model, 0, vec![job("any")]).0;
        let (admitted, full) = (Admission::Admitted, Admission::QueueFull);
        // The first of each runs, and the rest wait.
        assert_eq!([admit(0), admit(0), admit(0)], [admitted, admitted, full]);
        for expected in [admitted, admitted, admitted, full] {
            assert_eq!(admit(1), expected);
        }
        assert_eq!(admit(0), full);
        assert_eq!(plan.queued(), 3, "of both");
    }

    #[test]
    fn a_lost_worker_takes_nothing_until_it_is_ready_again() {
        let mut plan = plan(&[1], 8);
        admit(&mut plan, 0, "runs");
        admit(&mut plan, 0, "waits");
        plan.lost(WorkerId(0));
        assert_eq!(admit(&mut plan, 0, "refused"), Admission::NoWorker);
        assert!(
            release(&mut plan, 0).is_empty(),
            "the slot belongs to an earlier life"
        );
        let placed = plan.ready(WorkerId(0), Life(2), 1);
        assert_eq!(names(&placed), [("waits", 0)]);
    }

    #[test]
    fn what_was_running_goes_before_what_is_new_whatever_its_priority() {
        let mut plan = plan(&[1], 1);
        admit(&mut plan, 0, "runs");
        admit(&mut plan, -9, "new");
        assert!(plan.resume(0, 9, job("resumed")).is_empty());
        assert_eq!(plan.queued(), 1, "it has a place already");
        assert_eq!(release(&mut plan, 0), [("resumed", 0)]);
        assert_eq!(release(&mut plan, 0), [("new", 0)]);
    }

    #[test]
    fn what_was_running_waits_for_a_worker_where_none_is_up() {
        let mut plan = plan(&[1], 0);
        plan.lost(WorkerId(0));
        assert!(plan.resume(0, 0, job("resumed")).is_empty());
        assert_eq!(admit(&mut plan, 0, "new"), Admission::NoWorker);
        let placed = plan.ready(WorkerId(0), Life(2), 1);
        assert_eq!(names(&placed), [("resumed", 0)]);
    }

    #[test]
    fn a_worker_that_has_left_takes_nothing_and_one_that_joins_does() {
        let mut plan = plan(&[1], 8);
        plan.left(WorkerId(0));
        assert_eq!(admit(&mut plan, 0, "refused"), Admission::NoWorker);
        add_ready(&mut plan, (7, 0), 1);
        assert_eq!(names(&plan.admit(0, 0, vec![job("a")]).1), [("a", 7)]);
    }

    #[test]
    fn a_worker_whose_device_does_not_return_takes_nothing_until_it_does() {
        let mut plan = plan(&[2], 8);
        admit(&mut plan, 0, "runs");
        assert!(plan.stuck(WorkerId(0), true).is_empty());
        assert_eq!(admit(&mut plan, 0, "refused"), Admission::NoWorker);
        assert!(plan.resume(0, 0, job("waits")).is_empty());
        assert_eq!(names(&plan.stuck(WorkerId(0), false)), [("waits", 0)]);
    }

    #[test]
    fn suspects_are_never_together_on_a_worker_and_hold_up_nobody_else() {
        let mut plan = plan(&[4], 8);
        assert_eq!(
            names(&plan.resume(0, 0, job("suspect 1"))),
            [("suspect 1", 0)]
        );
        assert!(plan.resume(0, 0, job("suspect 2")).is_empty());
        assert_eq!(names(&plan.admit(0, 0, vec![job("new")]).1), [("new", 0)]);
        let placed = plan.cleared(WorkerId(0), Life(1));
        assert_eq!(names(&placed), [("suspect 2", 0)]);
    }
}
