//! Which engines exist, and which of them takes the next request: the one of this process, or a list
//! of others.
//!
//! Membership only says where to ask. That an engine has failed is noticed by the stream itself.

use std::collections::BTreeMap;
use std::sync::Arc;

use futures_util::future::{join_all, select_all};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
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

/// The engines. Clones share them.
#[derive(Clone)]
pub struct Cluster {
    engines: Arc<[Engine]>,
}

impl Cluster {
    /// The engine of this process: its gRPC service, called without a socket, and without a message being
    /// encoded.
    #[must_use]
    pub fn local(service: impl Inference) -> Self {
        Self {
            engines: [Engine::local(service)].into(),
        }
    }

    /// Engines elsewhere, each `http://host:port` or `unix:/path`. They may come up later. `tasks` watches
    /// them until `stop`.
    ///
    /// # Errors
    /// Names the address that is none.
    pub fn remote(
        addresses: &[String],
        (tasks, critical): (&TaskTracker, &CriticalTasks),
        stop: &CancellationToken,
    ) -> Result<Self, String> {
        let connect = |address: &String| {
            let (channels, health) = remote::connect(address, (tasks, critical), stop)?;
            Ok(Engine::remote(channels, health, tasks.clone()))
        };
        let engines: Result<Vec<_>, String> = addresses.iter().map(connect).collect();
        Ok(Self {
            engines: engines?.into(),
        })
    }

    /// Whether any engine takes requests, as far as is known.
    #[must_use]
    pub fn is_up(&self) -> bool {
        self.engines.iter().any(|engine| engine.is_up())
    }

    /// Waits until an engine has said that it takes requests.
    pub async fn up(&self) {
        let engines = self.engines.iter();
        let up = engines.map(|engine| Box::pin(engine.up()));
        select_all(up).await;
    }

    /// Starts a completion: it has been admitted by an engine. An engine that cannot take it now is
    /// passed over for the next. `delivery_context` says how its tokens will leave this process.
    ///
    /// # Errors
    /// What the last engine said that was asked; an engine without the model speaks for itself only.
    pub async fn complete(
        &self,
        message: &v1::CompletionRequest,
        id: &RequestId,
        timeout: std::time::Duration,
        delivery_context: &DeliveryContext,
    ) -> Result<CheckedEvents, Error> {
        let begun = self.ask(&message.model, |engine| {
            let mut request = Request::new(message.clone());
            request.set_timeout(timeout);
            // It reaches an engine of this process; another process takes this door for its client.
            request.extensions_mut().insert(delivery_context.clone());
            if let Ok(id) = MetadataValue::try_from(&*id.0) {
                request.metadata_mut().insert("x-request-id", id);
            }
            engine.complete(request)
        });
        Ok(CheckedEvents::new(begun.await?, message.n.unwrap_or(1)))
    }

    /// The models of all engines that answer, each name once.
    ///
    /// # Errors
    /// What the last engine said, when none answers.
    pub async fn list_models(&self) -> Result<Vec<v1::Model>, Error> {
        let asked = self
            .by_load()
            .into_iter()
            .map(|engine| async move { engine.list_models().await });
        let (mut models, mut refusal) = (BTreeMap::new(), Some(no_engine()));
        for answer in join_all(asked).await {
            match answer {
                Ok(listed) => {
                    models.extend(listed.into_iter().map(|model| (model.name.clone(), model)));
                    refusal = None;
                }
                Err(status) => refusal = refusal.map(|_| events::refusal(&status)),
            }
        }
        match refusal {
            None => Ok(models.into_values().collect()),
            Some(refusal) => Err(refusal),
        }
    }

    /// One model.
    ///
    /// # Errors
    /// When no engine has it, or none answers.
    pub async fn get_model(&self, model: &str) -> Result<v1::Model, Error> {
        let found = self.ask(model, |engine| engine.get_model(model)).await?;
        found.ok_or_else(Error::internal)
    }

    /// The tokens of a text, by its model's own tokenizer.
    ///
    /// # Errors
    /// What the last engine said that was asked; an engine without the model speaks for itself only.
    pub async fn tokenize(
        &self,
        message: &v1::TokenizeRequest,
    ) -> Result<v1::TokenizeResponse, Error> {
        self.ask(&message.model, |engine| engine.tokenize(message.clone()))
            .await
    }

    /// The text of tokens.
    ///
    /// # Errors
    /// What the last engine said that was asked; an engine without the model speaks for itself only.
    pub async fn detokenize(
        &self,
        message: &v1::DetokenizeRequest,
    ) -> Result<v1::DetokenizeResponse, Error> {
        self.ask(&message.model, |engine| engine.detokenize(message.clone()))
            .await
    }

    /// The first answer of an engine that can give one.
    async fn ask<'a, T, F>(
        &'a self,
        model: &str,
        question: impl Fn(&'a Engine) -> F,
    ) -> Result<T, Error>
    where
        F: Future<Output = Result<T, Status>>,
    {
        if model.is_empty() {
            self.check_one_model().await?;
        }
        let mut refusal = None;
        for engine in self.for_model(model) {
            match question(engine).await {
                Ok(answer) => return Ok(answer),
                Err(status) => {
                    let refused = events::refusal(&status);
                    if !another_engine_may_accept(refused.kind) {
                        return Err(refused);
                    }
                    refusal = Some(more_informative(refusal, refused));
                }
            }
        }
        Err(match refusal {
            None => no_engine(),
            Some(refusal) if refusal.kind == ErrorKind::ModelNotFound => {
                self.not_found(model, refusal).await
            }
            Some(refusal) => refusal,
        })
    }

    /// Engines that have one model each may have several between them: then none is meant by no name.
    async fn check_one_model(&self) -> Result<(), Error> {
        let names = self.names().await;
        if names.len() < 2 {
            return Ok(());
        }
        let message = format!("A model must be named. There are: {}.", names.join(", "));
        Err(Error::new(ErrorKind::MissingParameter, message).with_param("model"))
    }

    /// What is told where no engine that was asked has the model: one that is not up may have it.
    async fn not_found(&self, model: &str, refusal: Error) -> Error {
        let mut down = self.engines.iter().filter(|engine| !engine.is_up());
        if down.any(|engine| engine.models().iter().any(|it| is_named(it, model))) {
            let message = format!("No engine that serves the model '{model}' is up.");
            return Error::new(ErrorKind::NoWorker, message);
        }
        // Each engine speaks for itself only.
        match &self.names().await[..] {
            [] => refusal,
            names => {
                let names = names.join(", ");
                let message = format!("There is no model '{model}'. The engines have: {names}.");
                Error { message, ..refusal }
            }
        }
    }

    /// The names of all models of several engines; none of a single one, which can say itself.
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

    /// The engines in the order in which they are asked for a model: those that list it by name, then those that
    /// list it as an alias, then the others, each group by load. An engine with `--any-model` takes what none lists.
    fn for_model(&self, model: &str) -> Vec<&Engine> {
        let mut engines = self.by_load();
        if engines.len() > 1 && !model.is_empty() {
            engines.sort_by_key(|engine| {
                let models = engine.models();
                let is_name = models.iter().any(|it| it.name == model);
                let is_alias = models.iter().any(|it| is_named(it, model));
                (!is_name, !is_alias)
            });
        }
        engines
    }

    /// The engines that are up, the least busy first; where none is known to be up, all of them.
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

/// A model's name, and how a list of models tells it.
fn listed(model: &v1::Model) -> (String, String) {
    let told = match &model.aliases[..] {
        [] => model.name.clone(),
        aliases => format!("{} (also {})", model.name, aliases.join(", ")),
    };
    (model.name.clone(), told)
}

/// Whether this is an address that an engine can have.
///
/// # Errors
/// What is wrong with it.
pub fn check_address(address: &str) -> Result<(), String> {
    remote::endpoint(address).map(|_| ())
}

/// Whether another engine may take what this one refused.
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

/// What is told of two refusals: the later, but that an engine does not have the model says nothing of
/// an engine that may.
fn more_informative(earlier: Option<Error>, later: Error) -> Error {
    match earlier {
        Some(earlier) if later.kind == ErrorKind::ModelNotFound => earlier,
        Some(_) | None => later,
    }
}

fn is_named(model: &v1::Model, name: &str) -> bool {
    model.name == name || model.aliases.iter().any(|alias| alias == name)
}

fn no_engine() -> Error {
    Error::from(&Status::unavailable("no engine"))
}
