//! Parses and writes large JSON texts on another thread, because this work would delay the tokens of other streams.
//! Small texts are parsed and written at once.

use std::sync::Arc;

use axum::response::Response;
use serde::Serialize;
use tokio::sync::Semaphore;
use tokio::task::spawn_blocking;
use tracing::Span;

use super::response;
use crate::context::RequestContext;
use crate::error::Error;
use crate::request_memory::Work;

/// Size from which a body is parsed on another thread, in bytes.
const LARGE_BODY_BYTES: usize = 64 * 1024;

/// Size from which a response is written on another thread, in bytes.
const LARGE_RESPONSE_BYTES: usize = 256 * 1024;

/// Processes large texts one at a time: a parsed body needs many times its own size, and parsing two bodies could keep
/// all processors from the threads that carry tokens.
pub struct LargeJson(Arc<Semaphore>);

impl Default for LargeJson {
    fn default() -> Self {
        Self(Arc::new(Semaphore::new(1)))
    }
}

impl LargeJson {
    /// Runs a function that parses a body of this size.
    ///
    /// # Errors
    /// The error of the function, `queue_full` if too many large requests are held, or `internal_error` if the function
    /// panics.
    pub(super) async fn parse<T: Send + 'static>(
        &self,
        context: &RequestContext,
        work: Work,
        bytes: usize,
        parse: impl FnOnce() -> Result<T, Error> + Send + 'static,
    ) -> Result<T, Error> {
        if bytes < LARGE_BODY_BYTES {
            return parse();
        }
        let bytes = u64::try_from(bytes).unwrap_or(u64::MAX);
        let shares = context.memory_shares();
        shares.wait_for_request(work, bytes).await?;
        let parsed = self.run(parse).await?;
        match work {
            Work::Completion => shares.finish_parsing(bytes),
            // The text or the tokens of the answer need the rest.
            Work::Tokenizer => {}
        }
        parsed
    }

    /// Writes a response whose body has about this size.
    ///
    /// # Errors
    /// `internal_error` if an object panics while it is written.
    pub(super) async fn write<A: Serialize>(
        &self,
        bytes: usize,
        object: impl FnOnce() -> A + Send + 'static,
    ) -> Result<Response, Error> {
        let write = move || response::json(&object());
        match bytes < LARGE_RESPONSE_BYTES {
            true => Ok(write()),
            false => self.run(write).await,
        }
    }

    /// Runs a function on another thread, after all earlier calls have finished.
    async fn run<T: Send + 'static>(
        &self,
        run: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, Error> {
        let turn = Arc::clone(&self.0).acquire_owned().await;
        let turn = turn.expect("the semaphore is never closed");
        let span = Span::current();
        let done = spawn_blocking(move || {
            let done = span.in_scope(run);
            // The permit must stay with the function, because a cancelled request does not stop the thread.
            drop(turn);
            done
        });
        done.await.map_err(|panicked| {
            tracing::error!(%panicked, "a large body could not be parsed or written");
            Error::internal()
        })
    }
}
