//! Routes: the targets that can serve a model, and the queue in front of them.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use futures_util::future::select_all;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::Instant;

use super::member::Member;
use super::policy::{TargetView, WeightedLoad};
use super::prefixes::Prefixes;
use super::selection::has_name;
use super::spec::{PlacementPolicy, RoutePolicy, RouteSpec, TargetSpec};
use crate::error::{Error, ErrorKind};
use crate::proto::v1;
use crate::request::Parameter;
use crate::telemetry::GaugeGuard;

/// The engines of a cluster and the routes to them, at one moment.
#[derive(Default)]
pub(super) struct RoutingTable {
    pub(super) members: Vec<Arc<Member>>,
    /// Routes by the name of their model. Empty if every engine's models are served under their own names.
    pub(super) routes: HashMap<String, Arc<Route>>,
    /// Memory of the prompts that were sent to the engines. `None` if requests are placed by load alone.
    pub(super) prefixes: Option<Prefixes>,
}

/// The targets of one model.
pub(super) struct Route {
    pub(super) spec: RouteSpec,
    pub(super) targets: Vec<Target>,
    /// Number of requests that wait for a target.
    waiting: Arc<AtomicU32>,
}

/// Limit of the queue in front of the targets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum QueueLimit {
    /// At most as many requests wait as the route allows.
    Depth,
    /// A completion that an engine has started already waits in any case.
    None,
}

/// A model of an engine.
#[derive(Clone)]
pub(super) struct Target {
    pub(super) member: Arc<Member>,
    /// Name of the model in requests to the engine.
    pub(super) model: String,
    pub(super) weight: u32,
    /// 0 for the targets of the route, then one number for each fallback.
    pub(super) tier: usize,
    /// Permits of the requests that run at the same time. `None` without a limit.
    permits: Option<Arc<Semaphore>>,
}

impl RoutingTable {
    /// Creates the routes to these engines. Keeps the queues of the routes of `earlier` that have not changed, and its
    /// memory of prompts if its size has not changed.
    pub(super) fn new(
        members: Vec<Arc<Member>>,
        specs: Vec<RouteSpec>,
        placement: PlacementPolicy,
        earlier: &RoutingTable,
    ) -> Self {
        let routes = specs.into_iter().map(|spec| {
            let model = spec.model.clone();
            let kept = earlier.routes.get(&model);
            let same = kept.filter(|route| route.spec == spec && route.uses(&members));
            let route = same.map_or_else(
                || Arc::new(Route::new(spec, &members, kept.map(Arc::as_ref))),
                Arc::clone,
            );
            (model, route)
        });
        Self {
            routes: routes.collect(),
            members,
            prefixes: Prefixes::for_placement(placement, earlier.prefixes.as_ref()),
        }
    }

    /// Returns the route of a model. Without routes, the targets are all engines: first those that list the model's
    /// name, then those that list it as an alias, then all others, because an engine with `--any-model` accepts models
    /// that it does not list. Returns `None` if the routes have no such model.
    pub(super) fn route(&self, model: &str, members: &[Arc<Member>]) -> Option<Arc<Route>> {
        if self.routes.is_empty() {
            return Some(Arc::new(Route::to_all(model, members)));
        }
        if model.is_empty() && self.routes.len() == 1 {
            return self.routes.values().next().cloned();
        }
        self.routes.get(model).cloned()
    }
}

impl Route {
    /// Creates a route. Requests that run on a target of `earlier` still count for the limit of the same target.
    fn new(spec: RouteSpec, members: &[Arc<Member>], earlier: Option<&Route>) -> Self {
        let tiers = std::iter::repeat_n(0, spec.targets.len()).chain(1..);
        let targets = spec.targets.iter().chain(&spec.fallback).zip(tiers);
        let targets = targets.filter_map(|(target, tier)| {
            let member = members.iter().find(|it| it.name == target.engine)?;
            Some(Target::new(target, tier, member, &spec))
        });
        let mut targets: Vec<_> = targets.collect();
        if let Some(earlier) = earlier
            && earlier.spec.policy.max_concurrency == spec.policy.max_concurrency
        {
            for target in &mut targets {
                target.share_permits(&earlier.targets);
            }
        }
        Self {
            targets,
            spec,
            waiting: Arc::default(),
        }
    }

    /// Creates the route of a model to all engines.
    pub(super) fn to_all(model: &str, members: &[Arc<Member>]) -> Self {
        let target = |member: &Arc<Member>| Target {
            member: Arc::clone(member),
            model: model.to_owned(),
            weight: 1,
            tier: tier_of(member, model),
            permits: None,
        };
        Self {
            targets: members.iter().map(target).collect(),
            spec: RouteSpec {
                model: model.to_owned(),
                targets: Vec::new(),
                fallback: Vec::new(),
                policy: RoutePolicy::default(),
            },
            waiting: Arc::default(),
        }
    }

    /// Returns true if a request may have fields that Tokenway does not know: if a target takes them whose engine lists
    /// the model, or any target if no engine lists it.
    pub(super) fn takes_extra_fields(&self) -> bool {
        let is_listed = |target: &&Target| target.listed_model().is_some();
        let takes = |target: &Target| {
            let unsupported = target.member.upstream.unsupported();
            !unsupported.contains(&Parameter::ExtraFields)
        };
        let mut listed = self.targets.iter().filter(is_listed).peekable();
        match listed.peek() {
            Some(_) => listed.any(takes),
            None => self.targets.iter().any(takes),
        }
    }

    /// Returns true if at least two targets have the same tier, so that there is a choice between them.
    pub(super) fn has_equal_targets(&self) -> bool {
        let targets = self.targets.iter().enumerate();
        let mut pairs = targets.flat_map(|(at, one)| {
            let others = self.targets[at + 1..].iter();
            others.map(move |other| (one.tier, other.tier))
        });
        pairs.any(|(one, other)| one == other)
    }

    /// Returns true if the targets' engines are among these.
    fn uses(&self, members: &[Arc<Member>]) -> bool {
        let is_member = |target: &Target| members.iter().any(|it| Arc::ptr_eq(it, &target.member));
        self.targets.iter().all(is_member)
    }

    /// Returns the state of the targets, for a decision.
    pub(super) fn views(&self, now: Instant) -> Vec<TargetView> {
        self.targets.iter().map(|target| target.view(now)).collect()
    }

    /// Waits until the target or another one of its tier may run one more request. Returns the target, and the permit
    /// to hold while the request runs.
    ///
    /// # Errors
    /// Returns `queue_full` if too many requests wait already.
    pub(super) async fn acquire(
        &self,
        target: usize,
        limit: QueueLimit,
    ) -> Result<(usize, Option<OwnedSemaphorePermit>), Error> {
        let Some(permits) = &self.targets[target].permits else {
            return Ok((target, None));
        };
        if let Ok(permit) = Arc::clone(permits).try_acquire_owned() {
            return Ok((target, Some(permit)));
        }
        let member = &self.targets[target].member;
        let depth = match limit {
            QueueLimit::Depth => self.spec.policy.queue_depth,
            QueueLimit::None => u32::MAX,
        };
        let _waiting = Waiting::start(&self.waiting, depth, member)?;
        let tier = self.targets[target].tier;
        let now = Instant::now();
        let others = self.targets.iter().enumerate().filter(|(at, other)| {
            let is_usable = other.member.is_up() && other.member.blocked_until(now).is_none();
            *at == target || other.tier == tier && is_usable
        });
        let waits = others.filter_map(|(at, other)| {
            let permits = Arc::clone(other.permits.as_ref()?);
            Some(Box::pin(async move { (at, permits.acquire_owned().await) }))
        });
        let ((at, permit), ..) = select_all(waits).await;
        Ok((at, Some(permit.expect("the semaphore is never closed"))))
    }
}

impl Target {
    fn new(spec: &TargetSpec, tier: usize, member: &Arc<Member>, route: &RouteSpec) -> Self {
        let limit = route.policy.max_concurrency;
        let permits = limit.map(|limit| usize::try_from(limit).unwrap_or(Semaphore::MAX_PERMITS));
        Self {
            member: Arc::clone(member),
            model: spec.model.as_ref().unwrap_or(&route.model).clone(),
            weight: spec.weight,
            tier,
            permits: permits.map(|permits| Arc::new(Semaphore::new(permits))),
        }
    }

    /// Takes over the permits of the same target in an earlier route.
    fn share_permits(&mut self, earlier: &[Target]) {
        let is_same =
            |it: &&Target| Arc::ptr_eq(&it.member, &self.member) && it.model == self.model;
        if let Some(earlier) = earlier.iter().find(is_same) {
            self.permits.clone_from(&earlier.permits);
        }
    }

    /// Returns the name under which the engine lists the target's model. It is the name in requests if the engine lists
    /// no such model.
    pub(super) fn served_model(&self) -> String {
        self.listed_model()
            .map_or_else(|| self.model.clone(), |model| model.name)
    }

    /// Returns the engine's description of the target's model, if the engine lists it.
    pub(super) fn listed_model(&self) -> Option<v1::Model> {
        let health = self.member.upstream.health().borrow();
        let is_model = |it: &&v1::Model| has_name(it, &self.model);
        let only = (self.model.is_empty() && health.models.len() == 1).then(|| &health.models[0]);
        health.models.iter().find(is_model).or(only).cloned()
    }

    fn view(&self, now: Instant) -> TargetView {
        TargetView {
            tier: self.tier,
            is_down: !self.member.is_up(),
            blocked_until: self.member.blocked_until(now),
            is_busy: self.member.is_busy(now),
            is_saturated: self.is_saturated(),
            has_recent_fault: self.member.has_recent_fault(now),
            load: WeightedLoad {
                tokens: self.member.load.get(),
                weight: self.weight,
            },
            warm_tokens: 0,
        }
    }

    fn is_saturated(&self) -> bool {
        let permits = self.permits.as_ref();
        permits.is_some_and(|permits| permits.available_permits() == 0)
    }
}

/// Returns how well an engine matches a model without a route: 0 if it lists the name, 1 if it lists it as an alias.
fn tier_of(member: &Member, model: &str) -> usize {
    let health = member.upstream.health().borrow();
    if model.is_empty() || health.models.iter().any(|it| it.name == model) {
        0
    } else if health.models.iter().any(|it| has_name(it, model)) {
        1
    } else {
        2
    }
}

/// Counts a request that waits for a target until it is dropped.
struct Waiting {
    waiting: Arc<AtomicU32>,
    _queued: GaugeGuard,
}

impl Waiting {
    fn start(waiting: &Arc<AtomicU32>, limit: u32, member: &Member) -> Result<Self, Error> {
        let guard = Self {
            waiting: Arc::clone(waiting),
            _queued: member.count_queued_request(),
        };
        if waiting.fetch_add(1, Ordering::Relaxed) >= limit {
            let message = format!("The queue of the route is full ({limit} requests wait).");
            return Err(Error::new(ErrorKind::QueueFull, message));
        }
        Ok(guard)
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        self.waiting.fetch_sub(1, Ordering::Relaxed);
    }
}
