//! Failures of calls to upstreams.

use std::error::Error as _;

use tonic::{Code, Status};

use super::ladder::SeamError;
use super::policy::Fault;
use crate::error::{Error, ErrorKind};
use crate::proto::v1;

/// Failure of a call to an upstream: an error of the error table, and the original status if a Tokenway engine
/// returned one. A gateway passes that status on to its gRPC clients unchanged.
#[derive(Clone, Debug)]
pub struct Failure {
    error: Error,
    status: Option<Status>,
    fault: Fault,
}

impl Failure {
    /// Converts the status of a rejected call. A status without error details does not come from a Tokenway engine:
    /// the engine is unreachable, did not answer in time, or its connection broke.
    pub(super) fn rejection(status: &Status) -> Self {
        let mut failure = Self::new(rejection(status), status);
        if is_unreachable(status) {
            failure.fault = Fault::Unreachable;
        }
        failure
    }

    /// Creates the failure of a call to an engine of another kind. `error` is the converted status.
    pub(super) fn foreign(error: Error, status: &Status) -> Self {
        match is_unreachable(status) {
            true => Self::unreachable(),
            false => error.into(),
        }
    }

    /// Creates the failure of a request that could not be sent, because the engine cannot be reached.
    pub(super) fn unreachable() -> Self {
        let error = Error::new(ErrorKind::UpstreamError, "The engine cannot be reached.");
        Self {
            fault: Fault::Unreachable,
            ..error.into()
        }
    }

    /// Creates the failure of a request that uses a parameter that the engine does not support.
    pub(super) fn unsupported(param: &str) -> Self {
        let message = format!("The model's engine does not support {param}. Leave it out.");
        let error = Error::new(ErrorKind::UnsupportedParameter, message);
        error.with_param(param).into()
    }

    /// Creates the failure of a request that the engine's breaker does not let pass.
    pub(super) fn blocked() -> Self {
        let message = "The model's engines failed too often. Try again in a few seconds.";
        Self {
            fault: Fault::NotServed,
            ..Error::new(ErrorKind::NoWorker, message).into()
        }
    }

    /// Creates the failure of a completion that an engine cannot continue. `refused` is its reason to refuse the last
    /// rung. The reason is the client's business only if the client has asked to resume.
    pub(super) fn not_continued(refused: Option<Self>, message: &v1::CompletionRequest) -> Self {
        match refused {
            Some(refused) if !message.resume.is_empty() => refused,
            None if !message.resume.is_empty() => Self::unsupported("resume"),
            Some(_) | None => {
                let message = "The engine's stream broke, and no other engine can continue it.";
                Self {
                    fault: Fault::NotServed,
                    ..Error::new(ErrorKind::UpstreamError, message).into()
                }
            }
        }
    }

    /// Returns the failure of a stream that broke after its first token.
    pub(super) fn after_first_token(self) -> Self {
        let fault = match self.fault {
            Fault::Passing | Fault::Unreachable | Fault::Silent => Fault::Cut,
            Fault::Request
            | Fault::NotServed
            | Fault::Busy(_)
            | Fault::Unavailable
            | Fault::Cut => self.fault,
        };
        Self { fault, ..self }
    }

    /// Creates a failure after which another target may serve the request, but not this one.
    pub(super) fn not_served(error: Error) -> Self {
        Self {
            fault: Fault::NotServed,
            ..error.into()
        }
    }

    /// Creates the failure of a request to an engine that was silent for too long.
    pub(super) fn silent() -> Self {
        let message = "The engine sent nothing for too long.";
        Self {
            fault: Fault::Silent,
            ..Error::new(ErrorKind::UpstreamError, message).into()
        }
    }

    /// Creates the failure of a request whose connection to the engine broke before the response.
    pub(super) fn broken_connection() -> Self {
        broken_connection().into()
    }

    /// Creates the failure of a request whose deadline has passed.
    pub(super) fn deadline_exceeded() -> Self {
        let message = "The request's deadline passed.";
        Error::new(ErrorKind::DeadlineExceeded, message).into()
    }

    /// Converts the status that ended a running stream. A status without error details becomes an upstream error,
    /// whatever its code. For example, a killed peer shows as `Unknown`.
    pub(super) fn in_stream(status: &Status) -> Self {
        let error = Error::from(status);
        if status.details().is_empty() && error.kind != ErrorKind::DeadlineExceeded {
            return broken_connection().into();
        }
        let mut failure = Self::new(error, status);
        if matches!(
            failure.error.kind,
            ErrorKind::WorkerLost | ErrorKind::Internal
        ) {
            // The engine itself could not go on, so it is not asked again for this request.
            failure.fault = Fault::Unavailable;
        }
        failure
    }

    /// Wraps the status from [`super::via::GatewayId::loop_detected_status`], whose metadata names the gateway.
    pub(super) fn loop_detected(status: Status) -> Self {
        let error = Error::from(&status);
        Self {
            status: Some(status),
            ..error.into()
        }
    }

    fn new(error: Error, status: &Status) -> Self {
        let is_engines = !status.details().is_empty();
        // The metadata belongs to the connection between the gateway and the engine, so it is removed.
        let unchanged = || {
            let details = status.details().to_vec().into();
            Status::with_details(status.code(), status.message(), details)
        };
        Self {
            status: is_engines.then(unchanged),
            ..error.into()
        }
    }

    /// Returns the error.
    #[must_use]
    pub fn error(&self) -> &Error {
        &self.error
    }

    /// Returns what the failure means for the next try.
    pub(super) fn fault(&self) -> Fault {
        self.fault
    }

    /// Returns true if the engine failed, so that its breaker counts the failure. A rejection because of the request,
    /// of load or of a shutdown is no fault of the engine.
    pub(super) fn is_engine_fault(&self) -> bool {
        match self.fault {
            Fault::Unreachable | Fault::Passing | Fault::Silent | Fault::Cut => true,
            Fault::Unavailable => self.error.kind == ErrorKind::NoWorker,
            Fault::Request | Fault::NotServed | Fault::Busy(_) => false,
        }
    }
}

/// Returns true if tonic could not connect. It then returns UNAVAILABLE with a source, which an engine never sends.
fn is_unreachable(status: &Status) -> bool {
    let is_engines = !status.details().is_empty();
    status.code() == Code::Unavailable && !is_engines && status.source().is_some()
}

/// Returns what an error of this kind means for the next try.
fn fault_of(error: &Error) -> Fault {
    match error.kind {
        ErrorKind::ModelNotFound
        | ErrorKind::UnsupportedParameter
        | ErrorKind::UnknownParameter
        | ErrorKind::ContextLengthExceeded => Fault::NotServed,
        ErrorKind::QueueFull | ErrorKind::RateLimited | ErrorKind::BudgetExhausted => {
            Fault::Busy(error.retry_after)
        }
        ErrorKind::NotReady | ErrorKind::Draining | ErrorKind::NoWorker => Fault::Unavailable,
        ErrorKind::WorkerLost | ErrorKind::UpstreamError | ErrorKind::Internal => Fault::Passing,
        ErrorKind::InvalidJson
        | ErrorKind::InvalidType
        | ErrorKind::InvalidValue
        | ErrorKind::MissingParameter
        | ErrorKind::ContentFilter
        | ErrorKind::ContentPolicyViolation
        | ErrorKind::InvalidApiKey
        | ErrorKind::InsufficientScope
        | ErrorKind::HostNotAllowed
        | ErrorKind::NotFound
        | ErrorKind::MethodNotAllowed
        | ErrorKind::NotAcceptable
        | ErrorKind::UnsupportedMediaType
        | ErrorKind::HeadersTooLarge
        | ErrorKind::RequestTooLarge
        | ErrorKind::BodyTimeout
        | ErrorKind::Cancelled
        | ErrorKind::SlowReader
        | ErrorKind::DeadlineExceeded => Fault::Request,
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self {
            fault: fault_of(&error),
            error,
            status: None,
        }
    }
}

impl From<Failure> for Error {
    fn from(failure: Failure) -> Self {
        failure.error
    }
}

impl From<Failure> for Status {
    fn from(failure: Failure) -> Self {
        failure.status.unwrap_or_else(|| failure.error.into())
    }
}

fn rejection(status: &Status) -> Error {
    let error = Error::from(status);
    let has_no_details = status.details().is_empty();
    match status.code() {
        // tonic returns CANCELLED when the request's deadline passes.
        Code::Cancelled if has_no_details => Error::new(
            ErrorKind::DeadlineExceeded,
            "The engine did not answer before the request's deadline.",
        ),
        Code::Unknown | Code::Internal | Code::DataLoss if has_no_details => broken_connection(),
        // tonic maps the HTTP/2 errors ENHANCE_YOUR_CALM and INADEQUATE_SECURITY to these codes. Such a status has a
        // source. A status that an engine sent has no source.
        Code::ResourceExhausted | Code::PermissionDenied
            if has_no_details && status.source().is_some() =>
        {
            broken_connection()
        }
        Code::Ok
        | Code::Cancelled
        | Code::Unknown
        | Code::InvalidArgument
        | Code::DeadlineExceeded
        | Code::NotFound
        | Code::AlreadyExists
        | Code::PermissionDenied
        | Code::ResourceExhausted
        | Code::FailedPrecondition
        | Code::Aborted
        | Code::OutOfRange
        | Code::Unimplemented
        | Code::Internal
        | Code::Unavailable
        | Code::DataLoss
        | Code::Unauthenticated => error,
    }
}

impl From<SeamError> for Failure {
    fn from(error: SeamError) -> Self {
        let text = error.to_string();
        let failure = Self::from(Error::new(ErrorKind::UpstreamError, text));
        match error {
            SeamError::UnexpectedIndex => failure,
            // The engine works, but it would give another text again.
            SeamError::DifferentText => Self {
                fault: Fault::NotServed,
                ..failure
            },
        }
    }
}

fn broken_connection() -> Error {
    Error::new(
        ErrorKind::UpstreamError,
        "The connection to the engine broke.",
    )
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn an_http2_protocol_error_is_not_reported_as_a_full_queue() {
        let closed = h2::Error::from(h2::Reason::ENHANCE_YOUR_CALM);
        let status = Status::from_error(Box::new(closed));
        assert_eq!(status.code(), Code::ResourceExhausted);
        assert_eq!(rejection(&status).kind, ErrorKind::UpstreamError);
        // A server that is not Tokenway may report a full queue without error details.
        let full = Status::resource_exhausted("full");
        assert_ne!(rejection(&full).kind, ErrorKind::UpstreamError);
        let full = Status::from(Error::new(ErrorKind::QueueFull, "The queue is full."));
        assert_eq!(rejection(&full).kind, ErrorKind::QueueFull);
    }

    #[test]
    fn an_engines_status_is_passed_on_unchanged() {
        let mut error = Error::invalid_value("stop", "stop must have at most 16 strings.");
        error.retry_after = Some(Duration::from_millis(1_500));
        let engines = Status::from(error);
        for failure in [Failure::rejection(&engines), Failure::in_stream(&engines)] {
            let passed_on = Status::from(failure);
            assert_eq!(passed_on.code(), engines.code());
            assert_eq!(passed_on.message(), engines.message());
            assert_eq!(passed_on.details(), engines.details());
        }
    }
}
