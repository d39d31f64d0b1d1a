//! Builds the error responses of the layers, and reads from a response whether its request was rejected.

use axum::http::HeaderMap;
use axum::response::{IntoResponse, Response};
use tonic::{Code, Status};

use crate::error::{Error, ErrorKind};
use crate::gateway::ErrorResponse;
use crate::telemetry::Api;

/// Converts an error to a response of this API.
pub(super) fn error_response(api: Api, error: Error) -> Response {
    match api {
        Api::Http => ErrorResponse::from(error).into_response(),
        Api::Grpc => Status::from(error).into_http(),
    }
}

/// Returns the kind of error with which a response rejects its request, or `None` for a success. A stream can still
/// fail later.
pub(super) fn rejection_kind(api: Api, response: &Response) -> Option<ErrorKind> {
    match api {
        Api::Http => match response.extensions().get::<ErrorKind>() {
            Some(kind) => Some(*kind),
            None if response.status().is_success() => None,
            // None of the routes responds this way, so it is counted as an internal error.
            None => Some(ErrorKind::Internal),
        },
        Api::Grpc => {
            let status = Status::from_header_map(response.headers())?;
            (status.code() != Code::Ok).then(|| Error::from(&status).kind)
        }
    }
}

/// Returns the name of the gRPC status in a response's headers or trailers.
pub(super) fn grpc_status(headers: &HeaderMap) -> Option<&'static str> {
    let code = headers.get(Status::GRPC_STATUS)?;
    Some(match Code::from_bytes(code.as_bytes()) {
        Code::Ok => "OK",
        Code::Cancelled => "CANCELLED",
        Code::Unknown => "UNKNOWN",
        Code::InvalidArgument => "INVALID_ARGUMENT",
        Code::DeadlineExceeded => "DEADLINE_EXCEEDED",
        Code::NotFound => "NOT_FOUND",
        Code::AlreadyExists => "ALREADY_EXISTS",
        Code::PermissionDenied => "PERMISSION_DENIED",
        Code::ResourceExhausted => "RESOURCE_EXHAUSTED",
        Code::FailedPrecondition => "FAILED_PRECONDITION",
        Code::Aborted => "ABORTED",
        Code::OutOfRange => "OUT_OF_RANGE",
        Code::Unimplemented => "UNIMPLEMENTED",
        Code::Internal => "INTERNAL",
        Code::Unavailable => "UNAVAILABLE",
        Code::DataLoss => "DATA_LOSS",
        Code::Unauthenticated => "UNAUTHENTICATED",
    })
}
