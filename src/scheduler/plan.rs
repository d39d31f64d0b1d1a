//! The scheduler's decisions: who waits, in which order, and which worker takes the next sequence.
//!
//! A plain synchronous struct: no I/O, no clock. `J` is what waits for a slot.

use std::collections::{BTreeMap, VecDeque};
use std::ops::Bound;

use crate::worker::{Generation, WorkerId};

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
    workers: BTreeMap<WorkerId, WorkerLoad>,
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

struct WorkerLoad {
    model: usize,
    slots: usize,
    /// `None` while the worker has no model.
    generation: Option<Generation>,
    used: usize,
    /// Whether a call of its device does not return: it gets nothing until that does.
    is_stuck: bool,
    /// Whether it has a suspect: it gets no second one, which would not be told from the first.
    has_suspect: bool,
    /// The tokens that its sequences have asked for.
    outstanding_tokens: u64,
}

/// Something to be run by a worker.
#[derive(Debug, PartialEq, Eq)]
pub struct Placement<J> {
    /// Who runs it.
    pub worker: WorkerId,
    /// The worker's generation that it is meant for.
    pub generation: Generation,
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
        let state = WorkerLoad {
            model,
            slots: 0,
            generation: None,
            used: 0,
            is_stuck: false,
            has_suspect: false,
            outstanding_tokens: 0,
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
    pub fn ready(
        &mut self,
        worker: WorkerId,
        generation: Generation,
        slots: usize,
    ) -> Vec<Placement<J>> {
        let Some(state) = self.workers.get_mut(&worker) else {
            return Vec::new();
        };
        *state = WorkerLoad {
            model: state.model,
            slots,
            generation: Some(generation),
            used: 0,
            is_stuck: false,
            has_suspect: false,
            outstanding_tokens: 0,
        };
        let model = state.model;
        self.place(model)
    }

    /// A worker has gone, with everything on it.
    pub(super) fn lost(&mut self, worker: WorkerId) {
        if let Some(state) = self.workers.get_mut(&worker) {
            state.generation = None;
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
    pub(super) fn cleared(
        &mut self,
        worker: WorkerId,
        generation: Generation,
    ) -> Vec<Placement<J>> {
        match self.workers.get_mut(&worker) {
            Some(state) if state.generation == Some(generation) => {
                state.has_suspect = false;
                let model = state.model;
                self.place(model)
            }
            Some(_) | None => Vec::new(),
        }
    }

    /// A worker's slot is free again.
    pub fn released(
        &mut self,
        worker: WorkerId,
        generation: Generation,
        max_tokens: u32,
    ) -> Vec<Placement<J>> {
        let state = self.workers.get_mut(&worker);
        let Some(state) = state.filter(|state| state.generation == Some(generation)) else {
            return Vec::new();
        };
        state.used = state.used.saturating_sub(1);
        state.outstanding_tokens = state
            .outstanding_tokens
            .saturating_sub(u64::from(max_tokens));
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
            let Some((worker, generation)) = chosen else {
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
                state.outstanding_tokens += u64::from(job.max_tokens());
            }
            placements.push(Placement {
                worker,
                generation,
                job,
            });
        }
        placements
    }
}

impl WorkerLoad {
    fn is_up(&self) -> bool {
        self.generation.is_some() && !self.is_stuck
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
    workers: &BTreeMap<WorkerId, WorkerLoad>,
    model: usize,
    is_suspect: bool,
) -> Option<(WorkerId, Generation)> {
    let candidates = workers.iter().filter_map(|(id, worker)| {
        let is_free = worker.model == model && worker.is_up() && worker.used < worker.slots;
        let may_take = is_free && !(is_suspect && worker.has_suspect);
        let generation = worker.generation.filter(|_| may_take)?;
        Some((worker.outstanding_tokens, *id, generation))
    });
    let least = candidates.min_by_key(|(outstanding_tokens, id, _)| (*outstanding_tokens, *id));
    least.map(|(_, id, generation)| (id, generation))
}

#[cfg(test)]
mod tests;
