//! Turns for requests that resume many tokens. Decoding these tokens again would delay the tokens of other streams, so
//! it runs on another thread, for one request at a time.

use std::sync::Arc;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::spawn_blocking;
use tokio::time::timeout_at;
use tracing::Span;

use crate::error::{Error, ErrorKind};
use crate::request::CompletionRequest;

/// Number of resumed tokens, of all choices together, from which a request waits for its turn.
const LARGE_RESUME_TOKENS: u64 = 16 * 1024;

/// Turns for requests that resume many tokens. Clones share them.
#[derive(Clone)]
pub(super) struct LargeResumes(Arc<Semaphore>);

/// The turn of a request.
pub(super) struct ResumeTurn {
    _permit: OwnedSemaphorePermit,
}

impl Default for LargeResumes {
    fn default() -> Self {
        Self(Arc::new(Semaphore::new(1)))
    }
}

impl LargeResumes {
    /// Waits for the turn of a request. Returns `None` for a request that resumes few tokens or none.
    ///
    /// # Errors
    /// The deadline of the request passes.
    pub(super) async fn wait_for_turn(
        &self,
        request: &CompletionRequest,
    ) -> Result<Option<ResumeTurn>, Error> {
        if request.resumed_tokens() < LARGE_RESUME_TOKENS {
            return Ok(None);
        }
        let turn = Arc::clone(&self.0).acquire_owned();
        match timeout_at(request.deadline, turn).await {
            Ok(turn) => Ok(Some(ResumeTurn {
                _permit: turn.expect("the semaphore is never closed"),
            })),
            Err(_) => {
                let message = "The request's deadline passed before it was queued.";
                Err(Error::new(ErrorKind::DeadlineExceeded, message))
            }
        }
    }
}

impl ResumeTurn {
    /// Runs a function on another thread. The turn ends when the function returns, even if the request was cancelled.
    ///
    /// # Errors
    /// The error of the function, or `internal_error` if it panics.
    pub(super) async fn run<T: Send + 'static>(
        self,
        create: impl FnOnce() -> Result<T, Error> + Send + 'static,
    ) -> Result<T, Error> {
        let span = Span::current();
        let created = spawn_blocking(move || {
            let created = span.in_scope(create);
            drop(self);
            created
        });
        created.await.unwrap_or_else(|panicked| {
            tracing::error!(%panicked, "a request that resumes many tokens could not be prepared");
            Err(Error::internal())
        })
    }
}
