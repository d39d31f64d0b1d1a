//! Every answer names its request: by the client's own `x-request-id`, or by one made here.

use axum::extract::Request;
use axum::http::{HeaderName, HeaderValue};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};

use super::error_response::ErrorResponse;
use crate::error::Error;
use crate::request::RequestId;

const X_REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// The longest id that is taken over from a client, in bytes.
const LIMIT: usize = 128;

/// What was wrong with a request's own id.
#[derive(Clone)]
struct InvalidRequestId(Error);

/// Gives the request its id, and the answer the same. It is outside of everything that can refuse the request.
pub(super) async fn carry(mut request: Request, next: Next) -> Response {
    let (id, problem) = match request.headers().get(&X_REQUEST_ID) {
        None => (RequestId::random(), None),
        Some(value) => match value.to_str() {
            Ok(id) if is_valid(id) => (RequestId(id.into()), None),
            Ok(_) | Err(_) => (RequestId::random(), Some(invalid())),
        },
    };
    let value = HeaderValue::from_str(&id.0).expect("it was a header, or is hexadecimal");
    request.extensions_mut().insert(id);
    if let Some(error) = problem {
        request.extensions_mut().insert(InvalidRequestId(error));
    }
    let mut response = next.run(request).await;
    response.headers_mut().insert(X_REQUEST_ID, value);
    response
}

/// Refuses a request whose own id is invalid. It is inside of what adds headers for browsers to every answer.
pub(super) async fn check(mut request: Request, next: Next) -> Response {
    match request.extensions_mut().remove() {
        Some(InvalidRequestId(error)) => ErrorResponse::from(error).into_response(),
        None => next.run(request).await,
    }
}

fn is_valid(id: &str) -> bool {
    (1..=LIMIT).contains(&id.len()) && id.bytes().all(|byte| byte.is_ascii_graphic())
}

fn invalid() -> Error {
    let message = format!("x-request-id must have 1 to {LIMIT} visible ASCII characters.");
    Error::invalid_value("x-request-id", message)
}
