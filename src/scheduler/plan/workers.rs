//! The workers: their free slots, their jobs, and the prompts that they have computed.

use std::collections::BTreeMap;

use tokio::time::Instant;

use super::QueuedChoice;
use super::callers::CallerId;
use crate::models::ModelId;
use crate::prefix_index::PrefixIndex;
use crate::worker::{AssignmentId, Generation, WorkerId};

/// Maximum number of tokens that one job adds to the load of its worker. `max_tokens` is not a good estimate: for a
/// chat, it is the rest of the context by default.
const MAX_EXPECTED_TOKENS: u32 = 256;

/// Maximum number of prompt blocks that the plan remembers. Each takes about 40 bytes (an estimate).
const MAX_WARM_BLOCKS: usize = 65_536;

/// The workers of all models.
pub(super) struct Workers {
    loads: BTreeMap<WorkerId, WorkerLoad>,
    /// The prompts of the jobs that each worker has run since it loaded its model.
    warm: PrefixIndex<(WorkerId, Generation)>,
}

struct WorkerLoad {
    model: ModelId,
    slots: usize,
    /// `None` while the worker is not ready.
    generation: Option<Generation>,
    /// True while a device call exceeds the step limit. The worker gets no jobs until the call returns.
    is_stuck: bool,
    /// True while the worker runs a crash suspect. A worker never runs two of them, so that a crash identifies its
    /// cause.
    has_suspect: bool,
    /// The running jobs. Each has a slot.
    jobs: BTreeMap<AssignmentId, RunningJob>,
    /// The sum of the expected tokens of the jobs.
    outstanding_tokens: u64,
}

/// A job that has a slot.
pub(super) struct RunningJob {
    pub(super) caller: CallerId,
    pub(super) started: Instant,
    /// Number of tokens that the job is expected to produce.
    expected_tokens: u64,
}

/// Jobs that have lost their slots, and their model.
pub(super) struct EndedJobs {
    pub(super) model: ModelId,
    pub(super) jobs: Vec<RunningJob>,
}

impl Workers {
    pub(super) fn new() -> Self {
        Self {
            loads: BTreeMap::new(),
            warm: PrefixIndex::new(MAX_WARM_BLOCKS),
        }
    }

    /// Adds a worker that is not ready yet.
    pub(super) fn add(&mut self, worker: WorkerId, model: ModelId) -> Option<EndedJobs> {
        let load = WorkerLoad::new(model);
        let before = self.loads.insert(worker, load);
        before.map(WorkerLoad::into_ended)
    }

    pub(super) fn remove(&mut self, worker: WorkerId) -> Option<EndedJobs> {
        self.loads.remove(&worker).map(WorkerLoad::into_ended)
    }

    /// Makes all slots of a worker free.
    pub(super) fn set_ready(
        &mut self,
        worker: WorkerId,
        generation: Generation,
        slots: usize,
    ) -> Option<EndedJobs> {
        let load = self.loads.get_mut(&worker)?;
        let ready = WorkerLoad {
            generation: Some(generation),
            slots,
            ..WorkerLoad::new(load.model)
        };
        Some(std::mem::replace(load, ready).into_ended())
    }

    pub(super) fn set_lost(&mut self, worker: WorkerId) -> Option<EndedJobs> {
        let load = self.loads.get_mut(&worker)?;
        let lost = WorkerLoad::new(load.model);
        Some(std::mem::replace(load, lost).into_ended())
    }

    /// Returns the worker's model. `None` for an unknown worker.
    pub(super) fn set_stuck(&mut self, worker: WorkerId, is_stuck: bool) -> Option<ModelId> {
        let load = self.loads.get_mut(&worker)?;
        load.is_stuck = is_stuck;
        Some(load.model)
    }

    /// Returns the worker's model. `None` for another generation of the worker.
    pub(super) fn clear_suspect(
        &mut self,
        worker: WorkerId,
        generation: Generation,
    ) -> Option<ModelId> {
        let load = self.load_of(worker, generation)?;
        load.has_suspect = false;
        Some(load.model)
    }

    /// Frees the slot of a job. `None` if the worker does not run the job.
    pub(super) fn release(
        &mut self,
        worker: WorkerId,
        generation: Generation,
        job: AssignmentId,
    ) -> Option<EndedJobs> {
        let load = self.load_of(worker, generation)?;
        let ended = load.jobs.remove(&job)?;
        load.outstanding_tokens -= ended.expected_tokens;
        Some(EndedJobs {
            model: load.model,
            jobs: vec![ended],
        })
    }

    pub(super) fn is_any_up(&self, model: ModelId) -> bool {
        let mut loads = self.loads.values();
        loads.any(|load| load.model == model && load.is_up())
    }

    /// Returns the worker with a free slot on which the job costs the fewest tokens. If several are equal, returns
    /// the first.
    pub(super) fn cheapest(
        &self,
        model: ModelId,
        job: &impl QueuedChoice,
    ) -> Option<(WorkerId, Generation)> {
        let is_suspect = job.is_suspect();
        let prompt = job.prompt_blocks();
        let candidates = self.loads.iter().filter_map(|(id, load)| {
            let is_free = load.model == model && load.is_up() && load.jobs.len() < load.slots;
            let may_take = is_free && !(is_suspect && load.has_suspect);
            let generation = load.generation.filter(|_| may_take)?;
            let warm = self.warm.warm_tokens(prompt, (*id, generation));
            let cold = prompt.tokens().saturating_sub(warm);
            Some((load.outstanding_tokens + cold, *id, generation))
        });
        let cheapest = candidates.min_by_key(|(cost, id, _)| (*cost, *id));
        cheapest.map(|(_, id, generation)| (id, generation))
    }

    /// Gives a job of the caller a free slot of the worker.
    pub(super) fn start(
        &mut self,
        (worker, generation): (WorkerId, Generation),
        job: &impl QueuedChoice,
        caller: CallerId,
        now: Instant,
    ) {
        self.warm.record(job.prompt_blocks(), (worker, generation));
        if let Some(load) = self.load_of(worker, generation) {
            let expected_tokens = job.max_tokens().min(MAX_EXPECTED_TOKENS).into();
            load.outstanding_tokens += expected_tokens;
            load.has_suspect |= job.is_suspect();
            let running = RunningJob {
                caller,
                started: now,
                expected_tokens,
            };
            load.jobs.insert(job.id(), running);
        }
    }

    fn load_of(&mut self, worker: WorkerId, generation: Generation) -> Option<&mut WorkerLoad> {
        let load = self.loads.get_mut(&worker);
        load.filter(|load| load.generation == Some(generation))
    }
}

impl WorkerLoad {
    /// Creates the state of a worker that is not ready.
    fn new(model: ModelId) -> Self {
        Self {
            model,
            slots: 0,
            generation: None,
            is_stuck: false,
            has_suspect: false,
            jobs: BTreeMap::new(),
            outstanding_tokens: 0,
        }
    }

    fn is_up(&self) -> bool {
        self.generation.is_some() && !self.is_stuck
    }

    fn into_ended(self) -> EndedJobs {
        EndedJobs {
            model: self.model,
            jobs: self.jobs.into_values().collect(),
        }
    }
}
