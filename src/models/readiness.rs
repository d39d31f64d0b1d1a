//! The readiness of the engine, computed from the status of each of its models. The health endpoints report it.

use std::sync::Arc;

use super::{ModelId, Models};

/// The readiness of the engine.
#[derive(Clone, Debug, PartialEq)]
pub enum Readiness {
    /// At least one model is still loading. The fraction, from 0 to 1, is the progress of all models together.
    Loading(f32),
    /// At least one worker of every model is up.
    Ready,
    /// No worker of this model has connected yet.
    NoWorker(Arc<str>),
    /// All workers of this model were lost and are being restarted.
    Lost(Arc<str>),
    /// A worker failed to load this model, and will try again.
    Failed {
        /// Name of the model.
        model: Arc<str>,
        /// Error message of the worker.
        reason: String,
    },
    /// Every worker of this model failed to start too often. None is started again.
    GivenUp {
        /// Name of the model.
        model: Arc<str>,
        /// Error message of the last worker.
        reason: String,
    },
}

/// The status of a model on one of its workers.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum ModelStatus {
    /// The worker is loading the model for the first time. The fraction, from 0 to 1, is the progress.
    Loading(f32),
    /// The worker accepts sequences.
    Up,
    /// The worker was lost, and loads the model again.
    Lost,
    /// The worker could not load the model, and tries again.
    LoadFailed(String),
    /// The worker could not load the model, and does not try again.
    GivenUp(String),
}

impl ModelStatus {
    /// Combines the statuses of a model's workers into one: the status with the highest rank.
    ///
    /// One worker that is up is enough. A failed load is reported while others are still loading. `GivenUp` is
    /// reported only if all workers were given up.
    pub(crate) fn of_workers<'a>(workers: impl Iterator<Item = &'a Self>) -> Option<&'a Self> {
        workers.max_by(|one, other| match (one, other) {
            (Self::Loading(one), Self::Loading(other)) => one.total_cmp(other),
            (one, other) => one.rank().cmp(&other.rank()),
        })
    }

    fn rank(&self) -> u8 {
        match self {
            Self::Up => 4,
            Self::LoadFailed(_) => 3,
            Self::Lost => 2,
            Self::Loading(_) => 1,
            Self::GivenUp(_) => 0,
        }
    }
}

impl Readiness {
    /// Returns `Ready` if every model is up, and otherwise the most severe problem. `None` stands for a model without
    /// workers.
    pub(crate) fn new<'a>(
        models: &Models,
        status_of: impl Fn(ModelId) -> Option<&'a ModelStatus>,
    ) -> Self {
        let (mut down, mut is_loading) = (None, false);
        let (mut loaded, mut count) = (0.0, 0.0);
        for entry in models.entries() {
            count += 1.0;
            let model = Arc::clone(&entry.name);
            match status_of(entry.id) {
                Some(ModelStatus::GivenUp(reason)) => {
                    let reason = reason.clone();
                    return Self::GivenUp { model, reason };
                }
                Some(ModelStatus::LoadFailed(reason)) => {
                    let reason = reason.clone();
                    return Self::Failed { model, reason };
                }
                Some(ModelStatus::Up) => loaded += 1.0,
                Some(ModelStatus::Loading(fraction)) => {
                    loaded += fraction;
                    is_loading = true;
                }
                Some(ModelStatus::Lost) => down = down.or(Some(Self::Lost(model))),
                None => down = down.or(Some(Self::NoWorker(model))),
            }
        }
        match down {
            Some(down) => down,
            None if is_loading => Self::Loading(loaded / count),
            None => Self::Ready,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Computes the readiness of an engine with two models: `a` with two workers and `b` with one.
    fn readiness([first, second, other]: [ModelStatus; 3]) -> Readiness {
        let models = Models::for_test(&["a", "b"]);
        let workers = models.map_values([vec![first, second], vec![other]]);
        Readiness::new(&models, |id| ModelStatus::of_workers(workers[id].iter()))
    }

    fn failed() -> ModelStatus {
        ModelStatus::LoadFailed("no file".to_owned())
    }

    fn given_up() -> ModelStatus {
        ModelStatus::GivenUp("no file".to_owned())
    }

    #[test]
    fn an_engine_is_ready_if_every_model_has_a_worker_that_is_up() {
        let up = || ModelStatus::Up;
        assert_eq!(readiness([up(), up(), up()]), Readiness::Ready);
        for other in [
            ModelStatus::Loading(0.5),
            ModelStatus::Lost,
            failed(),
            given_up(),
        ] {
            assert_eq!(readiness([other, up(), up()]), Readiness::Ready);
        }
    }

    #[test]
    fn the_reason_for_not_being_ready_names_the_model() {
        let (up, lost) = (|| ModelStatus::Up, || ModelStatus::Lost);
        let loading = |fraction| ModelStatus::Loading(fraction);
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
}
