//! The models of an engine, and what a request must fulfil to be run by one of them.

use std::sync::{Arc, OnceLock};

use crate::error::{Error, ErrorKind};
use crate::request::{Input, MAX_MODEL_NAME_BYTES, TokenId};
use crate::runner::{Model, ModelError};

/// Prompts up to this many bytes are tokenized where they are: it takes less time than handing them
/// to another thread.
const TOKENIZE_INLINE: usize = 4 * 1024;

/// So many bytes of names are told where a request names no model, or none that there is.
const MAX_LISTED_BYTES: usize = 2 * 1024;

/// As many ids are about as many bytes of text.
const DETOKENIZE_INLINE: usize = 1024;

/// The models that an engine serves. Clones share them.
#[derive(Clone)]
pub struct Catalog(Arc<[CatalogEntry]>);

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

    /// Turns text into token ids, on another thread where that takes long.
    ///
    /// # Errors
    /// When the text is too long, or the model refuses it.
    pub async fn tokenize(&self, text: &str) -> Result<Vec<TokenId>, Error> {
        let model = self.model()?;
        let limit = model.facts().max_prompt_bytes;
        if text.len() > limit {
            return Err(context_exceeded(format!(
                "The prompt has {} bytes; this model takes at most {limit}.",
                text.len()
            )));
        }
        let tokens = if text.len() <= TOKENIZE_INLINE {
            model.tokenize(text)
        } else {
            let (model, text) = (Arc::clone(model), text.to_owned());
            tokio::task::spawn_blocking(move || model.tokenize(&text))
                .await
                .map_err(|_| Error::internal())?
        };
        tokens.map_err(prompt_error)
    }

    /// The prompt's token ids: at least one, all in the vocabulary, with room for `max_tokens`.
    pub(super) async fn prompt(
        &self,
        input: &Input,
        max_tokens: u32,
    ) -> Result<Arc<[TokenId]>, Error> {
        let model = self.model()?;
        let tokens = match input {
            Input::Text(text) => self.tokenize(text).await?,
            Input::Chat(messages) => {
                let text = model.render_chat(messages).map_err(prompt_error)?;
                self.tokenize(&text).await?
            }
            Input::TokenIds(ids) => {
                // First what is cheap: the vocabulary is asked for every id.
                check_context(&**model, ids.len(), max_tokens)?;
                self.check_vocabulary(ids, "prompt")?;
                ids.clone()
            }
        };
        if tokens.is_empty() {
            return Err(Error::invalid_value("prompt", "The prompt is empty."));
        }
        check_context(&**model, tokens.len(), max_tokens)?;
        Ok(tokens.into())
    }

    /// Turns token ids into text, on another thread where that takes long. Bytes that are no UTF-8
    /// become replacement characters.
    ///
    /// # Errors
    /// Names the first id that is not in the model's vocabulary.
    pub async fn detokenize(&self, ids: Vec<TokenId>, param: &str) -> Result<String, Error> {
        let model = Arc::clone(self.model()?);
        let text = if ids.len() <= DETOKENIZE_INLINE {
            text_of(&*model, &ids)
        } else {
            tokio::task::spawn_blocking(move || text_of(&*model, &ids))
                .await
                .map_err(|_| Error::internal())?
        };
        text.map_err(|id| not_in_vocabulary(id, param))
    }

    /// Whether all ids are in the model's vocabulary.
    fn check_vocabulary(&self, ids: &[TokenId], param: &str) -> Result<(), Error> {
        let model = self.model()?;
        match ids.iter().find(|id| model.token_bytes(**id).is_none()) {
            None => Ok(()),
            Some(id) => Err(not_in_vocabulary(*id, param)),
        }
    }
}

impl Catalog {
    /// A catalog of these models, in this order.
    #[must_use]
    pub fn new(entries: Vec<CatalogEntry>) -> Self {
        Self(entries.into())
    }

    /// All models.
    #[must_use]
    pub fn entries(&self) -> &[CatalogEntry] {
        &self.0
    }

    /// The model of this name or alias, or the only one where no name is given; with its place in the catalog.
    ///
    /// # Errors
    /// When there is no such model, or several and no name.
    pub fn find(&self, name: Option<&str>) -> Result<(usize, &CatalogEntry), Error> {
        match name {
            Some(name) if name.len() > MAX_MODEL_NAME_BYTES => {
                let message = format!("model must be at most {MAX_MODEL_NAME_BYTES} bytes.");
                Err(Error::invalid_value("model", message))
            }
            Some(name) => self
                .0
                .iter()
                .enumerate()
                .find(|(_, entry)| entry.is_named(name))
                .ok_or_else(|| {
                    let message = format!(
                        "There is no model '{name}'. This server has: {}.",
                        self.names()
                    );
                    Error::new(ErrorKind::ModelNotFound, message).with_param("model")
                }),
            None => match &self.0[..] {
                [only] => Ok((0, only)),
                [] | [_, _, ..] => {
                    let message = format!("A model must be named. There are: {}.", self.names());
                    Err(Error::new(ErrorKind::MissingParameter, message).with_param("model"))
                }
            },
        }
    }

    /// All models with their aliases, as far as an error has room for them: it travels in headers.
    fn names(&self) -> String {
        let mut listed = String::new();
        for (at, entry) in self.0.iter().enumerate() {
            let before = if at == 0 { "" } else { ", " };
            let aliases = match &entry.aliases[..] {
                [] => String::new(),
                aliases => format!(" (also {})", aliases.join(", ")),
            };
            let next = format!("{before}{}{aliases}", entry.name);
            if listed.len() + next.len() > MAX_LISTED_BYTES {
                return format!("{listed} … and {} more", self.0.len() - at);
            }
            listed.push_str(&next);
        }
        listed
    }
}

/// Whether a prompt of so many tokens leaves room for `max_tokens` more.
fn check_context(model: &dyn Model, prompt_tokens: usize, max_tokens: u32) -> Result<(), Error> {
    let context = u64::from(model.facts().context_length);
    let prompt_tokens = u64::try_from(prompt_tokens).unwrap_or(u64::MAX);
    if prompt_tokens.saturating_add(u64::from(max_tokens)) <= context {
        return Ok(());
    }
    let error = context_exceeded(format!(
        "This model's context is {context} tokens; the prompt has {prompt_tokens} and max_tokens \
         asks for {max_tokens} more."
    ));
    let param = if u64::from(max_tokens) >= context {
        "max_tokens"
    } else {
        "prompt"
    };
    Err(error.with_param(param))
}

/// The text of these ids, or the first that the model does not have.
fn text_of(model: &dyn Model, ids: &[TokenId]) -> Result<String, TokenId> {
    let mut bytes = Vec::new();
    for id in ids {
        bytes.extend(model.token_bytes(*id).ok_or(*id)?);
    }
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

fn not_in_vocabulary(id: TokenId, param: &str) -> Error {
    Error::invalid_value(
        param,
        format!("Token id {id} is not in this model's vocabulary."),
    )
}

fn prompt_error(error: ModelError) -> Error {
    match error {
        ModelError::Invalid(message) => Error::invalid_value("prompt", message),
        ModelError::Failed(message) => {
            tracing::error!(%message, "the model failed on a prompt");
            Error::internal()
        }
    }
}

fn context_exceeded(message: String) -> Error {
    Error::new(ErrorKind::ContextLengthExceeded, message).with_param("prompt")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn catalog(models: &[(&str, &[&str])]) -> Catalog {
        let entry = |(name, aliases): &(&str, &[&str])| {
            let aliases: Vec<_> = aliases.iter().map(|alias| (*alias).to_owned()).collect();
            CatalogEntry::new(name, &aliases, "llm_test", 0)
        };
        Catalog::new(models.iter().map(entry).collect())
    }

    fn found(catalog: &Catalog, name: Option<&str>) -> Result<(usize, String), Error> {
        let found = catalog.find(name);
        found.map(|(at, entry)| (at, entry.name.to_string()))
    }

    #[test]
    fn a_model_is_found_by_its_name_and_by_each_alias() {
        let catalog = catalog(&[("a", &[]), ("b", &["bee", "b:latest"])]);
        for name in ["b", "bee", "b:latest"] {
            assert_eq!(found(&catalog, Some(name)), Ok((1, "b".to_owned())));
        }
        let unknown = found(&catalog, Some("c")).expect_err("there is none");
        assert_eq!(unknown.kind, ErrorKind::ModelNotFound);
        assert_eq!(
            unknown.message,
            "There is no model 'c'. This server has: a, b (also bee, b:latest)."
        );
    }

    #[test]
    fn no_name_means_the_only_model() {
        let only = catalog(&[("a", &["first"])]);
        assert_eq!(found(&only, None), Ok((0, "a".to_owned())));
        let unnamed = found(&catalog(&[("a", &[]), ("b", &[])]), None).expect_err("which?");
        assert_eq!(unnamed.kind, ErrorKind::MissingParameter);
        assert_eq!(unnamed.message, "A model must be named. There are: a, b.");
    }

    #[test]
    fn the_list_of_models_stays_short_enough_for_a_header() {
        let names: Vec<_> = (0..100).map(|at| format!("{at:0>256}")).collect();
        let models: Vec<(&str, &[&str])> = names.iter().map(|name| (&**name, &[][..])).collect();
        let unnamed = found(&catalog(&models), None).expect_err("which?");
        assert!(
            unnamed.message.len() < MAX_LISTED_BYTES + 100,
            "{unnamed:?}"
        );
        assert!(unnamed.message.contains("… and 93 more"), "{unnamed:?}");
    }
}
