//! The errors of requests, and the one table that maps each kind of error to its HTTP and gRPC status.
//!
//! Any module may return an [`Error`]. This module must not know which module failed.

use std::time::Duration;

use http::StatusCode;
use tonic::Code;

mod status;

/// The error that a client receives when its request fails.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct Error {
    /// The kind of error.
    pub kind: ErrorKind,
    /// A message for the client: what happened and what to do about it. It contains no internal details.
    pub message: String,
    /// The request field that caused the error.
    pub param: Option<String>,
    /// The delay after which a retry may succeed.
    pub retry_after: Option<Duration>,
    /// The HTTP status with which an engine rejected the request. `None` for the status of the kind.
    pub(crate) engine_status: Option<StatusCode>,
}

impl Error {
    /// Creates an error with the retry delay of its kind and no `param`.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self {
            kind,
            message: message.into(),
            param: None,
            retry_after: kind.mapping().retry_after,
            engine_status: None,
        }
    }

    /// Returns the status of the HTTP response.
    #[must_use]
    pub fn http_status(&self) -> StatusCode {
        self.engine_status.unwrap_or(self.kind.mapping().http)
    }

    /// Sets the request field that caused the error.
    #[must_use]
    pub(crate) fn with_param(mut self, param: impl Into<String>) -> Self {
        self.param = Some(param.into());
        self
    }

    /// Creates an [`ErrorKind::InvalidValue`] error for the field `param`.
    pub fn invalid_value(param: &str, message: impl Into<String>) -> Self {
        Self::new(ErrorKind::InvalidValue, message).with_param(param)
    }

    /// Creates the error of a request that is still running when the server stops waiting for it.
    #[must_use]
    pub(crate) fn shutting_down() -> Self {
        Self::new(
            ErrorKind::Draining,
            "The server is shutting down and could not wait for this request to end.",
        )
    }

    /// Creates the error for a fault of the server. The caller must log the details, which the client does not see.
    #[must_use]
    pub fn internal() -> Self {
        Self::new(
            ErrorKind::Internal,
            "The server failed to process the request.",
        )
    }
}

/// The kind of an error. Each kind has one row in the table of [`ErrorKind::mapping`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ErrorKind {
    /// The HTTP body is not valid JSON, or the gRPC message is malformed.
    InvalidJson,
    /// A field has the wrong type.
    InvalidType,
    /// A field's value is out of range.
    InvalidValue,
    /// The request has an unknown field.
    UnknownParameter,
    /// The model's runner does not support a field or its value.
    UnsupportedParameter,
    /// A required field is missing.
    MissingParameter,
    /// The prompt and `max_tokens` do not fit into the context.
    ContextLengthExceeded,
    /// The engine's content filter rejected the request.
    ContentFilter,
    /// The request violates the content policy of the engine.
    ContentPolicyViolation,
    /// The API key is missing or unknown.
    InvalidApiKey,
    /// The API key does not permit the request.
    InsufficientScope,
    /// The `Host` is not an allowed name, or the `Origin` is not an allowed web page.
    HostNotAllowed,
    /// The model does not exist.
    ModelNotFound,
    /// The HTTP path or the gRPC method does not exist.
    NotFound,
    /// The path exists but does not support the HTTP method.
    MethodNotAllowed,
    /// The server supports none of the media types in `Accept`.
    NotAcceptable,
    /// The `Content-Type` is not JSON, or, on the gRPC API, not gRPC.
    UnsupportedMediaType,
    /// The request headers are too large.
    HeadersTooLarge,
    /// The body or message exceeds the size limit.
    RequestTooLarge,
    /// The client stopped sending the body, or sent it too slowly.
    BodyTimeout,
    /// The queue is full.
    QueueFull,
    /// The client exceeded a rate or concurrency limit.
    RateLimited,
    /// A token budget of the API key is used up.
    BudgetExhausted,
    /// The client disconnected or cancelled the request.
    Cancelled,
    /// The client read too slowly.
    SlowReader,
    /// The worker that ran the request was lost, and no other worker could resume the request.
    WorkerLost,
    /// A remote engine failed or rejected the gateway's connection.
    UpstreamError,
    /// The model is still loading.
    NotReady,
    /// The server is shutting down.
    Draining,
    /// No worker of the model is up.
    NoWorker,
    /// The request's deadline passed.
    DeadlineExceeded,
    /// The server failed for a reason that the client cannot act on.
    Internal,
}

/// The HTTP and gRPC representation of an [`ErrorKind`].
#[derive(Clone, Copy, Debug)]
pub struct ErrorMapping {
    /// `error.code` over HTTP and `ErrorInfo.reason` over gRPC.
    pub code: &'static str,
    /// `error.type` over HTTP, as OpenAI names it.
    pub error_type: &'static str,
    /// The HTTP status.
    pub http: StatusCode,
    /// The gRPC status. `None` if only HTTP requests fail with this kind.
    pub grpc: Option<Code>,
    /// The default delay before a retry. `None` if a retry does not help.
    pub retry_after: Option<Duration>,
}

const RETRY_SOON: Option<Duration> = Some(Duration::from_secs(1));

impl ErrorKind {
    /// Every kind, in the order of the enum.
    pub const ALL: [Self; 32] = [
        Self::InvalidJson,
        Self::InvalidType,
        Self::InvalidValue,
        Self::UnknownParameter,
        Self::UnsupportedParameter,
        Self::MissingParameter,
        Self::ContextLengthExceeded,
        Self::ContentFilter,
        Self::ContentPolicyViolation,
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
        Self::BodyTimeout,
        Self::QueueFull,
        Self::RateLimited,
        Self::BudgetExhausted,
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

    /// Returns the kind with this `code`.
    #[must_use]
    pub fn from_code(code: &str) -> Option<Self> {
        Self::ALL
            .into_iter()
            .find(|kind| kind.mapping().code == code)
    }

    /// Returns true if the same request may succeed if it is sent again later.
    #[must_use]
    pub(crate) fn is_retryable(self) -> bool {
        match self {
            Self::BodyTimeout
            | Self::QueueFull
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
            | Self::ContentFilter
            | Self::ContentPolicyViolation
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
            | Self::BudgetExhausted
            | Self::Cancelled
            | Self::SlowReader
            | Self::DeadlineExceeded
            | Self::Internal => false,
        }
    }

    /// Returns the kind's row of the table.
    #[must_use]
    pub fn mapping(self) -> ErrorMapping {
        use Code as Grpc;
        use StatusCode as Http;
        match self {
            Self::InvalidJson => invalid_request("invalid_json"),
            Self::InvalidType => invalid_request("invalid_type"),
            Self::InvalidValue => invalid_request("invalid_value"),
            Self::UnknownParameter => invalid_request("unknown_parameter"),
            Self::UnsupportedParameter => invalid_request("unsupported_parameter"),
            Self::MissingParameter => invalid_request("missing_parameter"),
            Self::ContextLengthExceeded => invalid_request("context_length_exceeded"),
            Self::ContentFilter => invalid_request("content_filter"),
            Self::ContentPolicyViolation => client_error(
                "content_policy_violation",
                Http::FORBIDDEN,
                Grpc::PermissionDenied,
            ),
            Self::InvalidApiKey => ErrorMapping {
                error_type: "authentication_error",
                ..client_error("invalid_api_key", Http::UNAUTHORIZED, Grpc::Unauthenticated)
            },
            Self::InsufficientScope => forbidden("insufficient_scope"),
            Self::HostNotAllowed => forbidden("host_not_allowed"),
            Self::ModelNotFound => client_error("model_not_found", Http::NOT_FOUND, Grpc::NotFound),
            Self::NotFound => client_error("not_found", Http::NOT_FOUND, Grpc::Unimplemented),
            Self::MethodNotAllowed => http_only("method_not_allowed", Http::METHOD_NOT_ALLOWED),
            Self::NotAcceptable => http_only("not_acceptable", Http::NOT_ACCEPTABLE),
            Self::UnsupportedMediaType => client_error(
                "unsupported_media_type",
                Http::UNSUPPORTED_MEDIA_TYPE,
                Grpc::InvalidArgument,
            ),
            Self::HeadersTooLarge => {
                http_only("headers_too_large", Http::REQUEST_HEADER_FIELDS_TOO_LARGE)
            }
            Self::RequestTooLarge => client_error(
                "request_too_large",
                Http::PAYLOAD_TOO_LARGE,
                Grpc::OutOfRange,
            ),
            Self::BodyTimeout => client_error("body_timeout", Http::REQUEST_TIMEOUT, Grpc::Aborted),
            Self::QueueFull => too_many_requests("queue_full"),
            Self::RateLimited => too_many_requests("rate_limited"),
            // OpenAI's type for the same error. A retry succeeds only after the budget is renewed or raised.
            Self::BudgetExhausted => ErrorMapping {
                error_type: "insufficient_quota",
                retry_after: None,
                ..too_many_requests("budget_exhausted")
            },
            Self::Cancelled => {
                let client_closed = Http::from_u16(499).expect("499 is a valid HTTP status code");
                server_error("cancelled", client_closed, Grpc::Cancelled)
            }
            // `slow_reader` occurs only in a stream. Over HTTP the status 200 has already been sent, so the client
            // gets an error record instead of this status.
            Self::SlowReader => server_error("slow_reader", Http::REQUEST_TIMEOUT, Grpc::Aborted),
            Self::WorkerLost => server_error("worker_lost", Http::BAD_GATEWAY, Grpc::Aborted),
            Self::UpstreamError => server_error("upstream_error", Http::BAD_GATEWAY, Grpc::Aborted),
            Self::NotReady => unavailable("not_ready"),
            Self::Draining => unavailable("draining"),
            Self::NoWorker => unavailable("no_worker"),
            Self::DeadlineExceeded => server_error(
                "deadline_exceeded",
                Http::GATEWAY_TIMEOUT,
                Grpc::DeadlineExceeded,
            ),
            Self::Internal => server_error(
                "internal_error",
                Http::INTERNAL_SERVER_ERROR,
                Grpc::Internal,
            ),
        }
    }
}

/// Row of an error that the client can correct.
fn client_error(code: &'static str, http: StatusCode, grpc: Code) -> ErrorMapping {
    ErrorMapping {
        code,
        error_type: "invalid_request_error",
        http,
        grpc: Some(grpc),
        retry_after: None,
    }
}

/// Row of an invalid request: status 400.
fn invalid_request(code: &'static str) -> ErrorMapping {
    client_error(code, StatusCode::BAD_REQUEST, Code::InvalidArgument)
}

/// Row of an error that occurs over HTTP only.
fn http_only(code: &'static str, http: StatusCode) -> ErrorMapping {
    ErrorMapping {
        grpc: None,
        ..client_error(code, http, Code::InvalidArgument)
    }
}

/// Row of a request that the client may not make: status 403.
fn forbidden(code: &'static str) -> ErrorMapping {
    ErrorMapping {
        error_type: "permission_error",
        ..client_error(code, StatusCode::FORBIDDEN, Code::PermissionDenied)
    }
}

/// Row of a request that exceeds a limit and may succeed a second later: status 429.
fn too_many_requests(code: &'static str) -> ErrorMapping {
    ErrorMapping {
        error_type: "rate_limit_error",
        retry_after: RETRY_SOON,
        ..client_error(code, StatusCode::TOO_MANY_REQUESTS, Code::ResourceExhausted)
    }
}

/// Row of an error that the client did not cause.
fn server_error(code: &'static str, http: StatusCode, grpc: Code) -> ErrorMapping {
    ErrorMapping {
        error_type: "server_error",
        ..client_error(code, http, grpc)
    }
}

/// Row of a request that the server cannot accept now but may accept a second later: status 503.
fn unavailable(code: &'static str) -> ErrorMapping {
    ErrorMapping {
        retry_after: RETRY_SOON,
        ..server_error(code, StatusCode::SERVICE_UNAVAILABLE, Code::Unavailable)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_code_names_one_kind() {
        for kind in ErrorKind::ALL {
            assert_eq!(ErrorKind::from_code(kind.mapping().code), Some(kind));
        }
    }

    #[test]
    fn a_kind_with_retry_after_is_retryable() {
        for kind in ErrorKind::ALL {
            assert!(
                kind.mapping().retry_after.is_none() || kind.is_retryable(),
                "{kind:?}"
            );
        }
    }
}
