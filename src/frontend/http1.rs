//! Layer that rejects HTTP/1.1 requests whose host or whose end is ambiguous (RFC 9112, sections 3.2 and 6). A proxy
//! in front of the server could interpret such a request differently (request smuggling).
//!
//! hyper itself rejects most malformed requests, with a status and no body.

use axum::extract::Request;
use axum::http::header::{CONNECTION, HOST, TRANSFER_ENCODING};
use axum::http::{HeaderValue, Version};
use axum::response::Response;

use super::response;
use crate::error::{Error, ErrorKind};
use crate::listen::MalformedHead;
use crate::telemetry::Api;

/// Returns the error response if the request must be rejected. The connection closes after this response.
pub(super) fn rejection(request: &Request) -> Option<Response> {
    let error = check(request).err()?;
    let mut response = response::error_response(Api::Http, error);
    let close = HeaderValue::from_static("close");
    response.headers_mut().insert(CONNECTION, close);
    Some(response)
}

fn check(request: &Request) -> Result<(), Error> {
    if !matches!(request.version(), Version::HTTP_10 | Version::HTTP_11) {
        return Ok(());
    }
    match request.extensions().get() {
        None => {}
        Some(MalformedHead::BareLineFeed) => {
            let message = "Each line of the request's head must end with CR LF, not with LF alone.";
            return Err(Error::new(ErrorKind::InvalidValue, message));
        }
        Some(MalformedHead::LengthAndEncoding) => {
            let message =
                "The request has Content-Length and Transfer-Encoding; send only one of the two.";
            return Err(Error::invalid_value("content-length", message));
        }
    }
    check_host(request)?;
    check_transfer_encoding(request)
}

fn check_host(request: &Request) -> Result<(), Error> {
    let hosts = request.headers().get_all(HOST).iter().count();
    let kind = match hosts {
        0 if request.version() == Version::HTTP_11 => ErrorKind::MissingParameter,
        0 | 1 => return Ok(()),
        _ => ErrorKind::InvalidValue,
    };
    let message = format!("A request must have one Host header (got {hosts}).");
    Err(Error::new(kind, message).with_param(HOST.as_str()))
}

/// hyper decodes `chunked` only, and ignores the codings before it.
fn check_transfer_encoding(request: &Request) -> Result<(), Error> {
    let mut encodings = request.headers().get_all(TRANSFER_ENCODING).iter();
    let Some(encoding) = encodings.next() else {
        return Ok(());
    };
    let is_chunked = encoding
        .as_bytes()
        .trim_ascii()
        .eq_ignore_ascii_case(b"chunked");
    if is_chunked && encodings.next().is_none() {
        return Ok(());
    }
    let message = "The only supported Transfer-Encoding is chunked, and it must be sent once.";
    Err(Error::invalid_value(TRANSFER_ENCODING.as_str(), message))
}
