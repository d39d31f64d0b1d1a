//! Reads a request's body into memory, within the request's deadline.
//!
//! It checks the headers that describe the body. It does not parse the body.

use std::error::Error as StdError;
use std::io;

use axum::extract::Request;
use axum::http::header::{CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_TYPE};
use axum::http::{HeaderMap, HeaderName};
use http_body_util::{BodyExt, LengthLimitError, Limited};
use tokio::time::timeout_at;
use tonic::Status;

use super::completion_stream::deadline_exceeded;
use crate::context::RequestContext;
use crate::error::{Error, ErrorKind};

/// Largest request body, in bytes.
pub(super) const MAX_BODY_BYTES: usize = 4 * 1024 * 1024;

/// A request whose whole body has been read, and not yet parsed.
pub(super) struct BufferedRequest {
    pub(super) headers: HeaderMap,
    pub(super) body: Vec<u8>,
}

impl BufferedRequest {
    /// Reads the body.
    ///
    /// # Errors
    /// If the body is too large or not declared as JSON, the client disconnects, or the deadline or the body timeout
    /// passes.
    pub(super) async fn read(context: &RequestContext, request: Request) -> Result<Self, Error> {
        let headers = request.headers().clone();
        let body = timeout_at(context.deadline(), read_body(request)).await;
        Ok(Self {
            headers,
            body: body.map_err(|_| deadline_exceeded())??,
        })
    }
}

async fn read_body(request: Request) -> Result<Vec<u8>, Error> {
    check_content_type(request.headers())?;
    check_content_encoding(request.headers())?;
    let declared = text(request.headers(), &CONTENT_LENGTH);
    let declared = declared.and_then(|text| text.parse::<u64>().ok());
    if declared.is_some_and(is_too_large) {
        return Err(too_large());
    }
    let size = declared.and_then(|length| usize::try_from(length).ok());
    let mut read = Vec::with_capacity(size.unwrap_or(0));
    let mut body = Limited::new(request.into_body(), MAX_BODY_BYTES);
    while let Some(frame) = body.frame().await {
        match frame {
            // The frame is dropped at once, so that the connection can use its memory for the next.
            Ok(frame) => read.extend_from_slice(frame.data_ref().map_or(&[], |data| data)),
            Err(error) if error.is::<LengthLimitError>() => return Err(too_large()),
            Err(error) => {
                tracing::debug!(%error, "failed to read a request body");
                return Err(unfinished_body(&*error));
            }
        }
    }
    Ok(read)
}

/// Converts the error of a body that could not be read to its end.
fn unfinished_body(error: &(dyn StdError + 'static)) -> Error {
    let mut cause = Some(error);
    while let Some(error) = cause {
        // The body did not arrive in time, or the layer that limits the memory of bodies has rejected the request.
        if let Some(status) = error.downcast_ref::<Status>() {
            return Error::from(status);
        }
        if is_disconnect(error) {
            let message = "The client disconnected before the end of the body.";
            return Error::new(ErrorKind::Cancelled, message);
        }
        cause = error.source();
    }
    let message = "The body could not be read to its end.";
    Error::new(ErrorKind::InvalidJson, message)
}

/// Returns true for the error of a connection that the client has closed, or of an HTTP/2 stream that it has reset.
fn is_disconnect(error: &(dyn StdError + 'static)) -> bool {
    if let Some(error) = error.downcast_ref::<io::Error>() {
        return matches!(
            error.kind(),
            io::ErrorKind::UnexpectedEof
                | io::ErrorKind::ConnectionReset
                | io::ErrorKind::ConnectionAborted
                | io::ErrorKind::BrokenPipe
        );
    }
    let error = error.downcast_ref::<h2::Error>();
    error.is_some_and(|error| error.is_remote() || error.is_io())
}

fn is_too_large(length: u64) -> bool {
    usize::try_from(length).map_or(true, |length| length > MAX_BODY_BYTES)
}

fn check_content_type(headers: &HeaderMap) -> Result<(), Error> {
    let content_type = text(headers, &CONTENT_TYPE).unwrap_or("");
    let media_type = content_type.split(';').next().unwrap_or("").trim();
    if media_type.eq_ignore_ascii_case("application/json") {
        return Ok(());
    }
    let message = "The content-type header must be application/json.";
    Err(Error::new(ErrorKind::UnsupportedMediaType, message))
}

/// Rejects compressed bodies. Without this check, the client would only learn that the body is not valid JSON.
fn check_content_encoding(headers: &HeaderMap) -> Result<(), Error> {
    let mut values = headers.get_all(CONTENT_ENCODING).iter();
    let is_plain = values.all(|value| {
        let value = value.to_str().unwrap_or("?").trim();
        value.is_empty() || value.eq_ignore_ascii_case("identity")
    });
    if is_plain {
        return Ok(());
    }
    let message = "Compressed bodies are not supported; send the body without content-encoding.";
    Err(Error::new(ErrorKind::UnsupportedMediaType, message))
}

fn text<'a>(headers: &'a HeaderMap, name: &HeaderName) -> Option<&'a str> {
    headers.get(name).and_then(|value| value.to_str().ok())
}

fn too_large() -> Error {
    let message = format!("The body is larger than the limit of {MAX_BODY_BYTES} bytes.");
    Error::new(ErrorKind::RequestTooLarge, message)
}
