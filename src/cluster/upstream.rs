//! The interface of an upstream: the engine in this process, or a remote engine. This module must not know which
//! upstream gets a request.

use std::pin::Pin;
use std::sync::Arc;

use tokio::sync::watch;
use tokio_stream::Stream;
use tonic::{Request, Status};

use super::failure::Failure;
use super::health::Health;
use super::ladder::Abilities;
use crate::proto::v1;
use crate::request::Parameter;

/// Events of one completion, as the upstream sends them, or as they were converted from its own protocol.
pub type BoxedEventStream = Pin<Box<dyn Stream<Item = Result<v1::CompletionEvent, Status>> + Send>>;

/// A destination of requests.
///
/// Requests and responses are those of `tokenway.v1.Inference`; a completion is an [`AddressedCompletion`]. The metadata of a request contains its id and its
/// timeout. An upstream that speaks another protocol must convert them.
#[tonic::async_trait]
pub(crate) trait Upstream: Send + Sync {
    /// Starts a completion, and returns once the upstream has accepted it. Dropping the stream cancels it.
    ///
    /// # Errors
    /// Returns the reason for a rejection.
    async fn complete(
        &self,
        request: Request<AddressedCompletion>,
    ) -> Result<BoxedEventStream, Failure>;

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

    /// Returns the request parameters that no model of this upstream supports. A completion that uses one is not sent
    /// to this upstream.
    fn unsupported(&self) -> &[Parameter] {
        &[]
    }

    /// Returns the abilities that decide how this upstream can continue a completion whose stream broke.
    fn abilities(&self) -> Abilities {
        Abilities::default()
    }

    /// Returns true if the upstream reports when a request leaves its queue. The wait in the queue does not count as
    /// silence.
    fn reports_start(&self) -> bool {
        false
    }

    /// Returns true if the upstream gets the deadline of a request and reports when it passes.
    fn knows_deadline(&self) -> bool {
        false
    }
}

/// A completion request, and the fields that depend on the upstream. The message may be large, so it is shared, and copied
/// only for an upstream that needs a message of its own.
pub(crate) struct AddressedCompletion {
    pub(super) message: Arc<v1::CompletionRequest>,
    /// Name under which the upstream knows the model.
    pub(super) model: String,
    pub(super) seed: Option<i64>,
    /// True if the chat ends with the start of the assistant's answer, which the upstream must continue.
    pub(super) continues_message: bool,
}

impl AddressedCompletion {
    /// Keeps the model and the seed of the message.
    pub(super) fn unchanged(message: v1::CompletionRequest) -> Self {
        Self {
            model: message.model.clone(),
            seed: message.seed,
            message: Arc::new(message),
            continues_message: false,
        }
    }

    /// Returns a message with the model and the seed.
    pub(super) fn into_message(self) -> v1::CompletionRequest {
        v1::CompletionRequest {
            model: self.model,
            seed: self.seed,
            ..Arc::unwrap_or_clone(self.message)
        }
    }
}
