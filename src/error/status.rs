//! Conversion between [`Error`] and gRPC statuses with `google.rpc` details. Converting an error to a status and back
//! loses nothing.

use std::collections::HashMap;

use http::StatusCode;
use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt};

use super::{Error, ErrorKind};

/// Value of `ErrorInfo.domain` in the statuses that Tokenway creates.
const DOMAIN: &str = "tokenway";
/// Name in `ErrorInfo.metadata` of the HTTP status with which an engine rejected the request, such as `422`.
const ENGINE_STATUS: &str = "engine_status";

impl From<Error> for Status {
    fn from(error: Error) -> Self {
        let row = error.kind.mapping();
        let engine_status = error.engine_status.iter();
        let metadata: HashMap<_, _> = engine_status
            .map(|status| (ENGINE_STATUS.to_owned(), status.as_str().to_owned()))
            .collect();
        let mut details = ErrorDetails::with_error_info(row.code, DOMAIN, metadata);
        if let Some(param) = &error.param {
            details.add_bad_request_violation(param, &error.message);
        }
        if let Some(delay) = error.retry_after {
            details.set_retry_info(Some(delay));
        }
        Self::with_error_details(row.grpc.unwrap_or(Code::Internal), error.message, details)
    }
}

impl From<&Status> for Error {
    /// Converts a status back to an error. A status that Tokenway did not create is mapped by its gRPC code alone.
    fn from(status: &Status) -> Self {
        let details = status.get_error_details();
        let own_kind = details
            .error_info()
            .filter(|info| info.domain == DOMAIN)
            .and_then(|info| ErrorKind::from_code(&info.reason));
        let kind = own_kind.unwrap_or_else(|| kind_from_code(status.code()));
        let message = if own_kind.is_some() || kind.mapping().http.is_client_error() {
            status.message().to_owned()
        } else {
            // The message of another server may contain internal details, such as addresses.
            generic_message(kind).to_owned()
        };
        let engine_status = details
            .error_info()
            .and_then(|info| info.metadata.get(ENGINE_STATUS)?.parse().ok())
            .filter(|status: &StatusCode| own_kind.is_some() && status.is_client_error());
        Self {
            kind,
            message,
            engine_status,
            param: details
                .bad_request()
                .and_then(|bad| bad.field_violations.first())
                .map(|violation| violation.field.clone()),
            retry_after: details
                .retry_info()
                .and_then(|info| info.retry_delay)
                .or(kind.mapping().retry_after),
        }
    }
}

/// Maps the gRPC code of a status that Tokenway did not create.
fn kind_from_code(code: Code) -> ErrorKind {
    match code {
        Code::InvalidArgument => ErrorKind::InvalidValue,
        Code::Unauthenticated => ErrorKind::InvalidApiKey,
        Code::PermissionDenied => ErrorKind::InsufficientScope,
        Code::NotFound => ErrorKind::ModelNotFound,
        Code::Unimplemented => ErrorKind::NotFound,
        Code::OutOfRange => ErrorKind::RequestTooLarge,
        Code::ResourceExhausted => ErrorKind::RateLimited,
        Code::Cancelled => ErrorKind::Cancelled,
        Code::Aborted => ErrorKind::UpstreamError,
        Code::Unavailable => ErrorKind::NoWorker,
        Code::DeadlineExceeded => ErrorKind::DeadlineExceeded,
        Code::Ok
        | Code::Unknown
        | Code::AlreadyExists
        | Code::FailedPrecondition
        | Code::Internal
        | Code::DataLoss => ErrorKind::Internal,
    }
}

/// Returns a message to use instead of another server's message.
fn generic_message(kind: ErrorKind) -> &'static str {
    if kind == ErrorKind::NoWorker {
        "No engine can be reached."
    } else {
        "The server failed to process the request."
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn every_error_round_trips_through_a_status() {
        for kind in ErrorKind::ALL
            .into_iter()
            .filter(|kind| kind.mapping().grpc.is_some())
        {
            let mut error = Error::new(kind, Error::internal().message).with_param("stop");
            error.retry_after = Some(Duration::from_millis(1_500));
            error.engine_status = Some(StatusCode::UNPROCESSABLE_ENTITY);
            let status = Status::from(error.clone());
            assert_eq!(Some(status.code()), kind.mapping().grpc);
            assert_eq!(Error::from(&status), error);
        }
    }

    #[test]
    fn a_foreign_status_maps_by_its_code_and_leaks_no_internals() {
        let error = Error::from(&Status::unknown("stack trace"));
        assert_eq!(error.kind, ErrorKind::Internal);
        assert!(!error.message.contains("stack trace"));
        let error = Error::from(&Status::unavailable("connection refused"));
        assert_eq!(error.kind, ErrorKind::NoWorker);
    }
}
