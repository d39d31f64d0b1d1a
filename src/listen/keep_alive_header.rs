//! The HTTP/1.1 response header with the connection's idle timeout, in seconds.
//!
//! Connection pools such as Node's undici and Apache's `HttpClient` read this header, and do not reuse a connection
//! that is about to close.

use std::time::Duration;

use http::header::{CONNECTION, HeaderName};
use http::{HeaderMap, HeaderValue, Request, Version};

pub(super) const KEEP_ALIVE: HeaderName = HeaderName::from_static("keep-alive");

/// Returns the value of the `Keep-Alive` header: one second less than `timeout`, to allow for network latency.
/// Returns `None` if less than one second is left.
pub(super) fn keep_alive_header(timeout: Duration) -> Option<HeaderValue> {
    let seconds = timeout.as_secs().checked_sub(1).filter(|left| *left > 0)?;
    HeaderValue::try_from(format!("timeout={seconds}")).ok()
}

/// Returns true for an HTTP/1.1 request without `Connection: close`. Only its response gets a `Keep-Alive` header.
pub(super) fn allows_keep_alive<B>(request: &Request<B>) -> bool {
    let closes = |headers: &HeaderMap| {
        let connection = headers.get(CONNECTION);
        connection.is_some_and(|value| value.as_bytes().eq_ignore_ascii_case(b"close"))
    };
    request.version() == Version::HTTP_11 && !closes(request.headers())
}
