//! The parts from which a scheduler is created.

use std::time::Duration;

use tokio::sync::mpsc;

use crate::models::{ModelId, ModelMap, Models};
use crate::telemetry::Telemetry;
use crate::worker::{WorkerEvent, WorkerHandle, WorkerId};

/// The parts from which a scheduler is created.
pub(crate) struct SchedulerParts {
    /// The models. The scheduler's task records which of them are loaded.
    pub models: Models,
    /// The workers that the engine starts itself.
    pub workers: Vec<LocalWorker>,
    /// The events of all workers.
    pub events: mpsc::Receiver<WorkerEvent>,
    /// The queue limit of each model: the maximum number of requests that wait for their first slot.
    pub queue_depths: ModelMap<usize>,
    /// The limits on resuming choices after their workers are lost.
    pub resumption: ResumptionLimits,
    /// The metrics.
    pub telemetry: Telemetry,
}

/// The limits on resuming a choice after its workers are lost.
#[derive(Clone, Copy, Debug)]
pub struct ResumptionLimits {
    /// The maximum number of consecutive resumptions without a token in between.
    pub max_consecutive: u32,
    /// The maximum time that each resumption waits until another worker accepts the choice.
    pub acceptance_timeout: Duration,
}

impl Default for ResumptionLimits {
    /// Two consecutive resumptions, each waiting for at most 60 seconds.
    fn default() -> Self {
        Self {
            max_consecutive: 2,
            acceptance_timeout: Duration::from_secs(60),
        }
    }
}

/// A worker that the engine starts and restarts itself.
pub(crate) struct LocalWorker {
    /// The worker's id.
    pub worker: WorkerId,
    /// The worker's model.
    pub model: ModelId,
    /// Handle of the worker. `None` until the worker's process has connected.
    pub handle: Option<WorkerHandle>,
}
