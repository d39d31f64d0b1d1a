//! The set of engines, and the choice of the engine for the next request. There is either one engine in this process or
//! a list of remote engines. This module must not know how tokens are generated.
//!
//! Health checks only choose where to send a request. The stream of a request detects when its engine fails.

use std::collections::BTreeMap;
use std::sync::Arc;

use futures_util::future::{join_all, select_all};
use tokio_util::sync::CancellationToken;
use tonic::metadata::MetadataValue;
use tonic::{Request, Status};

use crate::critical::CriticalTasks;
use crate::error::{Error, ErrorKind};
use crate::proto::v1;
use crate::proto::v1::inference_server::Inference;
use crate::request::RequestId;
use crate::telemetry::DeliveryContext;

mod engine;
mod events;
mod remote;
#[cfg(test)]
pub(crate) mod scripted;
#[cfg(test)]
mod tests;

use engine::Engine;
pub use events::CheckedEvents;

/// The engines that can complete requests. Clones share the engines.
#[derive(Clone)]
pub struct Cluster {
    engines: Arc<[Engine]>,
}

impl Cluster {
    /// Creates a cluster of the engine in this process. Its gRPC service is called directly, without a socket and
    /// without encoding messages.
    #[must_use]
    pub fn local(service: impl Inference) -> Self {
        Self {
            engines: [Engine::local(service)].into(),
        }
    }

    /// Creates a cluster of remote engines. Each address is `http://host:port` or `unix:/path`. Engines may start
    /// later. Critical tasks watch the engines until `stop` is cancelled.
    ///
    /// # Errors
    /// Returns a message about the first invalid address.
    pub fn remote(
        addresses: &[String],
        critical: &CriticalTasks,
        stop: &CancellationToken,
    ) -> Result<Self, String> {
        let connect = |address: &String| {
            let remote = remote::connect(address, critical, stop)?;
            Ok(Engine::remote(remote, critical.tracker().clone()))
        };
        let engines: Result<Vec<_>, String> = addresses.iter().map(connect).collect();
        Ok(Self {
            engines: engines?.into(),
        })
    }

    /// Returns true unless every engine is known to be down.
    #[must_use]
    pub fn is_up(&self) -> bool {
        self.engines.iter().any(|engine| engine.is_up())
    }

    /// Waits until an engine reports that it accepts requests.
    pub async fn wait_until_up(&self) {
        let engines = self.engines.iter();
        let up = engines.map(|engine| Box::pin(engine.wait_until_up()));
        select_all(up).await;
    }

    /// Starts a completion. Returns once an engine has admitted it. Skips engines that cannot accept it now.
    /// `delivery_context` describes how this process delivers the tokens.
    ///
    /// # Errors
    /// Returns the most informative error of the engines that were tried.
    pub async fn complete(
        &self,
        message: &v1::CompletionRequest,
        id: &RequestId,
        timeout: std::time::Duration,
        delivery_context: &DeliveryContext,
    ) -> Result<CheckedEvents, Error> {
        let source = self.try_engines(&message.model, |engine| {
            let mut request = Request::new(message.clone());
            request.set_timeout(timeout);
            // Extensions reach only an engine in this process. A remote engine treats this gateway as its client.
            request.extensions_mut().insert(delivery_context.clone());
            if let Ok(id) = MetadataValue::try_from(&*id.0) {
                request.metadata_mut().insert("x-request-id", id);
            }
            engine.complete(request)
        });
        Ok(CheckedEvents::new(source.await?, message.n.unwrap_or(1)))
    }

    /// Returns the models of all engines that respond, sorted by name. Each name is listed once.
    ///
    /// # Errors
    /// Returns the error of the last engine if no engine responds.
    pub async fn list_models(&self) -> Result<Vec<v1::Model>, Error> {
        let calls = self
            .by_load()
            .into_iter()
            .map(|engine| async move { engine.list_models().await });
        let (mut models, mut error) = (BTreeMap::new(), Some(no_engine()));
        for result in join_all(calls).await {
            match result {
                Ok(listed) => {
                    models.extend(listed.into_iter().map(|model| (model.name.clone(), model)));
                    error = None;
                }
                Err(status) => error = error.map(|_| events::rejection(&status)),
            }
        }
        match error {
            None => Ok(models.into_values().collect()),
            Some(error) => Err(error),
        }
    }

    /// Returns the description of one model.
    ///
    /// # Errors
    /// Returns an error if no engine has the model, or no engine responds.
    pub async fn get_model(&self, model: &str) -> Result<v1::Model, Error> {
        let found = self
            .try_engines(model, |engine| engine.get_model(model))
            .await?;
        found.ok_or_else(Error::internal)
    }

    /// Converts text or a chat into token ids, with the tokenizer of its model.
    ///
    /// # Errors
    /// Returns the most informative error of the engines that were tried.
    pub async fn tokenize(
        &self,
        message: &v1::TokenizeRequest,
    ) -> Result<v1::TokenizeResponse, Error> {
        self.try_engines(&message.model, |engine| engine.tokenize(message.clone()))
            .await
    }

    /// Converts token ids into text.
    ///
    /// # Errors
    /// Returns the most informative error of the engines that were tried.
    pub async fn detokenize(
        &self,
        message: &v1::DetokenizeRequest,
    ) -> Result<v1::DetokenizeResponse, Error> {
        self.try_engines(&message.model, |engine| engine.detokenize(message.clone()))
            .await
    }

    /// Calls one engine after the other until a call succeeds, or fails with an error that every engine would return.
    async fn try_engines<'a, T, F>(
        &'a self,
        model: &str,
        call: impl Fn(&'a Engine) -> F,
    ) -> Result<T, Error>
    where
        F: Future<Output = Result<T, Status>>,
    {
        if model.is_empty() {
            self.check_model_is_unambiguous().await?;
        }
        let mut last_error = None;
        for engine in self.for_model(model) {
            match call(engine).await {
                Ok(response) => return Ok(response),
                Err(status) => {
                    let error = events::rejection(&status);
                    if !another_engine_may_accept(error.kind) {
                        return Err(error);
                    }
                    last_error = Some(more_informative(last_error, error));
                }
            }
        }
        Err(match last_error {
            None => no_engine(),
            Some(error) if error.kind == ErrorKind::ModelNotFound => {
                self.not_found(model, error).await
            }
            Some(error) => error,
        })
    }

    /// Rejects a request without a model name if the engines together have several models. Each engine alone may have
    /// only one, and would accept the request.
    async fn check_model_is_unambiguous(&self) -> Result<(), Error> {
        let names = self.names().await;
        if names.len() < 2 {
            return Ok(());
        }
        let message = format!(
            "`model` is required. The engines have: {}.",
            names.join(", ")
        );
        Err(Error::new(ErrorKind::MissingParameter, message).with_param("model"))
    }

    /// Returns the error for a model that no reachable engine has: `NoWorker` if an engine that is down has it.
    async fn not_found(&self, model: &str, error: Error) -> Error {
        let mut down = self.engines.iter().filter(|engine| !engine.is_up());
        if down.any(|engine| engine.models().iter().any(|it| has_name(it, model))) {
            let message = format!("No engine that serves the model '{model}' is up.");
            return Error::new(ErrorKind::NoWorker, message);
        }
        // The message of an engine lists only its own models.
        match &self.names().await[..] {
            [] => error,
            names => {
                let names = names.join(", ");
                let message = format!("There is no model '{model}'. The engines have: {names}.");
                Error { message, ..error }
            }
        }
    }

    /// Returns the names of all models, for error messages. Empty for a single engine, whose own message lists them.
    async fn names(&self) -> Vec<String> {
        if self.engines.len() < 2 {
            return Vec::new();
        }
        let mut names = BTreeMap::new();
        for engine in &*self.engines {
            names.extend(engine.models().iter().map(listed));
        }
        let is_known = |engine: &Engine| !engine.is_up() || !engine.models().is_empty();
        if !self.engines.iter().all(is_known) {
            let models = self.list_models().await.unwrap_or_default();
            names.extend(models.iter().map(listed));
        }
        names.into_values().collect()
    }

    /// Returns the engines in the order to try them for a model: first those that list it by name, then those that list
    /// it as an alias, then the others, each group by load. The others matter because an engine with `--any-model`
    /// accepts models that it does not list.
    fn for_model(&self, model: &str) -> Vec<&Engine> {
        let mut engines = self.by_load();
        if engines.len() > 1 && !model.is_empty() {
            engines.sort_by_key(|engine| {
                let models = engine.models();
                let is_name = models.iter().any(|it| it.name == model);
                let is_alias = models.iter().any(|it| has_name(it, model));
                (!is_name, !is_alias)
            });
        }
        engines
    }

    /// Returns the engines that are not known to be down, or all engines if none is left, sorted by load.
    fn by_load(&self) -> Vec<&Engine> {
        let mut engines: Vec<_> = self
            .engines
            .iter()
            .filter(|engine| engine.is_up())
            .collect();
        if engines.is_empty() {
            engines = self.engines.iter().collect();
        }
        engines.sort_by_key(|engine| engine.in_flight());
        engines
    }
}

/// Returns a model's name, and its entry in a list of models.
fn listed(model: &v1::Model) -> (String, String) {
    let entry = match &model.aliases[..] {
        [] => model.name.clone(),
        aliases => format!("{} (also {})", model.name, aliases.join(", ")),
    };
    (model.name.clone(), entry)
}

/// Checks the address of a remote engine.
///
/// # Errors
/// Returns a message that describes the problem.
pub fn check_address(address: &str) -> Result<(), String> {
    remote::endpoint(address).map(|_| ())
}

/// Returns true if another engine may accept a request that one engine rejected with this error.
fn another_engine_may_accept(kind: ErrorKind) -> bool {
    matches!(
        kind,
        ErrorKind::ModelNotFound
            | ErrorKind::NoWorker
            | ErrorKind::NotReady
            | ErrorKind::Draining
            | ErrorKind::QueueFull
            | ErrorKind::UpstreamError
            | ErrorKind::Internal
    )
}

/// Chooses the error to report: the later one, unless it is `ModelNotFound`, which does not explain why an engine that
/// may have the model rejected the request.
fn more_informative(earlier: Option<Error>, later: Error) -> Error {
    match earlier {
        Some(earlier) if later.kind == ErrorKind::ModelNotFound => earlier,
        Some(_) | None => later,
    }
}

fn has_name(model: &v1::Model, name: &str) -> bool {
    model.name == name || model.aliases.iter().any(|alias| alias == name)
}

fn no_engine() -> Error {
    Error::from(&Status::unavailable("there is no engine"))
}
