//! The messages to the scheduler's task.

use tokio::sync::oneshot;
use tokio::time::Instant;

use super::plan::CallerShare;
use crate::error::Error;
use crate::models::ModelId;
use crate::worker::Assignment;

/// A message to the scheduler's task.
pub(super) struct SchedulerMessage {
    pub(super) model: ModelId,
    pub(super) caller: CallerShare,
    pub(super) priority: i32,
    pub(super) work: SubmittedWork,
}

/// The work that a submission asks for.
pub(super) enum SubmittedWork {
    /// A new request.
    New {
        /// The time at which the request fails.
        deadline: Instant,
        choices: Vec<Assignment>,
        /// Receives the result of the admission.
        admitted: oneshot::Sender<Result<(), Error>>,
    },
    /// A choice to resume, because its worker was lost.
    Resumed(Box<Assignment>),
}
