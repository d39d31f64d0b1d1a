//! Layer that turns a panic of a handler into an error response.

use std::panic::AssertUnwindSafe;

use axum::response::Response;
use futures_util::FutureExt;

use super::response;
use crate::context::RequestContext;
use crate::error::Error;

/// Responds with `internal_error` if the handler panics.
pub(super) async fn catch_panics(
    context: &RequestContext,
    handled: impl Future<Output = Response>,
) -> Response {
    // `AssertUnwindSafe` is sound here: the handler's state is dropped after a panic.
    let caught = AssertUnwindSafe(handled).catch_unwind().await;
    caught.unwrap_or_else(|_| {
        // The panic hook has logged the panic itself.
        tracing::error!("the handler of a request panicked");
        response::error_response(context.api(), Error::internal())
    })
}
