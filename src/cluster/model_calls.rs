//! The calls of a cluster other than completions: lists of models, and tokenizers. Each call asks one engine after the
//! other, until one answers.

use std::collections::BTreeMap;
use std::sync::Arc;

use futures_util::future::join_all;
use tokio::time::Instant;
use tonic::Status;

use super::context::CallContext;
use super::failure::Failure;
use super::policy::Fault;
use super::route::{Route, Target};
use super::selection::{has_name, more_informative, name_with_aliases};
use super::{Cluster, no_engine_failure};
use crate::error::{Error, ErrorKind};
use crate::proto::v1;

impl Cluster {
    /// Returns the models that the request's key may use, sorted by name: those of the routes, or those of all upstreams
    /// that respond. Each name is listed once.
    ///
    /// # Errors
    /// Returns the failure of the last upstream if none responds.
    pub async fn list_models(&self, context: &CallContext) -> Result<Vec<v1::Model>, Failure> {
        let mut models = self.list_all_models(context).await?;
        models.retain(|model| {
            let aliases = model.aliases.iter().map(String::as_str);
            let names = std::iter::once(&*model.name).chain(aliases);
            context.request.allows_model(names)
        });
        Ok(models)
    }

    async fn list_all_models(&self, context: &CallContext) -> Result<Vec<v1::Model>, Failure> {
        self.reject_loop(context)?;
        let table = Arc::clone(&self.table.borrow());
        if !table.routes.is_empty() {
            let mut models: Vec<_> = table.routes.values().map(|it| it.model()).collect();
            models.sort_by(|one, other| one.name.cmp(&other.name));
            return Ok(models);
        }
        let route = Route::to_all("", &self.members());
        let calls = ordered(&route).into_iter().map(|target| async move {
            let request = context.build_request(v1::ListModelsRequest {}, self.gateway());
            target.member.upstream.list_models(request).await
        });
        let (mut models, mut failure) = (BTreeMap::new(), Some(no_engine_failure()));
        for result in join_all(calls).await {
            match result {
                Ok(listed) => {
                    let listed = listed.models.into_iter();
                    models.extend(listed.map(|model| (model.name.clone(), model)));
                    failure = None;
                }
                Err(status) => failure = failure.map(|_| Failure::rejection(&status)),
            }
        }
        match failure {
            None => Ok(models.into_values().collect()),
            Some(failure) => Err(failure),
        }
    }

    /// Returns the description of one model.
    ///
    /// # Errors
    /// Returns an error if no upstream has the model, or none responds.
    pub async fn get_model(
        &self,
        model: &str,
        context: &CallContext,
    ) -> Result<v1::Model, Failure> {
        let route = self.find_route(model, context).await?;
        let call = |target: Target| async move {
            let message = v1::GetModelRequest {
                model: target.model,
            };
            let request = context.build_request(message, self.gateway());
            target.member.upstream.get_model(request).await
        };
        let found = self.try_each(&route, model, context, call).await?;
        let found = found.model.ok_or_else(Error::internal)?;
        Ok(route.renamed(found))
    }

    /// Converts text or a chat into token ids, with the tokenizer of its model.
    ///
    /// # Errors
    /// Returns the most informative failure of the upstreams that were tried.
    pub async fn tokenize(
        &self,
        message: &v1::TokenizeRequest,
        context: &CallContext,
    ) -> Result<v1::TokenizeResponse, Failure> {
        let route = self.find_route(&message.model, context).await?;
        let call = |target: Target| async move {
            let message = v1::TokenizeRequest {
                model: target.model,
                ..message.clone()
            };
            let request = context.build_request(message, self.gateway());
            target.member.upstream.tokenize(request).await
        };
        self.try_each(&route, &message.model, context, call).await
    }

    /// Converts token ids into text.
    ///
    /// # Errors
    /// Returns the most informative failure of the upstreams that were tried.
    pub async fn detokenize(
        &self,
        message: &v1::DetokenizeRequest,
        context: &CallContext,
    ) -> Result<v1::DetokenizeResponse, Failure> {
        let route = self.find_route(&message.model, context).await?;
        let call = |target: Target| async move {
            let message = v1::DetokenizeRequest {
                model: target.model,
                ..message.clone()
            };
            let request = context.build_request(message, self.gateway());
            target.member.upstream.detokenize(request).await
        };
        self.try_each(&route, &message.model, context, call).await
    }

    /// Tries one target after the other, until a call succeeds or fails with an error that every target would return.
    async fn try_each<T, F>(
        &self,
        route: &Route,
        model: &str,
        context: &CallContext,
        call: impl Fn(Target) -> F,
    ) -> Result<T, Failure>
    where
        F: Future<Output = Result<T, Status>>,
    {
        let mut last = None;
        for target in ordered(route) {
            match call(target).await {
                Ok(response) => return Ok(response),
                Err(status) => {
                    let failure = Failure::rejection(&status);
                    if failure.fault() == Fault::Request {
                        return Err(failure);
                    }
                    last = Some(more_informative(last, failure));
                }
            }
        }
        Err(match last {
            None => no_engine_failure(),
            Some(failure) if failure.error().kind == ErrorKind::ModelNotFound => {
                self.model_not_found_failure(model, route, failure, context)
                    .await
            }
            Some(failure) => failure,
        })
    }

    /// Rejects a request without a model name if the engines together have several models. A single engine would
    /// accept the request if it has only one model.
    pub(super) async fn check_model_is_unambiguous(
        &self,
        context: &CallContext,
    ) -> Result<(), Error> {
        let names = self.model_names(context).await;
        if names.len() < 2 {
            return Ok(());
        }
        let message = format!(
            "`model` is required. The engines have: {}.",
            names.join(", ")
        );
        Err(Error::new(ErrorKind::MissingParameter, message).with_param("model"))
    }

    /// Returns the failure for a model that no reachable engine has. If an engine that is down has the model, the
    /// failure is `NoWorker`.
    pub(super) async fn model_not_found_failure(
        &self,
        model: &str,
        route: &Route,
        failure: Failure,
        context: &CallContext,
    ) -> Failure {
        let is_down_with_model =
            |target: &Target| !target.member.is_up() && target.listed_model().is_some();
        if route.targets.iter().any(is_down_with_model) {
            let message = format!("No engine that serves the model '{model}' is up.");
            return Error::new(ErrorKind::NoWorker, message).into();
        }
        // An engine's message lists only its own models, so the message is replaced by one with the models of all
        // engines.
        match &self.model_names(context).await[..] {
            [] => failure,
            names => {
                let names = names.join(", ");
                let message = format!("There is no model '{model}'. The engines have: {names}.");
                Error {
                    message,
                    ..failure.into()
                }
                .into()
            }
        }
    }

    /// Returns the error for a model that has no route.
    pub(super) fn unknown_route_error(&self, model: &str) -> Error {
        let table = self.table.borrow();
        let mut names: Vec<_> = table.routes.keys().map(String::as_str).collect();
        names.sort_unstable();
        let names = names.join(", ");
        let message = format!("There is no model '{model}'. The gateway has: {names}.");
        Error::new(ErrorKind::ModelNotFound, message).with_param("model")
    }

    /// Returns the names of all models, for error messages. Returns none if there is only one engine and no route,
    /// because the engine's own message lists its models.
    async fn model_names(&self, context: &CallContext) -> Vec<String> {
        let has_routes = !self.table.borrow().routes.is_empty();
        let members = self.members();
        if members.len() < 2 && !has_routes {
            return Vec::new();
        }
        let entry = |model: &v1::Model| (model.name.clone(), name_with_aliases(model));
        let mut names = BTreeMap::new();
        let mut all_are_known = !has_routes;
        if all_are_known {
            for member in &members {
                let health = member.upstream.health().borrow();
                names.extend(health.models.iter().map(entry));
                all_are_known &= !health.is_up() || !health.models.is_empty();
            }
        }
        if !all_are_known {
            let models = self.list_models(context).await.unwrap_or_default();
            names.extend(models.iter().map(entry));
        }
        names.retain(|name, _| context.request.allows_model([name.as_str()]));
        names.into_values().collect()
    }
}

impl Route {
    /// Returns the description of the route's model: that of the first target that is known, under the route's name.
    fn model(&self) -> v1::Model {
        let known = self.targets.iter().find_map(Target::listed_model);
        self.renamed(known.unwrap_or_default())
    }

    /// Returns a target's description of its model under the name that clients use. Without a configured route, that is
    /// the engine's own name.
    fn renamed(&self, model: v1::Model) -> v1::Model {
        if self.spec.targets.is_empty() {
            return model;
        }
        v1::Model {
            name: self.spec.model.clone(),
            aliases: Vec::new(),
            ..model
        }
    }

    /// Returns the name under which clients see the model, if it is known.
    pub(super) fn served_name(&self) -> Option<String> {
        if !self.spec.targets.is_empty() {
            return Some(self.spec.model.clone());
        }
        let listed = self.targets.iter().find_map(|target| {
            let model = target.listed_model()?;
            has_name(&model, &target.model).then_some(model)
        });
        listed.map(|model| model.name)
    }
}

/// Returns the targets in the order in which to ask them: those that may be up, by tier and load. If all are down,
/// returns all of them.
fn ordered(route: &Route) -> Vec<Target> {
    let views = route.views(Instant::now());
    let mut targets: Vec<_> = route.targets.iter().cloned().zip(views).collect();
    if targets.iter().any(|(_, view)| !view.is_down) {
        targets.retain(|(_, view)| !view.is_down);
    }
    targets.sort_by(|(_, one), (_, other)| {
        let by_tier = one.tier.cmp(&other.tier);
        by_tier.then_with(|| one.load.cmp(&other.load))
    });
    targets.into_iter().map(|(target, _)| target).collect()
}
