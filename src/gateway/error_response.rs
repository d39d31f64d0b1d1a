//! Converts errors to HTTP responses. A response has an error object, and headers for a retry. The object is OpenAI's
//! unless a dialect has its own.

use std::time::Duration;

use axum::body::Body;
use axum::http::header::{CONTENT_TYPE, RETRY_AFTER, VARY, WWW_AUTHENTICATE};
use axum::http::{HeaderValue, Response};
use axum::response::IntoResponse;
use serde::Serialize;
use utoipa::ToSchema;
use utoipa::openapi::RefOr;
use utoipa::openapi::schema::{ObjectBuilder, Schema, Type};

use super::json;
use crate::error::{Error, ErrorKind};

/// An error response. It is possible only before any part of another response was sent. The response has the
/// [`ErrorKind`] as an extension, for metrics and the access log.
#[derive(Debug)]
pub(crate) struct ErrorResponse(Error);

impl From<Error> for ErrorResponse {
    fn from(error: Error) -> Self {
        Self(error)
    }
}

impl IntoResponse for ErrorResponse {
    fn into_response(self) -> Response<Body> {
        let Self(error) = self;
        with_object(&error, &ErrorObject::from(&error))
    }
}

/// Builds the response for an error. `object` becomes the body.
pub(super) fn with_object(error: &Error, object: &impl Serialize) -> Response<Body> {
    let mut response = Response::new(Body::from(json::to_vec(object)));
    *response.status_mut() = error.http_status();
    response.extensions_mut().insert(error.kind);
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    if let Some(delay) = error.retry_after {
        headers.insert(RETRY_AFTER, HeaderValue::from(whole_seconds(delay)));
        let milliseconds = u64::try_from(delay.as_nanos().div_ceil(1_000_000));
        let milliseconds = milliseconds.unwrap_or(u64::MAX);
        headers.insert("retry-after-ms", HeaderValue::from(milliseconds));
    }
    if !error.kind.is_retryable() {
        headers.insert("x-should-retry", HeaderValue::from_static("false"));
    }
    if error.kind == ErrorKind::NotAcceptable {
        headers.insert(VARY, HeaderValue::from_static("accept"));
    }
    if error.kind == ErrorKind::InvalidApiKey {
        headers.insert(WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
    }
    response
}

/// OpenAI's error object.
#[derive(Serialize, ToSchema)]
pub(super) struct ErrorObject<'a> {
    /// The error.
    error: ErrorBody<'a>,
}

/// Details of an error.
#[derive(Serialize, ToSchema)]
struct ErrorBody<'a> {
    /// Description of the error, and how to fix it.
    message: &'a str,
    /// Category of the error, such as `invalid_request_error`.
    r#type: &'static str,
    /// Name of the invalid field; null if no single field is invalid.
    #[schema(required)]
    param: Option<&'a str>,
    /// Error code.
    #[schema(schema_with = code)]
    code: &'static str,
    /// Streams only: number of tokens sent before the error.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    tokens_delivered: Option<u64>,
    /// Streams only: true if the same request can succeed later.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    retryable: Option<bool>,
}

impl<'a> From<&'a Error> for ErrorObject<'a> {
    fn from(error: &'a Error) -> Self {
        let row = error.kind.mapping();
        Self {
            error: ErrorBody {
                message: &error.message,
                r#type: row.error_type,
                param: error.param.as_deref(),
                code: row.code,
                tokens_delivered: None,
                retryable: None,
            },
        }
    }
}

impl<'a> ErrorObject<'a> {
    /// The error record that ends a failed stream.
    pub(super) fn in_stream(error: &'a Error, tokens_delivered: u64) -> Self {
        let mut object = Self::from(error);
        object.error.tokens_delivered = Some(tokens_delivered);
        object.error.retryable = Some(error.kind.is_retryable());
        object
    }
}

/// Schema of `code`, with every error code.
fn code() -> RefOr<Schema> {
    let codes = ErrorKind::ALL.map(|kind| kind.mapping().code);
    ObjectBuilder::new()
        .schema_type(Type::String)
        .description(Some("Error code."))
        .enum_values(Some(codes))
        .into()
}

/// Rounds up, because a client that retries too early is rejected again.
fn whole_seconds(delay: Duration) -> u64 {
    delay.as_secs() + u64::from(delay.subsec_nanos() > 0)
}
