//! Every way in which a request can fail, and the one table that says how each door tells it.
//!
//! It must not know who fails: any module may return an [`Error`].

use std::time::Duration;

use http::StatusCode;
use tonic::Code;

mod status;

/// A request's failure, as its client is told.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct Error {
    /// Which failure.
    pub kind: ErrorKind,
    /// What happened and what to do about it. It leaks nothing internal.
    pub message: String,
    /// The request's field that is at fault.
    pub param: Option<String>,
    /// How long to wait before a retry can help.
    pub retry_after: Option<Duration>,
}

impl Error {
    /// A failure with a message and nothing more.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self {
            kind,
            message: message.into(),
            param: None,
            retry_after: kind.row().retry_after,
        }
    }

    /// Names the field that is at fault.
    #[must_use]
    pub fn with_param(mut self, param: impl Into<String>) -> Self {
        self.param = Some(param.into());
        self
    }

    /// A field that is out of its range.
    pub fn invalid_value(param: &str, message: impl Into<String>) -> Self {
        Self::new(ErrorKind::InvalidValue, message).with_param(param)
    }

    /// A failure that is no fault of the request. The details belong in the log, not here.
    #[must_use]
    pub fn internal() -> Self {
        Self::new(
            ErrorKind::Internal,
            "The server failed to process the request.",
        )
    }
}

/// The kinds of failure: `contract.md`'s table, row by row.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ErrorKind {
    /// The body is no JSON, or the message is malformed.
    InvalidJson,
    /// A field has the wrong type.
    InvalidType,
    /// A field is out of its range.
    InvalidValue,
    /// A field that nobody knows.
    UnknownParameter,
    /// A field, or a value of it, that the model's runner cannot honour.
    UnsupportedParameter,
    /// A required field is missing.
    MissingParameter,
    /// The prompt and `max_tokens` do not fit into the context.
    ContextLengthExceeded,
    /// No key, or a wrong one.
    InvalidApiKey,
    /// The key does not allow this.
    InsufficientScope,
    /// A host name that is not the server's, or a web page of a foreign origin.
    HostNotAllowed,
    /// No such model.
    ModelNotFound,
    /// No such path or method.
    NotFound,
    /// The path does not answer this HTTP method.
    MethodNotAllowed,
    /// Nothing in `Accept` can be met.
    NotAcceptable,
    /// The body is not declared as JSON.
    UnsupportedMediaType,
    /// The request's headers are too large.
    HeadersTooLarge,
    /// The body or message is over the limit.
    RequestTooLarge,
    /// The queue is full.
    QueueFull,
    /// A rate or concurrency limit is reached.
    RateLimited,
    /// The client went away.
    Cancelled,
    /// The client does not read.
    SlowReader,
    /// The device that made the tokens was lost.
    WorkerLost,
    /// An engine behind the gateway failed or refused the gateway.
    UpstreamError,
    /// The model is still loading.
    NotReady,
    /// The server is shutting down.
    Draining,
    /// No worker serves the model at the moment.
    NoWorker,
    /// The deadline passed, or cannot be met.
    DeadlineExceeded,
    /// Anything else.
    Internal,
}

/// How both doors tell a failure.
#[derive(Clone, Copy, Debug)]
pub struct Row {
    /// OpenAI's `code`, and `ErrorInfo.reason`.
    pub code: &'static str,
    /// OpenAI's `type`.
    pub error_type: &'static str,
    /// The HTTP status.
    pub http: StatusCode,
    /// The gRPC status; `None` where only HTTP can fail like this.
    pub grpc: Option<Code>,
    /// How long to wait before a retry, where one can help.
    pub retry_after: Option<Duration>,
}

const INVALID_REQUEST: &str = "invalid_request_error";
const SERVER: &str = "server_error";
const RETRY_SOON: Option<Duration> = Some(Duration::from_secs(1));

impl ErrorKind {
    /// Every kind, in the table's order.
    pub const ALL: [Self; 28] = [
        Self::InvalidJson,
        Self::InvalidType,
        Self::InvalidValue,
        Self::UnknownParameter,
        Self::UnsupportedParameter,
        Self::MissingParameter,
        Self::ContextLengthExceeded,
        Self::InvalidApiKey,
        Self::InsufficientScope,
        Self::HostNotAllowed,
        Self::ModelNotFound,
        Self::NotFound,
        Self::MethodNotAllowed,
        Self::NotAcceptable,
        Self::UnsupportedMediaType,
        Self::HeadersTooLarge,
        Self::RequestTooLarge,
        Self::QueueFull,
        Self::RateLimited,
        Self::Cancelled,
        Self::SlowReader,
        Self::WorkerLost,
        Self::UpstreamError,
        Self::NotReady,
        Self::Draining,
        Self::NoWorker,
        Self::DeadlineExceeded,
        Self::Internal,
    ];

    /// The kind whose `code` this is.
    #[must_use]
    pub fn from_code(code: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.row().code == code)
    }

    /// Whether the same request can succeed later.
    #[must_use]
    pub fn is_retryable(self) -> bool {
        match self {
            Self::QueueFull
            | Self::RateLimited
            | Self::WorkerLost
            | Self::UpstreamError
            | Self::NotReady
            | Self::Draining
            | Self::NoWorker => true,
            Self::InvalidJson
            | Self::InvalidType
            | Self::InvalidValue
            | Self::UnknownParameter
            | Self::UnsupportedParameter
            | Self::MissingParameter
            | Self::ContextLengthExceeded
            | Self::InvalidApiKey
            | Self::InsufficientScope
            | Self::HostNotAllowed
            | Self::ModelNotFound
            | Self::NotFound
            | Self::MethodNotAllowed
            | Self::NotAcceptable
            | Self::UnsupportedMediaType
            | Self::HeadersTooLarge
            | Self::RequestTooLarge
            | Self::Cancelled
            | Self::SlowReader
            | Self::DeadlineExceeded
            | Self::Internal => false,
        }
    }

    /// The table.
    #[must_use]
    pub fn row(self) -> Row {
        use Code as Grpc;
        use StatusCode as Http;
        let invalid = |code| {
            row(
                code,
                INVALID_REQUEST,
                Http::BAD_REQUEST,
                Grpc::InvalidArgument,
            )
        };
        let http_only = |code, http| Row {
            code,
            error_type: INVALID_REQUEST,
            http,
            grpc: None,
            retry_after: None,
        };
        match self {
            Self::InvalidJson => invalid("invalid_json"),
            Self::InvalidType => invalid("invalid_type"),
            Self::InvalidValue => invalid("invalid_value"),
            Self::UnknownParameter => invalid("unknown_parameter"),
            Self::UnsupportedParameter => invalid("unsupported_parameter"),
            Self::MissingParameter => invalid("missing_parameter"),
            Self::ContextLengthExceeded => invalid("context_length_exceeded"),
            Self::InvalidApiKey => row(
                "invalid_api_key",
                "authentication_error",
                Http::UNAUTHORIZED,
                Grpc::Unauthenticated,
            ),
            Self::InsufficientScope => row(
                "insufficient_scope",
                "permission_error",
                Http::FORBIDDEN,
                Grpc::PermissionDenied,
            ),
            Self::HostNotAllowed => row(
                "host_not_allowed",
                "permission_error",
                Http::FORBIDDEN,
                Grpc::PermissionDenied,
            ),
            Self::ModelNotFound => row(
                "model_not_found",
                INVALID_REQUEST,
                Http::NOT_FOUND,
                Grpc::NotFound,
            ),
            Self::NotFound => row(
                "not_found",
                INVALID_REQUEST,
                Http::NOT_FOUND,
                Grpc::Unimplemented,
            ),
            Self::MethodNotAllowed => http_only("method_not_allowed", Http::METHOD_NOT_ALLOWED),
            Self::NotAcceptable => http_only("not_acceptable", Http::NOT_ACCEPTABLE),
            Self::UnsupportedMediaType => {
                http_only("unsupported_media_type", Http::UNSUPPORTED_MEDIA_TYPE)
            }
            Self::HeadersTooLarge => {
                http_only("headers_too_large", Http::REQUEST_HEADER_FIELDS_TOO_LARGE)
            }
            Self::RequestTooLarge => row(
                "request_too_large",
                INVALID_REQUEST,
                Http::PAYLOAD_TOO_LARGE,
                Grpc::OutOfRange,
            ),
            Self::QueueFull => retry("queue_full", "rate_limit_error", Http::TOO_MANY_REQUESTS),
            Self::RateLimited => retry("rate_limited", "rate_limit_error", Http::TOO_MANY_REQUESTS),
            Self::Cancelled => {
                let client_closed_request =
                    Http::from_u16(499).expect("499 is within the range of status codes");
                row("cancelled", SERVER, client_closed_request, Grpc::Cancelled)
            }
            // In a stream only: the client has its 200 already, and HTTP tells it by a record.
            Self::SlowReader => row("slow_reader", SERVER, Http::REQUEST_TIMEOUT, Grpc::Aborted),
            Self::WorkerLost => row("worker_lost", SERVER, Http::BAD_GATEWAY, Grpc::Aborted),
            Self::UpstreamError => row("upstream_error", SERVER, Http::BAD_GATEWAY, Grpc::Aborted),
            Self::NotReady => retry("not_ready", SERVER, Http::SERVICE_UNAVAILABLE),
            Self::Draining => retry("draining", SERVER, Http::SERVICE_UNAVAILABLE),
            Self::NoWorker => retry("no_worker", SERVER, Http::SERVICE_UNAVAILABLE),
            Self::DeadlineExceeded => row(
                "deadline_exceeded",
                SERVER,
                Http::GATEWAY_TIMEOUT,
                Grpc::DeadlineExceeded,
            ),
            Self::Internal => row(
                "internal_error",
                SERVER,
                Http::INTERNAL_SERVER_ERROR,
                Grpc::Internal,
            ),
        }
    }
}

fn row(code: &'static str, error_type: &'static str, http: StatusCode, grpc: Code) -> Row {
    Row {
        code,
        error_type,
        http,
        grpc: Some(grpc),
        retry_after: None,
    }
}

fn retry(code: &'static str, error_type: &'static str, http: StatusCode) -> Row {
    let grpc = if http == StatusCode::TOO_MANY_REQUESTS {
        Code::ResourceExhausted
    } else {
        Code::Unavailable
    };
    Row {
        code,
        error_type,
        http,
        grpc: Some(grpc),
        retry_after: RETRY_SOON,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_code_names_one_kind() {
        for kind in ErrorKind::ALL {
            assert_eq!(ErrorKind::from_code(kind.row().code), Some(kind));
        }
    }

    #[test]
    fn a_kind_with_retry_after_is_retryable() {
        for kind in ErrorKind::ALL {
            assert!(
                kind.row().retry_after.is_none() || kind.is_retryable(),
                "{kind:?}"
            );
        }
    }
}
