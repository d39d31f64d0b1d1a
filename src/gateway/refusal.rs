//! Errors as HTTP answers: OpenAI's error object, and headers that say whether and when to retry.

use std::any::Any;
use std::time::Duration;

use axum::body::Body;
use axum::http::header::{CONTENT_TYPE, RETRY_AFTER, VARY, WWW_AUTHENTICATE};
use axum::http::{HeaderValue, Response};
use axum::response::IntoResponse;
use serde_json::{Value, json};

use crate::error::{Error, ErrorKind};

/// An error on its way to a client that has received nothing yet.
#[derive(Debug)]
pub(super) struct Refusal(Error);

impl From<Error> for Refusal {
    fn from(mut error: Error) -> Self {
        // Both of the proto's names for the prompt are one field here.
        if error.param.as_deref() == Some("prompt_token_ids") {
            error.param = Some("prompt".to_owned());
        }
        Self(error)
    }
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response<Body> {
        let Self(error) = self;
        let row = error.kind.row();
        let mut response = Response::new(Body::from(error_object(&error).to_string()));
        *response.status_mut() = row.http;
        let headers = response.headers_mut();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        if let Some(delay) = error.retry_after {
            headers.insert(RETRY_AFTER, HeaderValue::from(whole_seconds(delay)));
            let milliseconds = u64::try_from(delay.as_millis()).unwrap_or(u64::MAX);
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
}

/// OpenAI's error object.
pub(super) fn error_object(error: &Error) -> Value {
    let row = error.kind.row();
    json!({"error": {
        "message": error.message,
        "type": row.error_type,
        "param": error.param,
        "code": row.code,
    }})
}

/// The answer where a handler panicked.
pub(super) fn panicked(panic: Box<dyn Any + Send + 'static>) -> Response<Body> {
    // The panic hook has told the log what it was.
    drop(panic);
    Refusal(Error::internal()).into_response()
}

/// Rounded up: a client that comes back too early is refused again.
fn whole_seconds(delay: Duration) -> u64 {
    delay.as_secs() + u64::from(delay.subsec_nanos() > 0)
}
