//! The upstreams that can complete requests, and the choice of an upstream for each request. There is either one
//! engine in this process or a changing list of remote engines. This module must not know how tokens are generated.
//!
//! Health checks only influence the choice. A failure of the chosen engine is detected by the request's own stream.

use std::collections::BTreeMap;
use std::sync::Arc;

use futures_util::future::join_all;
use futures_util::stream::FuturesUnordered;
use futures_util::{FutureExt, StreamExt};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tonic::Status;

use crate::critical::CriticalTasks;
use crate::error::{Error, ErrorKind};
use crate::proto::v1;
use crate::proto::v1::inference_server::Inference;

mod address;
mod context;
mod events;
mod failure;
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) mod fuzzing;
mod local;
mod membership;
mod openai;
mod remote;
#[cfg(test)]
pub(crate) mod scripted;
mod selection;
mod spec;
#[cfg(test)]
mod tests;
mod upstream;
mod via;

pub use address::EngineAddress;
use address::EngineProtocol;
pub(crate) use address::{check_listen_address, check_no_duplicates, without_secrets};
pub use context::CallContext;
pub use events::CheckedEvents;
pub use failure::Failure;
use local::LocalUpstream;
pub use membership::Membership;
use membership::{Members, Upstreams};
use openai::OpenAiUpstream;
use remote::Connector;
use selection::{another_engine_may_accept, has_name, more_informative, name_with_aliases};
pub use spec::{ApiKey, ClusterSpec, EngineSpec, RoutePolicy, RouteSpec, TargetSpec};
pub use upstream::{Availability, BoxedEventStream};
pub(crate) use upstream::{Health, Upstream};
use via::GatewayId;
pub(crate) use via::Via;

/// The upstreams that can complete requests. Clones share the upstreams.
#[derive(Clone)]
pub struct Cluster {
    upstreams: watch::Receiver<Upstreams>,
    /// Identifies this gateway in requests to remote engines. `None` if the engine is in this process.
    gateway: Option<GatewayId>,
}

impl Cluster {
    /// Creates a cluster with the engine in this process. Its gRPC service is called directly, without a socket and
    /// without encoding messages.
    #[must_use]
    pub(crate) fn local(service: impl Inference) -> Self {
        let upstreams: Upstreams = Arc::new([Arc::new(LocalUpstream::new(service))]);
        Self {
            upstreams: watch::channel(upstreams).1,
            gateway: None,
        }
    }

    /// Creates a cluster of remote engines. Engines may start later. If the membership already has a snapshot, it is
    /// applied before this returns.
    ///
    /// Critical tasks follow the membership and watch the engines' health until `stop` is cancelled.
    #[must_use]
    pub fn remote(
        membership: Membership,
        critical: &CriticalTasks,
        stop: &CancellationToken,
    ) -> Self {
        let gateway = GatewayId::random();
        let connector = Connector {
            gateway: gateway.clone(),
            critical: critical.clone(),
            stop: stop.clone(),
        };
        let connect = move |engine: &EngineSpec| -> Arc<dyn Upstream> {
            match engine.address.protocol() {
                EngineProtocol::Tokenway => Arc::new(connector.connect(&engine.address)),
                EngineProtocol::OpenAi(base_url) => {
                    let (critical, stop) = (&connector.critical, &connector.stop);
                    let base_url = base_url.clone();
                    Arc::new(OpenAiUpstream::connect(engine, base_url, critical, stop))
                }
            }
        };
        let (upstreams, following) = follow_membership(membership, connect);
        let stop = stop.clone();
        critical.spawn("membership", async move {
            stop.run_until_cancelled_owned(following).await;
        });
        Self {
            upstreams,
            gateway: Some(gateway),
        }
    }

    /// Returns true unless every upstream is known to be unavailable.
    #[must_use]
    pub(crate) fn is_up(&self) -> bool {
        let upstreams = self.upstreams.borrow();
        upstreams.iter().any(|it| it.health().borrow().is_up())
    }

    /// Waits until an upstream reports that it accepts requests.
    pub(crate) async fn wait_until_up(&self) {
        self.wait_until(|health| health.availability == Availability::Up, true)
            .await;
    }

    /// Waits until [`Self::is_up`] no longer equals `was_up`.
    pub(crate) async fn wait_for_change(&self, was_up: bool) {
        self.wait_until(Health::is_up, !was_up).await;
    }

    /// Waits until an upstream's health satisfies `holds` (if `expected` is true), or until none does (if false).
    async fn wait_until(&self, holds: impl Fn(&Health) -> bool, expected: bool) {
        let mut upstreams = self.upstreams.clone();
        loop {
            let current = Arc::clone(&upstreams.borrow_and_update());
            let mut watches: Vec<_> = current.iter().map(|it| it.health().clone()).collect();
            let mut any = false;
            for watch in &mut watches {
                any |= holds(&watch.borrow_and_update());
            }
            if any == expected {
                return;
            }
            let mut changes: FuturesUnordered<_> = watches.iter_mut().map(next_change).collect();
            tokio::select! {
                () = next_change(&mut upstreams) => {}
                Some(()) = changes.next() => {}
            }
        }
    }

    /// Returns true if a request to this model may have fields that Tokenway does not know.
    pub(crate) fn takes_extra_fields(&self, model: &str) -> bool {
        selection::takes_extra_fields(selection::sort_by_load(self.without_self()), model)
    }

    /// Starts a completion on an upstream that admits it. Skips upstreams that cannot accept the request now, and
    /// those that do not support one of its parameters.
    ///
    /// # Errors
    /// Returns the most informative failure of the upstreams that were tried.
    pub async fn complete(
        &self,
        message: &v1::CompletionRequest,
        context: &CallContext,
    ) -> Result<CheckedEvents, Failure> {
        let upstreams = self.select_upstreams(&message.model, context).await?;
        let upstreams = selection::filter_supporting(upstreams, message)?;
        let call = |upstream: Arc<dyn Upstream>| async move {
            upstream
                .complete(self.build_request(message.clone(), context))
                .await
        };
        let events = self.try_each(upstreams, &message.model, context, call);
        Ok(CheckedEvents::new(events.await?, message))
    }

    /// Returns the models of all upstreams that respond, sorted by name. Each name is listed once.
    ///
    /// # Errors
    /// Returns the failure of the last upstream if none responds.
    pub async fn list_models(&self, context: &CallContext) -> Result<Vec<v1::Model>, Failure> {
        self.reject_loop(context)?;
        let calls = selection::sort_by_load(self.without_self())
            .into_iter()
            .map(|upstream| async move {
                let request = self.build_request(v1::ListModelsRequest {}, context);
                upstream.list_models(request).await
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
        let upstreams = self.select_upstreams(model, context).await?;
        let call = |upstream: Arc<dyn Upstream>| async move {
            let message = v1::GetModelRequest {
                model: model.to_owned(),
            };
            upstream
                .get_model(self.build_request(message, context))
                .await
        };
        let found = self.try_each(upstreams, model, context, call).await?;
        found.model.ok_or_else(|| Error::internal().into())
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
        let upstreams = self.select_upstreams(&message.model, context).await?;
        let call = |upstream: Arc<dyn Upstream>| async move {
            upstream
                .tokenize(self.build_request(message.clone(), context))
                .await
        };
        self.try_each(upstreams, &message.model, context, call)
            .await
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
        let upstreams = self.select_upstreams(&message.model, context).await?;
        let call = |upstream: Arc<dyn Upstream>| async move {
            upstream
                .detokenize(self.build_request(message.clone(), context))
                .await
        };
        self.try_each(upstreams, &message.model, context, call)
            .await
    }

    fn build_request<T>(&self, message: T, context: &CallContext) -> tonic::Request<T> {
        context.build_request(message, self.gateway.as_ref())
    }

    /// Rejects a request that has already passed through this gateway.
    fn reject_loop(&self, context: &CallContext) -> Result<(), Failure> {
        match &self.gateway {
            Some(gateway) if context.via.contains(gateway) => {
                Err(Failure::loop_detected(gateway.loop_detected_status()))
            }
            Some(_) | None => Ok(()),
        }
    }

    /// Returns the upstreams for a request, in the order in which to try them.
    async fn select_upstreams(
        &self,
        model: &str,
        context: &CallContext,
    ) -> Result<Vec<Arc<dyn Upstream>>, Failure> {
        self.reject_loop(context)?;
        let record = context.request.record();
        record.set_requested_model(model);
        if let Some(name) = self.served_name(model) {
            record.set_model(&name);
        }
        if model.is_empty() {
            self.check_model_is_unambiguous(context).await?;
        }
        Ok(selection::order_for_model(self.without_self(), model))
    }

    /// Returns the name under which a remote engine lists the model with this name or alias. The engine in this
    /// process resolves names itself.
    fn served_name(&self, model: &str) -> Option<String> {
        self.without_self().iter().find_map(|upstream| {
            let health = upstream.health().borrow();
            let served = health.models.iter().find(|it| has_name(it, model))?;
            Some(served.name.clone())
        })
    }

    /// Tries one upstream after the other, until a call succeeds or fails with an error that every upstream would
    /// return.
    async fn try_each<T, F>(
        &self,
        upstreams: Vec<Arc<dyn Upstream>>,
        model: &str,
        context: &CallContext,
        call: impl Fn(Arc<dyn Upstream>) -> F,
    ) -> Result<T, Failure>
    where
        F: Future<Output = Result<T, Status>>,
    {
        let mut last = None;
        for upstream in upstreams {
            match call(upstream).await {
                Ok(response) => return Ok(response),
                Err(status) => {
                    let failure = Failure::rejection(&status);
                    if !another_engine_may_accept(failure.error().kind) {
                        return Err(failure);
                    }
                    last = Some(more_informative(last, failure));
                }
            }
        }
        Err(match last {
            None => no_engine_failure(),
            Some(failure) if failure.error().kind == ErrorKind::ModelNotFound => {
                self.model_not_found_failure(model, failure, context).await
            }
            Some(failure) => failure,
        })
    }

    /// Rejects a request without a model name if the engines together have several models. A single engine would
    /// accept the request if it has only one model.
    async fn check_model_is_unambiguous(&self, context: &CallContext) -> Result<(), Error> {
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
    async fn model_not_found_failure(
        &self,
        model: &str,
        failure: Failure,
        context: &CallContext,
    ) -> Failure {
        let is_down_with_model = |upstream: &Arc<dyn Upstream>| {
            let health = upstream.health().borrow();
            !health.is_up() && health.models.iter().any(|it| has_name(it, model))
        };
        if self.without_self().iter().any(is_down_with_model) {
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

    /// Returns the names of all models, for error messages. Returns none if there is only one engine, because its own
    /// message lists its models.
    async fn model_names(&self, context: &CallContext) -> Vec<String> {
        let upstreams = self.without_self();
        if upstreams.len() < 2 {
            return Vec::new();
        }
        let entry = |model: &v1::Model| (model.name.clone(), name_with_aliases(model));
        let mut names = BTreeMap::new();
        let mut all_are_known = true;
        for upstream in &upstreams {
            let health = upstream.health().borrow();
            names.extend(health.models.iter().map(entry));
            all_are_known &= !health.is_up() || !health.models.is_empty();
        }
        if !all_are_known {
            let models = self.list_models(context).await.unwrap_or_default();
            names.extend(models.iter().map(entry));
        }
        names.into_values().collect()
    }

    /// Returns all upstreams, except engines that turned out to be this gateway itself.
    fn without_self(&self) -> Vec<Arc<dyn Upstream>> {
        selection::without_self(&self.upstreams.borrow())
    }
}

/// Applies the membership's current snapshot. Returns the upstreams, and a future that applies later snapshots.
fn follow_membership(
    membership: Membership,
    connect: impl Fn(&EngineSpec) -> Arc<dyn Upstream> + Send + 'static,
) -> (
    watch::Receiver<Upstreams>,
    impl Future<Output = ()> + Send + 'static,
) {
    let mut members = Members::new(connect);
    let mut snapshots = membership.into_stream();
    let first = snapshots.next().now_or_never().flatten();
    let (sender, upstreams) = watch::channel(members.apply(first.unwrap_or_default()));
    let following = async move {
        while let Some(snapshot) = snapshots.next().await {
            sender.send_replace(members.apply(snapshot));
        }
    };
    (upstreams, following)
}

/// Waits for the next change of a watched value. Never completes if the sender is gone.
async fn next_change<T>(watch: &mut watch::Receiver<T>) {
    if watch.changed().await.is_err() {
        std::future::pending().await
    }
}

fn no_engine_failure() -> Failure {
    Error::from(&Status::unavailable("there is no engine")).into()
}
