//! The interface of an upstream: the engine in this process, or a remote engine. This module must not know which
//! upstream gets a request.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use tokio::sync::watch;
use tokio_stream::Stream;
use tonic::{Request, Status};

use crate::proto::v1;
use crate::request::Parameter;

/// Events of one completion, exactly as the upstream sends them.
pub type BoxedEventStream = Pin<Box<dyn Stream<Item = Result<v1::CompletionEvent, Status>> + Send>>;

/// A destination of requests.
///
/// Requests and responses are those of `tokenway.v1.Inference`. The metadata of a request contains its id and its
/// timeout. An upstream that speaks another protocol must convert them.
#[tonic::async_trait]
pub(crate) trait Upstream: Send + Sync {
    /// Starts a completion, and returns once it is admitted. Dropping the stream cancels it.
    ///
    /// # Errors
    /// Returns the reason for a rejection.
    async fn complete(
        &self,
        request: Request<v1::CompletionRequest>,
    ) -> Result<BoxedEventStream, Status>;

    /// Returns all models.
    ///
    /// # Errors
    /// Returns an error if the upstream does not respond.
    async fn list_models(
        &self,
        request: Request<v1::ListModelsRequest>,
    ) -> Result<v1::ListModelsResponse, Status>;

    /// Returns the description of one model.
    ///
    /// # Errors
    /// Returns an error for an unknown model.
    async fn get_model(
        &self,
        request: Request<v1::GetModelRequest>,
    ) -> Result<v1::GetModelResponse, Status>;

    /// Converts text or a chat into token ids.
    ///
    /// # Errors
    /// Returns the reason for a rejection.
    async fn tokenize(
        &self,
        request: Request<v1::TokenizeRequest>,
    ) -> Result<v1::TokenizeResponse, Status>;

    /// Converts token ids into text.
    ///
    /// # Errors
    /// Returns the reason for a rejection.
    async fn detokenize(
        &self,
        request: Request<v1::DetokenizeRequest>,
    ) -> Result<v1::DetokenizeResponse, Status>;

    /// Returns a watch of the upstream's health.
    fn health(&self) -> &watch::Receiver<Health>;

    /// Returns the number of open streams. The upstream with the lowest load gets the next request.
    fn load(&self) -> usize;

    /// Returns the request parameters that no model of this upstream supports. A completion that uses one is not sent
    /// to this upstream.
    fn unsupported(&self) -> &[Parameter] {
        &[]
    }
}

/// Health of an upstream.
#[derive(Clone, Debug, Default)]
pub(crate) struct Health {
    /// Availability for requests.
    pub availability: Availability,
    /// Models that the upstream listed when it last came up. Empty for the engine in this process, which resolves
    /// model names itself.
    pub models: Vec<v1::Model>,
}

/// Availability of an upstream.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Availability {
    /// The upstream has not answered a health check yet. It counts as up, so requests are sent to it.
    #[default]
    Unknown,
    /// The upstream accepts requests.
    Up,
    /// The upstream rejects requests or cannot be reached. It gets requests only if no other upstream is up.
    Down,
    /// The upstream is this gateway itself, under another address. It gets no requests.
    Loop,
}

impl Health {
    /// Returns the health of an upstream that is always up.
    #[must_use]
    pub(crate) fn always_up() -> Self {
        Self {
            availability: Availability::Up,
            models: Vec::new(),
        }
    }

    /// Returns true unless the upstream is known to be unavailable.
    #[must_use]
    pub(crate) fn is_up(&self) -> bool {
        matches!(self.availability, Availability::Unknown | Availability::Up)
    }
}

/// Number of open streams of an upstream. Clones share the number.
#[derive(Clone, Default)]
pub(super) struct OpenStreams(Arc<AtomicUsize>);

impl OpenStreams {
    pub(super) fn get(&self) -> usize {
        self.0.load(Ordering::Relaxed)
    }

    /// Counts a stream until the guard is dropped.
    pub(super) fn track_stream(&self) -> OpenStreamGuard {
        self.0.fetch_add(1, Ordering::Relaxed);
        OpenStreamGuard(Arc::clone(&self.0))
    }
}

/// Counts a stream in the load of its upstream until it is dropped.
pub(super) struct OpenStreamGuard(Arc<AtomicUsize>);

impl Drop for OpenStreamGuard {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}
