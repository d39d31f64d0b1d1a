//! The models of an engine, and what a request must fulfil to be run by one of them.

use std::sync::{Arc, OnceLock};

use crate::error::{Error, ErrorKind};
use crate::request::{
    ChatMessage, CompletionRequest, DEFAULT_MAX_TOKENS, Input, MAX_MODEL_NAME_BYTES, Parameter,
    TokenId,
};
use crate::runner::{BosPolicy, Model, ModelError, Resumption, TokenBytes};

/// Prompts up to this many bytes are tokenized where they are: it takes less time than handing them
/// to another thread.
const MAX_INLINE_BYTES: usize = 4 * 1024;

/// As many bytes of text are about one id.
const BYTES_PER_TOKEN: usize = 4;

/// The fields that hold what is to be completed.
const PROMPT: &str = "prompt";
const PROMPT_TOKEN_IDS: &str = "prompt_token_ids";
const CHAT: &str = "chat";

#[cfg(test)]
mod tests;

/// A prompt that is ready to run.
pub(super) struct Prompt {
    /// At least one, all in the vocabulary.
    pub(super) ids: Arc<[TokenId]>,
    /// Its text, where the request asks for it.
    pub(super) text: Option<String>,
    /// The most tokens that follow it; they fit.
    pub(super) max_tokens: u32,
    /// What the client already has of each choice.
    pub(super) resumed: Vec<Vec<DeliveredToken>>,
}

/// A token that a client already has.
pub type DeliveredToken = (TokenId, TokenBytes);

/// So many bytes of names are told where a request names no model, or none that there is.
const MAX_MODEL_LIST_BYTES: usize = 2 * 1024;

/// The models that an engine serves. Clones share them.
#[derive(Clone)]
pub struct Catalog {
    entries: Arc<[CatalogEntry]>,
    unknown: UnknownModel,
}

/// What an engine does with a request for a model that it does not have.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum UnknownModel {
    /// Refuses the request.
    #[default]
    Refuse,
    /// Serves the request with the first model.
    First,
}

/// One model of the catalog.
pub struct CatalogEntry {
    /// The name that requests give, and that answers tell.
    pub name: Arc<str>,
    /// Other names that requests may give.
    pub aliases: Box<[String]>,
    /// The kind of runner.
    pub runner: &'static str,
    /// When the engine began to serve it, in seconds since the Unix epoch.
    pub created: i64,
    /// Known once a worker has loaded it.
    model: OnceLock<Arc<dyn Model>>,
}

impl CatalogEntry {
    /// A model that is not loaded yet.
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

    /// The model itself.
    ///
    /// # Errors
    /// While it is loading, or when it cannot be loaded.
    pub fn model(&self) -> Result<&Arc<dyn Model>, Error> {
        self.model.get().ok_or_else(|| {
            let message = format!("The model '{}' is not loaded.", self.name);
            Error::new(ErrorKind::NotReady, message)
        })
    }

    fn is_named(&self, name: &str) -> bool {
        *self.name == *name || self.aliases.iter().any(|alias| alias == name)
    }

    /// Notes that a worker has loaded the model. What the first worker says is what the model is.
    pub(super) fn loaded(&self, model: Arc<dyn Model>) {
        let _ = self.model.set(model);
    }

    /// Turns text into token ids, on another thread where that takes long. `param` is the field that
    /// holds it.
    ///
    /// # Errors
    /// When the text is too long, or the model refuses it.
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

    /// Renders a conversation by the model's chat template, on another thread where that takes long.
    ///
    /// # Errors
    /// When the model's template refuses it, or it has none.
    pub async fn render_chat(&self, messages: &[ChatMessage]) -> Result<String, Error> {
        let bytes = messages.iter().map(|message| message.content.len()).sum();
        let messages = messages.to_owned();
        let text = self.run_on_model(bytes, move |model| model.render_chat(&messages));
        text.await?.map_err(|error| prompt_error(error, CHAT))
    }

    /// Refuses what the model's runner cannot honour.
    pub(super) fn check_supported(&self, request: &CompletionRequest) -> Result<(), Error> {
        let unsupported = &self.model()?.facts().unsupported;
        let needed = unsupported
            .iter()
            .find(|parameter| request.needs(**parameter));
        match needed {
            None => Ok(()),
            Some(parameter) => {
                let param = parameter.name();
                let what = if *parameter == Parameter::EchoLogprobs {
                    "log probabilities of the prompt (echo with logprobs)"
                } else if *parameter == Parameter::Suffix {
                    "suffix: it has no fill-in-the-middle tokens"
                } else {
                    param
                };
                let message = format!("The model '{}' does not support {what}.", self.name);
                Err(Error::new(ErrorKind::UnsupportedParameter, message).with_param(param))
            }
        }
    }

    /// The request's prompt: at least one token, all in the vocabulary, with room for what follows.
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
                // First what is cheap: the vocabulary is asked for every id.
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
        let rest = self.rest_of_context(ids.len())?;
        let max_tokens = match (request.max_tokens, &request.input) {
            (Some(max_tokens), _) => max_tokens,
            // A conversation goes on until its answer is whole; with no room at all it does not fit.
            (None, Input::Chat(_)) => rest.max(1),
            (None, Input::Text(_) | Input::TokenIds(_) | Input::Infill { .. }) => {
                DEFAULT_MAX_TOKENS
            }
        };
        self.check_context(ids.len(), max_tokens, param)?;
        let min_tokens = request.stopping.tokens.min_tokens;
        if min_tokens > max_tokens {
            let message =
                format!("min_tokens must be at most the limit of tokens, which is {max_tokens}.");
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

    /// What the client has of each choice, with its bytes: less than all of it.
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
            let message = format!(
                "The model '{}' cannot go on with what it has begun.",
                self.name
            );
            let error = Error::new(ErrorKind::UnsupportedParameter, message);
            return Err(error.with_param(PARAM));
        }
        let limit = usize::try_from(max_tokens).unwrap_or(usize::MAX);
        let mut resumed = Vec::new();
        for ids in &request.resume {
            if !ids.is_empty() && ids.len() >= limit {
                let message =
                    format!("resume must hold fewer than max_tokens, which is {max_tokens}.");
                return Err(Error::invalid_value(PARAM, message));
            }
            self.check_vocabulary(ids, PARAM)?;
            let asked = ids.clone();
            let bytes = ids.len().saturating_mul(BYTES_PER_TOKEN);
            let pieces = self
                .run_on_model(bytes, move |model| model.pieces(&asked))
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

    /// Whether the ids by which a request stops or moves logits are in the model's vocabulary.
    fn check_ids(&self, request: &CompletionRequest) -> Result<(), Error> {
        self.check_vocabulary(&request.stopping.tokens.ids, "stop_token_ids")?;
        let biased: Vec<_> = request.logit_bias.iter().map(|(id, _)| *id).collect();
        self.check_vocabulary(&biased, "logit_bias")
    }

    /// Whether a text can be a prompt at all.
    fn check_length(&self, bytes: usize, param: &str) -> Result<(), Error> {
        let limit = self.model()?.facts().max_prompt_bytes;
        if bytes <= limit {
            return Ok(());
        }
        Err(context_exceeded(
            format!("The text has {bytes} bytes; this model takes at most {limit}."),
            param,
        ))
    }

    /// How much of the context so many tokens leave.
    fn rest_of_context(&self, tokens: usize) -> Result<u32, Error> {
        let context_length = self.model()?.facts().context_length;
        let tokens = u32::try_from(tokens).unwrap_or(u32::MAX);
        Ok(context_length.saturating_sub(tokens))
    }

    /// Whether a prompt of so many tokens leaves room for `max_tokens` more.
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
            "This model's context is {context} tokens; the prompt has {prompt_tokens}, which leaves no \
             room for {max_tokens} more."
        );
        // A shorter prompt would not help, or a shorter completion would.
        let is_alone_too_much = u64::from(max_tokens) >= context;
        let param = if is_alone_too_much && prompt_tokens < context {
            "max_tokens"
        } else {
            param
        };
        Err(context_exceeded(message, param))
    }

    /// Asks the model where it is quick, and on another thread where so many bytes take long.
    async fn run_on_model<T: Send + 'static>(
        &self,
        bytes: usize,
        ask: impl FnOnce(&dyn Model) -> T + Send + 'static,
    ) -> Result<T, Error> {
        let model = self.model()?;
        if bytes <= MAX_INLINE_BYTES && model.tokenizes_inline() {
            return Ok(ask(&**model));
        }
        let model = Arc::clone(model);
        tokio::task::spawn_blocking(move || ask(&*model))
            .await
            .map_err(|_| Error::internal())
    }

    /// Turns token ids into text, on another thread where that takes long. Bytes that are no UTF-8
    /// become replacement characters.
    ///
    /// # Errors
    /// Names the first id that is not in the model's vocabulary.
    pub async fn detokenize(&self, ids: Vec<TokenId>, param: &str) -> Result<String, Error> {
        let bytes = ids.len().saturating_mul(BYTES_PER_TOKEN);
        self.check_vocabulary(&ids, param)?;
        let pieces = self
            .run_on_model(bytes, move |model| model.pieces(&ids))
            .await?;
        let pieces = pieces.map_err(|error| prompt_error(error, param))?;
        Ok(String::from_utf8_lossy(&pieces.concat()).into_owned())
    }

    /// Whether all ids are in the model's vocabulary.
    fn check_vocabulary(&self, ids: &[TokenId], param: &str) -> Result<(), Error> {
        let size = self.model()?.facts().vocabulary_size;
        match ids.iter().find(|id| **id >= size) {
            None => Ok(()),
            Some(id) => Err(not_in_vocabulary(*id, param)),
        }
    }
}

impl Catalog {
    /// A catalog of these models, in this order.
    #[must_use]
    pub fn new(entries: Vec<CatalogEntry>) -> Self {
        Self {
            entries: entries.into(),
            unknown: UnknownModel::Refuse,
        }
    }

    /// The same catalog, which does this with requests for models that are not in it.
    #[must_use]
    pub fn with_unknown_model(self, unknown: UnknownModel) -> Self {
        Self { unknown, ..self }
    }

    /// All models.
    #[must_use]
    pub fn entries(&self) -> &[CatalogEntry] {
        &self.entries
    }

    /// The model of this name or alias, or the only one where no name is given; with its place in the catalog.
    ///
    /// # Errors
    /// When there is no such model, or several and no name, unless the first model serves such requests.
    pub fn find(&self, name: Option<&str>) -> Result<(usize, &CatalogEntry), Error> {
        let first = match self.unknown {
            UnknownModel::Refuse => None,
            UnknownModel::First => self.entries.first().map(|entry| (0, entry)),
        };
        match name {
            Some(name) if name.len() > MAX_MODEL_NAME_BYTES => {
                let message = format!("model must be at most {MAX_MODEL_NAME_BYTES} bytes.");
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
                    let message = format!("A model must be named. There are: {}.", self.names());
                    Err(Error::new(ErrorKind::MissingParameter, message).with_param("model"))
                }
            },
        }
    }

    /// All models with their aliases, as far as an error has room for them: it travels in headers.
    fn names(&self) -> String {
        let mut listed = String::new();
        for (at, entry) in self.entries.iter().enumerate() {
            let before = if at == 0 { "" } else { ", " };
            let aliases = match &entry.aliases[..] {
                [] => String::new(),
                aliases => format!(" (also {})", aliases.join(", ")),
            };
            let next = format!("{before}{}{aliases}", entry.name);
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
            tracing::error!(%message, "the model failed on a prompt");
            Error::internal()
        }
        ModelError::Unavailable(message) => Error::new(ErrorKind::NoWorker, message),
    }
}

fn context_exceeded(message: String, param: &str) -> Error {
    Error::new(ErrorKind::ContextLengthExceeded, message).with_param(param)
}
