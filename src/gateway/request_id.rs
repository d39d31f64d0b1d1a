//! Assigns each request its id, from the client's `x-request-id` or at random, and returns it in every response.

use axum::extract::Request;
use axum::http::{HeaderName, HeaderValue};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};

use super::error_response::ErrorResponse;
use crate::error::Error;
use crate::request::RequestId;

const X_REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// Maximum length of a client's request id, in bytes.
const MAX_BYTES: usize = 128;

/// Request extension that marks an invalid id. [`reject_invalid`] answers with the error.
#[derive(Clone)]
struct InvalidRequestId(Error);

/// Adds the id to the request and to the response. This is the outermost layer, so that error responses have the id.
///
/// An invalid id is replaced by a random one here and rejected later, by [`reject_invalid`].
pub(super) async fn assign(mut request: Request, next: Next) -> Response {
    let (id, error) = match request.headers().get(&X_REQUEST_ID) {
        None => (RequestId::random(), None),
        Some(value) => match value.to_str() {
            Ok(id) if is_valid(id) => (RequestId(id.into()), None),
            Ok(_) | Err(_) => (RequestId::random(), Some(invalid())),
        },
    };
    let value = HeaderValue::from_str(&id.0).expect("the id came from a header or is hexadecimal");
    request.extensions_mut().insert(id);
    if let Some(error) = error {
        request.extensions_mut().insert(InvalidRequestId(error));
    }
    let mut response = next.run(request).await;
    response.headers_mut().insert(X_REQUEST_ID, value);
    response
}

/// Rejects a request with an invalid id. This layer is inside the CORS layer, so that browsers can read the error.
pub(super) async fn reject_invalid(mut request: Request, next: Next) -> Response {
    match request.extensions_mut().remove() {
        Some(InvalidRequestId(error)) => ErrorResponse::from(error).into_response(),
        None => next.run(request).await,
    }
}

fn is_valid(id: &str) -> bool {
    (1..=MAX_BYTES).contains(&id.len()) && id.bytes().all(|byte| byte.is_ascii_graphic())
}

fn invalid() -> Error {
    let message = format!("x-request-id must have 1 to {MAX_BYTES} visible ASCII characters.");
    Error::invalid_value("x-request-id", message)
}
