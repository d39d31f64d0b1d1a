//! How a worker's stream ends, and what is told of it.

use tonic::Status;

use crate::worker::wire::Violation;

/// How a worker's stream ended.
#[derive(Debug)]
pub(super) enum End {
    /// The engine is ending.
    Stopped,
    /// The stream ended, or broke.
    Gone(String),
    /// Nothing came for too long.
    Silent,
    /// A call of the device took too long.
    Stuck,
    /// A sequence was not taken in time.
    Idle,
    /// It has questions, and answers none.
    Unanswered,
    /// It broke a rule.
    Broke(Violation),
    /// The engine's own task for this worker panicked: a bug, and no fault of the worker's.
    Panicked,
}

impl End {
    /// Why, for the operator.
    pub(super) fn reason(&self) -> String {
        match self {
            Self::Stopped => "the engine is ending".to_owned(),
            Self::Gone(how) => how.clone(),
            Self::Silent => "it sent no heartbeat in time".to_owned(),
            Self::Stuck => "a call of its device took longer than the step limit".to_owned(),
            Self::Idle => {
                "it neither accepted nor refused a sequence within the step limit".to_owned()
            }
            Self::Unanswered => "it has questions, and answered none in time".to_owned(),
            Self::Broke(violation) => format!("it broke the contract: {violation}"),
            Self::Panicked => "the engine's task for it panicked".to_owned(),
        }
    }

    /// What the worker is told.
    pub(super) fn status(&self) -> Option<Status> {
        match self {
            Self::Stopped | Self::Gone(_) => None,
            Self::Silent | Self::Stuck | Self::Idle | Self::Unanswered => {
                Some(Status::deadline_exceeded(self.reason()))
            }
            Self::Broke(violation) => Some(Status::failed_precondition(violation.to_string())),
            Self::Panicked => Some(Status::internal(self.reason())),
        }
    }
}
