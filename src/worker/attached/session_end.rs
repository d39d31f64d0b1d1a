//! The reasons for which a worker's session ends, and their texts for the operator and for the worker.

use tonic::Status;

use crate::worker::wire::Violation;

/// The end of a worker's session.
#[derive(Debug)]
pub(super) enum SessionEnd {
    /// The engine is shutting down.
    Stopped,
    /// The stream ended or broke.
    Disconnected(String),
    /// No message arrived within the heartbeat timeout, or the worker did not read its messages for that long.
    HeartbeatTimeout,
    /// A device call exceeded the step limit.
    StepTimeout,
    /// The worker did not accept or reject a sequence in time.
    AcceptanceTimeout,
    /// The worker has open tokenizer calls and answered none in time.
    Unresponsive,
    /// The worker violated the protocol.
    Violation(Violation),
    /// The session's task panicked. This is a bug of the engine, not of the worker.
    Panicked,
}

impl SessionEnd {
    /// The reason, for the operator.
    pub(super) fn reason(&self) -> String {
        match self {
            Self::Stopped => "the engine is shutting down".to_owned(),
            Self::Disconnected(reason) => reason.clone(),
            Self::HeartbeatTimeout => {
                "it sent no heartbeat within its heartbeat timeout".to_owned()
            }
            Self::StepTimeout => "a call of its device took longer than the step limit".to_owned(),
            Self::AcceptanceTimeout => {
                "it neither accepted nor rejected a sequence within the step limit plus the heartbeat \
                 timeout"
                    .to_owned()
            }
            Self::Unresponsive => "it did not answer its tokenizer calls in time".to_owned(),
            Self::Violation(violation) => format!("it violated the protocol: {violation}"),
            Self::Panicked => "the engine's task for it panicked".to_owned(),
        }
    }

    /// The status that the worker receives; `None` if its stream just ends.
    pub(super) fn status(&self) -> Option<Status> {
        match self {
            Self::Stopped | Self::Disconnected(_) => None,
            Self::HeartbeatTimeout
            | Self::StepTimeout
            | Self::AcceptanceTimeout
            | Self::Unresponsive => Some(Status::deadline_exceeded(self.reason())),
            Self::Violation(violation) => Some(Status::failed_precondition(violation.to_string())),
            Self::Panicked => Some(Status::internal(self.reason())),
        }
    }
}
