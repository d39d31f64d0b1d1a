//! Converts the statuses of a vLLM server into errors of Tokenway.
//!
//! An error of the client's own request is passed on with its message. An error of the engine is replaced by a general
//! message, because its text may contain internal details.

use std::error::Error as _;

use tonic::{Code, Status};

use crate::error::{Error, ErrorKind};

/// Names of fields in vLLM's messages, and the names of the same fields in a completion request. An error names the
/// first field of this list that its message contains.
const FIELDS: [(&str, &str); 18] = [
    ("num_sequences", "n"),
    ("max_new_tokens", "max_tokens"),
    ("min_new_tokens", "min_tokens"),
    ("stop_token_ids", "stop_token_ids"),
    ("stop strings", "stop"),
    ("stop_strings", "stop"),
    ("temperature", "temperature"),
    ("top_p", "top_p"),
    ("top_k", "top_k"),
    ("min_p", "min_p"),
    ("presence_penalty", "presence_penalty"),
    ("frequency_penalty", "frequency_penalty"),
    ("repetition_penalty", "repetition_penalty"),
    ("logit_bias", "logit_bias"),
    ("logprobs", "logprobs"),
    ("priority", "priority"),
    ("min_tokens", "min_tokens"),
    ("max_tokens", "max_tokens"),
];

/// Converts the status of a request that the engine did not accept.
pub(super) fn rejection(status: &Status) -> Error {
    let kind = kind_of(status);
    if !kind.mapping().http.is_client_error() || kind == ErrorKind::QueueFull {
        log_details(status);
        return Error::new(kind, message_of(kind, status.code()));
    }
    let mut error = Error::new(kind, status.message());
    if kind == ErrorKind::ModelNotFound {
        error.param = Some("model".to_owned());
    } else if kind == ErrorKind::InvalidValue {
        error.param = field_in(status.message()).map(str::to_owned);
    }
    error
}

/// Converts the status that ended a running stream. vLLM may find out only then that a request is invalid. Any other
/// status means that the stream was cut, whatever its code: for example, a killed peer shows as `Unknown`.
pub(super) fn in_stream(status: &Status) -> Error {
    if status.code() == Code::InvalidArgument {
        return rejection(status);
    }
    log_details(status);
    broken_stream()
}

/// The error of a stream that ends, or stops making sense, before each of its choices has ended.
pub(super) fn broken_stream() -> Error {
    Error::new(
        ErrorKind::UpstreamError,
        "The engine's stream broke off before its end.",
    )
}

/// The table of gRPC codes. A status that the connection made itself has a source. Apart from `Unavailable`, its code
/// says nothing about the request.
fn kind_of(status: &Status) -> ErrorKind {
    if status.source().is_some() && status.code() != Code::Unavailable {
        return ErrorKind::UpstreamError;
    }
    match status.code() {
        Code::Unavailable => ErrorKind::NoWorker,
        Code::InvalidArgument | Code::OutOfRange => kind_of_invalid_request(status.message()),
        Code::NotFound => ErrorKind::ModelNotFound,
        Code::ResourceExhausted => ErrorKind::QueueFull,
        // Also `Unauthenticated` and `PermissionDenied`: the key is the gateway's and not the client's.
        Code::Ok
        | Code::Cancelled
        | Code::Unknown
        | Code::DeadlineExceeded
        | Code::AlreadyExists
        | Code::PermissionDenied
        | Code::FailedPrecondition
        | Code::Aborted
        | Code::Unimplemented
        | Code::Internal
        | Code::DataLoss
        | Code::Unauthenticated => ErrorKind::UpstreamError,
    }
}

/// Recognizes the reason of an invalid request, which vLLM and tonic report only in words.
fn kind_of_invalid_request(message: &str) -> ErrorKind {
    if message.contains("maximum context length") || message.contains("maximum model length") {
        ErrorKind::ContextLengthExceeded
    } else if message.contains("message length too large") {
        ErrorKind::RequestTooLarge
    } else {
        ErrorKind::InvalidValue
    }
}

/// Returns the field of a completion request that a message is about.
fn field_in(message: &str) -> Option<&'static str> {
    let mut fields = FIELDS.iter();
    let (_, field) = fields.find(|(name, _)| message.contains(name))?;
    Some(field)
}

fn message_of(kind: ErrorKind, code: Code) -> &'static str {
    match (kind, code) {
        (ErrorKind::QueueFull, _) => "The engine is busy. Try again later.",
        (ErrorKind::NoWorker, _) => "The engine does not accept requests now.",
        (_, Code::Unauthenticated | Code::PermissionDenied) => {
            "The engine did not accept the gateway's credentials."
        }
        _ => "The engine failed to process the request.",
    }
}

fn log_details(status: &Status) {
    let (code, message) = (status.code(), status.message());
    tracing::debug!(?code, message, "an engine failed to process a request");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_code_has_its_kind_of_error() {
        for (code, kind) in [
            (Code::Ok, ErrorKind::UpstreamError),
            (Code::Cancelled, ErrorKind::UpstreamError),
            (Code::Unknown, ErrorKind::UpstreamError),
            (Code::InvalidArgument, ErrorKind::InvalidValue),
            (Code::DeadlineExceeded, ErrorKind::UpstreamError),
            (Code::NotFound, ErrorKind::ModelNotFound),
            (Code::AlreadyExists, ErrorKind::UpstreamError),
            (Code::PermissionDenied, ErrorKind::UpstreamError),
            (Code::ResourceExhausted, ErrorKind::QueueFull),
            (Code::FailedPrecondition, ErrorKind::UpstreamError),
            (Code::Aborted, ErrorKind::UpstreamError),
            (Code::OutOfRange, ErrorKind::InvalidValue),
            (Code::Unimplemented, ErrorKind::UpstreamError),
            (Code::Internal, ErrorKind::UpstreamError),
            (Code::Unavailable, ErrorKind::NoWorker),
            (Code::DataLoss, ErrorKind::UpstreamError),
            (Code::Unauthenticated, ErrorKind::UpstreamError),
        ] {
            let error = rejection(&Status::new(code, "at 10.0.0.7"));
            assert_eq!(error.kind, kind, "{code:?}");
            let is_requests = matches!(kind, ErrorKind::InvalidValue | ErrorKind::ModelNotFound);
            assert_eq!(error.message.contains("10.0.0.7"), is_requests, "{error}");
        }
    }

    #[test]
    fn an_invalid_request_is_passed_on_with_its_reason_and_its_field() {
        for (message, kind, param) in [
            (
                "this model's maximum context length is 64 tokens, but the prompt contains 70 input tokens",
                ErrorKind::ContextLengthExceeded,
                None,
            ),
            (
                "Error, decoded message length too large: found 5 bytes, the limit is: 4 bytes",
                ErrorKind::RequestTooLarge,
                None,
            ),
            (
                "num_sequences > 1 is not supported",
                ErrorKind::InvalidValue,
                Some("n"),
            ),
            (
                "`min_tokens` must be less than or equal to `max_tokens`",
                ErrorKind::InvalidValue,
                Some("min_tokens"),
            ),
            ("no field is named", ErrorKind::InvalidValue, None),
        ] {
            let error = rejection(&Status::invalid_argument(message));
            assert_eq!((error.kind, error.param.as_deref()), (kind, param));
            assert_eq!(error.message, message);
        }
    }

    #[test]
    fn an_error_of_the_connection_is_no_full_queue() {
        let closed = h2::Error::from(h2::Reason::ENHANCE_YOUR_CALM);
        let status = Status::from_error(Box::new(closed));
        assert_eq!(status.code(), Code::ResourceExhausted);
        assert_eq!(rejection(&status).kind, ErrorKind::UpstreamError);
    }

    #[test]
    fn a_stream_that_ends_with_a_status_was_cut_unless_the_request_is_invalid() {
        for code in 0..=16 {
            let code = Code::from(code);
            let error = in_stream(&Status::new(code, "secret"));
            let expected = if code == Code::InvalidArgument {
                ErrorKind::InvalidValue
            } else {
                ErrorKind::UpstreamError
            };
            assert_eq!(error.kind, expected, "{code:?}");
        }
    }
}
