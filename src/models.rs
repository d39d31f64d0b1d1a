//! The registry of the models that an engine serves: names and aliases, facts, and readiness.
//!
//! Everything that belongs to one model, such as its queue and its workers, refers to the model by its [`ModelId`].
//! [`Models::find`] resolves the names in requests. Another kind of named target, such as an adapter on a base model,
//! would also be an entry of this registry. This module must not know workers, queues or prompts.

use std::sync::{Arc, OnceLock};

use crate::error::{Error, ErrorKind};
use crate::request::MAX_MODEL_NAME_BYTES;
use crate::runner::Model;

mod model_map;
mod readiness;
#[cfg(test)]
mod tests;

pub use model_map::ModelMap;
pub(crate) use readiness::ModelStatus;
pub use readiness::Readiness;

/// Maximum length in bytes of the list of models in an error message.
const MAX_MODEL_LIST_BYTES: usize = 2 * 1024;

/// Identifies a model of one registry. Only [`Models::new`] creates ids.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ModelId(usize);

/// The models that an engine serves, in the order of the settings. Clones share them.
#[derive(Clone)]
pub struct Models {
    entries: Arc<[ModelEntry]>,
    unknown: UnknownModelPolicy,
}

/// Reaction to a request that names an unknown model, or none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum UnknownModelPolicy {
    /// Rejects the request with an error.
    #[default]
    Refuse,
    /// Uses the first model of the registry.
    First,
}

/// A model to register.
#[derive(Clone, Debug)]
pub struct ModelSpec {
    /// Name of the model in requests and responses.
    pub name: String,
    /// Other names of the model in requests.
    pub aliases: Vec<String>,
    /// Kind of the runner.
    pub runner: &'static str,
    /// Time of the registration, in seconds since the Unix epoch.
    pub created: i64,
}

/// A registered model.
pub struct ModelEntry {
    /// Id of the model in this registry.
    pub id: ModelId,
    /// Name of the model in requests and responses.
    pub name: Arc<str>,
    /// Other names of the model in requests.
    pub aliases: Box<[String]>,
    /// Kind of the runner.
    pub runner: &'static str,
    /// Time of the registration, in seconds since the Unix epoch.
    pub created: i64,
    /// The loaded model. Empty until a worker has loaded it.
    loaded: OnceLock<Arc<dyn Model>>,
}

impl ModelEntry {
    /// Returns the name and the aliases.
    pub(crate) fn names(&self) -> impl Iterator<Item = &str> {
        let aliases = self.aliases.iter().map(String::as_str);
        std::iter::once(&*self.name).chain(aliases)
    }
}

impl Models {
    /// Creates the registry of these models. Their names and aliases must be unique; this is not checked here.
    #[must_use]
    pub fn new(specs: Vec<ModelSpec>, unknown: UnknownModelPolicy) -> Self {
        let entries = specs.into_iter().enumerate();
        let entries = entries.map(|(index, spec)| ModelEntry::new(ModelId(index), spec));
        Self {
            entries: entries.collect(),
            unknown,
        }
    }

    /// Returns all models.
    #[must_use]
    pub fn entries(&self) -> &[ModelEntry] {
        &self.entries
    }

    /// Returns the model with this id.
    #[must_use]
    pub fn get(&self, id: ModelId) -> &ModelEntry {
        &self.entries[id.0]
    }

    /// Finds the model with this name or alias, or the only model if `name` is `None`.
    ///
    /// # Errors
    /// Returns an error if the name is unknown, or missing while there are several models. With
    /// [`UnknownModelPolicy::First`], both cases return the first model instead.
    pub fn find(&self, name: Option<&str>) -> Result<&ModelEntry, Error> {
        let first = match self.unknown {
            UnknownModelPolicy::Refuse => None,
            UnknownModelPolicy::First => self.entries.first(),
        };
        match name {
            Some(name) if name.len() > MAX_MODEL_NAME_BYTES => {
                let message = format!("`model` must be at most {MAX_MODEL_NAME_BYTES} bytes.");
                Err(Error::invalid_value("model", message))
            }
            Some(name) => self
                .entries
                .iter()
                .find(|entry| entry.is_named(name))
                .or(first)
                .ok_or_else(|| {
                    let message = format!(
                        "There is no model '{name}'. This server has: {}.",
                        self.names()
                    );
                    Error::new(ErrorKind::ModelNotFound, message).with_param("model")
                }),
            None => match (&self.entries[..], first) {
                ([only], _) => Ok(only),
                (_, Some(first)) => Ok(first),
                ([] | [_, _, ..], None) => {
                    let message =
                        format!("`model` is required. This server has: {}.", self.names());
                    Err(Error::new(ErrorKind::MissingParameter, message).with_param("model"))
                }
            },
        }
    }

    /// Lists all models with their aliases for an error message. The list is cut at [`MAX_MODEL_LIST_BYTES`], because
    /// gRPC sends error messages in headers.
    fn names(&self) -> String {
        let mut listed = String::new();
        for (index, entry) in self.entries.iter().enumerate() {
            let separator = if index == 0 { "" } else { ", " };
            let aliases = match &entry.aliases[..] {
                [] => String::new(),
                aliases => format!(" (also {})", aliases.join(", ")),
            };
            let next = format!("{separator}{}{aliases}", entry.name);
            if listed.len() + next.len() > MAX_MODEL_LIST_BYTES {
                return format!("{listed} … and {} more", self.entries.len() - index);
            }
            listed.push_str(&next);
        }
        listed
    }
}

#[cfg(test)]
impl Models {
    /// Registers models of the test runner with these names.
    pub(crate) fn for_test(names: &[&str]) -> Self {
        let specs = names.iter().map(|name| ModelSpec {
            name: (*name).to_owned(),
            aliases: Vec::new(),
            runner: "llm_test",
            created: 0,
        });
        Self::new(specs.collect(), UnknownModelPolicy::Refuse)
    }
}

impl ModelEntry {
    fn new(id: ModelId, spec: ModelSpec) -> Self {
        Self {
            id,
            name: spec.name.into(),
            aliases: spec.aliases.into(),
            runner: spec.runner,
            created: spec.created,
            loaded: OnceLock::new(),
        }
    }

    /// Returns the loaded model, with its facts, tokenizer and chat template.
    ///
    /// # Errors
    /// Returns [`ErrorKind::NotReady`] if no worker has loaded the model.
    pub(crate) fn loaded_model(&self) -> Result<&Arc<dyn Model>, Error> {
        self.loaded.get().ok_or_else(|| {
            let message = format!("The model '{}' is not loaded.", self.name);
            Error::new(ErrorKind::NotReady, message)
        })
    }

    /// Records the model that a worker has loaded. Only the first call for a model has an effect.
    pub(crate) fn set_loaded(&self, model: Arc<dyn Model>) {
        let _ = self.loaded.set(model);
    }

    fn is_named(&self, name: &str) -> bool {
        *self.name == *name || self.aliases.iter().any(|alias| alias == name)
    }
}
