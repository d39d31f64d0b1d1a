//! What tonic refuses by itself, told as the service tells its own refusals: with a reason, and the code
//! of the table.

use http::Response;
use tonic::body::Body;
use tonic::{Code, Status};

use super::MESSAGE_LIMIT;
use crate::error::{Error, ErrorKind};

/// Gives a refusal of tonic's own its reason. Every other answer is left as it is.
pub fn with_error_details(response: Response<Body>) -> Response<Body> {
    // Only an answer that is nothing but a status has it in its headers.
    let Some(status) = Status::from_header_map(response.headers()) else {
        return response;
    };
    match reason(&status) {
        Some(error) => Status::from(error).into_http(),
        None => response,
    }
}

fn reason(status: &Status) -> Option<Error> {
    if !status.details().is_empty() {
        return None;
    }
    match status.code() {
        Code::OutOfRange => {
            let message = format!("The message is larger than {MESSAGE_LIMIT} bytes.");
            Some(Error::new(ErrorKind::RequestTooLarge, message))
        }
        // Before the service has the request, nothing else is internal to tonic than reading it.
        Code::Internal => {
            let message = format!("The message could not be read: {}.", status.message());
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
