//! The scheduler's decisions: admission, the order of the queue, and the assignment of jobs to workers.
//!
//! [`Plan`] is a synchronous struct without I/O or a clock. A job `J` is one choice of a request.
//!
//! Resumed choices get slots first. Other slots, and the places in the queue, are shared among callers
//! (`plan/callers.rs`); each caller's requests run by priority and arrival.
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

use std::time::Duration;

use tokio::time::Instant;

use crate::models::{ModelId, ModelMap};
use crate::prefix_index::PromptBlocks;
use crate::worker::{AssignmentId, Generation, WorkerId};

mod caller_queue;
mod caller_share;
mod callers;
mod queue;
#[cfg(test)]
mod tests;
mod wait_estimate;
mod workers;

use caller_queue::QueueOrder;
pub use caller_share::{CallerShare, PriorityReach};
use callers::Overflow;
use queue::ModelQueue;
use workers::{EndedJobs, Workers};

/// The waiting requests and the workers' free slots.
pub struct Plan<J> {
    /// One queue per model, so that a full queue of one model does not affect the others.
    queues: ModelMap<ModelQueue<J>>,
    workers: Workers,
    /// Arrival number that the next request gets.
    next_arrival: u64,
    now: Instant,
}

/// A request to admit.
pub struct NewWork<J> {
    /// The model.
    pub model: ModelId,
    /// The caller.
    pub caller: CallerShare,
    /// The priority. Lower numbers run first.
    pub priority: i32,
    /// The time at which the request fails.
    pub deadline: Instant,
    /// The jobs, at least one.
    pub choices: Vec<J>,
}

/// A job and the worker to run it on.
#[derive(Clone, Debug, PartialEq, Eq)]
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
    /// Identifies the job among all jobs of the plan.
    fn id(&self) -> AssignmentId;

    /// Maximum number of tokens that the job produces.
    fn max_tokens(&self) -> u32;

    /// Hashes of the job's prompt. Empty if the model's runner reuses no prefixes.
    fn prompt_blocks(&self) -> &PromptBlocks;

    /// Returns false after the reader of the job's tokens was dropped.
    fn has_reader(&self) -> bool;

    /// Returns true if a worker crashed while it ran this job, so the job may have caused the crash. Only a resumed
    /// job may be a suspect.
    fn is_suspect(&self) -> bool;
}

/// The result of an admission.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Admission {
    /// The request runs or waits in the queue.
    Admitted,
    /// The queue is full, and the caller already has its share of the queue.
    QueueFull,
    /// No worker of the model is up.
    NoWorker,
    /// The request would wait much longer than its deadline allows.
    DeadlineTooEarly {
        /// The time for which the request would wait.
        estimated_wait: Duration,
        /// The time until the deadline.
        left: Duration,
    },
}

/// The result of an admission, and its consequences.
#[must_use]
pub struct Admitting<J> {
    /// The result.
    pub admission: Admission,
    /// The jobs to start now, possibly those of other requests.
    pub placements: Vec<Placement<J>>,
    /// The jobs of a queued request that has lost its place to this request.
    pub displaced: Vec<J>,
}

impl<J> From<Admission> for Admitting<J> {
    fn from(admission: Admission) -> Self {
        Self {
            admission,
            placements: Vec::new(),
            displaced: Vec::new(),
        }
    }
}

impl<J: QueuedChoice> Plan<J> {
    /// Creates a plan without workers. `queue_depths` has one entry per model.
    #[must_use]
    pub fn new(queue_depths: ModelMap<usize>, now: Instant) -> Self {
        Self {
            queues: queue_depths.map(|_, depth| ModelQueue::new(depth)),
            workers: Workers::new(),
            next_arrival: 0,
            now,
        }
    }

    /// Sets the time of the next events.
    pub fn set_now(&mut self, now: Instant) {
        self.now = now;
    }

    /// Adds a worker of this model, which is not ready yet.
    pub fn add_worker(&mut self, worker: WorkerId, model: ModelId) {
        let ended = self.workers.add(worker, model);
        self.end_lost(ended);
    }

    /// Removes a worker.
    pub(super) fn remove_worker(&mut self, worker: WorkerId) {
        let ended = self.workers.remove(worker);
        self.end_lost(ended);
    }

    /// Admits a request.
    pub fn admit(&mut self, work: NewWork<J>) -> Admitting<J> {
        let NewWork {
            model,
            caller,
            priority,
            deadline,
            choices,
        } = work;
        if !self.workers.is_any_up(model) {
            return Admission::NoWorker.into();
        }
        let left = deadline.saturating_duration_since(self.now);
        let queue = &mut self.queues[model];
        if let Some(estimated_wait) = queue.wait_beyond(&caller, priority, left) {
            return Admission::DeadlineTooEarly {
                estimated_wait,
                left,
            }
            .into();
        }
        let order = self.next_order(priority);
        let id = self.queues[model].push(&caller, order, choices);
        let placements = self.place_waiting(model);
        // The queue was within its limit before this request, so at most one request is too many.
        let (admission, displaced) = match self.queues[model].make_room((id, order)) {
            None => (Admission::Admitted, Vec::new()),
            Some(Overflow::New) => (Admission::QueueFull, Vec::new()),
            Some(Overflow::Displaced(displaced)) => (Admission::Admitted, displaced),
        };
        Admitting {
            admission,
            placements,
            displaced,
        }
    }

    /// Queues a choice whose worker was lost. The request was admitted before, so the choice waits even if no worker
    /// is up, and does not count as queued.
    pub fn resume(
        &mut self,
        model: ModelId,
        caller: CallerShare,
        priority: i32,
        choice: J,
    ) -> Vec<Placement<J>> {
        let order = self.next_order(priority);
        self.queues[model].push_resumed(caller, order, choice);
        self.place_waiting(model)
    }

    /// Records that a worker has loaded its model: all its slots are free. Returns the jobs to start.
    pub fn set_worker_ready(
        &mut self,
        worker: WorkerId,
        generation: Generation,
        slots: usize,
    ) -> Vec<Placement<J>> {
        let ended = self.workers.set_ready(worker, generation, slots);
        let model = self.end_lost(ended);
        model.map_or_else(Vec::new, |model| self.place_waiting(model))
    }

    /// Records that a worker and all its jobs are lost.
    pub(super) fn set_worker_lost(&mut self, worker: WorkerId) {
        let ended = self.workers.set_lost(worker);
        self.end_lost(ended);
    }

    /// Records that a device call of a worker exceeds the step limit, or that the call has returned.
    pub(super) fn set_stuck(&mut self, worker: WorkerId, is_stuck: bool) -> Vec<Placement<J>> {
        let Some(model) = self.workers.set_stuck(worker, is_stuck) else {
            return Vec::new();
        };
        self.queues[model].record_changed_slots();
        self.place_waiting(model)
    }

    /// Records that a crash suspect has produced a token or has ended, so it is no longer suspect.
    pub(super) fn clear_suspect(
        &mut self,
        worker: WorkerId,
        generation: Generation,
    ) -> Vec<Placement<J>> {
        let model = self.workers.clear_suspect(worker, generation);
        model.map_or_else(Vec::new, |model| self.place_waiting(model))
    }

    /// Records that the slot of a job is free again. Returns the jobs to start.
    pub fn release_slot(
        &mut self,
        worker: WorkerId,
        generation: Generation,
        job: AssignmentId,
    ) -> Vec<Placement<J>> {
        let Some(ended) = self.workers.release(worker, generation, job) else {
            return Vec::new();
        };
        let model = ended.model;
        self.end_jobs(ended);
        let placements = self.place_waiting(model);
        self.queues[model].record_free_slot(self.now);
        placements
    }

    /// Drops the waiting jobs whose readers were dropped.
    pub fn drop_abandoned(&mut self) {
        for queue in self.queues.values_mut() {
            queue.drop_abandoned();
        }
    }

    /// Removes and returns all waiting jobs.
    pub(super) fn clear(&mut self) -> Vec<J> {
        let queues = self.queues.values_mut();
        queues.flat_map(ModelQueue::clear).collect()
    }

    /// Returns the number of requests of all models that wait for their first slot.
    pub(super) fn queued(&self) -> usize {
        self.queues.as_slice().iter().map(ModelQueue::queued).sum()
    }

    fn next_order(&mut self, priority: i32) -> QueueOrder {
        let arrival = self.next_arrival;
        self.next_arrival += 1;
        QueueOrder { priority, arrival }
    }

    /// Records that jobs have lost their slots, and that the number of their model's slots may have changed.
    fn end_lost(&mut self, ended: Option<EndedJobs>) -> Option<ModelId> {
        let ended = ended?;
        let model = ended.model;
        self.end_jobs(ended);
        self.queues[model].record_changed_slots();
        Some(model)
    }

    fn end_jobs(&mut self, ended: EndedJobs) {
        let queue = &mut self.queues[ended.model];
        for job in ended.jobs {
            let held = self.now.saturating_duration_since(job.started);
            queue.remove_slot(job.caller, held);
        }
    }

    /// Assigns waiting jobs to free slots, in order.
    fn place_waiting(&mut self, model: ModelId) -> Vec<Placement<J>> {
        let mut placements = Vec::new();
        let queue = &mut self.queues[model];
        // A crash suspect may have to wait for a worker without one. It does not block the jobs after it.
        let mut after = None;
        while let Some((at, job)) = queue.next_resumed(after) {
            let is_suspect = job.is_suspect();
            match self.workers.cheapest(model, job) {
                Some(worker) => {
                    let taken = queue.take_resumed(at);
                    placements.extend(start(&mut self.workers, worker, taken, self.now));
                }
                None if is_suspect => after = Some(at),
                None => return placements,
            }
        }
        while let Some(job) = queue.next_new() {
            let Some(worker) = self.workers.cheapest(model, job) else {
                break;
            };
            let taken = queue.take_new();
            placements.extend(start(&mut self.workers, worker, taken, self.now));
        }
        placements
    }
}

/// Gives a job that has left the queue a slot of this worker.
fn start<J: QueuedChoice>(
    workers: &mut Workers,
    worker: (WorkerId, Generation),
    taken: Option<(callers::CallerId, J)>,
    now: Instant,
) -> Option<Placement<J>> {
    let (caller, job) = taken?;
    workers.start(worker, &job, caller, now);
    let (worker, generation) = worker;
    Some(Placement {
        worker,
        generation,
        job,
    })
}
