//! A model's tokenizer and chat template, for async code. Long input is processed on a blocking thread, so that it
//! does not delay the streams of an async thread.

use std::sync::Arc;

use super::{CHAT_FIELD, PROMPT_FIELD};
use crate::error::{Error, ErrorKind};
use crate::models::ModelEntry;
use crate::request::{ChatMessage, TokenId};
use crate::runner::{BosPolicy, Model, ModelError, ModelFacts, TokenBytes};

/// Texts up to this size in bytes are processed on the calling thread, because passing them to another thread takes
/// longer.
const MAX_BYTES_TOKENIZED_BY_TASK: usize = 4 * 1024;

/// Estimated length of one token's text in bytes.
const BYTES_PER_TOKEN: usize = 4;

/// The tokenizer and the chat template of a loaded model.
pub(crate) struct Tokenizer(Arc<dyn Model>);

impl Tokenizer {
    /// Returns the tokenizer of a model.
    ///
    /// # Errors
    /// Returns [`ErrorKind::NotReady`] if the model is not loaded.
    pub(crate) fn new(model: &ModelEntry) -> Result<Self, Error> {
        Ok(Self(Arc::clone(model.loaded_model()?)))
    }

    /// Returns the model's facts.
    #[must_use]
    pub(crate) fn facts(&self) -> &ModelFacts {
        self.0.facts()
    }

    /// Tokenizes `text`. `param` names the request field of the text in errors.
    ///
    /// # Errors
    /// Returns an error if the text is too long or the model rejects it.
    pub(crate) async fn tokenize(
        &self,
        text: &str,
        bos: BosPolicy,
        param: &str,
    ) -> Result<Vec<TokenId>, Error> {
        self.check_length(text.len(), param)?;
        let text = text.to_owned();
        let ids = self.call_model(text.len(), move |model| model.tokenize(&text, bos));
        ids.await?.map_err(|error| prompt_error(error, param))
    }

    /// Renders messages with the model's chat template.
    ///
    /// # Errors
    /// Returns an error if the model has no chat template or the template rejects the messages.
    pub(crate) async fn render_chat(&self, messages: &[ChatMessage]) -> Result<String, Error> {
        let bytes = messages.iter().map(|message| message.content.len()).sum();
        let messages = messages.to_owned();
        let text = self.call_model(bytes, move |model| model.render_chat(&messages));
        text.await?.map_err(|error| prompt_error(error, CHAT_FIELD))
    }

    /// Builds and tokenizes the fill-in-the-middle prompt of two texts.
    pub(super) async fn tokenize_infill(
        &self,
        prefix: String,
        suffix: String,
    ) -> Result<Vec<TokenId>, Error> {
        let bytes = prefix.len().saturating_add(suffix.len());
        self.check_length(bytes, PROMPT_FIELD)?;
        let ids = self.call_model(bytes, move |model| model.tokenize_infill(&prefix, &suffix));
        ids.await?.map_err(|error| prompt_error(error, "suffix"))
    }

    /// Detokenizes ids. `param` names their request field in errors. Invalid UTF-8 becomes U+FFFD.
    ///
    /// # Errors
    /// Returns an error that names the first id that is not in the vocabulary.
    pub(crate) async fn detokenize(&self, ids: Vec<TokenId>, param: &str) -> Result<String, Error> {
        let bytes = self.token_bytes(ids, param).await?;
        Ok(String::from_utf8_lossy(&bytes.concat()).into_owned())
    }

    /// Returns the bytes of each token. `param` names the request field of the ids in errors.
    pub(super) async fn token_bytes(
        &self,
        ids: Vec<TokenId>,
        param: &str,
    ) -> Result<Vec<TokenBytes>, Error> {
        self.check_vocabulary(&ids, param)?;
        let bytes = ids.len().saturating_mul(BYTES_PER_TOKEN);
        let pieces = self.call_model(bytes, move |model| model.token_bytes(&ids));
        pieces.await?.map_err(|error| prompt_error(error, param))
    }

    /// Checks that all ids are in the vocabulary.
    pub(super) fn check_vocabulary(&self, ids: &[TokenId], param: &str) -> Result<(), Error> {
        let size = self.facts().vocabulary_size;
        match ids.iter().find(|id| **id >= size) {
            None => Ok(()),
            Some(id) => {
                let message = format!("Token id {id} is not in this model's vocabulary.");
                Err(Error::invalid_value(param, message))
            }
        }
    }

    /// Checks the length of a text against the model's limit.
    fn check_length(&self, bytes: usize, param: &str) -> Result<(), Error> {
        let limit = self.facts().max_prompt_bytes;
        if bytes <= limit {
            return Ok(());
        }
        let message = format!("The text has {bytes} bytes. This model accepts at most {limit}.");
        Err(Error::new(ErrorKind::ContextLengthExceeded, message).with_param(param))
    }

    /// Calls the model. If processing `bytes` bytes may take long, the call runs on a blocking thread.
    async fn call_model<T: Send + 'static>(
        &self,
        bytes: usize,
        call: impl FnOnce(&dyn Model) -> T + Send + 'static,
    ) -> Result<T, Error> {
        if bytes <= MAX_BYTES_TOKENIZED_BY_TASK && self.0.tokenizes_inline() {
            return Ok(call(&*self.0));
        }
        let model = Arc::clone(&self.0);
        let span = tracing::Span::current();
        tokio::task::spawn_blocking(move || span.in_scope(|| call(&*model)))
            .await
            .map_err(|_| Error::internal())
    }
}

fn prompt_error(error: ModelError, param: &str) -> Error {
    match error {
        ModelError::Invalid(message) => Error::invalid_value(param, message),
        ModelError::Failed(message) => {
            tracing::error!(%message, "the model failed to process a prompt");
            Error::internal()
        }
        ModelError::Unavailable(message) => Error::new(ErrorKind::NoWorker, message),
    }
}
