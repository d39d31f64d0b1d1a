//! The upstreams that can complete requests, and the choice of an upstream for each request. There is either one
//! engine in this process or a changing list of remote engines. This module must not know how tokens are generated.
//!
//! Health checks only influence the choice. A failure of the chosen engine is detected by the request's own stream.

use std::sync::{Arc, Mutex};

use futures_util::stream::FuturesUnordered;
use futures_util::{FutureExt, StreamExt};
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::critical::CriticalTasks;
use crate::error::{Error, ErrorKind};
use crate::keys::TokenNeed;
use crate::proto::v1;
use crate::proto::v1::completion_request::Input;
use crate::proto::v1::inference_server::Inference;
use crate::request::DEFAULT_MAX_TOKENS;
use crate::sequence_proto::check_cache_salt;
use crate::telemetry::Telemetry;
use crate::token_charges::TokenCharges;

mod address;
mod attempts;
mod conflicts;
mod context;
mod events;
mod failure;
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) mod fuzzing;
mod health;
mod ladder;
mod local;
mod member;
mod membership;
mod merged_choices;
mod model_calls;
mod openai;
mod policy;
mod prefixes;
mod prompt_blocks;
mod remote;
mod resilient_events;
mod route;
#[cfg(test)]
pub(crate) mod scripted;
mod selection;
mod silence;
mod spec;
mod stream_times;
mod target_call;
#[cfg(test)]
mod tests;
mod upstream;
mod via;
mod vllm;

pub use address::EngineAddress;
use address::EngineProtocol;
pub(crate) use address::without_secrets;
use attempts::{Attempts, NewRequest};
pub(crate) use conflicts::{EngineConflict, find_conflicts};
pub use context::CallContext;
pub use events::CheckedEvents;
pub use failure::Failure;
pub use health::Availability;
use health::Health;
use ladder::Delivered;
use local::LocalUpstream;
use member::Member;
use membership::Members;
pub use membership::Membership;
use openai::OpenAiUpstream;
use policy::{RetryBudget, expected_prompt_tokens};
use remote::Connector;
use resilient_events::ResilientEvents;
use route::{Route, RoutingTable};
pub use spec::{
    ApiKey, ClusterSpec, EngineSpec, PlacementPolicy, RoutePolicy, RouteSpec, ServerKind,
    TargetSpec,
};
pub use upstream::BoxedEventStream;
use upstream::{AddressedCompletion, Upstream};
use via::GatewayId;
pub(crate) use via::Via;
use vllm::VllmUpstream;

/// The upstreams that can complete requests. Clones share the upstreams.
#[derive(Clone)]
pub struct Cluster {
    table: watch::Receiver<Arc<RoutingTable>>,
    /// `None` if the engine is in this process.
    remote: Option<RemoteParts>,
}

/// Parts of a cluster of remote engines.
#[derive(Clone)]
struct RemoteParts {
    /// Identifies this gateway in requests to remote engines.
    gateway: GatewayId,
    budget: Arc<Mutex<RetryBudget>>,
}

impl Cluster {
    /// Creates a cluster with the engine in this process. Its gRPC service is called directly, without a socket and
    /// without encoding messages.
    #[must_use]
    pub(crate) fn local(service: impl Inference, telemetry: &Telemetry) -> Self {
        let upstream = Arc::new(LocalUpstream::new(service));
        let member = Member::new(&"local".into(), upstream, telemetry);
        let table = RoutingTable::new(
            vec![Arc::new(member)],
            Vec::new(),
            PlacementPolicy::LeastLoad,
            &RoutingTable::default(),
        );
        Self {
            table: watch::channel(Arc::new(table)).1,
            remote: None,
        }
    }

    /// Creates a cluster of remote engines. Engines may start later. If the membership already has a snapshot, it is
    /// applied before this returns.
    ///
    /// Critical tasks follow the membership and watch the engines' health until `stop` is cancelled.
    #[must_use]
    pub fn remote(
        membership: Membership,
        telemetry: &Telemetry,
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
                EngineProtocol::Tokenway => Arc::new(connector.connect(engine)),
                EngineProtocol::OpenAi(base_url) => {
                    let (critical, stop) = (&connector.critical, &connector.stop);
                    let base_url = base_url.clone();
                    Arc::new(OpenAiUpstream::connect(engine, base_url, critical, stop))
                }
                EngineProtocol::Vllm(url) => {
                    let (critical, stop) = (&connector.critical, &connector.stop);
                    Arc::new(VllmUpstream::connect(engine, url.clone(), critical, stop))
                }
            }
        };
        let (table, following) = follow_membership(membership, Members::new(connect, telemetry));
        let stop = stop.clone();
        critical.spawn("membership", async move {
            stop.run_until_cancelled_owned(following).await;
        });
        Self::with_table(table, gateway)
    }

    fn with_table(table: watch::Receiver<Arc<RoutingTable>>, gateway: GatewayId) -> Self {
        Self {
            table,
            remote: Some(RemoteParts {
                gateway,
                budget: Arc::new(Mutex::new(RetryBudget::new(Instant::now()))),
            }),
        }
    }

    /// Returns true unless every upstream is known to be unavailable.
    #[must_use]
    pub(crate) fn is_up(&self) -> bool {
        let table = self.table.borrow();
        table.members.iter().any(|member| member.is_up())
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
        let mut table = self.table.clone();
        loop {
            let current = Arc::clone(&table.borrow_and_update());
            let watches = current
                .members
                .iter()
                .map(|it| it.upstream.health().clone());
            let mut watches: Vec<_> = watches.collect();
            let mut any = false;
            for watch in &mut watches {
                any |= holds(&watch.borrow_and_update());
            }
            if any == expected {
                return;
            }
            let mut changes: FuturesUnordered<_> = watches.iter_mut().map(next_change).collect();
            tokio::select! {
                () = next_change(&mut table) => {}
                Some(()) = changes.next() => {}
            }
        }
    }

    /// Returns true if a request to this model may have fields that Tokenway does not know.
    pub(crate) fn takes_extra_fields(&self, model: &str) -> bool {
        let route = self.table.borrow().route(model, &self.members());
        route.is_some_and(|route| route.takes_extra_fields())
    }

    /// Starts a completion on an upstream that admits it. Skips upstreams that cannot accept the request now, and
    /// those that do not support one of its parameters. On remote engines, a completion goes on with another request
    /// when its stream breaks.
    ///
    /// # Errors
    /// Returns the most informative failure of the upstreams that were tried.
    pub async fn complete(
        &self,
        message: v1::CompletionRequest,
        context: &CallContext,
    ) -> Result<CheckedEvents, Failure> {
        let route = self.find_route(&message.model, context).await?;
        let Some(remote) = &self.remote else {
            return complete_locally(&route, message, context).await;
        };
        let mut message = message;
        if !matches!(message.input, Some(Input::Chat(_))) {
            // The limit of the whole completion, also after a resumption.
            message.max_tokens.get_or_insert(DEFAULT_MAX_TOKENS);
        }
        // The number of prompt tokens is not known yet, and is estimated.
        let max_tokens = u64::from(message.max_tokens.unwrap_or(DEFAULT_MAX_TOKENS));
        let choices = u64::from(message.n.unwrap_or(1));
        let resumed = message.resume.iter().map(|it| it.token_ids.len());
        let resumed = u64::try_from(resumed.sum::<usize>()).unwrap_or(u64::MAX);
        let reservation = context.request.reserve_tokens(TokenNeed {
            prompt: expected_prompt_tokens(&message)
                .max(1)
                .saturating_add(resumed),
            completion: max_tokens.saturating_mul(choices),
            is_open_ended: message.max_tokens.is_none(),
        })?;
        // The engine cannot check this length, because it gets a hash if callers are isolated.
        check_cache_salt(&message.cache_salt).map_err(Error::from)?;
        message.cache_salt = context
            .request
            .cache_salt(&message.user, &message.cache_salt);
        let prefixes = self.table.borrow().prefixes.clone();
        let prefixes = prefixes.filter(|_| route.has_equal_targets());
        let prefix = prefixes.map(|prefixes| prefixes.prompt(&message));
        let message = Arc::new(message);
        let mut delivered = Delivered::at_start(&message);
        let mut attempts = Attempts::new(NewRequest {
            route: Arc::clone(&route),
            message: Arc::clone(&message),
            context: context.clone(),
            gateway: remote.gateway.clone(),
            budget: Arc::clone(&remote.budget),
            prefix,
        });
        match attempts.open(&mut delivered).await {
            Ok(stream) => {
                let events = ResilientEvents::new(stream, attempts, delivered);
                Ok(CheckedEvents::resilient(
                    events,
                    reservation.map(|it| TokenCharges::new(it, resumed)),
                ))
            }
            Err(failure) if failure.error().kind == ErrorKind::ModelNotFound => {
                let model = &message.model;
                Err(self
                    .model_not_found_failure(model, &route, failure, context)
                    .await)
            }
            Err(failure) => Err(failure),
        }
    }

    /// Rejects a request that has already passed through this gateway.
    fn reject_loop(&self, context: &CallContext) -> Result<(), Failure> {
        match self.gateway() {
            Some(gateway) if context.via.contains(gateway) => {
                Err(Failure::loop_detected(gateway.loop_detected_status()))
            }
            Some(_) | None => Ok(()),
        }
    }

    fn gateway(&self) -> Option<&GatewayId> {
        self.remote.as_ref().map(|remote| &remote.gateway)
    }

    /// Returns all members, except engines that turned out to be this gateway itself.
    fn members(&self) -> Vec<Arc<Member>> {
        selection::without_self(&self.table.borrow().members)
    }

    /// Finds the route of a model, and reports the model to the request's record.
    async fn find_route(&self, model: &str, context: &CallContext) -> Result<Arc<Route>, Failure> {
        self.reject_loop(context)?;
        let record = context.request.record();
        record.set_requested_model(model);
        if model.is_empty() {
            self.check_model_is_unambiguous(context).await?;
        }
        let route = self.table.borrow().route(model, &self.members());
        // The engine in this process checks the key itself.
        if self.remote.is_some() {
            let served = route.as_ref().and_then(|route| route.served_name());
            // The key is checked first: the error for an unknown model lists all models.
            context.request.check_model(model, served.as_deref())?;
            if let Some(served) = served {
                record.set_model(&served);
            }
        }
        let unknown = || {
            context
                .request
                .hide_models(self.unknown_route_error(model), model)
        };
        route.ok_or_else(|| unknown().into())
    }
}

/// Starts a completion on the engine in this process.
async fn complete_locally(
    route: &Route,
    message: v1::CompletionRequest,
    context: &CallContext,
) -> Result<CheckedEvents, Failure> {
    let checks = events::UpstreamChecks::new(&message);
    let request = context.build_request(AddressedCompletion::unchanged(message), None);
    let Some(target) = route.targets.first() else {
        return Err(no_engine_failure());
    };
    let events = target.member.upstream.complete(request).await?;
    Ok(CheckedEvents::checked(events, checks))
}

/// Applies the membership's current snapshot. Returns the routing table, and a future that applies later snapshots.
fn follow_membership<C>(
    membership: Membership,
    mut members: Members<C>,
) -> (
    watch::Receiver<Arc<RoutingTable>>,
    impl Future<Output = ()> + Send + 'static,
)
where
    C: Fn(&EngineSpec) -> Arc<dyn Upstream> + Send + 'static,
{
    let mut snapshots = membership.into_stream();
    let first = snapshots.next().now_or_never().flatten();
    let (sender, table) = watch::channel(members.apply(first.unwrap_or_default()));
    let following = async move {
        while let Some(snapshot) = snapshots.next().await {
            sender.send_replace(members.apply(snapshot));
        }
    };
    (table, following)
}

/// Waits for the next change of a watched value. Never completes if the sender is gone.
async fn next_change<T>(watch: &mut watch::Receiver<T>) {
    if watch.changed().await.is_err() {
        std::future::pending().await
    }
}

fn no_engine_failure() -> Failure {
    Error::new(ErrorKind::NoWorker, "There is no engine.").into()
}
