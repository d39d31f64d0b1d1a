//! The engine's models, and the validation and tokenization of requests for them.

use std::sync::{Arc, OnceLock};

use crate::error::{Error, ErrorKind};
use crate::request::{
    ChatMessage, CompletionRequest, DEFAULT_MAX_TOKENS, Input, MAX_MODEL_NAME_BYTES, Parameter,
    TokenId,
};
use crate::runner::{BosPolicy, Model, ModelError, Resumption, TokenBytes};

/// The maximum size of text in bytes that is processed on the calling thread, because handing it to another thread
/// takes longer.
const MAX_INLINE_BYTES: usize = 4 * 1024;

/// An estimate of the text of one token in bytes.
const BYTES_PER_TOKEN: usize = 4;

/// The request fields that contain the prompt.
const PROMPT: &str = "prompt";
const PROMPT_TOKEN_IDS: &str = "prompt_token_ids";
const CHAT: &str = "chat";

#[cfg(test)]
mod tests;

/// A tokenized and validated prompt.
pub(super) struct Prompt {
    /// The token ids: at least one, all in the vocabulary.
    pub(super) ids: Arc<[TokenId]>,
    /// The prompt's text, if the request echoes it.
    pub(super) text: Option<String>,
    /// The maximum number of completion tokens. Prompt and completion fit into the context.
    pub(super) max_tokens: u32,
    /// The tokens of each choice that the client already has.
    pub(super) resumed: Vec<Vec<DeliveredToken>>,
}

/// The id and the bytes of a token that the client already has.
pub type DeliveredToken = (TokenId, TokenBytes);

/// The maximum length in bytes of the list of models in an error message.
const MAX_MODEL_LIST_BYTES: usize = 2 * 1024;

/// The models that an engine serves. Clones share them.
#[derive(Clone)]
pub struct Catalog {
    entries: Arc<[CatalogEntry]>,
    unknown: UnknownModel,
}

/// The handling of requests for unknown models.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum UnknownModel {
    /// Rejects the request.
    #[default]
    Refuse,
    /// Uses the first model.
    First,
}

/// One model of the catalog.
pub struct CatalogEntry {
    /// The name of the model in requests and responses.
    pub name: Arc<str>,
    /// Alternative names of the model in requests.
    pub aliases: Box<[String]>,
    /// The kind of the runner.
    pub runner: &'static str,
    /// The time when the engine added the model, in seconds since the Unix epoch.
    pub created: i64,
    /// Set once a worker has loaded the model.
    model: OnceLock<Arc<dyn Model>>,
}

impl CatalogEntry {
    /// Creates the entry of a model that is not loaded yet.
    #[must_use]
    pub fn new(name: &str, aliases: &[String], runner: &'static str, created: i64) -> Self {
        Self {
            name: name.into(),
            aliases: aliases.into(),
            runner,
            created,
            model: OnceLock::new(),
        }
    }

    /// Returns the loaded model.
    ///
    /// # Errors
    /// Returns [`ErrorKind::NotReady`] if no worker has loaded the model.
    pub fn model(&self) -> Result<&Arc<dyn Model>, Error> {
        self.model.get().ok_or_else(|| {
            let message = format!("The model '{}' is not loaded.", self.name);
            Error::new(ErrorKind::NotReady, message)
        })
    }

    fn is_named(&self, name: &str) -> bool {
        *self.name == *name || self.aliases.iter().any(|alias| alias == name)
    }

    /// Sets the model that a worker has loaded. Models of later workers are ignored.
    pub(super) fn loaded(&self, model: Arc<dyn Model>) {
        let _ = self.model.set(model);
    }

    /// Tokenizes `text`, which is the request field `param`. Long text is tokenized on another thread.
    ///
    /// # Errors
    /// Returns an error if the text is too long or the model rejects it.
    pub async fn tokenize(
        &self,
        text: &str,
        bos: BosPolicy,
        param: &str,
    ) -> Result<Vec<TokenId>, Error> {
        self.check_length(text.len(), param)?;
        let text = text.to_owned();
        let tokens = self.run_on_model(text.len(), move |model| model.tokenize(&text, bos));
        tokens.await?.map_err(|error| prompt_error(error, param))
    }

    /// Renders messages with the model's chat template. Long messages are rendered on another thread.
    ///
    /// # Errors
    /// Returns an error if the model has no chat template or the template rejects the messages.
    pub async fn render_chat(&self, messages: &[ChatMessage]) -> Result<String, Error> {
        let bytes = messages.iter().map(|message| message.content.len()).sum();
        let messages = messages.to_owned();
        let text = self.run_on_model(bytes, move |model| model.render_chat(&messages));
        text.await?.map_err(|error| prompt_error(error, CHAT))
    }

    /// Rejects a request that uses a parameter that the model's runner does not support.
    pub(super) fn check_supported(&self, request: &CompletionRequest) -> Result<(), Error> {
        let unsupported = &self.model()?.facts().unsupported;
        let used = unsupported
            .iter()
            .find(|parameter| request.needs(**parameter));
        match used {
            None => Ok(()),
            Some(parameter) => {
                let param = parameter.name();
                let feature = if *parameter == Parameter::EchoLogprobs {
                    "log probabilities of the prompt (`echo` with `logprobs`)"
                } else if *parameter == Parameter::Suffix {
                    "`suffix`: it has no fill-in-the-middle tokens"
                } else {
                    param
                };
                let message = format!("The model '{}' does not support {feature}.", self.name);
                Err(Error::new(ErrorKind::UnsupportedParameter, message).with_param(param))
            }
        }
    }

    /// Tokenizes and validates the request's prompt.
    pub(super) async fn prompt(&self, request: &CompletionRequest) -> Result<Prompt, Error> {
        let (ids, text, param) = match &request.input {
            Input::Text(text) => {
                let ids = self.tokenize(text, BosPolicy::Add, PROMPT).await?;
                (ids, request.echo.then(|| text.clone()), PROMPT)
            }
            Input::Chat(messages) => {
                let text = self.render_chat(messages).await?;
                let ids = self.tokenize(&text, BosPolicy::Add, CHAT).await?;
                (ids, request.echo.then_some(text), CHAT)
            }
            Input::TokenIds(ids) => {
                // This cheap check comes first, because detokenizing looks up every id.
                let max_tokens = request.max_tokens.unwrap_or(1);
                self.check_context(ids.len(), max_tokens, PROMPT_TOKEN_IDS)?;
                let text = self.detokenize(ids.clone(), PROMPT_TOKEN_IDS).await?;
                (ids.clone(), request.echo.then_some(text), PROMPT_TOKEN_IDS)
            }
            Input::Infill { prefix, suffix } => {
                let ids = self.infill(prefix.clone(), suffix.clone()).await?;
                (ids, request.echo.then(|| prefix.clone()), PROMPT)
            }
        };
        if ids.is_empty() {
            return Err(Error::invalid_value(param, "The prompt is empty."));
        }
        let remaining = self.remaining_context(ids.len())?;
        let max_tokens = match (request.max_tokens, &request.input) {
            (Some(max_tokens), _) => max_tokens,
            // A chat may use the rest of the context. If none is left, 1 makes the check below fail.
            (None, Input::Chat(_)) => remaining.max(1),
            (None, Input::Text(_) | Input::TokenIds(_) | Input::Infill { .. }) => {
                DEFAULT_MAX_TOKENS
            }
        };
        self.check_context(ids.len(), max_tokens, param)?;
        let min_tokens = request.options.stop_tokens.min_tokens;
        if min_tokens > max_tokens {
            let message = format!(
                "`min_tokens` must be at most the token limit, {max_tokens} (got {min_tokens})."
            );
            return Err(Error::invalid_value("min_tokens", message));
        }
        self.check_ids(request)?;
        Ok(Prompt {
            ids: ids.into(),
            text,
            max_tokens,
            resumed: self.resumed(request, max_tokens).await?,
        })
    }

    /// Validates `resume` and returns the tokens of each choice with their bytes.
    async fn resumed(
        &self,
        request: &CompletionRequest,
        max_tokens: u32,
    ) -> Result<Vec<Vec<DeliveredToken>>, Error> {
        const PARAM: &str = "resume";
        if request.resume.is_empty() {
            return Ok(Vec::new());
        }
        if self.model()?.facts().resumption == Resumption::No {
            let message = format!("The model '{}' does not support `resume`.", self.name);
            let error = Error::new(ErrorKind::UnsupportedParameter, message);
            return Err(error.with_param(PARAM));
        }
        let limit = usize::try_from(max_tokens).unwrap_or(usize::MAX);
        let mut resumed = Vec::new();
        for ids in &request.resume {
            if !ids.is_empty() && ids.len() >= limit {
                let message = format!(
                    "`resume` must have fewer tokens than the token limit, {max_tokens} (got {}).",
                    ids.len()
                );
                return Err(Error::invalid_value(PARAM, message));
            }
            self.check_vocabulary(ids, PARAM)?;
            let requested = ids.clone();
            let bytes = ids.len().saturating_mul(BYTES_PER_TOKEN);
            let pieces = self
                .run_on_model(bytes, move |model| model.pieces(&requested))
                .await?;
            let pieces = pieces.map_err(|error| prompt_error(error, PARAM))?;
            resumed.push(ids.iter().copied().zip(pieces).collect());
        }
        Ok(resumed)
    }

    async fn infill(&self, prefix: String, suffix: String) -> Result<Vec<TokenId>, Error> {
        let bytes = prefix.len().saturating_add(suffix.len());
        self.check_length(bytes, PROMPT)?;
        let ids = self.run_on_model(bytes, move |model| model.infill(&prefix, &suffix));
        ids.await?.map_err(|error| prompt_error(error, "suffix"))
    }

    /// Checks that `stop_token_ids` and `logit_bias` contain only ids of the vocabulary.
    fn check_ids(&self, request: &CompletionRequest) -> Result<(), Error> {
        self.check_vocabulary(&request.options.stop_tokens.ids, "stop_token_ids")?;
        let biased: Vec<_> = request
            .options
            .logit_bias
            .iter()
            .map(|(id, _)| *id)
            .collect();
        self.check_vocabulary(&biased, "logit_bias")
    }

    /// Checks the length of a text against the model's limit.
    fn check_length(&self, bytes: usize, param: &str) -> Result<(), Error> {
        let limit = self.model()?.facts().max_prompt_bytes;
        if bytes <= limit {
            return Ok(());
        }
        Err(context_exceeded(
            format!("The text has {bytes} bytes. This model accepts at most {limit}."),
            param,
        ))
    }

    /// Returns the number of tokens of the context that `tokens` tokens leave free.
    fn remaining_context(&self, tokens: usize) -> Result<u32, Error> {
        let context_length = self.model()?.facts().context_length;
        let tokens = u32::try_from(tokens).unwrap_or(u32::MAX);
        Ok(context_length.saturating_sub(tokens))
    }

    /// Checks that the prompt and `max_tokens` fit into the context.
    fn check_context(
        &self,
        prompt_tokens: usize,
        max_tokens: u32,
        param: &str,
    ) -> Result<(), Error> {
        let context = u64::from(self.model()?.facts().context_length);
        let prompt_tokens = u64::try_from(prompt_tokens).unwrap_or(u64::MAX);
        if prompt_tokens.saturating_add(u64::from(max_tokens)) <= context {
            return Ok(());
        }
        let message = format!(
            "This model's context is {context} tokens. The prompt has {prompt_tokens} tokens, which leaves no room \
             for {max_tokens} more."
        );
        // If `max_tokens` alone fills the context and the prompt alone does not, the error names `max_tokens`.
        let exceeds_alone = u64::from(max_tokens) >= context;
        let param = if exceeds_alone && prompt_tokens < context {
            "max_tokens"
        } else {
            param
        };
        Err(context_exceeded(message, param))
    }

    /// Calls the model, on another thread if processing `bytes` bytes may take long.
    async fn run_on_model<T: Send + 'static>(
        &self,
        bytes: usize,
        call: impl FnOnce(&dyn Model) -> T + Send + 'static,
    ) -> Result<T, Error> {
        let model = self.model()?;
        if bytes <= MAX_INLINE_BYTES && model.tokenizes_inline() {
            return Ok(call(&**model));
        }
        let model = Arc::clone(model);
        tokio::task::spawn_blocking(move || call(&*model))
            .await
            .map_err(|_| Error::internal())
    }

    /// Detokenizes ids, which are the request field `param`. Many ids are detokenized on another thread. Invalid UTF-8
    /// becomes U+FFFD.
    ///
    /// # Errors
    /// Returns an error that names the first id that is not in the vocabulary.
    pub async fn detokenize(&self, ids: Vec<TokenId>, param: &str) -> Result<String, Error> {
        let bytes = ids.len().saturating_mul(BYTES_PER_TOKEN);
        self.check_vocabulary(&ids, param)?;
        let pieces = self
            .run_on_model(bytes, move |model| model.pieces(&ids))
            .await?;
        let pieces = pieces.map_err(|error| prompt_error(error, param))?;
        Ok(String::from_utf8_lossy(&pieces.concat()).into_owned())
    }

    /// Checks that all ids are in the model's vocabulary.
    fn check_vocabulary(&self, ids: &[TokenId], param: &str) -> Result<(), Error> {
        let size = self.model()?.facts().vocabulary_size;
        match ids.iter().find(|id| **id >= size) {
            None => Ok(()),
            Some(id) => Err(not_in_vocabulary(*id, param)),
        }
    }
}

impl Catalog {
    /// Creates a catalog of these models. Requests for unknown models are rejected.
    #[must_use]
    pub fn new(entries: Vec<CatalogEntry>) -> Self {
        Self {
            entries: entries.into(),
            unknown: UnknownModel::Refuse,
        }
    }

    /// Sets the handling of requests for unknown models.
    #[must_use]
    pub fn with_unknown_model(self, unknown: UnknownModel) -> Self {
        Self { unknown, ..self }
    }

    /// Returns all models, in the order of the configuration.
    #[must_use]
    pub fn entries(&self) -> &[CatalogEntry] {
        &self.entries
    }

    /// Finds the model with this name or alias, or the only model if `name` is `None`. Returns its index and its entry.
    ///
    /// # Errors
    /// Returns an error if the name is unknown, or missing while there are several models. With
    /// [`UnknownModel::First`], both cases return the first model instead.
    pub fn find(&self, name: Option<&str>) -> Result<(usize, &CatalogEntry), Error> {
        let first = match self.unknown {
            UnknownModel::Refuse => None,
            UnknownModel::First => self.entries.first().map(|entry| (0, entry)),
        };
        match name {
            Some(name) if name.len() > MAX_MODEL_NAME_BYTES => {
                let message = format!("`model` must be at most {MAX_MODEL_NAME_BYTES} bytes.");
                Err(Error::invalid_value("model", message))
            }
            Some(name) => self
                .entries
                .iter()
                .enumerate()
                .find(|(_, entry)| entry.is_named(name))
                .or(first)
                .ok_or_else(|| {
                    let message = format!(
                        "There is no model '{name}'. This server has: {}.",
                        self.names()
                    );
                    Error::new(ErrorKind::ModelNotFound, message).with_param("model")
                }),
            None => match (&self.entries[..], first) {
                ([only], _) => Ok((0, only)),
                (_, Some(first)) => Ok(first),
                ([] | [_, _, ..], None) => {
                    let message =
                        format!("`model` is required. This server has: {}.", self.names());
                    Err(Error::new(ErrorKind::MissingParameter, message).with_param("model"))
                }
            },
        }
    }

    /// Lists all models with their aliases, up to [`MAX_MODEL_LIST_BYTES`], because gRPC sends errors in headers.
    fn names(&self) -> String {
        let mut listed = String::new();
        for (at, entry) in self.entries.iter().enumerate() {
            let separator = if at == 0 { "" } else { ", " };
            let aliases = match &entry.aliases[..] {
                [] => String::new(),
                aliases => format!(" (also {})", aliases.join(", ")),
            };
            let next = format!("{separator}{}{aliases}", entry.name);
            if listed.len() + next.len() > MAX_MODEL_LIST_BYTES {
                return format!("{listed} … and {} more", self.entries.len() - at);
            }
            listed.push_str(&next);
        }
        listed
    }
}

fn not_in_vocabulary(id: TokenId, param: &str) -> Error {
    Error::invalid_value(
        param,
        format!("Token id {id} is not in this model's vocabulary."),
    )
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

fn context_exceeded(message: String, param: &str) -> Error {
    Error::new(ErrorKind::ContextLengthExceeded, message).with_param(param)
}
