//! Layer that rejects requests to the gRPC API that are not gRPC. A web page cannot set gRPC's content type without a
//! preflight request, which the gRPC API does not answer, so pages cannot call it.

use axum::extract::Request;
use axum::http::StatusCode;
use axum::http::header::CONTENT_TYPE;
use axum::response::Response;

use super::response;
use crate::error::{Error, ErrorKind};
use crate::telemetry::Api;

/// Returns the response to a request that is not gRPC. The status is the one that the gRPC protocol asks for.
pub(super) fn rejection(api: Api, request: &Request) -> Option<Response> {
    let content_type = request.headers().get(CONTENT_TYPE);
    let is_grpc = content_type.is_some_and(|it| it.as_bytes().starts_with(b"application/grpc"));
    if api == Api::Http || is_grpc {
        return None;
    }
    let message = "The gRPC API requires the content type application/grpc.";
    let error = Error::new(ErrorKind::UnsupportedMediaType, message);
    let mut response = response::error_response(api, error);
    *response.status_mut() = StatusCode::UNSUPPORTED_MEDIA_TYPE;
    Some(response)
}
