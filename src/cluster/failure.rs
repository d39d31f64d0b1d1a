//! Failures of calls to upstreams.

use std::error::Error as _;

use tonic::{Code, Status};

use crate::error::{Error, ErrorKind};

/// Failure of a call to an upstream: an error of the error table, and the original status if a Tokenway engine
/// returned one. A gateway passes that status on to its gRPC clients unchanged.
#[derive(Clone, Debug)]
pub struct Failure {
    error: Error,
    status: Option<Status>,
}

impl Failure {
    /// Converts the status of a rejected call. A status without error details does not come from a Tokenway engine:
    /// the engine is unreachable, did not answer in time, or its connection broke.
    pub(super) fn rejection(status: &Status) -> Self {
        Self::new(rejection(status), status)
    }

    /// Converts the status that ended a running stream. A status without error details becomes an upstream error,
    /// whatever its code. For example, a killed peer shows as `Unknown`.
    pub(super) fn in_stream(status: &Status) -> Self {
        let error = Error::from(status);
        if status.details().is_empty() && error.kind != ErrorKind::DeadlineExceeded {
            return broken_connection().into();
        }
        Self::new(error, status)
    }

    /// Wraps the status from [`super::via::GatewayId::loop_detected_status`], whose metadata names the gateway.
    pub(super) fn loop_detected(status: Status) -> Self {
        Self {
            error: Error::from(&status),
            status: Some(status),
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
            error,
            status: is_engines.then(unchanged),
        }
    }

    /// Returns the error.
    #[must_use]
    pub fn error(&self) -> &Error {
        &self.error
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self {
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
