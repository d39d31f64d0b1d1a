//! Errors that tonic returns before the service is called. They get the same status codes and details as the errors
//! of the service.

use http::Response;
use tonic::{Code, Status};

use super::MAX_MESSAGE_BYTES;
use crate::error::{Error, ErrorKind};

/// Replaces an error response of tonic by the corresponding error of the error table. Returns any other response
/// unchanged.
pub(crate) fn replace_tonic_error<B: Default>(response: Response<B>) -> Response<B> {
    // A response that carries messages has its status in the trailers, not in the headers.
    let Some(status) = Status::from_header_map(response.headers()) else {
        return response;
    };
    match table_error(&status) {
        Some(error) => Status::from(error).into_http(),
        None => response,
    }
}

/// Converts a status of tonic to an error of the error table. Returns `None` if the service itself returned the
/// status.
fn table_error(status: &Status) -> Option<Error> {
    if !status.details().is_empty() {
        return None;
    }
    match status.code() {
        Code::OutOfRange => {
            let message =
                format!("The message is larger than the limit of {MAX_MESSAGE_BYTES} bytes.");
            Some(Error::new(ErrorKind::RequestTooLarge, message))
        }
        // Before the service is called, tonic returns INTERNAL only for a message that it cannot decode.
        Code::Internal => {
            let message = format!("The message cannot be decoded: {}.", status.message());
            Some(Error::new(ErrorKind::InvalidJson, message))
        }
        Code::Unimplemented if status.message().is_empty() => {
            Some(Error::new(ErrorKind::NotFound, "There is no such method."))
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
        | Code::Unimplemented
        | Code::Unavailable
        | Code::DataLoss
        | Code::Unauthenticated => None,
    }
}
