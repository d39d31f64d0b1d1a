//! Converts the errors of an OpenAI-compatible engine into errors of Tokenway.
//!
//! An error of the client's own request is passed on with its message. An error of the engine is replaced by a general
//! message, because its text may contain internal details.

use std::time::{Duration, SystemTime};

use super::client::ResponseBody;
use http::StatusCode;
use http::header::{HeaderMap, RETRY_AFTER};
use http_body_util::{BodyExt, Limited};
use serde::Deserialize;
use serde_json::value::RawValue;
use tokio::time::timeout;

use crate::cluster::failure::Failure;
use crate::error::{Error, ErrorKind};

/// Maximum size of the body of an error response, in bytes. The rest is not read.
const MAX_BODY_BYTES: usize = 64 * 1024;
/// Maximum wait for the body of an error response.
const BODY_TIMEOUT: Duration = Duration::from_secs(1);
/// Longest delay that an engine may ask for.
pub(super) const MAX_RETRY_AFTER: Duration = Duration::from_secs(3_600);

/// The error object in OpenAI's form. Engines leave fields out, and some send other types.
#[derive(Default, Deserialize)]
#[serde(default)]
struct ErrorObject {
    message: Option<String>,
    param: Option<serde_json::Value>,
    code: Option<serde_json::Value>,
    r#type: Option<serde_json::Value>,
}

/// Reads an error response. A rejected key is a fault of the gateway's settings, so another engine may serve the request.
pub(super) async fn read_rejection(response: http::Response<ResponseBody>) -> Failure {
    let (head, body) = response.into_parts();
    let reading = Limited::new(body, MAX_BODY_BYTES).collect();
    let body = match timeout(BODY_TIMEOUT, reading).await {
        Ok(Ok(body)) => body.to_bytes(),
        Ok(Err(_)) | Err(_) => bytes::Bytes::new(),
    };
    let error = rejection(head.status, &head.headers, &body);
    match (head.status, error.kind) {
        (
            StatusCode::UNAUTHORIZED
            | StatusCode::FORBIDDEN
            | StatusCode::METHOD_NOT_ALLOWED
            | StatusCode::PROXY_AUTHENTICATION_REQUIRED,
            ErrorKind::UpstreamError,
        ) => Failure::not_served(error),
        _ => error.into(),
    }
}

/// Converts an error response.
pub(super) fn rejection(status: StatusCode, headers: &HeaderMap, body: &[u8]) -> Error {
    let object = error_object(body);
    let kind = kind_of(status, &object);
    let mut error = if kind.mapping().http.is_client_error() && kind != ErrorKind::QueueFull {
        let message = object
            .message
            .unwrap_or_else(|| format!("The engine answered {status}."));
        let mut error = Error::new(kind, message);
        error.param = object
            .param
            .and_then(|param| param.as_str().map(str::to_owned));
        if kind == ErrorKind::InvalidValue && status != StatusCode::BAD_REQUEST {
            error.engine_status = Some(status);
        }
        error
    } else {
        // The message may repeat a part of the prompt, so it is not logged.
        tracing::debug!(%status, "an engine rejected a request");
        Error::new(kind, message_of(kind, status))
    };
    if let Some(delay) = retry_after(headers) {
        error.retry_after = Some(delay);
    }
    error
}

/// Converts an error that an engine reports within a stream.
pub(super) fn error_in_stream(object: Option<&RawValue>) -> Error {
    // The object may repeat a part of the prompt, so it is not logged.
    let bytes = object.map_or(0, |raw| raw.get().len());
    tracing::debug!(bytes, "an engine reported an error in a stream");
    let message = "The engine reported an error in the stream.";
    Error::new(ErrorKind::UpstreamError, message)
}

/// Finds the error object: `{"error": {…}}`, the object itself (older vLLM), or `{"error": "text"}`.
fn error_object(body: &[u8]) -> ErrorObject {
    #[derive(Deserialize)]
    struct Wrapped {
        error: ErrorObject,
    }
    #[derive(Deserialize)]
    struct WithText {
        error: String,
    }
    let wrapped = serde_json::from_slice(body).map(|Wrapped { error }| error);
    let with_text = || {
        serde_json::from_slice(body).map(|WithText { error }| ErrorObject {
            message: Some(error),
            ..ErrorObject::default()
        })
    };
    wrapped
        .or_else(|_| with_text())
        .or_else(|_| fastapi_error(body))
        .or_else(|_| serde_json::from_slice(body))
        .unwrap_or_default()
}

/// Reads the error of FastAPI for an invalid field: `{"detail": [{"loc": ["body", "stop"], "msg": "…"}]}`.
fn fastapi_error(body: &[u8]) -> serde_json::Result<ErrorObject> {
    #[derive(Deserialize)]
    struct Invalid {
        detail: Vec<Detail>,
    }
    #[derive(Deserialize)]
    struct Detail {
        loc: Vec<serde_json::Value>,
        msg: String,
    }
    let Invalid { detail } = serde_json::from_slice(body)?;
    let first = detail.into_iter().next();
    Ok(
        first.map_or_else(ErrorObject::default, |first| ErrorObject {
            message: Some(first.msg),
            // The first part is `body`.
            param: first.loc.into_iter().nth(1),
            ..ErrorObject::default()
        }),
    )
}

fn kind_of(status: StatusCode, object: &ErrorObject) -> ErrorKind {
    let has_name = |name: &str| {
        let is_name =
            |value: &Option<serde_json::Value>| value.as_ref().is_some_and(|it| it == name);
        is_name(&object.code) || is_name(&object.r#type)
    };
    let message = object.message.as_deref().unwrap_or_default();
    match status {
        _ if status.is_client_error() && has_name("content_filter") => ErrorKind::ContentFilter,
        _ if status.is_client_error() && has_name("content_policy_violation") => {
            ErrorKind::ContentPolicyViolation
        }
        StatusCode::BAD_REQUEST | StatusCode::UNPROCESSABLE_ENTITY => {
            // vLLM and llama.cpp report the reason only in words or with a type of their own.
            if has_name("context_length_exceeded")
                || has_name("exceed_context_size_error")
                || message.contains("maximum context length")
            {
                ErrorKind::ContextLengthExceeded
            } else {
                ErrorKind::InvalidValue
            }
        }
        StatusCode::NOT_FOUND => ErrorKind::ModelNotFound,
        StatusCode::PAYLOAD_TOO_LARGE => ErrorKind::RequestTooLarge,
        StatusCode::TOO_MANY_REQUESTS => ErrorKind::QueueFull,
        StatusCode::SERVICE_UNAVAILABLE => ErrorKind::NoWorker,
        // The key is the gateway's and not the client's.
        StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => ErrorKind::UpstreamError,
        // The base URL is wrong, or a proxy has answered.
        StatusCode::METHOD_NOT_ALLOWED | StatusCode::PROXY_AUTHENTICATION_REQUIRED => {
            ErrorKind::UpstreamError
        }
        // The engine has waited too long for the gateway.
        StatusCode::REQUEST_TIMEOUT => ErrorKind::UpstreamError,
        _ if status.is_client_error() => ErrorKind::InvalidValue,
        _ => ErrorKind::UpstreamError,
    }
}

fn message_of(kind: ErrorKind, status: StatusCode) -> &'static str {
    match (kind, status) {
        (ErrorKind::QueueFull, _) => "The engine is busy. Try again later.",
        (ErrorKind::NoWorker, _) => "The engine does not accept requests now.",
        (_, StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN) => {
            "The engine did not accept the gateway's credentials."
        }
        _ => "The engine failed to process the request.",
    }
}

/// Reads `retry-after-ms`, or `Retry-After` in seconds or as a date.
fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    let number = |name: &str, unit: f64| {
        let value: f64 = headers.get(name)?.to_str().ok()?.trim().parse().ok()?;
        Duration::try_from_secs_f64(value * unit).ok()
    };
    let until_date = || {
        let date = headers.get(RETRY_AFTER)?.to_str().ok()?;
        let date = httpdate::parse_http_date(date).ok()?;
        Some(date.duration_since(SystemTime::now()).unwrap_or_default())
    };
    let delay = number("retry-after-ms", 1e-3)
        .or_else(|| number(RETRY_AFTER.as_str(), 1.0))
        .or_else(until_date)?;
    Some(delay.min(MAX_RETRY_AFTER))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rejected(status: u16, body: &str) -> Error {
        let status = StatusCode::from_u16(status).expect("a valid status");
        rejection(status, &HeaderMap::new(), body.as_bytes())
    }

    #[test]
    fn an_error_of_the_request_keeps_its_message_and_names_its_field() {
        let body =
            r#"{"error":{"message":"stop is too long","type":"x","param":"stop","code":400}}"#;
        let error = rejected(400, body);
        assert_eq!(error.kind, ErrorKind::InvalidValue);
        assert_eq!(
            (&*error.message, error.param.as_deref()),
            ("stop is too long", Some("stop"))
        );
    }

    #[test]
    fn fastapis_report_of_an_invalid_field_is_read() {
        let body = r#"{"detail":[{"type":"int_parsing","loc":["body","max_tokens"],"msg":"Input should be a valid integer"}]}"#;
        let error = rejected(422, body);
        assert_eq!(error.http_status(), StatusCode::UNPROCESSABLE_ENTITY);
        assert_eq!(
            (&*error.message, error.param.as_deref()),
            ("Input should be a valid integer", Some("max_tokens"))
        );
    }

    #[test]
    fn each_engines_report_of_a_full_context_is_recognized() {
        for body in [
            r#"{"error":{"message":"too long","code":"context_length_exceeded"}}"#,
            r#"{"error":{"code":400,"message":"too long","type":"exceed_context_size_error"}}"#,
            r#"{"error":{"message":"This model's maximum context length is 64 tokens.","type":"BadRequestError","code":400}}"#,
            r#"{"object":"error","message":"The maximum context length is 64.","code":400}"#,
        ] {
            assert_eq!(
                rejected(400, body).kind,
                ErrorKind::ContextLengthExceeded,
                "{body}"
            );
        }
    }

    #[test]
    fn a_rejected_content_and_other_client_errors_are_errors_of_the_request() {
        for (status, code, kind) in [
            (400, "content_filter", ErrorKind::ContentFilter),
            (
                403,
                "content_policy_violation",
                ErrorKind::ContentPolicyViolation,
            ),
            (409, "x", ErrorKind::InvalidValue),
            (451, "x", ErrorKind::InvalidValue),
        ] {
            let body = format!(r#"{{"error":{{"message":"no","code":"{code}"}}}}"#);
            let error = rejected(status, &body);
            assert_eq!((error.kind, &*error.message), (kind, "no"), "{status}");
            assert_eq!(error.http_status(), status, "{status}");
        }
    }

    #[test]
    fn an_error_of_the_engine_hides_its_text() {
        for (status, kind) in [
            (401, ErrorKind::UpstreamError),
            (403, ErrorKind::UpstreamError),
            (429, ErrorKind::QueueFull),
            (500, ErrorKind::UpstreamError),
            (502, ErrorKind::UpstreamError),
            (503, ErrorKind::NoWorker),
            (302, ErrorKind::UpstreamError),
            (405, ErrorKind::UpstreamError),
            (407, ErrorKind::UpstreamError),
            (408, ErrorKind::UpstreamError),
        ] {
            let error = rejected(
                status,
                r#"{"error":{"message":"at 10.0.0.7 with key sk-1"}}"#,
            );
            assert_eq!(error.kind, kind, "{status}");
            assert!(!error.message.contains("10.0.0.7"), "{status}: {error}");
        }
    }

    #[test]
    fn a_body_that_is_no_error_object_still_has_an_error() {
        for body in ["", "<html>", "{\"error\":\"no such model\"}", "[1]", "null"] {
            assert_eq!(rejected(404, body).kind, ErrorKind::ModelNotFound, "{body}");
        }
    }

    #[test]
    fn the_engines_retry_delay_is_passed_on_up_to_an_hour() {
        for (name, value, seconds) in [
            ("retry-after", "2", Some(2.0)),
            ("retry-after-ms", "1500", Some(1.5)),
            ("retry-after", "99999", Some(3_600.0)),
            ("retry-after", "-1", None),
            ("retry-after", "NaN", None),
            ("retry-after", "Fri, 31 Dec 1999 23:59:59 GMT", Some(0.0)),
            (
                "retry-after",
                "Tue, 31 Dec 2199 23:59:59 GMT",
                Some(3_600.0),
            ),
            ("retry-after", "soon", None),
        ] {
            let mut headers = HeaderMap::new();
            headers.insert(name, value.parse().expect("a valid header"));
            let delay = retry_after(&headers).map(|delay| delay.as_secs_f64());
            assert_eq!(delay, seconds, "{name}: {value}");
        }
    }
}
