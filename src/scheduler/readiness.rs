//! The readiness of the engine, computed from the states of its workers. The health endpoints report it.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::telemetry::{WorkerCounts, WorkerState};
use crate::worker::WorkerId;

/// The readiness of the engine.
#[derive(Clone, Debug, PartialEq)]
pub enum Readiness {
    /// At least one model is still loading. The fraction, 0 to 1, is the progress of all models together.
    Loading(f32),
    /// At least one worker of every model is up.
    Ready,
    /// The model has no worker: none has connected.
    NoWorker(Arc<str>),
    /// The model has no worker that is up. Its workers are being restarted.
    Lost(Arc<str>),
    /// The model could not be loaded. Loading is retried.
    Failed {
        /// The model.
        model: Arc<str>,
        /// The reason.
        reason: String,
    },
    /// Every worker of the model failed to start too often, and is not started again.
    GivenUp {
        /// The model.
        model: Arc<str>,
        /// The reason.
        reason: String,
    },
}

/// The status of one worker.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum WorkerStatus {
    /// The worker loads its model for the first time. The fraction, 0 to 1, is the progress.
    Loading(f32),
    /// The worker accepts sequences.
    Up,
    /// The worker was lost, and loads its model again.
    Lost,
    /// The worker could not load its model, and tries again.
    LoadFailed(String),
    /// The worker could not load its model, and does not try again.
    GivenUp(String),
}

impl WorkerStatus {
    fn state(&self) -> WorkerState {
        match self {
            Self::Loading(_) => WorkerState::Loading,
            Self::Up => WorkerState::Ready,
            Self::Lost => WorkerState::Lost,
            Self::LoadFailed(_) => WorkerState::Failed,
            Self::GivenUp(_) => WorkerState::GivenUp,
        }
    }
}

/// The status of every worker.
pub(super) struct WorkerStatuses {
    models: Vec<Arc<str>>,
    /// Each worker's model, as an index of `models`, and its status.
    workers: BTreeMap<WorkerId, (usize, WorkerStatus)>,
}

impl WorkerStatuses {
    /// Creates models without workers.
    pub(super) fn new(models: Vec<Arc<str>>) -> Self {
        Self {
            models,
            workers: BTreeMap::new(),
        }
    }

    /// Adds a worker of this model. A known worker keeps its status.
    pub(super) fn joined(&mut self, worker: WorkerId, model: usize) {
        let loading = (model, WorkerStatus::Loading(0.0));
        self.workers.entry(worker).or_insert(loading);
    }

    /// Removes a worker.
    pub(super) fn left(&mut self, worker: WorkerId) {
        self.workers.remove(&worker);
    }

    /// Returns the index and the name of a worker's model. Returns `None` for an unknown worker.
    pub(super) fn model_of(&self, worker: WorkerId) -> Option<(usize, &str)> {
        let (model, _) = self.workers.get(&worker)?;
        Some((*model, &self.models[*model]))
    }

    /// Sets the status of a worker.
    pub(super) fn set(&mut self, worker: WorkerId, status: WorkerStatus) {
        if let Some((_, known)) = self.workers.get_mut(&worker) {
            *known = status;
        }
    }

    /// Records how much of its model a worker has loaded. A worker that loads it again stays `Lost` until it is up.
    pub(super) fn loading(&mut self, worker: WorkerId, fraction: f32) {
        if let Some((_, WorkerStatus::Loading(known))) = self.workers.get_mut(&worker) {
            *known = known.max(fraction);
        }
    }

    /// Counts the workers in each state.
    pub(super) fn counts(&self) -> WorkerCounts {
        let mut counts = WorkerCounts::new();
        for (_, status) in self.workers.values() {
            *counts.entry(status.state()).or_default() += 1;
        }
        counts
    }

    /// Returns `Ready` if every model has a worker that is up, and otherwise the most severe reason.
    pub(super) fn readiness(&self) -> Readiness {
        let (mut down, mut is_loading) = (None, false);
        let (mut loaded, mut count) = (0.0, 0.0);
        for (at, model) in self.models.iter().enumerate() {
            count += 1.0;
            let name = || Arc::clone(model);
            match self.best(at) {
                Some(WorkerStatus::GivenUp(reason)) => {
                    let (model, reason) = (name(), reason.clone());
                    return Readiness::GivenUp { model, reason };
                }
                Some(WorkerStatus::LoadFailed(reason)) => {
                    let (model, reason) = (name(), reason.clone());
                    return Readiness::Failed { model, reason };
                }
                Some(WorkerStatus::Up) => loaded += 1.0,
                Some(WorkerStatus::Loading(fraction)) => {
                    loaded += fraction;
                    is_loading = true;
                }
                Some(WorkerStatus::Lost) => down = down.or_else(|| Some(Readiness::Lost(name()))),
                None => down = down.or_else(|| Some(Readiness::NoWorker(name()))),
            }
        }
        match down {
            Some(down) => down,
            None if is_loading => Readiness::Loading(loaded / count),
            None => Readiness::Ready,
        }
    }

    /// Returns the status that represents all workers of a model: the one with the highest rank.
    ///
    /// One worker that is up is enough. A failed load is reported while others are still loading. `GivenUp` is reported
    /// only if all workers were given up.
    fn best(&self, model: usize) -> Option<&WorkerStatus> {
        let rank = |status: &WorkerStatus| match status {
            WorkerStatus::Up => 4,
            WorkerStatus::LoadFailed(_) => 3,
            WorkerStatus::Lost => 2,
            WorkerStatus::Loading(_) => 1,
            WorkerStatus::GivenUp(_) => 0,
        };
        let compare = |one: &&WorkerStatus, other: &&WorkerStatus| match (one, other) {
            (WorkerStatus::Loading(one), WorkerStatus::Loading(other)) => one.total_cmp(other),
            (one, other) => rank(one).cmp(&rank(other)),
        };
        let workers = self.workers.values().filter(|(of, _)| *of == model);
        workers.map(|(_, status)| status).max_by(compare)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Returns the readiness of two models: `a` with two workers and `b` with one.
    fn readiness(states: [WorkerStatus; 3]) -> Readiness {
        let mut statuses = WorkerStatuses::new(vec!["a".into(), "b".into()]);
        for (worker, (model, state)) in [0, 0, 1].into_iter().zip(states).enumerate() {
            statuses.joined(WorkerId(worker), model);
            statuses.set(WorkerId(worker), state);
        }
        statuses.readiness()
    }

    fn failed() -> WorkerStatus {
        WorkerStatus::LoadFailed("no file".to_owned())
    }

    fn given_up() -> WorkerStatus {
        WorkerStatus::GivenUp("no file".to_owned())
    }

    #[test]
    fn an_engine_is_ready_if_every_model_has_a_worker_that_is_up() {
        let up = || WorkerStatus::Up;
        assert_eq!(readiness([up(), up(), up()]), Readiness::Ready);
        for other in [
            WorkerStatus::Loading(0.5),
            WorkerStatus::Lost,
            failed(),
            given_up(),
        ] {
            assert_eq!(readiness([other, up(), up()]), Readiness::Ready);
        }
    }

    #[test]
    fn the_reason_for_not_being_ready_names_the_model() {
        let (up, lost) = (|| WorkerStatus::Up, || WorkerStatus::Lost);
        let loading = |fraction| WorkerStatus::Loading(fraction);
        let is_lost = |model: &str| Readiness::Lost(model.into());
        let load_failed = |model: &str| Readiness::Failed {
            model: model.into(),
            reason: "no file".to_owned(),
        };
        for (states, expected) in [
            (
                [loading(0.25), loading(0.5), loading(0.0)],
                Readiness::Loading(0.25),
            ),
            ([up(), loading(0.5), loading(0.5)], Readiness::Loading(0.75)),
            ([lost(), lost(), up()], is_lost("a")),
            ([up(), up(), lost()], is_lost("b")),
            ([loading(0.5), loading(0.5), lost()], is_lost("b")),
            ([lost(), given_up(), up()], is_lost("a")),
            ([loading(0.5), given_up(), up()], Readiness::Loading(0.75)),
            (
                [given_up(), given_up(), lost()],
                Readiness::GivenUp {
                    model: "a".into(),
                    reason: "no file".to_owned(),
                },
            ),
            ([lost(), failed(), lost()], load_failed("a")),
            ([lost(), lost(), failed()], load_failed("b")),
            ([loading(0.5), failed(), up()], load_failed("a")),
        ] {
            assert_eq!(readiness(states), expected);
        }
    }

    #[test]
    fn a_worker_that_loads_its_model_again_stays_lost_until_it_is_up() {
        let mut statuses = WorkerStatuses::new(vec!["a".into()]);
        let worker = WorkerId(0);
        statuses.joined(worker, 0);
        statuses.loading(worker, 0.5);
        assert_eq!(statuses.readiness(), Readiness::Loading(0.5));
        statuses.set(worker, WorkerStatus::Lost);
        statuses.joined(worker, 0);
        statuses.loading(worker, 0.75);
        assert_eq!(statuses.readiness(), Readiness::Lost("a".into()));
        statuses.set(worker, WorkerStatus::Up);
        assert_eq!(statuses.readiness(), Readiness::Ready);
        statuses.left(worker);
        assert_eq!(statuses.readiness(), Readiness::NoWorker("a".into()));
    }

    #[test]
    fn workers_are_counted_by_state() {
        let mut statuses = WorkerStatuses::new(vec!["a".into()]);
        for (worker, status) in [
            WorkerStatus::Up,
            WorkerStatus::Lost,
            WorkerStatus::Up,
            given_up(),
        ]
        .into_iter()
        .enumerate()
        {
            statuses.joined(WorkerId(worker), 0);
            statuses.set(WorkerId(worker), status);
        }
        statuses.left(WorkerId(0));
        let counts = [
            (WorkerState::Ready, 1),
            (WorkerState::Lost, 1),
            (WorkerState::GivenUp, 1),
        ];
        assert_eq!(statuses.counts(), counts.into());
    }
}
