//! Extractors of the HTTP API's handlers.

use axum::extract::FromRequestParts;
use axum::http::request::Parts;
use axum::response::{IntoResponse, Response};

use super::error_response::ErrorResponse;
use crate::context::RequestContext;

impl<S: Sync> FromRequestParts<S> for RequestContext {
    type Rejection = Response;

    async fn from_request_parts(parts: &mut Parts, _state: &S) -> Result<Self, Response> {
        Self::from_extensions(&parts.extensions)
            .map_err(|error| ErrorResponse::from(error).into_response())
    }
}
