//! The reasons why a worker's session ends, and their texts for the operator and for the worker.

use tonic::Status;

use crate::worker::wire::Violation;

/// Reason why a worker's session ended.
#[derive(Debug)]
pub(super) enum SessionEnd {
    /// The engine is shutting down.
    Stopped,
    /// The stream ended or broke.
    Disconnected(String),
    /// The worker sent no message within the heartbeat timeout, or did not read its messages for that long.
    HeartbeatTimeout,
    /// A device call exceeded the step limit.
    StepTimeout,
    /// The worker did not accept or reject a sequence in time.
    AcceptanceTimeout,
    /// The worker has open tokenizer calls and has answered none of them in time.
    Unresponsive,
    /// The worker violated the protocol.
    Violation(Violation),
    /// The session's task panicked, which is a bug of the engine.
    Panicked,
}

impl SessionEnd {
    /// Describes the end for the operator, as a sentence about the worker ("it").
    pub(super) fn reason(&self) -> String {
        match self {
            Self::Stopped => "the engine is shutting down".to_owned(),
            Self::Disconnected(reason) => reason.clone(),
            Self::HeartbeatTimeout => {
                "the worker sent no message within its heartbeat timeout".to_owned()
            }
            Self::StepTimeout => "a device call of the worker took longer than the step limit".to_owned(),
            Self::AcceptanceTimeout => {
                "the worker neither accepted nor rejected a sequence within the step limit plus the heartbeat \
                 timeout"
                    .to_owned()
            }
            Self::Unresponsive => "the worker did not answer its tokenizer calls in time".to_owned(),
            Self::Violation(violation) => format!("the worker violated the protocol: {violation}"),
            Self::Panicked => "the engine's task for this worker panicked".to_owned(),
        }
    }

    /// Returns the gRPC status to send to the worker. `None` if the stream can simply end.
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
