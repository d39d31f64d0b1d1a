//! The status of every worker. The readiness of the engine is computed from them.

use std::collections::BTreeMap;

use crate::models::{ModelEntry, ModelId, ModelStatus, Models, Readiness};
use crate::telemetry::{WorkerCounts, WorkerState};
use crate::worker::WorkerId;

/// The status of every worker.
pub(super) struct WorkerStatuses {
    models: Models,
    workers: BTreeMap<WorkerId, WorkerStatus>,
}

/// The model that a worker runs, and the state of the model on this worker.
struct WorkerStatus {
    model: ModelId,
    status: ModelStatus,
}

impl WorkerStatuses {
    /// Creates the statuses of an engine without workers.
    pub(super) fn new(models: Models) -> Self {
        Self {
            models,
            workers: BTreeMap::new(),
        }
    }

    /// Adds a worker of this model. A known worker keeps its status.
    pub(super) fn add_worker(&mut self, worker: WorkerId, model: ModelId) {
        let status = ModelStatus::Loading(0.0);
        let loading = WorkerStatus { model, status };
        self.workers.entry(worker).or_insert(loading);
    }

    /// Removes a worker.
    pub(super) fn remove_worker(&mut self, worker: WorkerId) {
        self.workers.remove(&worker);
    }

    /// Returns a worker's model, or `None` for an unknown worker.
    pub(super) fn model_of(&self, worker: WorkerId) -> Option<&ModelEntry> {
        let known = self.workers.get(&worker)?;
        Some(self.models.get(known.model))
    }

    /// Sets the status of a worker.
    pub(super) fn set_status(&mut self, worker: WorkerId, status: ModelStatus) {
        if let Some(known) = self.workers.get_mut(&worker) {
            known.status = status;
        }
    }

    /// Records the fraction of the model that a worker has loaded. A worker that was lost and loads its model again
    /// stays `Lost` until it is up.
    pub(super) fn set_progress(&mut self, worker: WorkerId, fraction: f32) {
        let known = self.workers.get_mut(&worker);
        if let Some(ModelStatus::Loading(known)) = known.map(|known| &mut known.status) {
            *known = known.max(fraction);
        }
    }

    /// Counts the workers in each state.
    pub(super) fn counts(&self) -> WorkerCounts {
        let mut counts = WorkerCounts::new();
        for known in self.workers.values() {
            *counts.entry(state(&known.status)).or_default() += 1;
        }
        counts
    }

    /// Returns the readiness of the engine.
    pub(super) fn readiness(&self) -> Readiness {
        Readiness::new(&self.models, |model| {
            let workers = self.workers.values().filter(|known| known.model == model);
            ModelStatus::of_workers(workers.map(|known| &known.status))
        })
    }
}

/// Returns the state under which the metrics count a worker.
fn state(status: &ModelStatus) -> WorkerState {
    match status {
        ModelStatus::Loading(_) => WorkerState::Loading,
        ModelStatus::Up => WorkerState::Ready,
        ModelStatus::Lost => WorkerState::Lost,
        ModelStatus::LoadFailed(_) => WorkerState::Failed,
        ModelStatus::GivenUp(_) => WorkerState::GivenUp,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Creates one model without workers.
    fn one_model() -> (WorkerStatuses, ModelId) {
        let models = Models::for_test(&["a"]);
        let id = models.entries()[0].id;
        (WorkerStatuses::new(models), id)
    }

    #[test]
    fn a_worker_that_loads_its_model_again_stays_lost_until_it_is_up() {
        let (mut statuses, model) = one_model();
        let worker = WorkerId(0);
        statuses.add_worker(worker, model);
        statuses.set_progress(worker, 0.5);
        assert_eq!(statuses.readiness(), Readiness::Loading(0.5));
        statuses.set_status(worker, ModelStatus::Lost);
        statuses.add_worker(worker, model);
        statuses.set_progress(worker, 0.75);
        assert_eq!(statuses.readiness(), Readiness::Lost("a".into()));
        statuses.set_status(worker, ModelStatus::Up);
        assert_eq!(statuses.readiness(), Readiness::Ready);
        statuses.remove_worker(worker);
        assert_eq!(statuses.readiness(), Readiness::NoWorker("a".into()));
    }

    #[test]
    fn workers_are_counted_by_state() {
        let (mut statuses, model) = one_model();
        for (worker, status) in [
            ModelStatus::Up,
            ModelStatus::Lost,
            ModelStatus::Up,
            ModelStatus::GivenUp("no file".to_owned()),
        ]
        .into_iter()
        .enumerate()
        {
            statuses.add_worker(WorkerId(worker), model);
            statuses.set_status(WorkerId(worker), status);
        }
        statuses.remove_worker(WorkerId(0));
        let counts = [
            (WorkerState::Ready, 1),
            (WorkerState::Lost, 1),
            (WorkerState::GivenUp, 1),
        ];
        assert_eq!(statuses.counts(), counts.into());
    }
}
