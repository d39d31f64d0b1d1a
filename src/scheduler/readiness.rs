//! How able an engine's workers are, as a whole: what the health of both doors tells.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::telemetry::{WorkerCounts, WorkerState};
use crate::worker::WorkerId;

/// How able an engine's workers are.
#[derive(Clone, Debug, PartialEq)]
pub enum Readiness {
    /// A model is not loaded yet; the fraction is of all models together.
    Loading(f32),
    /// At least one worker of every model is up.
    Ready,
    /// This model has no worker: none has dialled in.
    NoWorker(Arc<str>),
    /// This model has no worker up; they are being restarted.
    Lost(Arc<str>),
    /// A model could not be loaded. It is tried again.
    Failed {
        /// Which.
        model: Arc<str>,
        /// Why.
        reason: String,
    },
    /// No worker of this model is started any more: each was too often in vain.
    GivenUp {
        /// Which.
        model: Arc<str>,
        /// Why.
        reason: String,
    },
}

/// How able one worker is.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum WorkerStatus {
    /// It loads its model for the first time, and is so far.
    Loading(f32),
    Up,
    /// It crashed, and loads its model again.
    Lost,
    /// It could not load its model, and tries again.
    LoadFailed(String),
    /// It could not load its model, and does not try any more.
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

/// Every worker's ability.
pub(super) struct WorkerStatuses {
    models: Vec<Arc<str>>,
    /// Each with its model's place.
    workers: BTreeMap<WorkerId, (usize, WorkerStatus)>,
}

impl WorkerStatuses {
    /// Models without workers.
    pub(super) fn new(models: Vec<Arc<str>>) -> Self {
        Self {
            models,
            workers: BTreeMap::new(),
        }
    }

    /// There is such a worker of this model. One that was there before keeps what is known of it.
    pub(super) fn joined(&mut self, worker: WorkerId, model: usize) {
        let loading = (model, WorkerStatus::Loading(0.0));
        self.workers.entry(worker).or_insert(loading);
    }

    /// There is no such worker any more.
    pub(super) fn left(&mut self, worker: WorkerId) {
        self.workers.remove(&worker);
    }

    /// The place of a worker's model, and its name; `None` for a worker that is not there.
    pub(super) fn model_of(&self, worker: WorkerId) -> Option<(usize, &str)> {
        let (model, _) = self.workers.get(&worker)?;
        Some((*model, &self.models[*model]))
    }

    pub(super) fn set(&mut self, worker: WorkerId, ability: WorkerStatus) {
        if let Some((_, known)) = self.workers.get_mut(&worker) {
            *known = ability;
        }
    }

    /// A worker has loaded so much of its model. One that loads it again stays lost until it is up.
    pub(super) fn loading(&mut self, worker: WorkerId, fraction: f32) {
        if let Some((_, WorkerStatus::Loading(known))) = self.workers.get_mut(&worker) {
            *known = known.max(fraction);
        }
    }

    /// How many workers are in each state.
    pub(super) fn counts(&self) -> WorkerCounts {
        let mut counts = WorkerCounts::new();
        for (_, ability) in self.workers.values() {
            *counts.entry(ability.state()).or_default() += 1;
        }
        counts
    }

    /// Ready when every model has a worker that is up. Of what keeps others from it the worst is told.
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

    /// What a model's workers can do between them: one that is up is enough. One that could not load
    /// the model speaks for those that still try, and one that was given up for none but its like.
    fn best(&self, model: usize) -> Option<&WorkerStatus> {
        let rank = |ability: &WorkerStatus| match ability {
            WorkerStatus::Up => 4,
            WorkerStatus::LoadFailed(_) => 3,
            WorkerStatus::Lost => 2,
            WorkerStatus::Loading(_) => 1,
            WorkerStatus::GivenUp(_) => 0,
        };
        let further = |one: &&WorkerStatus, other: &&WorkerStatus| match (one, other) {
            (WorkerStatus::Loading(one), WorkerStatus::Loading(other)) => one.total_cmp(other),
            (one, other) => rank(one).cmp(&rank(other)),
        };
        let workers = self.workers.values().filter(|(of, _)| *of == model);
        workers.map(|(_, ability)| ability).max_by(further)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The models `a`, with two workers, and `b`, with one.
    fn statuses(states: [WorkerStatus; 3]) -> Readiness {
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
    fn an_engine_is_ready_when_every_model_has_a_worker_that_is_up() {
        let up = || WorkerStatus::Up;
        assert_eq!(statuses([up(), up(), up()]), Readiness::Ready);
        for other in [
            WorkerStatus::Loading(0.5),
            WorkerStatus::Lost,
            failed(),
            given_up(),
        ] {
            assert_eq!(statuses([other, up(), up()]), Readiness::Ready);
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
        for (states, told) in [
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
            assert_eq!(statuses(states), told);
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
        for (worker, ability) in [
            WorkerStatus::Up,
            WorkerStatus::Lost,
            WorkerStatus::Up,
            given_up(),
        ]
        .into_iter()
        .enumerate()
        {
            statuses.joined(WorkerId(worker), 0);
            statuses.set(WorkerId(worker), ability);
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
