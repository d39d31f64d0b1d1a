//! The scheduler's decisions: admission, the order of the queue, and the assignment of jobs to workers.
//!
//! [`Plan`] is a synchronous struct without I/O or a clock. A job `J` is one choice of a request.
//!
//! A job goes to the worker on which it costs the fewest tokens. The cost is the number of tokens that the worker's
//! jobs may produce, plus the number of tokens of the job's prompt that the worker has not computed for an earlier job.
//! So a job goes to the worker that has the longest prefix of its prompt, unless the load of that worker exceeds the
//! load of another one by more tokens than the reuse saves. A prompt token counts as much as a generated one. On a
//! GPU, where a prompt token takes much less time, a worker with a warm prefix is therefore preferred too often.
//!
//! The prompts of running jobs do not count as load, because the plan does not learn when a prompt has been computed.
//! If they counted until the jobs end, a worker that only generates tokens would look busy, and jobs would avoid the
//! prefix that it has computed.

use std::collections::{BTreeMap, VecDeque};
use std::ops::Bound;

use crate::models::{ModelId, ModelMap};
use crate::prefix_index::{PrefixIndex, PromptBlocks};
use crate::worker::{Generation, WorkerId};

/// Maximum number of tokens that one job adds to the load of its worker. `max_tokens` is not a good estimate: for a
/// chat, it is the rest of the context by default.
const MAX_EXPECTED_TOKENS: u32 = 256;

/// Maximum number of prompt blocks that the plan remembers. Each takes about 40 bytes (an
/// estimate).
const MAX_WARM_BLOCKS: usize = 65_536;

/// Sort key of waiting requests: resumed choices before new requests, then lower priority numbers, then earlier
/// arrivals.
type QueueOrder = (QueueKind, i32, u64);

/// Kind of a waiting entry. Resumed choices are placed before new requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum QueueKind {
    Resumed,
    New,
}

/// The waiting requests and the workers' free slots.
pub struct Plan<J> {
    /// One queue per model, so that a full queue of one model does not affect the others.
    queues: ModelMap<ModelQueue<J>>,
    workers: BTreeMap<WorkerId, WorkerLoad>,
    /// The prompts of the jobs that each worker got since it loaded its model.
    warm: PrefixIndex<(WorkerId, Generation)>,
    /// Arrival number that the next request gets.
    next_arrival: u64,
}

struct ModelQueue<J> {
    /// Requests that have choices without a slot, in the order in which they are placed.
    waiting: BTreeMap<QueueOrder, WaitingRequest<J>>,
    /// Maximum number of requests that wait for their first slot.
    depth: usize,
}

struct WaitingRequest<J> {
    choices: VecDeque<J>,
    /// True once one of the request's choices has had a slot. The request then no longer counts as queued.
    started: bool,
}

struct WorkerLoad {
    model: ModelId,
    slots: usize,
    /// `None` while the worker is not ready.
    generation: Option<Generation>,
    used: usize,
    /// True while a device call exceeds the step limit. The worker gets no jobs until the call returns.
    is_stuck: bool,
    /// True while the worker runs a crash suspect. A worker never runs two of them, so that a crash identifies its
    /// cause.
    has_suspect: bool,
    /// The sum of `max_tokens` of the worker's jobs, each counted as at most [`MAX_EXPECTED_TOKENS`].
    outstanding_tokens: u64,
}

/// A job and the worker to run it on.
#[derive(Debug, PartialEq, Eq)]
pub struct Placement<J> {
    /// The worker.
    pub worker: WorkerId,
    /// Generation of the worker to which the free slot belongs.
    pub generation: Generation,
    /// The job.
    pub job: J,
}

/// The properties of a job from which its placement is decided.
pub trait QueuedChoice {
    /// Maximum number of tokens that the job produces.
    fn max_tokens(&self) -> u32;

    /// Hashes of the job's prompt. Empty if the model's runner reuses no prefixes.
    fn prompt_blocks(&self) -> &PromptBlocks;

    /// Returns false after the reader of the job's tokens was dropped.
    fn has_reader(&self) -> bool;

    /// Returns true if a worker crashed while it ran this job, so the job may have caused the crash.
    fn is_suspect(&self) -> bool;
}

/// The result of an admission.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Admission {
    /// The request runs or waits in the queue.
    Admitted,
    /// The queue is full.
    QueueFull,
    /// No worker of the model is up.
    NoWorker,
}

impl<J: QueuedChoice> Plan<J> {
    /// Creates a plan without workers. `queue_depths` has one entry per model.
    #[must_use]
    pub fn new(queue_depths: ModelMap<usize>) -> Self {
        let queues = queue_depths.map(|_, depth| ModelQueue {
            waiting: BTreeMap::new(),
            depth,
        });
        Self {
            queues,
            workers: BTreeMap::new(),
            warm: PrefixIndex::new(MAX_WARM_BLOCKS),
            next_arrival: 0,
        }
    }

    /// Adds a worker of this model, which is not ready yet.
    pub fn add_worker(&mut self, worker: WorkerId, model: ModelId) {
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

    /// Removes a worker.
    pub(super) fn remove_worker(&mut self, worker: WorkerId) {
        self.workers.remove(&worker);
    }

    /// Admits a request. Returns the jobs to start now, possibly those of other requests.
    pub fn admit(
        &mut self,
        model: ModelId,
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
        let order = (QueueKind::New, priority, self.next_arrival);
        self.next_arrival += 1;
        let waiting = WaitingRequest {
            choices: choices.into(),
            started: false,
        };
        self.queues[model].waiting.insert(order, waiting);
        let placements = self.place_waiting(model);
        let queue = &mut self.queues[model];
        // Before this request, the queue was within its limit. Therefore this request is the one to reject.
        if queue.queued() > queue.depth {
            queue.waiting.remove(&order);
            return (Admission::QueueFull, placements);
        }
        (Admission::Admitted, placements)
    }

    /// Queues a choice whose worker was lost. The request was admitted before, so the choice waits even if no worker
    /// is up, and does not count as queued.
    pub fn resume(&mut self, model: ModelId, priority: i32, choice: J) -> Vec<Placement<J>> {
        let order = (QueueKind::Resumed, priority, self.next_arrival);
        self.next_arrival += 1;
        let waiting = WaitingRequest {
            choices: [choice].into(),
            started: true,
        };
        self.queues[model].waiting.insert(order, waiting);
        self.place_waiting(model)
    }

    /// Records that a worker has loaded its model: all its slots are free. Returns the jobs to start.
    pub fn set_worker_ready(
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
        self.place_waiting(model)
    }

    /// Records that a worker and all its jobs are lost.
    pub(super) fn set_worker_lost(&mut self, worker: WorkerId) {
        if let Some(state) = self.workers.get_mut(&worker) {
            state.generation = None;
        }
    }

    /// Records that a device call of a worker exceeds the step limit, or that the call has returned.
    pub(super) fn set_stuck(&mut self, worker: WorkerId, is_stuck: bool) -> Vec<Placement<J>> {
        let Some(state) = self.workers.get_mut(&worker) else {
            return Vec::new();
        };
        state.is_stuck = is_stuck;
        let model = state.model;
        self.place_waiting(model)
    }

    /// Records that a crash suspect has produced a token or has ended, so it is no longer suspect.
    pub(super) fn clear_suspect(
        &mut self,
        worker: WorkerId,
        generation: Generation,
    ) -> Vec<Placement<J>> {
        match self.workers.get_mut(&worker) {
            Some(state) if state.generation == Some(generation) => {
                state.has_suspect = false;
                let model = state.model;
                self.place_waiting(model)
            }
            Some(_) | None => Vec::new(),
        }
    }

    /// Records that a slot of a worker is free again. Returns the jobs to start.
    pub fn release_slot(
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
            .saturating_sub(expected_tokens(max_tokens));
        let model = state.model;
        self.place_waiting(model)
    }

    /// Drops the waiting jobs whose readers were dropped.
    pub fn drop_abandoned(&mut self) {
        for queue in self.queues.values_mut() {
            queue.waiting.retain(|_, waiting| {
                waiting.choices.retain(QueuedChoice::has_reader);
                !waiting.choices.is_empty()
            });
        }
    }

    /// Removes and returns all waiting jobs.
    pub(super) fn clear(&mut self) -> Vec<J> {
        let queues = self.queues.values_mut();
        let waiting = queues.flat_map(|queue| std::mem::take(&mut queue.waiting).into_values());
        waiting.flat_map(|waiting| waiting.choices).collect()
    }

    /// Returns the number of requests of all models that wait for their first slot.
    pub(super) fn queued(&self) -> usize {
        self.queues.as_slice().iter().map(ModelQueue::queued).sum()
    }

    /// Assigns waiting jobs to free slots, in order. A crash suspect may have to wait for a worker without one. It does
    /// not block the jobs after it.
    fn place_waiting(&mut self, model: ModelId) -> Vec<Placement<J>> {
        let mut placements = Vec::new();
        let mut after = None;
        while let Some(order) = self.queues[model].next_after(after) {
            let waiting = self.queues[model].waiting.get_mut(&order);
            let choices = waiting.map(|waiting| &mut waiting.choices);
            let Some(job) = choices.and_then(VecDeque::pop_front) else {
                self.queues[model].waiting.remove(&order);
                continue;
            };
            if !job.has_reader() {
                continue;
            }
            let is_suspect = job.is_suspect();
            let chosen = self.cheapest_worker(model, &job);
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
            waiting.started = true;
            if waiting.choices.is_empty() {
                self.queues[model].waiting.remove(&order);
            }
            self.warm.record(job.prompt_blocks(), (worker, generation));
            if let Some(state) = self.workers.get_mut(&worker) {
                state.used += 1;
                state.has_suspect |= is_suspect;
                state.outstanding_tokens += expected_tokens(job.max_tokens());
            }
            placements.push(Placement {
                worker,
                generation,
                job,
            });
        }
        placements
    }

    /// Returns the worker with a free slot on which the job costs the fewest tokens. If several are equal, returns
    /// the first.
    fn cheapest_worker(&self, model: ModelId, job: &J) -> Option<(WorkerId, Generation)> {
        let is_suspect = job.is_suspect();
        let prompt = job.prompt_blocks();
        let candidates = self.workers.iter().filter_map(|(id, worker)| {
            let is_free = worker.model == model && worker.is_up() && worker.used < worker.slots;
            let may_take = is_free && !(is_suspect && worker.has_suspect);
            let generation = worker.generation.filter(|_| may_take)?;
            let warm = self.warm.warm_tokens(prompt, (*id, generation));
            let cold = prompt.tokens().saturating_sub(warm);
            Some((worker.outstanding_tokens + cold, *id, generation))
        });
        let cheapest = candidates.min_by_key(|(cost, id, _)| (*cost, *id));
        cheapest.map(|(_, id, generation)| (id, generation))
    }
}

impl WorkerLoad {
    fn is_up(&self) -> bool {
        self.generation.is_some() && !self.is_stuck
    }
}

impl<J> ModelQueue<J> {
    /// Returns the key of the first waiting request, or of the first one after `order`.
    fn next_after(&self, order: Option<QueueOrder>) -> Option<QueueOrder> {
        match order {
            None => self.waiting.keys().next().copied(),
            Some(order) => {
                let after = (Bound::Excluded(order), Bound::Unbounded);
                self.waiting.range(after).next().map(|(order, _)| *order)
            }
        }
    }

    /// Returns the number of requests that wait for their first slot.
    fn queued(&self) -> usize {
        let waiting = self.waiting.values();
        waiting.filter(|waiting| !waiting.started).count()
    }
}

/// Returns the number of tokens that a job is expected to produce.
fn expected_tokens(max_tokens: u32) -> u64 {
    max_tokens.min(MAX_EXPECTED_TOKENS).into()
}

#[cfg(test)]
mod tests;
