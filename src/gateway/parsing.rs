//! Parses request bodies: small ones at once, and large ones on another thread, because parsing them would delay the
//! tokens of other streams.

use std::sync::Arc;

use tokio::sync::Semaphore;
use tokio::task::spawn_blocking;
use tracing::Span;

use crate::error::Error;

/// Size from which a body is parsed on another thread, in bytes.
const LARGE_BODY_BYTES: usize = 64 * 1024;

/// Turns for parsing large bodies. Only one is parsed at a time, because a parsed body needs many times its own size.
pub struct LargeBodyParser(Arc<Semaphore>);

impl Default for LargeBodyParser {
    fn default() -> Self {
        Self(Arc::new(Semaphore::new(1)))
    }
}

impl LargeBodyParser {
    /// Runs a function that parses a body of this size.
    ///
    /// # Errors
    /// The error of the function, or `internal_error` if it panics.
    pub(super) async fn run<T: Send + 'static>(
        &self,
        bytes: usize,
        parse: impl FnOnce() -> Result<T, Error> + Send + 'static,
    ) -> Result<T, Error> {
        if bytes < LARGE_BODY_BYTES {
            return parse();
        }
        let turn = Arc::clone(&self.0).acquire_owned().await;
        let turn = turn.expect("the semaphore is never closed");
        let span = Span::current();
        let parsed = spawn_blocking(move || {
            let parsed = span.in_scope(parse);
            // The turn ends here even if the request was cancelled in between.
            drop(turn);
            parsed
        });
        parsed.await.unwrap_or_else(|panicked| {
            tracing::error!(%panicked, "a request body could not be parsed");
            Err(Error::internal())
        })
    }
}
